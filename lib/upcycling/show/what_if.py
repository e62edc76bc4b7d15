"""The panel `WhatIf`: a model with other experts, its loss on a probe and what it writes then, beside the trained one.

Shapes: B windows, T tokens of a window.
"""

import contextlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import ipywidgets as W
import torch
from torch import Tensor

from ..core.model import DecoderLM, evaluating
from ..decoding.generation import generate
from ..routing.adapter import context_length
from ..routing.intervention import intervene, token_losses
from ..routing.typed_text import check_ids, encode, route_text, token_texts, twin
from ..tables import Table
from .panel import Panel, View, text_inputs, toggle_buttons, wide
from .strips import plot_token_losses
from .style import visible

Probe = Mapping[str, tuple[Tensor, Tensor]]  # (tokens_BT, targets_BT) by name


@dataclass(frozen=True)
class Outcome:
    """What a model does under some choice of experts: the probe's losses (nats; (B, T) by name), and a continuation."""

    losses: Mapping[str, Tensor]
    continuation: str

    def mean(self, name: str | None = None) -> float:
        """Mean nats per token of one part of the probe, or of all of it."""
        chosen = self.losses.values() if name is None else [self.losses[name]]
        return float(torch.cat([losses_BT.flatten() for losses_BT in chosen]).nanmean())


def measure(model, tokenizer, prompt: str, probe: Probe, new_tokens: int = 20) -> Outcome:
    """The losses on `probe` and the most probable continuation of `prompt`, by `model` as it is (see `intervene`).

    Raises ValueError for a prompt that is empty, cannot be encoded, or leaves no room for `new_tokens`.
    """
    ids = encode(tokenizer, prompt)
    if len(ids) + new_tokens > context_length(model.config):
        raise ValueError(
            f"the text has {len(ids):,} tokens and {new_tokens} new ones are wanted, but the model's context is "
            f"{context_length(model.config):,}; shorten the text"
        )
    check_ids(model, ids)
    prompt_BT = torch.tensor([ids], device=next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        if isinstance(model, DecoderLM):
            tokens_BT = generate(model, prompt_BT, new_tokens)
        else:
            options = {"attention_mask": torch.ones_like(prompt_BT), "do_sample": False, "pad_token_id": 0}
            tokens_BT = model.generate(prompt_BT, max_new_tokens=new_tokens, **options)
    # decoded together, since a character may be several tokens, and a token alone may lose its space
    start, whole = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (ids, tokens_BT[0].tolist()))
    losses = {name: token_losses(model, *windows) for name, windows in probe.items()}
    return Outcome(losses, whole[len(start) :])


def render_what_if(
    choice: str, prompt: str, trained: Outcome, now: Outcome, window: str, target_texts: Sequence[str]
) -> View:
    """The view of `WhatIf`: what the `choice` (in words) does to losses and continuation.

    `window` is the part of the probe whose first window is drawn, `target_texts` are the tokens predicted there.
    """
    changes = {name: now.mean(name) - trained.mean(name) for name in trained.losses}
    worst = max(changes, key=changes.get)
    said = f"{choice}: {now.mean():.3f} nats per token, as trained {trained.mean():.3f}"
    said += f" ({now.mean() - trained.mean():+.3f})"
    said += f"; {worst} changes most ({changes[worst]:+.3f})." if len(changes) > 1 else "."
    table = Table(
        {"loss (nats per token)": visible(name), "as trained": trained.mean(name), "now": now.mean(name),
         "change": f"{change:+.3f}"} for name, change in changes.items()
    )  # fmt: skip
    both = zip(trained.continuation, now.continuation)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
    words, lines = table._repr_html_(), str(table).split("\n")
    for name, text in (("as trained", trained.continuation), ("now", now.continuation)):
        start, shared, other = (html.escape(visible(part)) for part in (prompt, text[:same], text[same:]))
        words += f"<p><b>{name}</b>: {start}<u>{shared}</u><mark>{other}</mark></p>"
        lines.append(f"{name}: {prompt}{text}")
    change_T = (now.losses[window] - trained.losses[window])[0]
    title = f"change of each token's loss, first window of {window}"
    return View(said, plot_token_losses(target_texts, change_T, limit=2.0, title=title), words=words, lines=lines)


