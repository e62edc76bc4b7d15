"""The remaining families' rules; see `families` for what a rule is.

Three moves recur. A layer that rotates neighbouring pairs becomes one that rotates halves by sorting the rows of q and
k within each head (`paired_to_halves`; the scores q·k do not see a common order). A class that always has a shared
expert gets one whose `down_proj` is 0: it adds nothing at first, and learns, since its other two matrices
are copies. A field that a hub file has but no transformers class reads is required to be what the class does, or
dropped, by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .base import DECODER, Fields, Rule, Target, kept, refuse
from .classes import CLASSES
from .rules import MIXTRAL

ATTENTION, MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
GLM4_MOE, COHERE2_MOE = CLASSES["Glm4MoeForCausalLM"], CLASSES["Cohere2MoeForCausalLM"]
NO_DROPOUT = "dropout, a setting of training; the MoE class has none there"
NOT_READ = "transformers' classes do not read it"
SILENT_NOTE = "The shared expert that this class always has starts at zero output and costs one more expert per token."

# ---------------------------------------------------------------------------------------------------- transformations


def paired_to_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k matrix (or bias) whose heads rotate pairs (2i, 2i+1), for a class that rotates (i, i + C/2)."""
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def halves_to_paired(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `paired_to_halves`."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def one_plus(weight: Tensor) -> Tensor:
    return 1 + weight


def times_root(embedding: Tensor, width: int) -> Tensor:
    """Gemma multiplies embeddings by sqrt(width), rounded to their dtype."""
    return embedding * torch.tensor(width**0.5).to(embedding.dtype)


def _head_dim(fields: Fields) -> int:
    """The width of a head, written out: the target's own default is another, or none."""
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields.replace("head_dim", "carried", head_dim=head_dim)
    return head_dim


def _no_biases(fields: Fields, *names: str, target: str) -> None:
    for name in names:
        fields.require(name, False, None, because=f"{target} has no bias there")


# ------------------------------------------------------------------------------------------------------------ families


def qwen3_5(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias", "layer_types", "rope_parameters")
    fields.carry(*(f"linear_{name}" for name in ("conv_kernel_dim", "key_head_dim", "value_head_dim")))
    fields.carry("linear_num_key_heads", "linear_num_value_heads")
    width = fields["intermediate_size"]
    fields.replace(
        "intermediate_size",
        "the experts' width, and the shared expert's",
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
    )
    fields.require("attn_output_gate", True, because="Qwen3.5-MoE's attention always has its gate")
    fields.require("mlp_only_layers", [], None, because="all layers of a dense model are dense")
    fields.drop("full_attention_interval", because="layer_types says which layers attend")
    fields.drop("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", because=NOT_READ)
    return Target(CLASSES["Qwen3_5MoeForCausalLM"], notes=(SILENT_NOTE,))


def phi3(fields: Fields) -> Target:
    fields.carry(*DECODER)
    head_dim = _head_dim(fields)
    fields.drop("resid_pdrop", "embd_pdrop", because=NO_DROPOUT)
    fields.drop("original_max_position_embeddings", because="rope_parameters has it where it counts")
    _no_biases(fields, "attention_bias", target="Phi-3")
    rope = copy.deepcopy(fields["rope_parameters"])
    if rope["rope_type"] == "default":
        rope.pop("original_max_position_embeddings", None)
    share = rope.pop("partial_rotary_factor", 1.0)
    fields.drop("partial_rotary_factor", because="rope_parameters has it")
    q, k = (fields[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    width = fields["intermediate_size"]
    qkv, gate_up = ATTENTION + "qkv_proj.weight", MLP + "gate_up_proj.weight"
    attention = {
        ATTENTION + "q_proj.weight": kept(qkv, transform=partial(rows_of, start=0, stop=q)),
        ATTENTION + "k_proj.weight": kept(qkv, transform=partial(rows_of, start=q, stop=q + k)),
        ATTENTION + "v_proj.weight": kept(qkv, transform=partial(rows_of, start=q + k, stop=q + 2 * k)),
    }
    gate = (gate_up, partial(rows_of, start=0, stop=width))
    up = (gate_up, partial(rows_of, start=width, stop=2 * width))
    notes: tuple[str, ...] = ()
    if rope["rope_type"] == "longrope":
        switch = rope["original_max_position_embeddings"]
        notes = (
            f"Longer than {switch} tokens, all positions turn by other angles. When generate() crosses that length, "
            "Phi-3 computes its cache anew and this class does not, so the text after it may differ; single passes "
            "agree.",
        )
    if share == 1:
        fields.carry("sliding_window")
        fields.replace("rope_parameters", "carried", rope_parameters=rope)
        fields.experts_width()
        tensors = _same_with(MIXTRAL.tensors, {MLP + "gate_proj.weight": gate, MLP + "up_proj.weight": up})
        engines = {} if fields["sliding_window"] is None else {"llama.cpp": "no sliding window: equal up to its length"}
        return Target(MIXTRAL, {**tensors, **attention}, engines=engines, notes=notes)
    # Only a part of each head is rotated: Mixtral rotates all of it, Glm4Moe does not.
    window = fields["sliding_window"]
    if window is not None and window < fields["max_position_embeddings"]:
        refuse(
            f"sliding_window={window} and rope_parameters with partial_rotary_factor={share}: Mixtral has no partial "
            "rotation, Glm4Moe no window",
            "the model up to its window: set max_position_embeddings to it and sliding_window to None",
        )
    fields.drop("sliding_window", because="it is no shorter than the context")
    fields.replace("rope_parameters", "carried", rope_parameters={**rope, "partial_rotary_factor": share})
    fields.set(attention_bias=False, use_qk_norm=False)
    fields.experts_width(moe_intermediate_size=width)
    tensors = _same_with(GLM4_MOE.tensors, {MLP + "gate_proj.weight": gate, MLP + "up_proj.weight": up})
    return Target(GLM4_MOE, {**tensors, **attention}, notes=(SILENT_NOTE, *notes), exact_up_to=window)


def _same_with(tensors: Mapping[str, Rule], fused: Mapping[str, tuple[str, Callable]]) -> dict[str, Rule]:
    """The table with some source tensors cut out of others: source -> (the other, how)."""
    changed = {}
    for name, rule in tensors.items():
        if rule.transform is None and len(rule.sources) == 1 and rule.sources[0] in fused:
            source, transform = fused[rule.sources[0]]
            changed[name] = replace(rule, sources=(source,), transform=transform)
    return changed


def gemma(fields: Fields) -> Target:
    fields.carry(*DECODER)
    fields.rope()
    _no_biases(fields, "attention_bias", target="Mixtral")
    fields.require("use_bidirectional_attention", None, False, because="Mixtral's attention is causal")
    fields.drop("hidden_activation", because="hidden_act says it")
    fields.experts_width()
    norms = ("model.layers.{layer}.input_layernorm", "model.layers.{layer}.post_attention_layernorm", "model.norm")
    tensors = {name + ".weight": kept(name + ".weight", transform=one_plus) for name in norms}
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = kept(embedding, transform=partial(times_root, width=fields["hidden_size"]))
    if fields["tie_word_embeddings"]:
        fields.replace("tie_word_embeddings", "untied: only the embedding is scaled", tie_word_embeddings=False)
        tensors["lm_head.weight"] = kept(embedding)
    return Target(MIXTRAL, tensors, notes=("In bfloat16 the norms' 1 + w is rounded; in float32 it is not.",))


def gemma4(fields: Fields) -> Target:
    fields.carry(*DECODER, "hidden_activation", "rope_parameters", "attention_bias", "sliding_window", "layer_types")
    fields.carry("final_logit_softcapping", "use_bidirectional_attention", "attention_k_eq_v", "num_kv_shared_layers")
    fields.carry("vocab_size_per_layer_input", "hidden_size_per_layer_input", "per_layer_config", "use_double_wide_mlp")
    fields.require("use_bidirectional_attention", None, "vision", because="only causal models are known here")
    fields.require("enable_moe_block", False, because="the model has experts already")
    fields.drop("num_experts", "top_k_experts", "moe_intermediate_size", because="only for models with experts")
    if fields["use_double_wide_mlp"] and fields["num_kv_shared_layers"]:
        refuse("use_double_wide_mlp gives some layers a wider FFN, and all experts of Gemma4 have one width")
    if fields["rms_norm_eps"] > 1e-6:
        refuse(
            f"rms_norm_eps={fields['rms_norm_eps']}: Gemma4 norms an expert layer's output twice, exact only as eps → 0"
        )
    fields.experts_width(moe_intermediate_size=fields["intermediate_size"])
    return Target(
        CLASSES["Gemma4ForCausalLM"],
        notes=(
            "The dense FFN stays and each token's experts join it with half the weight; all of it is normed once more, "
            "so that outputs whose mean square is not far above rms_norm_eps differ by the ratio.",
        ),
    )


def cohere2(fields: Fields) -> Target:
    _cohere(fields)
    fields.carry("sliding_window", "layer_types")
    return Target(COHERE2_MOE)


def cohere(fields: Fields) -> Target:
    _cohere(fields)
    fields.require("use_qk_norm", False, None, because="Cohere2Moe has no norms of queries and keys")
    # Cohere2Moe rotates only where there is a window; one as long as the context hides nothing.
    context = fields["max_position_embeddings"]
    fields.set(layer_types=["sliding_attention"] * fields["num_hidden_layers"], sliding_window=context)
    note = "Every layer has a window as long as the context, because Cohere2Moe rotates only in such layers."
    return Target(COHERE2_MOE, exact_up_to=context, notes=(note,))


def _cohere(fields: Fields) -> None:
    """What both have in common, the fields of their hub files included."""
    fields.carry(*(name for name in DECODER if name != "rms_norm_eps"), "attention_bias", "layer_norm_eps")
    fields.carry("logit_scale", "rope_parameters")
    _head_dim(fields)
    fields.experts_width(prefix_dense_intermediate_size=fields["intermediate_size"])
    fields.require("rotary_pct", 1.0, because="Cohere2Moe rotates whole heads")
    fields.require("position_embedding_type", "rope_gptj", because="Cohere2Moe rotates pairs")
    for name in ("use_parallel_block", "use_gated_activation", "use_embedding_sharing", "use_parallel_embedding"):
        fields.require(name, True, because="it is what Cohere2Moe does")
    fields.drop("cache_implementation", "layer_switch", "order_of_interleaved_layers", because=NOT_READ)
    fields.drop("sliding_window_pattern", because="layer_types says which layers have a window")


def ernie4_5(fields: Fields) -> Target:
    fields.carry(*DECODER)
    fields.rope()
    fields.require("use_bias", False, None, because="Ernie4_5_Moe's experts have no biases")
    fields.experts_width(moe_intermediate_size=fields["intermediate_size"])
    return Target(CLASSES["Ernie4_5_MoeForCausalLM"])


def lfm2(fields: Fields) -> Target:
    fields.carry(*(name for name in DECODER if name not in ("rms_norm_eps", "hidden_act")))
    fields.carry("norm_eps", "conv_bias", "conv_L_cache", "layer_types")
    fields.rope()
    fields.drop("full_attn_idxs", because="layer_types says which layers attend")
    width = fields["intermediate_size"]
    if fields["block_auto_adjust_ff_dim"]:  # as Lfm2MLP computes it
        width = int(2 * width / 3)
        if fields["block_ffn_dim_multiplier"] is not None:
            unit = fields["block_multiple_of"]
            width = unit * ((int(fields["block_ffn_dim_multiplier"] * width) + unit - 1) // unit)
    fields.experts_width(width, moe_intermediate_size=width)
    fields.drop(
        "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", because="in the experts' width"
    )
    fields.require("block_use_swiglu", True, because="LFM2's FFN is gated")
    fields.drop("block_dim", "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", because=NOT_READ)
    fields.drop("block_use_xavier_init", "conv_use_xavier_init", "conv_dim", "conv_dim_out", because=NOT_READ)
    fields.drop("num_heads", "use_pos_enc", because=NOT_READ)
    return Target(
        CLASSES["Lfm2MoeForCausalLM"],
        notes=("Lfm2Moe divides the combine weights by their sum + 1e-6, so outputs are lower by about 1e-6 of them.",),
    )


def hunyuan(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias", "rope_parameters", "eod_token_id")
    _head_dim(fields)
    fields.experts_width()
    return Target(CLASSES["HunYuanMoEV1ForCausalLM"], notes=(SILENT_NOTE,))


def seed_oss(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias")
    _no_biases(fields, "attention_out_bias", "mlp_bias", target="Glm4Moe")
    fields.drop("residual_dropout", because=NO_DROPOUT)
    fields.rope()
    # Glm4Moe would rotate half of each head by default
    fields.target["rope_parameters"]["partial_rotary_factor"] = 1.0
    fields.set(use_qk_norm=False)
    fields.experts_width(moe_intermediate_size=fields["intermediate_size"])
    return Target(GLM4_MOE, notes=(SILENT_NOTE,))


def helium(fields: Fields) -> Target:
    fields.carry(*DECODER)
    fields.rope()
    _no_biases(fields, "attention_bias", "mlp_bias", target="Mixtral")
    fields.experts_width()
    sort = partial(paired_to_halves, head_dim=_head_dim(fields))
    tensors = {ATTENTION + n + ".weight": kept(ATTENTION + n + ".weight", transform=sort) for n in ("q_proj", "k_proj")}
    return Target(MIXTRAL, tensors)


def smollm3(fields: Fields) -> Target:
    fields.carry(*DECODER, "attention_bias", "no_rope_layers", "no_rope_layer_interval")
    fields.rope()
    head_dim = _head_dim(fields)
    _no_biases(fields, "mlp_bias", target="Llama4")
    if "sliding_attention" in fields["layer_types"]:
        refuse(
            "layer_types has layers with a sliding window, and Llama4 has chunks instead",
            "the model with use_sliding_window=False",
        )
    fields.carry("layer_types")
    fields.drop("use_sliding_window", "sliding_window", because="no layer has a window")
    fields.set(attention_chunk_size=fields["max_position_embeddings"])  # no layer is chunked; None fails in 5.23
    fields.experts_width(intermediate_size_mlp=fields["intermediate_size"])
    parts = ["weight", "bias"] if fields["attention_bias"] else ["weight"]
    names = [f"{ATTENTION}{n}_proj.{part}" for n in ("q", "k") for part in parts]
    sort = partial(halves_to_paired, head_dim=head_dim)
    return Target(
        CLASSES["Llama4ForCausalLM"],
        {name: kept(name, transform=sort) for name in names},
        notes=(
            "A residual MoE: the dense FFN is the shared expert, the routed experts (its copies with down_proj=0) add "
            "to it; Llama4 weights them by sigmoid, not normalised, so copies could not replace it.",
        ),
    )


FAMILIES: dict[str, Callable[[Fields], Target]] = {
    "qwen3_5_text": qwen3_5,
    "phi3": phi3,
    "gemma": gemma,
    "gemma4_text": gemma4,
    "cohere": cohere,
    "cohere2": cohere2,
    "ernie4_5": ernie4_5,
    "lfm2": lfm2,
    "hunyuan_v1_dense": hunyuan,
    "seed_oss": seed_oss,
    "helium": helium,
    "smollm3": smollm3,
}
