"""The rules: which stock transformers MoE class computes the same function as a dense model, from which tensors.

A family is one function `rule(fields) -> Target`. It reads a dense configuration through `Fields`, where every field
has to be carried, replaced, required or dropped *by name* (what is left over and not at its default is an error), and
returns the MoE class together with a table of its tensors, in the names that `save_pretrained` writes:

    {"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": expert("model.layers.{layer}.mlp.gate_proj.weight"),
     "model.layers.{layer}.mlp.gate.weight": router()}

A target tensor that the table does not name is a copy of the source tensor of the same name. So a rule is stated per
target tensor, with the source tensors that it is made from, and the in-memory path and the streaming one (shard by
shard) carry out the same list: `build(target, …) -> tuple[TargetTensor, …]`. It fails by name when a source tensor is
used by no target, or a target has no source. All of this works on configurations and shapes; no weight is read.

To add a family: write its function and add it to a module's `FAMILIES` (model_type -> rule), and a line of tiny
configurations to `tests/tiny_families.json`. `refuse(reason, nearest)` ends a rule where no stock class fits.
"""

from __future__ import annotations

import copy as _copy
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Refusal(ValueError):
    """No stock class computes this model; `reason` says why, `nearest` what comes closest (or None)."""

    def __init__(self, reason: str, nearest: str | None = None):
        super().__init__(reason if nearest is None else f"{reason}; nearest alternative: {nearest}")
        self.reason, self.nearest = reason, nearest


def refuse(reason: str, nearest: str | None = None):
    raise Refusal(reason, nearest)


# ------------------------------------------------------------------------------------------------------ configuration

# What says where a checkpoint comes from, or serves other tasks: no forward pass of a language model reads it.
INFORMATIONAL = {
    *("_name_or_path", "name_or_path", "architectures", "model_type", "transformers_version", "auto_map"),
    *("id2label", "label2id", "problem_type", "is_llama_config", "transformers.js_config", "unsloth_version"),
    *("chunk_size_feed_forward", "pretraining_tp", "pruned_heads", "_attn_implementation_autoset"),
}
# Carried for every family: the same name and meaning in every class.
COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions"),
)
# Carried for most decoder families.
DECODER = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "attention_dropout"),
)
_ABSENT = object()


