"""Panels for looking inside a router, token by token, in a notebook; each also has a still twin (`panel.still()`).

    TokenExplorer(model, tokenizer, "Once upon a time")         # choose a layer, click a token, follow it
    TrainingPlayback(snapshots, tokenizer)                      # how it came about: a slider over the snapshots
    WhatIf(model, tokenizer, "Once upon a time", probe)         # other k, other temperature, experts knocked out
    CompareRouting(before, after, tokenizer, "Once upon ...")   # two models on the same text

Models are `DecoderLM`s or transformers MoEs; tokenizers are those of the tokenizers library or of transformers.
Shapes: N tokens, L MoE layers, E experts, K experts per token, B windows, T tokens of a window.
"""

from collections.abc import Mapping, Sequence

import ipywidgets as W
import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from ..routing.metrics import domain_specialization, router_saturation
from ..routing.snapshots import RoutingSnapshots
from ..routing.trace import RoutingTrace
from ..routing.typed_text import route_text, token_texts, twin
from .experts import heat_map, plot_expert_matrix
from .panel import Panel, Strip, View, text_inputs, wide
from .style import MEASURE, expert_colour, visible


def strip_of(
    trace: RoutingTrace, texts: Sequence[str], layer: int, expert: int | None = None, title: str = ""
) -> Strip:
    """The tokens coloured by the expert that each prefers in `layer`, or by the probability of one `expert`."""
    probabilities_NE = trace.probabilities[_at(trace, layer)].tolist()
    chosen_NK = _best_first(trace)[_at(trace, layer)].tolist()
    if expert is None:
        notes = [str(experts[0]) for experts in chosen_NK]
        colours = [expert_colour(experts[0]) for experts in chosen_NK]
        legend = f"colour and number: the expert that weighs most in layer {layer}"
    else:
        notes = [f"{100 * row[expert]:.0f}" for row in probabilities_NE]
        colours = [to_hex(matplotlib.colormaps[MEASURE](row[expert])) for row in probabilities_NE]
        legend = f"colour and number: probability of expert {expert} in layer {layer}, in %"
    return Strip(title, legend, texts, colours, notes, probabilities_NE, chosen_NK)


def _at(trace: RoutingTrace, layer: int) -> int:
    if layer not in trace.layers:
        raise ValueError(f"layer {layer} has no experts; those with experts are {', '.join(map(str, trace.layers))}")
    return trace.layers.index(layer)


def _best_first(trace: RoutingTrace) -> Tensor:
    """expert_ids_LNK in the order of the combine weights; some routers leave them in another."""
    return trace.expert_ids.gather(-1, trace.weights.argsort(dim=-1, descending=True, stable=True))


def render_tokens(
    traces: Sequence[RoutingTrace], texts: Sequence[str], layer: int, token: int, expert: int | None = None,
    names: Sequence[str] = ("",),
) -> View:  # fmt: skip
    """The view of `TokenExplorer` and `CompareRouting`: a strip for each trace, one token's way through all layers."""
    strips = [strip_of(trace, texts, layer, expert, name) for trace, name in zip(traces, names)]
    ways = [_way(trace, token) for trace in traces]
    said = f"Token {token} “{visible(texts[token])}” goes to " + "; ".join(
        f"{name}: {way}" if name else way for name, way in zip(names, ways)
    )
    if len(traces) == 2:
        first_N, second_N = (_best_first(trace)[_at(trace, layer), :, 0] for trace in traces)
        share = float((first_N == second_N).float().mean())
        said += f". In layer {layer} both prefer the same expert for {100 * share:.0f} % of the tokens"
    return View(said + ".", way_figure(traces, token, visible(texts[token]), names), strips, token)


def _way(trace: RoutingTrace, token: int) -> str:
    parts = []
    for layer, ids_NK, weights_NK in zip(trace.layers, trace.expert_ids, trace.weights):
        order = weights_NK[token].argsort(descending=True)
        experts = ", ".join(f"{int(ids_NK[token, k])} ({100 * float(weights_NK[token, k]):.0f} %)" for k in order)
        parts.append(f"layer {layer}: expert{'s' if len(order) > 1 else ''} {experts}")
    return "; ".join(parts[:8]) + ("; …" if len(parts) > 8 else "")


def way_figure(traces: Sequence[RoutingTrace], token: int, text: str, names: Sequence[str] = ("",)) -> Figure:
    """One token's probabilities of all experts, a row for each layer (and trace); the chosen experts are framed."""
    places = [
        (trace, i, name)
        for i in range(max(len(trace.layers) for trace in traces))
        for trace, name in zip(traces, names)
        if i < len(trace.layers)
    ]
    share_RE = np.full((len(places), max(trace.num_experts for trace in traces)), np.nan)
    chosen_RE = np.zeros(share_RE.shape, dtype=bool)
    for row, (trace, i, _) in enumerate(places):
        share_RE[row, : trace.num_experts] = trace.probabilities[i, token]
        chosen_RE[row, trace.expert_ids[i, token]] = True
    top = max(float(trace.probabilities.max()) for trace in traces)  # the same for every token: colours can be compared
    rows = [f"{name} layer {trace.layers[i]}".strip() for trace, i, name in places]
    title = f"token {token} “{text}” on its way through the layers"
    look = {"scale": (0, top), "framed_RE": chosen_RE}
    return heat_map(share_RE, rows, "router's probability", "expert (framed: chosen)", title=title, **look)


