"""The rules: which stock transformers MoE class computes the same function as a dense model, from which tensors.

A family is one function `rule(fields) -> Target`. It reads a dense configuration through `Fields`, where every field
has to be carried, replaced, required or dropped *by name* (what is left over and not at its default is an error), and
returns an MoE class of `classes.json`, where a table says what its tensors are made from, in the names that
`save_pretrained` writes. A family whose tensors have to be changed gives its own table, which goes before the class's:

    {"model.norm.weight": kept("model.norm.weight", transform=one_plus)}

A target tensor that no table names is a copy of the source tensor of the same name. So a rule is stated per target
tensor, with the source tensors that it is made from, and the in-memory path and the streaming one (shard by shard)
carry out the same list: `engine.build(target, …) -> tuple[TargetTensor, …]`. It fails by name when a source tensor is
used by no target, or a target has no source.

To add a family: write its function and add it to a module's `FAMILIES` (model_type -> rule), its class to
`classes.json` if it is not there, and a line of tiny configurations to the tests' `tiny_families.json`.
`refuse(reason, nearest)` ends a rule where no stock class fits.
"""

from __future__ import annotations

import copy as _copy
from collections.abc import Callable

from .base import DECODER, Fields, Target, refuse
from .classes import CLASSES

MIXTRAL, GRANITE_MOE = CLASSES["MixtralForCausalLM"], CLASSES["GraniteMoeForCausalLM"]
STAY_DENSE = ", and that of layers that stay dense"
OWN_CODE = "a modelling file of your own, loaded with trust_remote_code"

# ------------------------------------------------------------------------------------------------------------ families


def llama(fields: Fields) -> Target:
    fields.carry(*DECODER)
    fields.rope()
    fields.require("mlp_bias", False, because="no stock MoE class has such experts with biases", nearest=OWN_CODE)
    fields.require("rope_interleaved", False, because="Llama's layers rotate halves")
    fields.experts_width()
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
    fields.experts_width()
    if fields["sliding_window"] is None:
        return Target(MIXTRAL)
    return Target(MIXTRAL, engines={"llama.cpp": "no sliding window: equal up to its length only"})


def qwen2(fields: Fields) -> Target:
    fields.carry(*DECODER, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    _check_layer_types(fields)
    fields.rope()
    fields.experts_width(also=STAY_DENSE, moe_intermediate_size=fields["intermediate_size"])
    fields.set(qkv_bias=True)
    return Target(CLASSES["Qwen2MoeForCausalLM"])


def qwen3(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    _check_layer_types(fields)
    fields.experts_width(also=STAY_DENSE, moe_intermediate_size=fields["intermediate_size"])
    fields.drop("max_window_layers", because="layer_types says which layers have a window")
    if "sliding_attention" not in fields["layer_types"]:
        fields.rope()
        fields.drop("layer_types", "sliding_window", "use_sliding_window", because="all layers see everything")
        return Target(CLASSES["Qwen3MoeForCausalLM"])
    # Qwen3Moe has one window for all layers or none; Mellum is the same block with a type for each layer.
    fields.rope(layer_types=("full_attention", "sliding_attention"))
    fields.carry("layer_types", "sliding_window")
    fields.drop("use_sliding_window", because="layer_types says which layers have a window")
    return Target(CLASSES["MellumForCausalLM"])


def olmo2(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    fields.rope()
    fields.experts_width()
    return Target(CLASSES["FlexOlmoForCausalLM"])


def olmo3(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    fields.experts_width()
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
        return Target(CLASSES["FlexOlmoForCausalLM"], exact_up_to=window)
    fields.replace("max_position_embeddings", f"cut to the window, {window}", max_position_embeddings=window)
    return Target(
        CLASSES["FlexOlmoForCausalLM"],
        exact_up_to=window,
        notes=(f"FlexOlmo has no sliding window: the same function up to {window} tokens, not beyond.",),
    )


def granite(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias", "embedding_multiplier", "logits_scaling")
    fields.carry("residual_multiplier", "attention_multiplier")
    fields.rope()
    fields.require("mlp_bias", False, because="GraniteMoe's experts have no biases", nearest=OWN_CODE)
    fields.experts_width()
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