class Fields:
    """A dense configuration whose every field has to be accounted for.

    `fields[name]` reads a field; `carry`, `replace`, `require` and `drop` account for it. A name that the configuration
    does not have is passed over by all of them. `target` collects the MoE configuration's fields, `account` has one
    sentence for each source field.
    """

    def __init__(self, config):
        self.config = config
        self.values: dict[str, Any] = config.to_dict()
        self.target: dict[str, Any] = {}
        self.account: dict[str, str] = {}
        self.drop(*INFORMATIONAL, because="informational")
        self.require("is_encoder_decoder", False, because="only decoders are known here")
        if self.values.get("quantization_config") is not None:
            refuse("quantization_config: its weights are quantised", "load it, call .dequantize(), save it")
        self.carry(*COMMON)

    def __getitem__(self, name: str):
        return self.values[name]

    def get(self, name: str, default=None):
        """The field's value; `default` where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

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
            refuse(f"{name}={self.values[name]!r} cannot be kept: {because}", nearest)
        self.account[name] = f"is {self.values[name]!r}, as it has to be"

    def drop(self, *names: str, because: str) -> None:
        """The field does not change what the model computes."""
        for name in names:
            if name in self.values:
                self.account[name] = f"left out: {because}"

    def set(self, **target: Any) -> None:
        """Fields of the target that the dense model does not have."""
        self.target.update(target)

    def rope(self, *, layer_types: tuple[str, ...] = ()) -> None:
        """Carry `rope_parameters` with its theta (the target's default is another); once per layer type if given."""
        rope = _copy.deepcopy(self.values["rope_parameters"])
        if rope.get("partial_rotary_factor") not in (None, 1):
            refuse(
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
                    refuse(
                        f"the field {name}={value!r} is not known for {type(self.config).__name__} and could change it",
                        "take it out of config.json if it does not",
                    )
                self.account[name] = "left out: at its default"


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Rule:
    """How one target tensor is made: from these source tensors (names with {layer}), by this function of them."""

    kind: (
        str  # "kept": outside the experts · "expert": one expert's own · "experts": stacked over all · "router" · "new"
    )
    sources: tuple[str, ...] = ()
    transform: Callable[..., Tensor] | None = None  # of the sources, in order; None: the one source as it is
    value: float = 0.0  # of a "new" tensor


def kept(*sources: str, transform=None) -> Rule:
    return Rule("kept", sources, transform)


def expert(*sources: str, transform=None) -> Rule:
    """One expert's tensor, (…): a copy of the dense one (plus noise with init="noise")."""
    return Rule("expert", sources, transform)


def experts(*sources: str, transform=None) -> Rule:
    """All experts' tensors in one, (E, …): copies of the dense one (plus noise with init="noise")."""
    return Rule("experts", sources, transform)


def router() -> Rule:
    """Rows N(0, router_std)."""
    return Rule("router")


def filled(value: float = 0.0) -> Rule:
    return Rule("new", value=value)


def rows(*tensors: Tensor) -> Tensor:
    """The tensors, one below the other: [gate; up]."""
    return torch.cat(tensors)


@dataclass(frozen=True)
class Initialisation:
    """How what is new is drawn: each tensor from a stream of its own, so that the order does not matter."""

    num_experts: int
    router_std: float = 0.02
    init: str = "copy"
    noise: float = 0.0  # standard deviation, in units of the dense tensor's own
    seed: int = 0

    def normal(self, name: str, shape) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(tuple(shape), generator=generator)


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
    engines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a rule returns: `tensors` overrides the class's; equal up to `exact_up_to` tokens (None: any number)."""

    moe: MoEClass
    tensors: Mapping[str, Rule] = field(default_factory=dict)
    exact_up_to: int | None = None
    notes: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)


MLP = "model.layers.{layer}.mlp."
W_GATE, W_UP, W_DOWN = (MLP + part for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
MLP_EXPERTS = {
    MLP + "experts.{expert}.gate_proj.weight": expert(W_GATE),
    MLP + "experts.{expert}.up_proj.weight": expert(W_UP),
    MLP + "experts.{expert}.down_proj.weight": expert(W_DOWN),
    MLP + "gate.weight": router(),
}
BLOCK = "model.layers.{layer}.block_sparse_moe."
NORMALISED = {"norm_topk_prob": True, "output_router_logits": True}

MIXTRAL = MoEClass(
    "MixtralForCausalLM",
    {
        BLOCK + "experts.{expert}.w1.weight": expert(W_GATE),
        BLOCK + "experts.{expert}.w3.weight": expert(W_UP),
        BLOCK + "experts.{expert}.w2.weight": expert(W_DOWN),
        BLOCK + "gate.weight": router(),
    },
    settings={"output_router_logits": True, "router_jitter_noise": 0.0},
    engines={"transformers": "everything", "vLLM": "everything", "llama.cpp": "everything"},
)
GRANITE_MOE = MoEClass(
    "GraniteMoeForCausalLM",
    {
        BLOCK + "input_linear.weight": experts(W_GATE, W_UP, transform=rows),
        BLOCK + "output_linear.weight": experts(W_DOWN),
        BLOCK + "router.layer.weight": router(),
    },
    settings={"output_router_logits": True},
    read_by_getattr=("head_dim",),
    engines={"transformers": "everything", "vLLM": "everything", "llama.cpp": "everything"},
)
QWEN2_MOE = MoEClass(
    "Qwen2MoeForCausalLM",
    # The shared expert has width 0. Its gate is drawn, not zero: llama.cpp computes sigmoid(x) as silu(x)/x.
    {
        **MLP_EXPERTS,
        **{MLP + f"shared_expert.{n}_proj.weight": filled() for n in ("gate", "up", "down")},
        MLP + "shared_expert_gate.weight": router(),
    },
    expert_width="moe_intermediate_size",
    settings={**NORMALISED, "shared_expert_intermediate_size": 0, "decoder_sparse_step": 1},
    dense_layers="mlp_only_layers",
    read_by_getattr=("head_dim",),
    engines={
        "transformers": "everything",
        "vLLM": "no sliding window; skips the shared expert of width 0",
        "llama.cpp": "no: it hard-codes un-normalised weights for this class, and wants an untied output head",
    },
)
QWEN3_MOE = MoEClass(
    "Qwen3MoeForCausalLM",
    MLP_EXPERTS,
    expert_width="moe_intermediate_size",
    settings={**NORMALISED, "decoder_sparse_step": 1},
    dense_layers="mlp_only_layers",
    read_by_getattr=("head_dim",),
    engines={"transformers": "everything", "vLLM": "everything", "llama.cpp": "only if every layer is an MoE layer"},
)
MELLUM = MoEClass(
    "MellumForCausalLM",
    MLP_EXPERTS,
    expert_width="moe_intermediate_size",
    settings=NORMALISED,
    dense_layers="mlp_layer_types",
    engines={"transformers": "everything", "vLLM": "not known", "llama.cpp": "not known"},
)
FLEX_OLMO = MoEClass(
    "FlexOlmoForCausalLM",
    MLP_EXPERTS,
    settings=NORMALISED,
    read_by_getattr=("head_dim",),
    engines={
        "transformers": "everything",
        "vLLM": "un-normalised weights, whose sum the norm after the FFN takes out at the start only: train with "
        "norm_topk_prob=False for it",
        "llama.cpp": "as vLLM",
    },
)

# ------------------------------------------------------------------------------------------------------------ families


OWN_CODE = "a modelling file of your own, loaded with trust_remote_code"


def llama(fields: Fields) -> Target:
    fields.carry(*DECODER)
    fields.rope()
    fields.require("mlp_bias", False, because="no stock MoE class has such experts with biases", nearest=OWN_CODE)
    fields.require("rope_interleaved", False, because="Llama's layers rotate halves")
    fields.replace("intermediate_size", "the experts' width", intermediate_size=fields["intermediate_size"])
    if not fields["attention_bias"]:
        fields.drop("attention_bias", because="it is False, and Mixtral has none")
        return Target(MIXTRAL)
    # Mixtral has no attention biases; GraniteMoe is Llama's block with four multipliers, neutral here.
    fields.carry("attention_bias")
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields.set(
        attention_multiplier=head_dim**-0.5, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0
    )
    return Target(
        GRANITE_MOE, engines={"vLLM": "attention bias not checked", "llama.cpp": "attention bias not checked"}
    )


def mistral(fields: Fields) -> Target:
    fields.carry(*DECODER, "sliding_window")
    fields.rope()
    fields.replace("intermediate_size", "the experts' width", intermediate_size=fields["intermediate_size"])
    if fields["sliding_window"] is None:
        return Target(MIXTRAL)
    return Target(MIXTRAL, engines={"llama.cpp": "no sliding window: equal up to its length only"})


def qwen2(fields: Fields) -> Target:
    fields.carry(*DECODER, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    _check_layer_types(fields)
    fields.rope()
    fields.replace(
        "intermediate_size",
        "the experts' width, and that of layers that stay dense",
        intermediate_size=fields["intermediate_size"],
        moe_intermediate_size=fields["intermediate_size"],
    )
    fields.set(qkv_bias=True)
    return Target(QWEN2_MOE)


def qwen3(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    _check_layer_types(fields)
    fields.replace(
        "intermediate_size",
        "the experts' width, and that of layers that stay dense",
        intermediate_size=fields["intermediate_size"],
        moe_intermediate_size=fields["intermediate_size"],
    )
    fields.drop("max_window_layers", because="layer_types says which layers have a window")
    if "sliding_attention" not in fields["layer_types"]:
        fields.rope()
        fields.drop("layer_types", "sliding_window", "use_sliding_window", because="all layers see everything")
        return Target(QWEN3_MOE)
    # Qwen3Moe has one window for all layers or none; Mellum is the same block with a type for each layer.
    fields.rope(layer_types=("full_attention", "sliding_attention"))
    fields.carry("layer_types", "sliding_window")
    fields.drop("use_sliding_window", because="layer_types says which layers have a window")
    return Target(MELLUM)


def olmo2(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    fields.rope()
    fields.replace("intermediate_size", "the experts' width", intermediate_size=fields["intermediate_size"])
    return Target(FLEX_OLMO)


def olmo3(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    fields.replace("intermediate_size", "the experts' width", intermediate_size=fields["intermediate_size"])
    _check_layer_types(fields)
    kinds = set(fields["layer_types"])
    ropes = [fields["rope_parameters"][kind] for kind in sorted(kinds)]
    if any(rope != ropes[0] for rope in ropes):
        refuse(
            "rope_parameters differ between full and sliding layers, and FlexOlmo has one rotation for all",
            OWN_CODE,
        )
    fields.replace("rope_parameters", "the one that all layers share", rope_parameters=_copy.deepcopy(ropes[0]))
    fields.drop("layer_types", because="FlexOlmo's layers see everything")
    window = fields["sliding_window"] if "sliding_attention" in kinds else None
    fields.drop("sliding_window", because="FlexOlmo has none; see max_position_embeddings")
    if window is None or window >= fields["max_position_embeddings"]:
        return Target(FLEX_OLMO, exact_up_to=window)
    fields.replace("max_position_embeddings", f"cut to the window, {window}", max_position_embeddings=window)
    return Target(
        FLEX_OLMO,
        exact_up_to=window,
        notes=(f"FlexOlmo has no sliding window: the same function up to {window} tokens, not beyond.",),
    )


def granite(fields: Fields) -> Target:
    fields.carry(
        *DECODER,
        "attention_bias",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
    )
    fields.rope()
    fields.require("mlp_bias", False, because="GraniteMoe's experts have no biases", nearest=OWN_CODE)
    fields.replace("intermediate_size", "the experts' width", intermediate_size=fields["intermediate_size"])
    return Target(GRANITE_MOE)


def _check_layer_types(fields: Fields) -> None:
    unknown = set(fields["layer_types"]) - {"full_attention", "sliding_attention"}
    if unknown:
        refuse(f"layer_types has {', '.join(sorted(unknown))}: only full_attention and sliding_attention are known")
    if "sliding_attention" in fields["layer_types"] and fields["sliding_window"] is None:
        refuse(
            "layer_types has sliding layers but there is no sliding_window (use_sliding_window=False?)",
            "give it a window",
        )


FAMILIES: dict[str, Callable[[Fields], Target]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "granite": granite,
}

# ----------------------------------------------------------------------------------------------------------- the engine


def configure(config, rule: Callable[[Fields], Target], *, num_experts: int, top_k: int, layers: tuple[int, ...]):
    """(Target, the MoE's configuration, the account of the dense fields); Refusal where it cannot be done.

    `layers` are the indices of the MoE layers; the others stay dense where the class knows how.
    """
    import transformers

    fields = Fields(config)
    target = rule(fields)
    fields.finish()
    moe, depth = target.moe, config.num_hidden_layers
    if num_experts < moe.fewest_experts:
        refuse(f"{moe.name}'s router cannot run with {num_experts} expert", f"at least {moe.fewest_experts} experts")
    settings = {**moe.settings, moe.top_k: top_k}
    if len(layers) < depth:
        if moe.dense_layers is None:
            refuse(
                f"{moe.name} has no dense layers, so all {depth} layers become MoE layers or none", "leave out layers="
            )
        dense = [i for i in range(depth) if i not in layers]
        if moe.dense_layers == "mlp_only_layers":
            settings["mlp_only_layers"] = dense
        else:
            settings["mlp_layer_types"] = ["dense" if i in dense else "sparse" for i in range(depth)]
    config_class = getattr(transformers, moe.name).config_class
    values = {**fields.target, **settings}
    declared = set(config_class.__dataclass_fields__) | set(config_class.attribute_map) | {"output_attentions"}
    undeclared = sorted(
        name for name in values if name not in declared | set(moe.read_by_getattr) and values[name] is not None
    )
    if undeclared:
        raise AssertionError(f"the rule sets {', '.join(undeclared)}, which {config_class.__name__} does not have")
    moe_config = config_class(**values, num_experts=num_experts, num_local_experts=num_experts)
    # Written past the class's alias, so that config.json gets both names: each is what some reader looks for.
    vars(moe_config).update(num_experts=num_experts, num_local_experts=num_experts)
    moe_config.architectures = [moe.name]
    return target, moe_config, fields.account


def hub_shapes(config, class_name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(Name -> shape of each tensor that `save_pretrained` writes for this class, tied name -> its twin); no memory."""
    import transformers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = getattr(transformers, class_name)._from_config(_copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in hub_tensors(model).items()}, dict(model.all_tied_weights_keys)


def hub_tensors(model) -> dict[str, Tensor]:
    """A model's tensors under the names that `save_pretrained` writes, a tied one once."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tensor for name, tensor in tensors.items() if name not in model.all_tied_weights_keys}


def _pattern(name: str) -> re.Pattern:
    escaped = re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped + r"\Z")


def build(
    target: Target, dense_shapes: Mapping[str, tuple], moe_shapes: Mapping[str, tuple], how: Initialisation
) -> tuple[TargetTensor, ...]:
    """The target tensors, layer by layer. ValueError naming one without a source, or a source that nothing uses."""
    table = [(_pattern(name), rule) for name, rule in {**target.moe.tensors, **target.tensors}.items()]
    made = []
    for name, shape in moe_shapes.items():
        match, rule = next(((m, rule) for pattern, rule in table if (m := pattern.match(name))), (None, None))
        layer = re.search(r"\.layers\.(\d+)\.", name)
        layer = None if layer is None else int(layer[1])
        if rule is None:
            rule, sources = kept(name), (name,)
        else:
            sources = tuple(source.format(**match.groupdict()) for source in rule.sources)
        missing = [source for source in sources if source not in dense_shapes]
        if missing:
            raise ValueError(
                f"{name} of {target.moe.name} would be made from {missing[0]}, which the dense model does not have"
            )
        made.append(TargetTensor(name, tuple(shape), sources, rule.kind, layer, rule, how))
    unused = sorted(set(dense_shapes) - {source for tensor in made for source in tensor.sources})
    if unused:
        raise ValueError(
            f"{unused[0]} of the dense model is used nowhere in {target.moe.name} ({len(unused)} such tensors)"
        )
    return tuple(sorted(made, key=lambda t: (t.layer is not None, t.layer or 0)))
