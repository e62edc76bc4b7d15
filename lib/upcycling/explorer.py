"""Panels for looking inside a router, token by token, in a notebook; each also has a still twin (`panel.still()`).

    TokenExplorer(model, tokenizer, "Once upon a time")         # choose a layer, click a token, follow it
    TrainingPlayback(snapshots, tokenizer)                      # how it came about: a slider over the snapshots
    WhatIf(model, tokenizer, "Once upon a time", probe)         # other k, other temperature, experts knocked out
    CompareRouting(before, after, tokenizer, "Once upon ...")   # two models, or two moments, on the same text

Models are `DecoderLM`s or transformers MoEs; tokenizers are those of the tokenizers library or of transformers.
Shapes: N tokens, L MoE layers, E experts, K experts per token, B windows, T tokens of a window.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor

from .generation import generate
from .intervention import intervene, token_losses
from .metrics import domain_specialization, router_saturation
from .model import DecoderLM
from .panel import Panel, Strip, View, visible
from .routing import RoutingTrace, record_routing
from .routing_plots import expert_colour, plot_expert_matrix, plot_token_losses
from .tokens import encode_prompt

# ------------------------------------------------------------------------------------------------- text and routing


def encode(tokenizer, text: str) -> list[int]:
    """The ids of `text`, with what the tokenizer puts before a text. Raises ValueError where it cannot encode it."""
    if not text:
        raise ValueError("there is no text; type some, or choose an example")
    try:
        if not hasattr(tokenizer, "encode_batch_fast"):  # transformers'
            return list(tokenizer(text)["input_ids"])
        try:
            return encode_prompt(tokenizer, text)
        except ValueError:  # no token is known to begin a document
            return tokenizer.encode(text).ids
    except (TypeError, UnicodeEncodeError):  # a lone surrogate is no character
        raise ValueError("the text holds half of a surrogate pair, which is no character; delete it") from None


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each id stands for, its leading space included; `[id]` where the tokenizer has no such token."""
    to_token = getattr(tokenizer, "id_to_token", None) or tokenizer.convert_ids_to_tokens
    texts = []
    for i in ids:
        try:
            piece = to_token(int(i))
        except (OverflowError, IndexError):
            piece = None
        text = f"[{i}]" if piece is None else tokenizer.decode([int(i)], skip_special_tokens=False) or piece
        # sentencepiece's mark of a space is lost when a token is decoded alone
        texts.append(" " + text if piece and piece.startswith("▁") and not text.startswith(" ") else text)
    return texts


def route_text(model, tokenizer, text: str, max_tokens: int = 256) -> tuple[RoutingTrace, list[str]]:
    """How `model` routes `text`, and the text of each token.

    Raises ValueError, one sentence, for a text that is empty, cannot be encoded or does not fit.
    """
    ids = encode(tokenizer, text)
    context = _context(model)
    if len(ids) > context:
        raise ValueError(f"the text has {len(ids):,} tokens but the model's context is {context:,}; shorten it")
    if len(ids) > max_tokens:
        raise ValueError(f"the text has {len(ids):,} tokens, this panel shows at most {max_tokens:,}; shorten it")
    _check_ids(model, ids)
    with _evaluating(model), record_routing(model) as trace:
        model(torch.tensor([ids], device=_device(model)))
    return trace, token_texts(tokenizer, ids)


def _check_ids(model, ids: Sequence[int]) -> None:
    size = model.config.vocab_size
    if max(ids) >= size:
        raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {size}; is this its tokenizer?")


def _context(model) -> int:
    config = model.config
    return config.seq_len if isinstance(model, DecoderLM) else getattr(config, "max_position_embeddings", None) or 2**31


def _device(model):
    return next(model.parameters()).device


@contextmanager
def _evaluating(model):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------- tokens and their way through layers


def strip_of(trace, texts: Sequence[str], layer: int, expert: int | None = None, title: str = "") -> Strip:
    """The tokens coloured by the expert that each prefers in `layer`, or by the probability of one `expert`."""
    probabilities_NE = trace.probabilities[trace.layers.index(layer)].tolist()
    chosen_NK = _best_first(trace)[trace.layers.index(layer)].tolist()
    if expert is None:
        colours = [expert_colour(experts[0]) for experts in chosen_NK]
        notes = [str(experts[0]) for experts in chosen_NK]
        legend = f"colour and number: the expert that weighs most in layer {layer}"
    else:
        import matplotlib
        from matplotlib.colors import to_hex

        shares = [row[expert] for row in probabilities_NE]
        colours = [to_hex(colour) for colour in matplotlib.colormaps["magma_r"](shares)]
        notes = [f"{100 * share:.0f}" for share in shares]
        legend = f"colour and number: probability of expert {expert} in layer {layer}, in %"
    return Strip(title, legend, texts, colours, notes, probabilities_NE, chosen_NK)


