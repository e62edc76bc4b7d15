"""A family's rule: which stock transformers MoE class computes the same function as a dense model, from which tensors.

Most of it is a row of `families.json`, by model type: steps that account for the dense configuration's fields, taken in
the row's order through `Fields`, where every field has to be carried, replaced, required or dropped *by name* (what is
left over and not at its default is an error), and the MoE class.

    "like"     first the steps of that other row
    "carry"    these fields, "*" being `DECODER`, without those of "except"
    "rope"     rope_parameters, with these changes
    "require"  field -> the values it may have ("allowed"), why, and what comes nearest otherwise
    "drop"     reason -> fields
    "width"    the target's fields that get the FFN's width, "width_also": whose that is beside the experts'
    "head_dim" written out; "known_layer_types": the layers see everything, or a window; "set": fields of the target
    "class"    of `classes.json`, where a table says what its tensors are made from, in the names that
               `save_pretrained` writes; "notes" for whoever trains the MoE

What a row cannot say is a function `own(fields, target) -> Target` in `OWN`, here or in `more.py`, called after the
row's steps. A family whose tensors have to be changed gives its own table there, which goes before the class's:

    {"model.norm.weight": kept("model.norm.weight", transform=one_plus)}

A target tensor that no table names is a copy of the source tensor of the same name. So a rule is stated per target
tensor, with the source tensors that it is made from, and the in-memory path and the streaming one (shard by shard)
carry out the same list: `engine.build(target, …) -> tuple[TargetTensor, …]`. It fails by name when a source tensor is
used by no target, or a target has no source.

To add a family: write its row, its class in `classes.json` if it is not there, and a line of tiny configurations in the
tests' `tiny_families.json`. `raise Refusal(reason, nearest)` ends a rule where no stock class fits.
"""

from __future__ import annotations

import copy as _copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .base import DECODER, Fields, Refusal, Target, table
from .classes import CLASSES

ROWS: dict[str, dict[str, Any]] = table("families.json")
MIXTRAL = CLASSES["MixtralForCausalLM"]
WINDOWS = "layer_types says which layers have a window"
Own = Callable[[Fields, Target], Target]


def rule_of(kind: str, own: Own | None = None) -> Callable[[Fields], Target]:
    """The rule of a model type: its row's steps, then what is its own."""

    def rule(fields: Fields) -> Target:
        row = ROWS[kind]
        take_steps(fields, row)
        target = Target(CLASSES[row["class"]], notes=tuple(row.get("notes", ())))
        return target if own is None else own(fields, target)

    return rule


def take_steps(fields: Fields, row: dict[str, Any]) -> None:
    """Carry out a row. AssertionError for a step that is none."""
    for step, what in row.items():
        if step == "like":
            take_steps(fields, ROWS[what])
        elif step == "carry":
            names = [name for entry in what for name in (DECODER if entry == "*" else [entry])]
            fields.carry(*(name for name in names if name not in row.get("except", ())))
        elif step == "rope":
            fields.rope()
            fields.target["rope_parameters"].update(what)
        elif step == "require":
            for name, case in what.items():
                fields.require(name, *case["allowed"], because=case["because"], nearest=case.get("nearest"))
        elif step == "drop":
            for reason, names in what.items():
                fields.drop(*names, because=reason)
        elif step == "width":
            fields.experts_width(*what, also=row.get("width_also", ""))
        elif step == "head_dim":
            fields.head_dim()
        elif step == "known_layer_types":
            _check_layer_types(fields)
        elif step == "set":
            fields.target.update(**what)
        elif step not in ("except", "width_also", "class", "notes"):
            raise AssertionError(f"{step} is no step of a family's row")


def _check_layer_types(fields: Fields) -> None:
    unknown = sorted(set(fields["layer_types"]) - {"full_attention", "sliding_attention"})
    if unknown:
        raise Refusal(f"layer_types has {', '.join(unknown)}: only full_attention and sliding_attention are known")
    if "sliding_attention" in fields["layer_types"] and fields["sliding_window"] is None:
        raise Refusal(
            "layer_types has sliding layers but there is no sliding_window (use_sliding_window=False?)",
            "give it a window",
        )


# ------------------------------------------------------------------------------------------- what rows cannot say


