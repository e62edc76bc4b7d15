"""A Hugging Face dense model in, a stock Hugging Face MoE with the same logits out; or the reason why not.

`plan(config)` says which class and what has to be set, `upcycle_pretrained` carries it out in memory, `verify` compares
the two models and gives a receipt. The rules are in `families` and `more_families`; `conversion` carries the same plan
out from file to file.
"""

from __future__ import annotations

import contextlib
import copy
import html
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import families, more_families
from .families import Initialisation, Refusal, TargetTensor, build, configure, hub_shapes, hub_tensors
from .receipt import Receipt, fits_grouped_mm, use_eager_if_needed, verify

__all__ = ["Plan", "Receipt", "Sizes", "plan", "read_config", "upcycle_pretrained", "verify"]

INITS = ("copy", "noise")
TRAINING_NOTES = (
    "output_router_logits=True makes transformers add the balance loss to `loss`; it pools all layers before comparing "
    "expert loads, so layers that collapse on different experts look balanced: use a balance loss per layer to train.",
    "With it, generate() on a padded batch fails in transformers 5.23: pass output_router_logits=False there.",
)


def all_families() -> dict:
    """model_type -> rule, of every module that has some."""
    return {**families.FAMILIES, **more_families.FAMILIES}


@dataclass(frozen=True)
class Sizes:
    """Parameters of the dense model, of the MoE, of the MoE as one token uses it, and the MoE's bytes on disk."""

    dense: int
    moe: int
    active: int
    bytes: int


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
    sizes: Sizes | None = None
    config: Any = field(default=None, repr=False, compare=False)  # of the MoE
    tensors: tuple[TargetTensor, ...] = field(default=(), repr=False, compare=False)
    tied: Mapping[str, str] = field(
        default_factory=dict, repr=False
    )  # dense names that may be in a file beside their twin

    @property
    def sources(self) -> set[str]:
        """Names of the dense model's tensors, every one of which is used."""
        return {name for tensor in self.tensors for name in tensor.sources}

    def check_sources(self, names: Iterable[str]) -> set[str]:
        """The names that a conversion reads; those left are known to carry nothing (rotation tables, tied twins).

        Raises ValueError naming a tensor that is missing, or one that nothing would be made from.
        """
        names, sources = set(names), self.sources
        if missing := sorted(sources - names):
            raise ValueError(
                f"{missing[0]} is missing from the weights of this {self.source} ({len(missing)} such tensors)"
            )
        extra = sorted(n for n in names - sources if n not in self.tied and not n.endswith("rotary_emb.inv_freq"))
        if extra:
            raise ValueError(f"{extra[0]} is in the weights but no part of {self.source} ({len(extra)} such tensors)")
        return sources

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
            f"parameters: {s.dense:,} -> {s.moe:,}, {s.active:,} active; {_gib(s.bytes)} in {_name(self.dtype)}",
            "settings: " + ", ".join(f"{name}={value!r}" for name, value in self.settings.items()),
        ]
        lines += [
            f"{engine}{_EVIDENCE.get(engine, ' (read, not run)')}: {what}" for engine, what in self.engines.items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"  {name:28} {what}" for name, what in self.account.items() if what not in _PLAIN]
        plain = [name for name, what in self.account.items() if what == "carried"]
        return "\n".join(lines + [f"  carried: {', '.join(plain)}"])

    def _repr_html_(self) -> str:
        if self.target is None:
            return f"<b style='color:#a4001d'>no stock class</b><pre>{html.escape(str(self))}</pre>"
        fields = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(what)}</td></tr>" for name, what in self.account.items()
        )
        head = str(self).split("\n  ")[0]
        return (
            f"<b style='color:#00693e'>{self.source} → {self.target}</b><pre>{html.escape(head)}</pre>"
            f"<details><summary>every field of {self.source}'s configuration</summary><table>{fields}</table></details>"
        )


