"""A Hugging Face dense model in, a stock Hugging Face MoE with the same logits out; or the reason why not.

`plan(config)` says which class and what has to be set, `upcycle_pretrained` carries it out in memory, `verify` compares
the two models and gives a receipt. The rules are in `families/`; `convert` carries the same plan out
from file to file.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ..checks import _one_of, whole_number
from ..tables import Table
from .families import FAMILIES, REFUSED
from .families.base import Initialisation, Refusal, TargetTensor
from .families.engine import build, configure, hub_shapes
from .receipt import fits_grouped_mm
from .sources import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPERTS_START_AS = ("copy", "noise")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_EXPERTS = 4096  # planning takes a while for each; the largest models have some hundreds
TRAINING_NOTES = (
    "output_router_logits=True makes transformers add the balance loss to `loss`; it pools all layers before comparing "
    "expert loads, so layers that collapse on different experts look balanced: use a balance loss per layer to train.",
    "With it, generate() on a padded batch fails in transformers 5.23: pass output_router_logits=False there.",
)
NO_BALANCE_LOSS = "{} adds no balance loss of its own: use one per layer to train."
# Settings that conversions have lost before, shown although they are only carried.
_TRAPS = ("rope_parameters", "sliding_window", "head_dim", "tie_word_embeddings", "attention_bias", "layer_types")
_EVIDENCE = {"transformers": " (compared by the tests)"}
_PLAIN = ("carried", "left out: informational", "left out: at its default")


@dataclass(frozen=True)
class Sizes:
    """Parameters of the dense model, of the MoE, of the MoE as one token uses it, and the MoE's bytes on disk."""

    dense: int = 0
    moe: int = 0
    active: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What upcycling a dense configuration comes to; prints as text. `target` is None where no class fits."""

    source: str  # the dense class
    target: str | None  # the MoE class
    reason: str | None = None  # why there is none
    nearest: str | None = None  # what comes closest then
    num_experts: int = 8
    top_k: int = 2
    layers: tuple[int, ...] = ()  # the MoE layers
    router_std: float = 0.02
    init: str = "copy"
    noise: float = 0.05
    seed: int = 0
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of the MoE's configuration that decide
    account: Mapping[str, str] = field(default_factory=dict)  # dense field -> what becomes of it
    engines: Mapping[str, str] = field(default_factory=dict)  # engine -> what it will honour (read, not run)
    notes: tuple[str, ...] = ()
    expert_width: int = 0  # of each expert's FFN
    exact_up_to: int | None = None  # tokens; None: any number
    sizes: Sizes = Sizes()
    config: Any = field(default=None, repr=False, compare=False)  # of the MoE
    tensors: tuple[TargetTensor, ...] = field(default=(), repr=False, compare=False)
    # dense names that may be in a file beside their twin
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def sources(self) -> set[str]:
        """Names of the dense model's tensors, every one of which is used."""
        return {name for tensor in self.tensors for name in tensor.sources}

    def or_refusal(self) -> Plan:
        """The plan itself; raises Refusal where there is no class."""
        if self.target is None:
            raise Refusal(f"{self.source} has no stock MoE class: {self.reason}", self.nearest)
        return self

    def check_sources(self, names: Iterable[str]) -> None:
        """Raises ValueError naming a tensor that is missing, or one that nothing would be made from.

        Rotation tables and tied twins are known to carry nothing.
        """
        names, sources = set(names), self.sources
        if missing := sorted(sources - names):
            raise ValueError(
                f"{missing[0]} is missing from the weights of this {self.source} ({len(missing)} such tensors)"
            )
        extra = sorted(n for n in names - sources if n not in self.tied and not n.endswith("rotary_emb.inv_freq"))
        if extra:
            raise ValueError(f"{extra[0]} is in the weights but no part of {self.source} ({len(extra)} such tensors)")

    def __str__(self) -> str:
        if self.target is None:
            lines = [f"{self.source}: no stock class, because {self.reason}"]
            return "\n".join(lines + [f"nearest: {self.nearest}"] * (self.nearest is not None))
        s = self.sizes
        where = "all layers" if len(self.layers) == self.config.num_hidden_layers else f"layers {list(self.layers)}"
        start = "the same logits" if self.init == "copy" else f"copies with {self.noise:.0%} noise: not the same logits"
        if self.exact_up_to is not None:
            start += f", up to {self.exact_up_to} tokens"
        lines = [
            f"{self.source} -> {self.target}: {self.num_experts} experts of width {self.expert_width}, "
            f"top-{self.top_k}, {where}; {start}",
            f"parameters: {s.dense:,} -> {s.moe:,}, {s.active:,} active; {_gib(s.bytes)} in {dtype_name(self.dtype)}",
            "settings: " + ", ".join(f"{name}={value!r}" for name, value in self.settings.items()),
        ]
        for engine, what in self.engines.items():
            lines.append(f"{engine}{_EVIDENCE.get(engine, ' (read, not run)')}: {what}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"  {name:28} {what}" for name, what in self.account.items() if what not in _PLAIN]
        plain = [name for name, what in self.account.items() if what == "carried"]
        return "\n".join(lines + [f"  carried: {', '.join(plain)}"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if self.target is None:
            return f"<b style='color:#a4001d'>no stock class</b><pre>{html.escape(str(self))}</pre>"
        fields = Table({"field": name, "what becomes of it": what} for name, what in self.account.items())
        names, head = html.escape(f"{self.source} → {self.target}"), html.escape(str(self).split("\n  ")[0])
        return (
            f"<b style='color:#00693e'>{names}</b><pre>{head}</pre>"
            f"<details><summary>every field of the configuration</summary>{fields._repr_html_()}</details>"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_deviation(name: str, value: Any) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value!r} is a standard deviation; it must be finite and cannot be negative")


def plan(
    config: Any, num_experts: int = 8, top_k: int = 2, *, layers: Iterable[int] | None = None, router_std: float = 0.02,
    init: str = "copy", noise: float = 0.05, seed: int = 0, dtype: torch.dtype | None = None,
) -> Plan:  # fmt: skip
    """Which stock MoE class has a dense model's logits, and what has to be set; or why there is none. Reads no weights.

    `config`: a transformers configuration or model, a dict, a folder or a hub name. `layers`: indices of the MoE layers
    (default: all). `init`: "copy", or "noise" (each expert's tensor plus N(0, (noise × its standard deviation)²), which
    changes the function). `dtype`: of what will be written (default: the dense model's). Raises ValueError for settings
    that no model could have, OSError for a folder that is not there; a model that cannot be upcycled is a Plan whose
    `target` is None.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    _one_of("init", init, EXPERTS_START_AS)
    num_experts, top_k = whole_number("num_experts", num_experts), whole_number("top_k", top_k)
    seed = whole_number("seed", seed)
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"num_experts={num_experts} is too many; choose 1..{MOST_EXPERTS}")
    if num_experts < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} with {num_experts} experts; choose 1..{max(1, num_experts)}")
    _check_deviation("router_std", router_std)
    _check_deviation("noise", noise)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(map(str, DTYPES))}")
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ValueError(f"layers={layers!r} is no list of layer indices")
        layers = [whole_number("layer", layer) for layer in layers]
    config = read_config(config)
    kind = config.model_type
    source = CLASSES.get(kind, type(config).__name__)
    if kind not in FAMILIES:
        return Plan(source, None, *REFUSED.get(kind, _unknown(config, kind in CLASSES)))
    depth = config.num_hidden_layers
    chosen = tuple(range(depth)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"layers={list(chosen)}; choose some of 0..{depth - 1}")
    try:
        target, moe_config, account = configure(
            config, FAMILIES[kind], num_experts=num_experts, top_k=top_k, layers=chosen
        )
    except Refusal as refusal:
        return Plan(source, None, refusal.reason, refusal.nearest)
    how = Initialisation(num_experts, router_std, init, noise, seed)
    dense_shapes, tied = hub_shapes(config, source)
    tensors = build(target, dense_shapes, hub_shapes(moe_config, target.moe.name)[0], how)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    moe_config.dtype = dtype
    total = sum(math.prod(t.shape) for t in tensors)
    in_experts = sum(math.prod(t.shape) for t in tensors if t.kind in ("expert", "experts"))
    sizes = Sizes(
        dense=sum(map(math.prod, dense_shapes.values())),
        moe=total,
        active=total - in_experts + in_experts * top_k // num_experts,
        bytes=total * dtype.itemsize,
    )
    before, after = config.to_dict(), moe_config.to_dict()
    shown = {name: value for name, value in after.items() if name in _TRAPS or before.get(name) != value}
    for name in ("_name_or_path", "architectures", "model_type", "dtype", "transformers_version"):
        shown.pop(name, None)
    notes = [*target.moe.notes, *target.notes]
    notes += TRAINING_NOTES if target.moe.balance_loss else [NO_BALANCE_LOSS.format(target.moe.name)]
    if not all(fits_grouped_mm(t.shape, dtype) for t in tensors if t.kind in ("expert", "experts")):
        notes.append(
            f"transformers' grouped_mm needs widths in multiples of {16 // dtype.itemsize} for {dtype_name(dtype)}: "
            "call model.set_experts_implementation('eager') after loading"
        )
    if top_k == 1:
        notes.append("top_k=1 with renormalised weights: the weight is always 1, so the loss never moves the router")
    if getattr(moe_config, "hidden_act", "silu") not in ("silu", "swish"):
        notes.append(
            f"hidden_act={moe_config.hidden_act!r}: vLLM and llama.cpp use SiLU in this class, so transformers only"
        )
    return Plan(
        source, target.moe.name, None, None, num_experts, top_k, chosen, router_std, init, noise, seed, dtype,
        settings=shown, account=account, engines={**target.moe.engines, **target.engines}, notes=tuple(notes),
        expert_width=getattr(moe_config.get_text_config(), target.moe.expert_width), exact_up_to=target.exact_up_to,
        sizes=sizes, config=moe_config, tensors=tensors, tied=tied,
    )  # fmt: skip


def _unknown(config: PreTrainedConfig, causal: bool) -> tuple[str, str | None]:
    """(Why there is no class, what is nearest) for a family without a rule."""
    known = f"the family {config.model_type!r} is not known here"
    if not causal or getattr(config, "is_decoder", None) is False or getattr(config, "is_encoder_decoder", False):
        return f"{known}, and it is no decoder: only causal language models can be upcycled", None
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"{known}, and it has experts already", None
    return known, f"add a rule for it; known: {', '.join(sorted(FAMILIES))}"