class WhatIf(Panel):
    """Other k, other temperature, experts knocked out: the loss on a fixed probe and a continuation, at once.

    `probe` maps names (domains) to (tokens_BT, targets_BT); without it the first text is the probe. Controls: example,
    text, k, temperature (divides the router's logits), layer (where experts are knocked out), without ("0, 3-5"),
    window (the part of the probe that is drawn). Raises ValueError for a dense model and a text that does not fit.
    """

    def __init__(self, model, tokenizer, text: str = "", probe=None, *, examples=None, new_tokens: int = 20):
        inputs = text_inputs(text, examples)
        if probe is None:
            ids = encode(tokenizer, inputs["text"].value)
            if len(ids) < 2:
                raise ValueError("the text is one token long, which is too short to be a probe; give a longer one")
            probe = {"the first text": (torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))}
        self._model, self._tokenizer, self._probe, self._new_tokens = twin(model), tokenizer, dict(probe), new_tokens
        self._prompt = None
        trace, _ = route_text(model, tokenizer, inputs["text"].value, context_length(model.config))
        experts = trace.num_experts
        layers = [("all layers", None)] + [(f"layer {layer}", layer) for layer in trace.layers]
        super().__init__(
            **inputs,
            k=W.BoundedIntText(trace.top_k, min=1, max=experts, layout=wide(160)),
            temperature=W.BoundedFloatText(1, min=0.1, max=10, step=0.1, layout=wide(180)),
            layer=W.Dropdown(description="knock out in", options=layers, layout=wide(220)),
            without=W.Text(description="without experts", placeholder="none; for example 3, 7", layout=wide(260)),
            window=W.Dropdown(description="draw", options=list(self._probe), layout=wide(220)),
        )
        # one button an expert; with their numbers for labels, ipywidgets leaves them (and the focus) in place
        self._experts = toggle_buttons([(str(e), e) for e in range(experts)], "upcycling-experts")
        self._experts.add_class(f"experts-{self._experts.model_id}")
        self._experts.value = None
        self._experts.observe(self._toggle, "value")
        self._removed_style = W.HTML()
        self._start(
            inputs.values(), [self.k, self.temperature, self.window],
            [self.layer, self.without, W.HBox([self._experts, self._removed_style])],
        )  # fmt: skip

    def _toggle(self, change) -> None:
        """A click on an expert takes it out, or puts it back."""
        with self._lock, contextlib.suppress(ValueError):  # if what is typed is wrong, the panel says so already
            if change["new"] is not None:
                self._experts.value = None  # so that the next click on it is a change, too
                removed = set(self._removed()) ^ {change["new"]}
                self.without.value = ", ".join(map(str, sorted(removed)))

    def _removed(self) -> list[int]:
        """The experts in the field, as in "0, 3-5"."""
        removed = set()
        for part in filter(None, re.split(r"[\s,;]+", self.without.value)):
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
            if not first <= last < len(self._experts.options):
                raise ValueError(
                    f"“{part}” names no expert; write numbers from 0 to {len(self._experts.options) - 1}, as in 0, 3-5"
                )
            removed |= set(range(first, last + 1))
        return sorted(removed)

    def _mark(self, removed: Sequence[int]) -> None:
        places = ",".join(f":nth-child({expert + 1})" for expert in removed)
        out = f".experts-{self._experts.model_id} button:is({places})"
        self._removed_style.value = (
            f"<style>{out}{{background:#B00020;color:white;text-decoration:line-through}}"
            f"{out}::after{{content:'\\200b'/', knocked out'}}</style>"
        )

    def _follow(self, change) -> None:
        super()._follow(change)
        with contextlib.suppress(ValueError):  # `view` says what is wrong
            self._mark(self._removed())
        if self.text.value != self._prompt:
            self._trained = measure(self._model, self._tokenizer, self.text.value, self._probe, self._new_tokens)
            self._prompt = self.text.value

    def view(self) -> View:
        removed = self._removed()
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
