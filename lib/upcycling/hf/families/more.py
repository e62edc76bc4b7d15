"""The families whose tensors are changed on the way; see `rules.py` for what a rule is.

Two moves recur. A layer that rotates neighbouring pairs becomes one that rotates halves by sorting the rows of q and
k within each head (`paired_to_halves`; the scores q·k do not see a common order). A class that always has a shared
expert gets one whose `down_proj` is 0: it adds nothing at first, and learns, since its other two matrices
are copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .base import Fields, Refusal, Rule, Target, kept
from .classes import CLASSES
from .rules import MIXTRAL, Own

ATTENTION, MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
GLM4_MOE = CLASSES["Glm4MoeForCausalLM"]

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


# ------------------------------------------------------------------------------------------------------------ families


def phi3(fields: Fields, target: Target) -> Target:
    rope = copy.deepcopy(fields["rope_parameters"])
    if rope["rope_type"] == "default":
        rope.pop("original_max_position_embeddings", None)
    share = rope.pop("partial_rotary_factor", 1.0)
    fields.drop("partial_rotary_factor", because="rope_parameters has it")
    q, k = (fields[name] * fields.head_dim() for name in ("num_attention_heads", "num_key_value_heads"))
    width = fields["intermediate_size"]
    qkv, gate_up = ATTENTION + "qkv_proj.weight", MLP + "gate_up_proj.weight"
    attention = {
        ATTENTION + "q_proj.weight": kept(qkv, transform=partial(rows_of, start=0, stop=q)),
        ATTENTION + "k_proj.weight": kept(qkv, transform=partial(rows_of, start=q, stop=q + k)),
        ATTENTION + "v_proj.weight": kept(qkv, transform=partial(rows_of, start=q + k, stop=q + 2 * k)),
    }
    halves = {
        MLP + "gate_proj.weight": (gate_up, partial(rows_of, start=0, stop=width)),
        MLP + "up_proj.weight": (gate_up, partial(rows_of, start=width, stop=2 * width)),
    }
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
        fields.experts_width("intermediate_size")
        engines = {} if fields["sliding_window"] is None else {"llama.cpp": "no sliding window: equal up to its length"}
        return Target(MIXTRAL, _same_with(MIXTRAL.tensors, halves) | attention, engines=engines, notes=notes)
    # Only a part of each head is rotated: Mixtral rotates all of it, Glm4Moe does not.
    window = fields["sliding_window"]
    if window is not None and window < fields["max_position_embeddings"]:
        raise Refusal(
            f"sliding_window={window} and rope_parameters with partial_rotary_factor={share}: Mixtral has no partial "
            "rotation, Glm4Moe no window",
            "the model up to its window: set max_position_embeddings to it and sliding_window to None",
        )
    fields.drop("sliding_window", because="it is no shorter than the context")
    fields.replace("rope_parameters", "carried", rope_parameters={**rope, "partial_rotary_factor": share})
    fields.target.update(attention_bias=False, use_qk_norm=False)
    fields.experts_width("intermediate_size", "moe_intermediate_size")
    return Target(GLM4_MOE, _same_with(GLM4_MOE.tensors, halves) | attention, notes=notes, exact_up_to=window)


def _same_with(tensors: Mapping[str, Rule], fused: Mapping[str, tuple[str, Callable]]) -> dict[str, Rule]:
    """The table with some source tensors cut out of others: source -> (the other, how)."""
    changed = {}
    for name, rule in tensors.items():
        if rule.transform is None and len(rule.sources) == 1 and rule.sources[0] in fused:
            source, transform = fused[rule.sources[0]]
            changed[name] = replace(rule, sources=(source,), transform=transform)
    return changed


def gemma(fields: Fields, target: Target) -> Target:
    norms = ("model.layers.{layer}.input_layernorm", "model.layers.{layer}.post_attention_layernorm", "model.norm")
    tensors = {name + ".weight": kept(name + ".weight", transform=one_plus) for name in norms}
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = kept(embedding, transform=partial(times_root, width=fields["hidden_size"]))
    if fields["tie_word_embeddings"]:
        fields.replace("tie_word_embeddings", "untied: only the embedding is scaled", tie_word_embeddings=False)
        tensors["lm_head.weight"] = kept(embedding)
    return replace(target, tensors=tensors)


def helium(fields: Fields, target: Target) -> Target:
    return replace(target, tensors=_sorted_heads(paired_to_halves, fields.head_dim(), "weight"))


def smollm3(fields: Fields, target: Target) -> Target:
    if "sliding_attention" in fields["layer_types"]:
        raise Refusal(
            "layer_types has layers with a sliding window, and Llama4 has chunks instead",
            "the model with use_sliding_window=False",
        )
    fields.carry("layer_types")
    fields.drop("use_sliding_window", "sliding_window", because="no layer has a window")
    # no layer is chunked; None fails in 5.23
    fields.target["attention_chunk_size"] = fields["max_position_embeddings"]
    fields.experts_width("intermediate_size", "intermediate_size_mlp")
    parts = ["weight", "bias"] if fields["attention_bias"] else ["weight"]
    return replace(target, tensors=_sorted_heads(halves_to_paired, fields.head_dim(), *parts))


def _sorted_heads(order: Callable[..., Tensor], head_dim: int, *parts: str) -> dict[str, Rule]:
    """The table for q and k (their weights, or biases too) with the rows of each head in another order."""
    names = [f"{ATTENTION}{name}_proj.{part}" for name in ("q", "k") for part in parts]
    return {name: kept(name, transform=partial(order, head_dim=head_dim)) for name in names}


OWN: dict[str, Own] = {function.__name__: function for function in (phi3, gemma, helium, smollm3)}