def _best_first(trace: RoutingTrace) -> Tensor:
    """expert_ids_LNK in the order of the combine weights; some routers leave them in another."""
    return trace.expert_ids.gather(-1, trace.weights.argsort(dim=-1, descending=True, stable=True))


def render_tokens(
    traces: Sequence[RoutingTrace],
    texts: Sequence[str],
    layer: int,
    token: int,
    expert: int | None = None,
    names: Sequence[str] = ("",),
) -> View:
    """The view of `TokenExplorer` and `CompareRouting`: a strip for each trace, one token's way through all layers."""
    strips = [strip_of(trace, texts, layer, expert, name) for trace, name in zip(traces, names)]
    ways = [_way(trace, token) for trace in traces]
    said = f"Token {token} “{visible(texts[token])}” goes to " + "; ".join(
        f"{name}: {way}" if name else way for name, way in zip(names, ways)
    )
    if len(traces) == 2:
        first_N, second_N = (_best_first(trace)[trace.layers.index(layer), :, 0] for trace in traces)
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


def way_figure(traces: Sequence[RoutingTrace], token: int, text: str, names: Sequence[str] = ("",)):
    """One token's probabilities of all experts, a row for each layer (and trace); the chosen experts are framed."""
    experts = max(trace.num_experts for trace in traces)
    rows, labels, framed = [], [], []
    for i in range(max(len(trace.layers) for trace in traces)):
        for trace, name in zip(traces, names):
            if i < len(trace.layers):
                row_E = np.full(experts, np.nan)
                row_E[: trace.num_experts] = trace.probabilities[i, token]
                chosen_E = np.isin(np.arange(experts), trace.expert_ids[i, token])
                rows.append(row_E)
                framed.append(np.where(chosen_E, -1.0, 2.0))  # below and above every probability
                labels.append(f"{name} layer {trace.layers[i]}".strip())
    figure = plot_expert_matrix(
        np.stack(rows), labels, null=np.stack(framed), spread=0.0, kind="", vmax=1, quantity="router's probability",
        title=f"token {token} “{text}” on its way through the layers",
    )  # fmt: skip
    figure.axes[0].set_xlabel("expert (framed: chosen)")
    return figure


class _TokenPanel(Panel):
    """Strips of one text, routed by one or two models, or recorded; a layer, and a token that is followed."""

    def __init__(self, sources, names, tokenizer, text, examples, max_tokens):
        self._sources, self._names, self._tokenizer, self._max_tokens = sources, names, tokenizer, max_tokens
        self._recorded, self._shown = isinstance(sources[0], RoutingTrace), None
        if self._recorded:
            sequences = sorted(set(sources[0].sequence.tolist()))
            inputs = {"sequence": W.Dropdown(description="sequence", options=sequences)}
        else:
            inputs = _text_inputs(text, examples)
        super().__init__(
            strips=len(sources),
            **inputs,
            layer=W.Dropdown(description="layer", layout=_wide(160)),
            colour=W.Dropdown(description="colour", layout=_wide(290)),
            token=W.IntSlider(description="token", layout=_wide(420)),
        )
        self._start(inputs.values(), [self.layer, self.colour, self.token])

    def _follow(self, change) -> None:
        owner = change and change["owner"]
        for strip in self.strips:
            if owner is strip.buttons:
                self.token.value = change["new"]
        if not self._recorded:
            _follow_example(self, owner)
        wanted = self.sequence.value if self._recorded else self.text.value
        if wanted == self._shown:
            return
        traces, self._texts = self._read()
        layers = [layer for layer in traces[0].layers if layer in traces[-1].layers]
        if not layers:
            raise ValueError("the two have no MoE layer in common")
        if self._shown is None:
            experts = min(trace.num_experts for trace in traces)
            self.layer.options = layers
            self.colour.options = [("the preferred expert", None)] + [
                (f"probability of expert {expert}", expert) for expert in range(experts)
            ]
            self.layer.index = self.colour.index = 0
        self._traces, self._shown = traces, wanted
        self.token.max = len(self._texts) - 1

    def _read(self) -> tuple[list[RoutingTrace], list[str]]:
        if self._recorded:
            traces = [source.select(source.sequence == self.sequence.value) for source in self._sources]
            if len(traces) == 2 and not torch.equal(traces[0].tokens, traces[1].tokens):
                raise ValueError("the two traces are not of the same text; record both on the same tokens")
            if len(traces[0]) > self._max_tokens:
                traces = [trace.select(torch.arange(self._max_tokens)) for trace in traces]
            return traces, token_texts(self._tokenizer, traces[0].tokens.tolist())
        routed = [route_text(model, self._tokenizer, self.text.value, self._max_tokens) for model in self._sources]
        return [trace for trace, _ in routed], routed[0][1]

    def view(self) -> View:
        return render_tokens(
            self._traces, self._texts, self.layer.value, self.token.value, self.colour.value, self._names
        )


