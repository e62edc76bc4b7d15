"""The words in which families are described: fields, rules, tensors, target classes."""

from __future__ import annotations

import copy as _copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Refusal(ValueError):
    """No stock class computes this model; `reason` says why, `nearest` what comes closest (or None)."""

    def __init__(self, reason: str, nearest: str | None = None) -> None:
        super().__init__(reason if nearest is None else f"{reason}; nearest alternative: {nearest}")
        self.reason, self.nearest = reason, nearest


def table(name: str) -> Any:
    """What stands in a JSON file beside this module."""
    return json.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ configuration

_NAMES = table("fields.json")
# What says where a checkpoint comes from, or serves other tasks: no forward pass of a language model reads it.
INFORMATIONAL = _NAMES["informational"]
COMMON = _NAMES["common"]  # carried for every family: the same name and meaning in every class
DECODER = _NAMES["decoder"]  # carried for most decoder families
_ABSENT = object()


class Fields:
    """A dense configuration whose every field has to be accounted for.

    `fields[name]` reads a field; `take`, `carry`, `replace`, `require` and `drop` account for it. A name that the
    configuration does not have is passed over by all of them. `target` collects the MoE configuration's fields,
    `account` has one sentence for each source field.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.values: dict[str, Any] = config.to_dict()
        self.target: dict[str, Any] = {}
        self.account: dict[str, str] = {}
        self.drop(*INFORMATIONAL, because="informational")
        self.require("is_encoder_decoder", False, because="only decoders are known here")
        if self.values.get("quantization_config") is not None:
            raise Refusal("quantization_config: its weights are quantised", "load it, call .dequantize(), save it")
        self.carry(*COMMON)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; `default` where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

    def take(self, *names: str) -> list[Any]:
        """The fields' values, each accounted for; None where one is absent."""
        self.drop(*names, because="taken")
        return [self.values.get(name) for name in names]

    def carry(self, *names: str) -> None:
        """The field keeps its name, value and meaning."""
        for name in names:
            if name in self.values:
                self.target[name] = _copy.deepcopy(self.values[name])
                self.account[name] = "carried"

    def replace(self, name: str, because: str, **target: Any) -> None:
        """The field becomes the target's fields `target`; the sentence says how."""
        self.target.update(target)
        if name in self.values:
            self.account[name] = because

    def require(self, name: str, *allowed: Any, because: str, nearest: str | None = None) -> None:
        """The field must be one of `allowed` (the first is the usual one), else the model is refused."""
        if name not in self.values:
            return
        if self.values[name] not in allowed:
            raise Refusal(f"{name}={self.values[name]!r} cannot be kept, only {allowed[0]!r} can: {because}", nearest)
        self.account[name] = f"is {self.values[name]!r}, as it has to be"

    def drop(self, *names: str, because: str) -> None:
        """The field does not change what the model computes."""
        for name in names:
            if name in self.values:
                self.account[name] = f"left out: {because}"

    def experts_width(self, *names: str, width: int | None = None, also: str = "") -> None:
        """The dense FFN's width (or `width`) becomes the target's fields `names`; `also` says whose it is, too."""
        width = self["intermediate_size"] if width is None else width
        self.replace("intermediate_size", "the experts' width" + also, **dict.fromkeys(names, width))

    def head_dim(self) -> int:
        """The width of a head, written out: the target's own default is another, or none."""
        head_dim = self.get("head_dim", self["hidden_size"] // self["num_attention_heads"])
        self.replace("head_dim", "carried", head_dim=head_dim)
        return head_dim

    def rope(self, *, layer_types: tuple[str, ...] = ()) -> None:
        """Carry `rope_parameters` with its theta (the target's default is another); once per layer type if given."""
        rope = _copy.deepcopy(self.values["rope_parameters"])
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise Refusal(
                f"rope_parameters: partial_rotary_factor={rope['partial_rotary_factor']} is not a field of this family"
            )
        rope.pop("partial_rotary_factor", None)
        self.target["rope_parameters"] = {kind: _copy.deepcopy(rope) for kind in layer_types} if layer_types else rope
        self.account["rope_parameters"] = "carried, for each layer type" if layer_types else "carried"

    def finish(self) -> None:
        """Every field is accounted for, or absent, or at its class's default; else Refusal, naming it."""
        defaults = type(self.config)().to_dict()
        for name, value in self.values.items():
            if name not in self.account:
                if value is not None and defaults.get(name, _ABSENT) != value:
                    raise Refusal(
                        f"the field {name}={value!r} is not known for {type(self.config).__name__} and could change it",
                        "take it out of config.json if it does not",
                    )
                self.account[name] = "left out: at its default"


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Rule:
    """How one target tensor is made: from these source tensors (names with {layer}), by this function of them."""

    # "kept": outside the experts · "expert" (…): one expert's own, a copy of the dense one · "experts" (E, …): all
    # experts' in one, copies (plus noise with init="noise", both) · "router": rows N(0, router_std) · "new": `value`
    kind: str
    sources: tuple[str, ...] = ()
    transform: Callable[..., Tensor] | None = None  # of the sources, in order; None: the one source as it is
    value: float = 0.0  # of a "new" tensor


def kept(*sources: str, transform: Callable[..., Tensor] | None = None) -> Rule:
    """A tensor outside the experts, made from these."""
    return Rule("kept", sources, transform)


@dataclass(frozen=True)
class Initialisation:
    """How what is new is drawn: each tensor from a stream of its own, so that the order does not matter."""

    num_experts: int
    router_std: float = 0.02
    init: str = "copy"
    noise: float = 0.0  # standard deviation, in units of the dense tensor's own
    seed: int = 0

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the MoE: `make(*sources)` with the source tensors named in `sources` gives it."""

    name: str  # as save_pretrained writes it
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # names of dense tensors; () for a new one
    kind: str
    layer: int | None
    rule: Rule = field(repr=False)
    how: Initialisation = field(repr=False)
    dtype: torch.dtype = torch.float32  # in the file that it is written to

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @torch.no_grad()
    def make(self, *sources: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in `dtype` (default: the source's own; float32 for a new one). ValueError on a wrong shape."""
        if self.kind == "router":
            made = self.how.router_std * self.how.normal(self.name, self.shape)
        elif self.kind == "new":
            made = torch.full(self.shape, self.rule.value)
        else:
            made = sources[0] if self.rule.transform is None else self.rule.transform(*sources)
            if self.kind == "experts":
                made = made.expand(self.how.num_experts, *made.shape)
            if self.kind in ("expert", "experts") and self.how.init == "noise":
                std = self.how.noise * sources[0].float().std()
                made = (made.float() + std * self.how.normal(self.name, made.shape).to(made.device)).to(made.dtype)
        if tuple(made.shape) != self.shape:
            raise ValueError(
                f"{self.name} must have the shape {self.shape}, but {', '.join(self.sources)} gives {tuple(made.shape)}"
            )
        return made.to(dtype or made.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class MoEClass:
    """A stock class: its names, what must always be set, and who reads it how (from reading their sources, not run)."""

    name: str  # XForCausalLM
    tensors: Mapping[str, Rule]
    expert_width: str = "intermediate_size"  # the field with the experts' FFN width
    top_k: str = "num_experts_per_tok"  # the field with the number of experts per token
    fewest_experts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    # How some layers stay dense: "mlp_only_layers" (indices), "mlp_layer_types" ("dense" or "sparse"), or not at all.
    dense_layers: str | None = None
    read_by_getattr: tuple[str, ...] = ()  # fields that the class uses although its configuration does not declare them
    balance_loss: bool = True  # does the class add one to its loss?
    notes: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a rule returns: `tensors` overrides the class's; equal up to `exact_up_to` tokens (None: any number)."""

    moe: MoEClass
    tensors: Mapping[str, Rule] = field(default_factory=dict)
    exact_up_to: int | None = None
    notes: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