_EVIDENCE = {"transformers": " (compared by the tests)"}
_PLAIN = ("carried", "left out: informational", "left out: at its default")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_config(config):
    """A transformers configuration from one, from a dict (config.json) or from a folder or hub name.

    Raises ValueError for a model_type that transformers does not know, OSError where nothing is found.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(config, PreTrainedConfig):
        return config
    if isinstance(config, Mapping):
        values = dict(config)
        return AutoConfig.for_model(values.pop("model_type", None), **values)
    path = Path(config)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; give a folder that save_pretrained wrote, or a hub name")
    return AutoConfig.from_pretrained(config)


def plan(
    config, num_experts: int = 8, top_k: int = 2, *, layers: Iterable[int] | None = None, router_std: float = 0.02,
    init: str = "copy", noise: float = 0.05, seed: int = 0, dtype: torch.dtype | None = None,
) -> Plan:  # fmt: skip
    """Which stock MoE class has a dense model's logits, and what has to be set; or why there is none. Reads no weights.

    `config`: a transformers configuration, a dict, a folder or a hub name. `layers`: indices of the MoE layers
    (default: all). `init`: "copy", or "noise" (each expert's tensor plus N(0, (noise × its standard deviation)²), which
    changes the function). `dtype`: of what will be written (default: the dense model's). Raises ValueError for settings
    that no model could have, OSError for a folder that is not there; a model that cannot be upcycled is a Plan whose
    `target` is None.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(map(repr, INITS))}")
    if num_experts < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} with {num_experts} experts; choose 1..{max(1, num_experts)}")
    if router_std < 0 or noise < 0:
        raise ValueError(f"router_std={router_std} and noise={noise} are standard deviations; they cannot be negative")
    config = read_config(config)
    kind = config.model_type
    source = CLASSES.get(kind, type(config).__name__)
    rules = all_families()
    if kind not in rules:
        unknown = f"the family {kind!r} is not known here", f"add a rule for it; known: {', '.join(sorted(rules))}"
        return Plan(source, None, *more_families.REFUSED.get(kind, unknown))
    depth = config.num_hidden_layers
    chosen = tuple(range(depth)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"layers={list(chosen)}; choose some of 0..{depth - 1}")
    try:
        target, moe_config, account = configure(
            config, rules[kind], num_experts=num_experts, top_k=top_k, layers=chosen
        )
    except Refusal as refusal:
        return Plan(source, None, refusal.reason, refusal.nearest)
    how = Initialisation(num_experts, router_std, init, noise, seed)
    dense_shapes, tied = hub_shapes(config, source)
    tensors = build(target, dense_shapes, hub_shapes(moe_config, target.moe.name)[0], how)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    moe_config.dtype = dtype
    total = sum(_count(t.shape) for t in tensors)
    in_experts = sum(_count(t.shape) for t in tensors if t.kind in ("expert", "experts"))
    sizes = Sizes(
        dense=sum(map(_count, dense_shapes.values())),
        moe=total,
        active=total - in_experts + in_experts * top_k // num_experts,
        bytes=total * dtype.itemsize,
    )
    before, after = config.to_dict(), moe_config.to_dict()
    shown = {name: value for name, value in after.items() if name in _TRAPS or before.get(name) != value}
    for name in ("_name_or_path", "architectures", "model_type", "dtype", "transformers_version"):
        shown.pop(name, None)
    notes = list(target.notes)
    notes += TRAINING_NOTES if target.moe.balance_loss else [NO_BALANCE_LOSS.format(target.moe.name)]
    if not all(fits_grouped_mm(t.shape, dtype) for t in tensors if t.kind in ("expert", "experts")):
        notes.append(
            f"transformers' grouped_mm needs widths in multiples of {16 // dtype.itemsize} for {_name(dtype)}: "
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


NO_BALANCE_LOSS = "{} adds no balance loss of its own: use one per layer to train."
# Settings that conversions have lost before, shown although they are only carried.
_TRAPS = ("rope_parameters", "sliding_window", "head_dim", "tie_word_embeddings", "attention_bias", "layer_types")


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def upcycle_pretrained(
    model_or_folder, num_experts: int = 8, top_k: int = 2, *, layers: Iterable[int] | None = None,
    router_std: float = 0.02, init: str = "copy", noise: float = 0.05, seed: int = 0, dtype: torch.dtype | None = None,
):  # fmt: skip
    """A stock transformers MoE with the logits of a dense model (or its folder or hub name); settings as in `plan`.

    Returns a new model on the dense model's device and in its mode, with its generation configuration; the dense model
    is unchanged. Raises ValueError where no class fits (see `plan`) or a tensor has no place.
    """
    import transformers

    dense = model_or_folder
    if not isinstance(dense, transformers.PreTrainedModel):
        dense = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=dtype or "auto")
    dense_config = copy.deepcopy(dense.config)
    dense_config.dtype = dense.dtype
    carried_out = plan(
        dense_config, num_experts, top_k,
        layers=layers, router_std=router_std, init=init, noise=noise, seed=seed, dtype=dtype,
    )  # fmt: skip
    if carried_out.target is None:
        raise Refusal(f"{carried_out.source} has no stock MoE class: {carried_out.reason}", carried_out.nearest)
    weights = hub_tensors(dense)
    carried_out.check_sources(weights)
    everything = dense.state_dict()
    for name, twin in carried_out.tied.items():
        if not torch.equal(everything[name], everything[twin]):
            raise ValueError(
                f"{name} is not {twin} although the configuration ties them; set tie_word_embeddings=False"
            )
    made = {}
    for tensor in carried_out.tensors:
        # A source keeps its own dtype unless another is asked for; what is new has the model's.
        to = dtype if tensor.sources else carried_out.dtype
        sources = [weights[name] for name in tensor.sources]
        value = tensor.make(*sources, dtype=to)
        # transformers keeps what it is given and stacks only single experts; the dense model's memory stays its own.
        shared = any(value.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in sources)
        made[tensor.name] = value.clone() if shared and tensor.kind != "expert" else value
    with _quiet():
        moe, loading = getattr(transformers, carried_out.target).from_pretrained(
            None, config=copy.deepcopy(carried_out.config), state_dict=made, dtype=carried_out.dtype,
            attn_implementation=dense.config._attn_implementation, output_loading_info=True,
        )  # fmt: skip
    wrong = [name for names in loading.values() for name in names]
    if wrong:
        raise ValueError(f"transformers did not take {wrong[0]} into {carried_out.target} ({len(wrong)} such tensors)")
    use_eager_if_needed(moe)
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe.to(dense.device).train(dense.training)


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bars (they are for downloads) and torch's remark on shared experts of width 0."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
