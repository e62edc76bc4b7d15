"""Does an MoE give the logits of the dense transformers model it was made from? `verify` compares: a receipt."""

from __future__ import annotations

import contextlib
import copy
import html
import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import __version__
from ..core.equivalence import TOLERANCE
from ..core.model import evaluating
from ..routing.adapter import context_length
from ..routing.hf_routers import check_model
from ..tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROBES = json.loads(files(__package__).joinpath("probes.json").read_text(encoding="utf-8"))
SENTENCES = PROBES["sentences"]  # real text that a receipt compares logits on
SETTINGS = PROBES["settings"]  # fields of an MoE's configuration that a receipt shows


@dataclass(frozen=True)
class Receipt:
    """What `verify` found; prints as a table. Differences are max |Δlogit| over all real tokens, in float32."""

    source: str
    target: str
    max_abs_diff: float
    tolerance: float
    checks: Mapping[str, float]  # comparison -> its largest difference
    greedy_equal: bool | None  # the same tokens generated (two within the tolerance may swap); None: not tried
    greedy: str  # what was generated, as text where there is a tokenizer
    probe: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        passed = self.max_abs_diff <= self.tolerance and self.greedy_equal is not False  # a NaN fails
        object.__setattr__(self, "passed", passed)

    def to_markdown(self) -> str:
        """The receipt as a section of a model card."""
        rows = "".join(f"| {name} | {value:.1e} |\n" for name, value in self.checks.items())
        numbers = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"## Equality with the dense model\n\n{self.verdict}\n\n"
            f"| comparison | max \\|Δlogit\\| |\n|---|---|\n{rows}\n"
            f"Greedy generation {self._greedy_verdict}. Probe: {self.probe}. {numbers}.\n"
            + "".join(f"\n- {note}" for note in self.notes)
        )

    @property
    def verdict(self) -> str:
        """One sentence: the two classes, whether they are the same function, and by how much."""
        verdict = "the same function" if self.passed else "NOT the same function"
        size = f"max |Δlogit| {self.max_abs_diff:.1e}, tolerance {self.tolerance:.1e}"
        return f"{self.source} and {self.target}: {verdict}, {size}"

    @property
    def _greedy_verdict(self) -> str:
        return {True: "equal", False: "NOT equal", None: "not tried"}[self.greedy_equal]

    def __str__(self) -> str:
        lines = [self.verdict] + [f"  {name:14} {value:.1e}" for name, value in self.checks.items()]
        lines += [f"  {'greedy':14} {self._greedy_verdict}: {self.greedy!r}", f"  probe: {self.probe}"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour = "#00693e" if self.passed else "#a4001d"
        greedy = f"greedy generation {self._greedy_verdict}: {self.greedy!r}"
        rows = [{"comparison": name, "max |Δlogit|": value} for name, value in self.checks.items()]
        table = Table(rows, formats={"max |Δlogit|": ".1e"}, below=[greedy, self.probe, *self.notes])
        return f"<b style='color:{colour}'>{html.escape(self.verdict)}</b>{table._repr_html_()}"


@torch.no_grad()
def verify(
    dense: PreTrainedModel, moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *,
    length: int = 32,
) -> Receipt:  # fmt: skip
    """Compare a dense transformers model with its MoE in float32: logits and greedy generation.

    On random ids (2 sequences of `length` tokens, fewer where the models take fewer), on real text where there is a
    `tokenizer`, on that batch padded right and left with an attention mask, and with the cache, token by token. The
    tolerance is 1e-5, times the largest logit where that exceeds 1. Both models are put into evaluation mode and back.
    Raises TypeError for what is not a transformers model, ValueError for models without weights (on the meta device)
    or of different vocabularies, and for a tokenizer with ids that they do not have.
    """
    check_model(dense, "verify")
    check_model(moe, "verify")
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (dense, moe)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the vocabularies differ, {sizes[0]} tokens and {sizes[1]}: not one model's dense and MoE form"
        )
    dense, moe = _float32(dense), _float32(moe)
    use_eager_if_needed(moe)
    notes, vocab = [], sizes[0]
    length = max(4, min(length, context_length(dense.config), context_length(moe.config)))
    generator = torch.Generator().manual_seed(0)
    random_BT = torch.randint(vocab, (2, length), generator=generator)
    sequences = [random_BT[0].tolist(), random_BT[1, : length - length // 3].tolist()]
    probe = f"2 sequences of {length} random ids (seed 0)"
    if tokenizer is not None:
        text = [tokenizer(sentence)["input_ids"][:length] for sentence in SENTENCES]
        if (largest_id := max((max(ids, default=0) for ids in text), default=0)) >= vocab:
            raise ValueError(f"the tokenizer gives id {largest_id} but the models have {vocab} tokens; give their own")
        sequences = text
        probe += f", {len(text)} texts of {', '.join(str(len(ids)) for ids in text)} tokens"
    window = getattr(dense.config.get_text_config(), "sliding_window", None)
    if window and window >= length:
        notes.append(f"the probe is shorter than the sliding window of {window}: what lies beyond was not compared")
    buffers = dict(moe.named_buffers())
    for name, buffer in dense.named_buffers():
        if name in buffers and not torch.equal(buffer, buffers[name].to(buffer)):
            notes.append(
                f"{name} differs: the rope_parameters are not the same, or a model was cast after loading "
                "(from_pretrained(…, dtype=…) keeps such tables)"
            )
            break
    with evaluating(dense), evaluating(moe):
        largest, checks = 0.0, {}

        def compare(name: str, run: Callable[..., Tensor], keep: Tensor | None = None) -> None:
            nonlocal largest
            a, b = run(dense).cpu().double(), run(moe).cpu().double()
            if keep is not None:
                a, b = a[keep], b[keep]
            largest = _worst([largest, float(a.abs().max())])
            checks[name] = float((a - b).abs().max())

        compare("random ids", lambda model: _logits(model, random_BT))
        if tokenizer is not None:
            compare("real text", lambda model: torch.cat([_logits(model, torch.tensor([ids]))[0] for ids in sequences]))
        for side in ("right", "left"):
            ids_BT, mask_BT = _pad(sequences, side)
            compare(f"padded {side}", lambda model, x=ids_BT, m=mask_BT: _logits(model, x, m), mask_BT.bool())
        compare("with cache", lambda model: _cached_logits(model, random_BT))
        if not math.isfinite(largest):
            notes.append("the dense model's own logits are not finite (NaN or infinity): nothing can be equal to them")
        tolerance = TOLERANCE[torch.float32] * max(1.0, largest)
        ids_BT, mask_BT = _pad([ids[: max(1, length // 2)] for ids in sequences], "left")
        new = min(16, length - ids_BT.shape[1])
        a, b = (_greedy(model, ids_BT, mask_BT, new) for model in (dense, moe))
        equal = torch.equal(a, b) or _only_ties(dense, a, b, ids_BT.shape[1], mask_BT, tolerance)
        generated = a[0, ids_BT.shape[1] :].tolist()
        greedy = tokenizer.decode(generated) if tokenizer is not None else " ".join(map(str, generated))
    return Receipt(
        type(dense).__name__, type(moe).__name__, _worst(list(checks.values())), tolerance, checks, equal, greedy,
        probe, settings_of(moe.config), versions(), tuple(notes),
    )  # fmt: skip


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Those of `SETTINGS` that an MoE's configuration has."""
    values = config.get_text_config().to_dict()
    return {name: values[name] for name in SETTINGS if values.get(name) is not None}


def _worst(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).max())  # unlike Python's max, it lets a NaN through


def fits_grouped_mm(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Are an expert weight's rows multiples of 16 bytes? torch's grouped product (transformers' default) needs that."""
    return shape[-1] * dtype.itemsize % 16 == 0


def use_eager_if_needed(moe: PreTrainedModel) -> None:
    """Switch a model whose widths torch's grouped product does not take to transformers' loop over experts."""
    if not all(fits_grouped_mm(p.shape, p.dtype) for p in moe.parameters() if p.ndim == 3):
        with contextlib.suppress(ValueError):  # Llama4 has one implementation only, which takes any width
            moe.set_experts_implementation("eager")


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def _router_off(model: PreTrainedModel) -> dict[str, bool]:
    # With the balance loss on, a cached step and its longer attention mask do not fit together in transformers 5.23.
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}


def _logits(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    mask_BT = None if mask_BT is None else mask_BT.to(model.device)
    options = dict(use_cache=False, return_dict=True, **_router_off(model))
    return model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT, **options).logits


def _cached_logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Logits of the sequence's second half, computed token by token after the first."""
    ids_BT = ids_BT.to(model.device)
    half = ids_BT.shape[1] // 2
    options = dict(use_cache=True, return_dict=True, **_router_off(model))
    out = model(input_ids=ids_BT[:, :half], **options)
    steps = [out.logits]
    for t in range(half, ids_BT.shape[1]):
        out = model(input_ids=ids_BT[:, t : t + 1], past_key_values=out.past_key_values, **options)
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


def _pad(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of sequences padded with id 0 on one side."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids_BT = pad_sequence(rows, batch_first=True, padding_side=side)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids_BT, mask_BT


def _greedy(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, new: int) -> Tensor:
    from transformers import GenerationConfig

    plain = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, use_cache=True)
    return model.generate(
        ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=plain, **_router_off(model),
    ).cpu()  # fmt: skip


def _only_ties(
    dense: PreTrainedModel, a_BT: Tensor, b_BT: Tensor, start: int, mask_BT: Tensor, tolerance: float
) -> bool:
    """Where two generations part, did the dense model have two candidates within rounding of each other?"""
    for row in range(len(a_BT)):
        parted = (a_BT[row] != b_BT[row]).nonzero()
        if len(parted):
            t = int(parted[0])
            mask = torch.cat([mask_BT[row], torch.ones(t - start, dtype=torch.long)])[None]
            logits_V = _logits(dense, a_BT[row : row + 1, :t], mask)[0, -1]
            if not abs(float(logits_V[a_BT[row, t]] - logits_V[b_BT[row, t]])) <= 2 * tolerance:
                return False
    return True


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a conversion depends on."""
    others = {name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")}
    return {"python": platform.python_version(), **others, "upcycling": __version__}