def llama(fields: Fields, target: Target) -> Target:
    if not fields["attention_bias"]:
        fields.drop("attention_bias", because="it is False, and Mixtral has none")
        return target
    # Mixtral has no attention biases; GraniteMoe is Llama's block with four multipliers, neutral here.
    fields.carry("attention_bias")
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields.target.update(
        attention_multiplier=head_dim**-0.5, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0
    )
    engines = dict.fromkeys(("vLLM", "llama.cpp"), "attention bias not checked")
    return Target(CLASSES["GraniteMoeForCausalLM"], engines=engines)


def mistral(fields: Fields, target: Target) -> Target:
    if fields["sliding_window"] is None:
        return target
    return replace(target, engines={"llama.cpp": "no sliding window: equal up to its length only"})


def qwen3(fields: Fields, target: Target) -> Target:
    if "sliding_attention" not in fields["layer_types"]:
        fields.rope()
        fields.drop("layer_types", "sliding_window", "use_sliding_window", because="all layers see everything")
        return target
    # Qwen3Moe has one window for all layers or none; Mellum is the same block with a type for each layer.
    fields.rope(layer_types=("full_attention", "sliding_attention"))
    fields.carry("layer_types", "sliding_window")
    fields.drop("use_sliding_window", because=WINDOWS)
    return Target(CLASSES["MellumForCausalLM"])


def olmo3(fields: Fields, target: Target) -> Target:
    kinds = set(fields["layer_types"])
    ropes = [fields["rope_parameters"][kind] for kind in sorted(kinds)]
    if any(rope != ropes[0] for rope in ropes):
        raise Refusal(
            "rope_parameters differ between full and sliding layers, and FlexOlmo has one rotation for all",
            "a modelling file of your own, loaded with trust_remote_code",
        )
    fields.replace("rope_parameters", "the one that all layers share", rope_parameters=_copy.deepcopy(ropes[0]))
    fields.drop("layer_types", because="FlexOlmo's layers see everything")
    window = fields["sliding_window"] if "sliding_attention" in kinds else None
    fields.drop("sliding_window", because="FlexOlmo has none; see max_position_embeddings")
    if window is None or window >= fields["max_position_embeddings"]:
        return replace(target, exact_up_to=window)
    fields.replace("max_position_embeddings", f"cut to the window, {window}", max_position_embeddings=window)
    note = f"FlexOlmo has no sliding window: the same function up to {window} tokens, not beyond."
    return replace(target, exact_up_to=window, notes=(note,))


def gemma4(fields: Fields, target: Target) -> Target:
    if fields["use_double_wide_mlp"] and fields["num_kv_shared_layers"]:
        raise Refusal("use_double_wide_mlp gives some layers a wider FFN, and all experts of Gemma4 have one width")
    if fields["rms_norm_eps"] > 1e-6:
        raise Refusal(
            f"rms_norm_eps={fields['rms_norm_eps']}: Gemma4 norms an expert layer's output twice, exact only as eps → 0"
        )
    return target


def cohere(fields: Fields, target: Target) -> Target:
    fields.require("use_qk_norm", False, None, because="Cohere2Moe has no norms of queries and keys")
    # Cohere2Moe rotates only where there is a window; one as long as the context hides nothing.
    context = fields["max_position_embeddings"]
    fields.target.update(layer_types=["sliding_attention"] * fields["num_hidden_layers"], sliding_window=context)
    note = "Every layer has a window as long as the context, because Cohere2Moe rotates only in such layers."
    return replace(target, exact_up_to=context, notes=(note,))


def lfm2(fields: Fields, target: Target) -> Target:
    width = fields["intermediate_size"]
    if fields["block_auto_adjust_ff_dim"]:  # as Lfm2MLP computes it
        width = int(2 * width / 3)
        if fields["block_ffn_dim_multiplier"] is not None:
            unit = fields["block_multiple_of"]
            width = unit * ((int(fields["block_ffn_dim_multiplier"] * width) + unit - 1) // unit)
    fields.experts_width("intermediate_size", "moe_intermediate_size", width=width)
    return target


OWN: dict[str, Own] = {function.__name__: function for function in (llama, mistral, qwen3, olmo3, cohere, lfm2)}
OWN["gemma4_text"] = gemma4