def _text_inputs(text: str, examples: Mapping[str, str] | None) -> dict[str, W.Widget]:
    examples = dict(examples or {})
    if not text and examples:
        text = next(iter(examples.values()))
    chosen = next((name for name, example in examples.items() if example == text), None)
    inputs = {"example": W.Dropdown(description="example", options=examples, label=chosen)} if examples else {}
    return inputs | {"text": W.Textarea(text, description="text", layout=W.Layout(width="520px", height="56px"))}


def _follow_example(panel, owner) -> None:
    """Choosing an example types it; typing something else chooses none."""
    if "example" not in panel.controls:
        return
    if owner is panel.example and panel.example.value is not None:
        panel.text.value = panel.example.value
    elif owner is panel.text and panel.text.value != panel.example.value:
        panel.example.value = None


def _wide(pixels: int) -> W.Layout:
    return W.Layout(width=f"{pixels}px")


class TokenExplorer(_TokenPanel):
    """One text's tokens in the colours of their experts; hover shows all probabilities, a click follows a token.

    `source` is a model, which then routes any text that is typed or chosen (`examples`: {name: text}), or a
    `RoutingTrace`, whose sequences can be chosen. Controls: example, text (or sequence), layer, colour, token.
    Raises ValueError for a dense model and for a text that does not fit the model or `max_tokens`.
    """

    def __init__(self, source, tokenizer, text: str = "", *, examples=None, max_tokens: int = 256):
        super().__init__([source], [""], tokenizer, text, examples, max_tokens)


class CompareRouting(_TokenPanel):
    """The same text in two models, or in two `RoutingTrace`s of the same tokens (two moments: `snapshots.trace(i)`).

    `names` are what the two are called. Controls, options and errors are those of `TokenExplorer`.
    """

    def __init__(self, a, b, tokenizer, text: str = "", *, names=("a", "b"), examples=None, max_tokens: int = 256):
        if isinstance(a, RoutingTrace) != isinstance(b, RoutingTrace):
            raise ValueError("give two models or two traces; record_routing makes a trace of a model")
        super().__init__([a, b], list(names), tokenizer, text, examples, max_tokens)


# ------------------------------------------------------------------------------------------------------ over training


def render_playback(snapshots, labels: Sequence[str], texts, moment: int, layer: int, window: int, token: int) -> View:
    """The view of `TrainingPlayback`: snapshot number `moment`; one window's tokens, and every label's experts.

    `labels` name the windows, `texts` are those of the window's tokens.
    """
    trace, step = snapshots.trace(moment), int(snapshots.steps[moment])
    at, even = trace.layers.index(layer), trace.top_k / trace.num_experts
    domains = list(dict.fromkeys(labels))
    labels_N = torch.tensor([domains.index(label) for label in labels])[snapshots.sequence]
    share_SCE = domain_specialization(snapshots.expert_ids[:, at], labels_N, trace.num_experts, len(domains))
    figure = plot_expert_matrix(
        share_SCE[moment],
        domains,
        null=even,
        vmax=float(share_SCE.max()),
        title=f"layer {layer} after {step:,} updates",
    )
    saturation = float(router_saturation(trace.expert_ids[at], snapshots.expert_ids[-1, at]))
    shown = trace.select(snapshots.sequence == window)
    said = (
        f"After {step:,} updates layer {layer} makes {100 * saturation:.0f} % of its final choices (by chance: "
        f"{100 * even:.0f} %). Token {token} “{visible(texts[token])}” goes to {_way(shown, token)}."
    )
    return View(said, figure, [strip_of(shown, texts, layer)], token)