class _TokenPanel(Panel):
    """Strips of one text, routed by one or two models; a layer, and a token that is followed."""

    def __init__(
        self, models: Sequence, names: Sequence[str], tokenizer, text: str, examples: Mapping | None, max_tokens: int
    ):
        self._names, self._tokenizer, self._max_tokens = names, tokenizer, max_tokens
        self._models, self._shown = [twin(model) for model in models], None
        inputs = text_inputs(text, examples)
        controls = dict(layer=_number(), colour=W.Dropdown(layout=wide(290)), token=W.IntSlider(layout=wide(420)))
        super().__init__(strips=len(models), **inputs, **controls)
        self._start(inputs.values(), controls.values())

    def _follow(self, change) -> None:
        super()._follow(change)
        if self.text.value == self._shown:
            return
        routed = [route_text(model, self._tokenizer, self.text.value, self._max_tokens) for model in self._models]
        traces, self._texts = [trace for trace, _ in routed], routed[0][1]
        layers = [layer for layer in traces[0].layers if layer in traces[-1].layers]
        if not layers:
            raise ValueError("the two have no MoE layer in common")
        if self._shown is None:
            _number(layers, self.layer)
            one_by_one = range(min(trace.num_experts for trace in traces))
            probabilities = [(f"probability of expert {expert}", expert) for expert in one_by_one]
            self.colour.options = [("the preferred expert", None), *probabilities]
            self.colour.index = 0
        self._traces, self._shown = traces, self.text.value
        self.token.max = len(self._texts) - 1

    def view(self) -> View:
        shown = (self.layer.value, self.token.value, self.colour.value)
        return render_tokens(self._traces, self._texts, *shown, self._names)


def _number(layers: Sequence[int] = (0,), number: W.BoundedIntText | None = None) -> W.BoundedIntText:
    """A number among `layers`, not a list to choose from: JupyterLab takes the arrow keys away from lists."""
    number = number or W.BoundedIntText(description="layer", layout=wide(120))
    number.max, number.value, number.min = max(layers), min(layers), min(layers)
    return number


class TokenExplorer(_TokenPanel):
    """One text's tokens in the colours of their experts; hover shows all probabilities, a click follows a token.

    `model` routes any text that is typed or chosen (`examples`: {name: text}). Controls: example, text, layer, colour,
    token. Raises ValueError for a dense model and for a text that does not fit the model or `max_tokens`.
    """

    def __init__(self, model, tokenizer, text: str = "", *, examples=None, max_tokens: int = 256):
        super().__init__([model], [""], tokenizer, text, examples, max_tokens)


class CompareRouting(_TokenPanel):
    """The same text in two models.

    `names` are what the two are called. Controls, options and errors are those of `TokenExplorer`.
    """

    def __init__(self, a, b, tokenizer, text: str = "", *, names=("a", "b"), examples=None, max_tokens: int = 256):
        super().__init__([a, b], list(names), tokenizer, text, examples, max_tokens)


def render_playback(
    snapshots: RoutingSnapshots, texts: Sequence[str], moment: int, layer: int, window: int, token: int
) -> View:
    """The view of `TrainingPlayback`: snapshot number `moment`; one window's tokens, and every label's experts.

    `texts` are those of the window's tokens.
    """
    trace, step = snapshots.trace(moment), int(snapshots.steps[moment])
    at, even = _at(trace, layer), trace.top_k / trace.num_experts
    domains = snapshots.domains
    share_SCE = domain_specialization(snapshots.expert_ids[:, at], snapshots.labels, trace.num_experts, len(domains))
    title = f"layer {layer} after {step:,} updates"
    figure = plot_expert_matrix(share_SCE[moment], domains, null=even, vmax=float(share_SCE.max()), title=title)
    saturation = float(router_saturation(trace.expert_ids[at], snapshots.expert_ids[-1, at]))
    shown = trace.select(snapshots.sequence == window)
    said = (
        f"After {step:,} updates layer {layer} makes {100 * saturation:.0f} % of its final choices (by chance: "
        f"{100 * even:.0f} %). Token {token} “{visible(texts[token])}” goes to {_way(shown, token)}."
    )
    return View(said, figure, [strip_of(shown, texts, layer)], token)


class TrainingPlayback(Panel):
    """How the routing of a fixed probe came about: a slider, and a play button, over `RoutingSnapshots`.

    Controls: moment (its values are optimizer updates), layer, window (of the probe), token. Raises ValueError where
    there are no snapshots.
    """

    def __init__(self, snapshots: RoutingSnapshots, tokenizer):
        if len(snapshots) == 0:
            raise ValueError("there are no snapshots yet; pass this RoutingSnapshots to train(callbacks=[...]) first")
        self._snapshots, self._tokenizer = snapshots, tokenizer
        steps = [(f"{step:,}", step) for step in snapshots.steps.tolist()]
        names = [(f"{i}: {name}", i) for i, name in enumerate(snapshots.window_labels)]
        super().__init__(
            strips=1,
            moment=W.SelectionSlider(description="updates", options=steps, layout=wide(520)),
            layer=_number(snapshots.layers),
            window=W.Dropdown(options=names, layout=wide(290)),
            token=W.IntSlider(max=snapshots.probe_BT.shape[1] - 1, layout=wide(420)),
        )
        play = W.Play(max=len(snapshots) - 1, interval=500).add_class("upcycling-play")
        W.jslink((play, "value"), (self.moment, "index"))
        self._start([play, self.moment], [self.layer, self.window, self.token])

    def _follow(self, change) -> None:
        super()._follow(change)
        if change is None or change["owner"] is self.window:
            self._texts = token_texts(self._tokenizer, self._snapshots.probe_BT[self.window.value].tolist())

    def view(self) -> View:
        shown = (self.moment.index, self.layer.value, self.window.value, self.token.value)
        return render_playback(self._snapshots, self._texts, *shown)