class TrainingPlayback(Panel):
    """How the routing of a fixed probe came about: a slider, and a play button, over `RoutingSnapshots`.

    Controls: moment (its values are optimizer updates), layer, window (of the probe), token. `labels` name the windows,
    in place of the names that the snapshots carry. Raises ValueError where there are no snapshots, or for a number of
    labels that is not that of the windows.
    """

    def __init__(self, snapshots, tokenizer, labels: Sequence[str] | None = None):
        if len(snapshots) == 0:
            raise ValueError("there are no snapshots yet; pass this RoutingSnapshots to train(callbacks=[...]) first")
        windows, length = snapshots.probe_BT.shape
        self._labels = list(labels or snapshots.window_labels)
        if len(self._labels) != windows:
            raise ValueError(f"{len(self._labels)} labels for {windows} windows; give one a window")
        self._snapshots, self._tokenizer = snapshots, tokenizer
        super().__init__(
            strips=1,
            moment=W.SelectionSlider(
                description="updates",
                options=[(f"{step:,}", step) for step in snapshots.steps.tolist()],
                layout=_wide(520),
            ),
            layer=W.Dropdown(description="layer", options=snapshots.layers, layout=_wide(160)),
            window=W.Dropdown(
                description="window", options=[(f"{i}: {x}", i) for i, x in enumerate(self._labels)], layout=_wide(290)
            ),
            token=W.IntSlider(description="token", max=length - 1, layout=_wide(420)),
        )
        play = W.Play(max=len(snapshots) - 1, interval=500)
        W.jslink((play, "value"), (self.moment, "index"))
        self._start([play, self.moment], [self.layer, self.window, self.token])

    def _follow(self, change) -> None:
        if change is None or change["owner"] is self.window:
            self._texts = token_texts(self._tokenizer, self._snapshots.probe_BT[self.window.value].tolist())
        elif change["owner"] is self.strips[0].buttons:
            self.token.value = change["new"]

    def view(self) -> View:
        return render_playback(
            self._snapshots, self._labels, self._texts,
            self.moment.index, self.layer.value, self.window.value, self.token.value,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ what if


@dataclass(frozen=True)
class Outcome:
    """What a model does under some choice of experts: the probe's losses (nats; (B, T) by name), and a continuation."""

    losses: Mapping[str, Tensor]
    continuation: str

    def mean(self, name: str | None = None) -> float:
        """Mean nats per token of one part of the probe, or of all of it."""
        chosen = self.losses.values() if name is None else [self.losses[name]]
        return float(torch.cat([losses_BT.flatten() for losses_BT in chosen]).nanmean())


def measure(model, tokenizer, prompt: str, probe: Mapping[str, tuple], new_tokens: int = 24) -> Outcome:
    """The losses on `probe` and the most probable continuation of `prompt`, by `model` as it is (see `intervene`).

    Raises ValueError for a prompt that is empty, cannot be encoded, or leaves no room for `new_tokens`.
    """
    ids = encode(tokenizer, prompt)
    if len(ids) + new_tokens > _context(model):
        raise ValueError(
            f"the text has {len(ids):,} tokens and {new_tokens} new ones are wanted, but the model's context is "
            f"{_context(model):,}; shorten the text"
        )
    _check_ids(model, ids)
    prompt_BT = torch.tensor([ids], device=_device(model))
    with _evaluating(model):
        if isinstance(model, DecoderLM):
            tokens_BT = generate(model, prompt_BT, new_tokens)
        else:
            tokens_BT = model.generate(
                prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
    # decoded together, since a character may be several tokens, and a token alone may lose its space
    start, whole = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (ids, tokens_BT[0].tolist()))
    continuation = whole[len(start) :]
    return Outcome({name: token_losses(model, *windows) for name, windows in probe.items()}, continuation)


def render_what_if(
    choice: str, prompt: str, trained: Outcome, now: Outcome, window: str, target_texts: Sequence[str]
) -> View:
    """The view of `WhatIf`: what the `choice` (in words) does to losses and continuation.

    `window` is the part of the probe whose first window is drawn, `target_texts` are the tokens predicted there.
    """
    changes = {name: now.mean(name) - trained.mean(name) for name in trained.losses}
    worst = max(changes, key=changes.get)
    change = now.mean() - trained.mean()
    said = f"{choice}: {now.mean():.3f} nats per token, as trained {trained.mean():.3f} ({change:+.3f})"
    said += f"; {worst} changes most ({changes[worst]:+.3f})." if len(changes) > 1 else "."
    rows = "".join(
        f"<tr><th scope=row style='text-align:left'>{html.escape(visible(name))}</th><td>{trained.mean(name):.3f}</td>"
        f"<td>{now.mean(name):.3f}</td><td>{changes[name]:+.3f}</td></tr>"
        for name in trained.losses
    )
    head = "".join(f"<th scope=col>{word}</th>" for word in ("loss (nats per token)", "as trained", "now", "change"))
    both = zip(trained.continuation, now.continuation)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
    texts = "".join(
        f"<p style='margin:4px 0;line-height:1.35;overflow-wrap:anywhere'><b>{name}</b>: {html.escape(visible(prompt))}"
        f"<u>{html.escape(visible(text[:same]))}</u><mark>{html.escape(visible(text[same:]))}</mark></p>"
        for name, text in (("as trained", trained.continuation), ("now", now.continuation))
    )
    words = f"<table style='border-spacing:8px 0'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{texts}"
    figure = plot_token_losses(
        target_texts, (now.losses[window] - trained.losses[window])[0], limit=2.0,
        title=f"change of each token's loss, first window of {window}",
    )  # fmt: skip
    lines = [f"{name}: {trained.mean(name):.3f} -> {now.mean(name):.3f} ({changes[name]:+.3f})" for name in changes]
    lines += [f"as trained: {prompt}{trained.continuation}", f"now: {prompt}{now.continuation}"]
    return View(said, figure, words=words, lines=lines)


class WhatIf(Panel):
    """Other k, other temperature, experts knocked out: the loss on a fixed probe and a continuation, at once.

    `probe` maps names (domains) to (tokens_BT, targets_BT); without it the first text is the probe. Controls: example,
    text, k, temperature (divides the router's logits), layer (where experts are knocked out), without (the experts),
    window (the part of the probe that is drawn). Raises ValueError for a dense model and a text that does not fit.
    """

    def __init__(self, model, tokenizer, text: str = "", probe=None, *, examples=None, new_tokens: int = 24):
        inputs = _text_inputs(text, examples)
        if probe is None:
            ids = encode(tokenizer, inputs["text"].value)
            if len(ids) < 2:
                raise ValueError("the text is one token long, which is too short to be a probe; give a longer one")
            probe = {"the first text": (torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))}
        self._model, self._tokenizer, self._probe, self._new_tokens = model, tokenizer, dict(probe), new_tokens
        self._prompt = None
        trace, _ = route_text(model, tokenizer, inputs["text"].value, _context(model))
        experts = trace.num_experts
        super().__init__(
            **inputs,
            k=W.BoundedIntText(trace.top_k, min=1, max=experts, description="k", layout=_wide(160)),
            temperature=W.BoundedFloatText(1, min=0.1, max=10, step=0.1, description="temperature", layout=_wide(180)),
            layer=W.Dropdown(
                description="knock out in",
                options=[("all layers", None)] + [(f"layer {layer}", layer) for layer in trace.layers],
                layout=_wide(220),
            ),
            without=W.SelectMultiple(
                description="experts", options=range(experts), rows=min(experts, 5), layout=_wide(180)
            ),
            window=W.Dropdown(description="draw", options=list(self._probe), layout=_wide(220)),
        )
        self._start(inputs.values(), [self.k, self.temperature, self.layer, self.without, self.window])

    def _follow(self, change) -> None:
        _follow_example(self, change and change["owner"])
        if self.text.value != self._prompt:
            self._trained = measure(self._model, self._tokenizer, self.text.value, self._probe, self._new_tokens)
            self._prompt = self.text.value

    def view(self) -> View:
        removed = sorted(self.without.value)
        layers = None if self.layer.value is None else [self.layer.value]
        remove = removed if layers is None else dict.fromkeys(layers, removed)
        with intervene(self._model, remove=remove, top_k=self.k.value, temperature=self.temperature.value):
            now = measure(self._model, self._tokenizer, self._prompt, self._probe, self._new_tokens)
        choice = f"Top-{self.k.value}, temperature {self.temperature.value:g}"
        if removed:
            experts = f"expert{'s' if len(removed) > 1 else ''} {', '.join(map(str, removed))}"
            choice += f", without {experts} in {'all layers' if layers is None else f'layer {layers[0]}'}"
        target_texts = token_texts(self._tokenizer, self._probe[self.window.value][1][0].tolist())
        return render_what_if(choice, self._prompt, self._trained, now, self.window.value, target_texts)
