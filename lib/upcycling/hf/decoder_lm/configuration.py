"""A DecoderLM's configuration as one of transformers', and back; what has no counterpart is refused by name."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...core.config import ModelConfig, MoEConfig
from ..families.base import Fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TABLES = json.loads(files(__package__).joinpath("configuration.json").read_text(encoding="utf-8"))
_GPT2, _LLAMA = ({**_TABLES["both"], **_TABLES[kind]} for kind in ("gpt2", "llama"))  # their field -> ours, same value
_ONLY = "it has no counterpart in DecoderLM"
KINDS = ("llama", "gpt2", "mixtral", "qwen2_moe")  # transformers' model types
_GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_GPT2_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# ---------------------------------------------------------------------------------------------------- ours to theirs


def kind_of(config: ModelConfig) -> str:
    """The transformers model_type that expresses `config`; a ValueError names the setting where there is none."""
    moe, rule = config.moe, config.moe.router if config.moe else None
    shape, activation = (config.norm, config.position), config.activation
    llama = shape == ("rmsnorm", "rope") and activation == "swiglu"
    gpt2 = shape == ("layernorm", "learned") and activation != "swiglu"
    found = {
        "causal": not config.causal,
        "head_bias": config.head_bias,
        "combination": not llama and not gpt2,
        "gate": moe and gpt2,
        "kv_heads": gpt2 and config.kv_heads != config.n_heads,
        "dropout": llama and config.dropout,
        "router": moe and rule and not (rule.kind == "top_k" and (rule.softmax_first or moe.renormalize)),
        "shared_experts": moe and moe.shared_experts,
        "capacity_factor": moe and moe.capacity_factor is not None,
        "logit_norm": moe and moe.logit_norm is not None,
        "noisy": moe and moe.noisy,
        "router_bias": moe and moe.router_bias,
        "ffn_bias": moe and config.ffn_bias,
        "attention_out_bias": moe and config.attention_out_bias,
    }
    for name, refused in found.items():
        if refused:
            raise ValueError(_TABLES["refusals"][name].format(config=config, moe=moe))
    if gpt2:
        return "gpt2"
    if moe is None:
        return "llama"
    everywhere = len(config.moe_layers) == config.n_layers
    return "mixtral" if everywhere and moe.renormalize and not config.qkv_bias else "qwen2_moe"


def to_settings(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The keyword arguments of transformers' configuration class."""
    if kind == "gpt2":
        settings = {theirs: getattr(config, ours) for theirs, ours in _GPT2.items()}
        dropouts = dict.fromkeys(_GPT2_DROPOUTS, config.dropout)
        return settings | dropouts | dict(activation_function=_GPT2_ACTIVATION[config.activation])
    settings = {theirs: getattr(config, ours) for theirs, ours in _LLAMA.items()} | dict(
        num_key_value_heads=config.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    moe = config.moe
    if moe is None:
        return settings | dict(attention_bias=config.qkv_bias or config.attention_out_bias, mlp_bias=config.ffn_bias)
    aux_weight = moe.aux_weight if moe.balance in ("layer", "pooled") else 0.0
    settings |= dict(
        intermediate_size=config.expert_width if len(config.moe_layers) == config.n_layers else config.d_ff,
        num_experts_per_tok=moe.top_k,
        router_aux_loss_coef=aux_weight * len(config.moe_layers) / moe.top_k,
        output_router_logits=aux_weight > 0,  # without it transformers leaves the balance loss out
    )
    if kind == "mixtral":
        return settings | dict(num_local_experts=moe.num_experts)
    return settings | dict(
        num_experts=moe.num_experts,
        moe_intermediate_size=config.expert_width,
        shared_expert_intermediate_size=0,
        norm_topk_prob=moe.renormalize,
        mlp_only_layers=[layer for layer in range(config.n_layers) if layer not in config.moe_layers],
        qkv_bias=config.qkv_bias,
    )


# ---------------------------------------------------------------------------------------------------- theirs to ours


def from_config(config: PreTrainedConfig) -> ModelConfig:
    """Our configuration for a transformers one; every field is used, known to be harmless, or refused by name."""
    kind = config.model_type
    if kind not in KINDS:
        raise ValueError(
            f"model_type={kind!r} has no DecoderLM; from_hf takes {', '.join(KINDS)}. To upcycle a model of another "
            "family into a standard class use upcycle_pretrained"
        )
    fields = Fields(config)
    sizes = _from_gpt2(fields) if kind == "gpt2" else _from_llama(kind, fields)
    fields.drop(*_TABLES["harmless"], because="harmless")
    fields.finish()
    return ModelConfig(**sizes, head_bias=False)


def _from_gpt2(fields: Fields) -> dict[str, Any]:
    fields.require("scale_attn_weights", True, because=_ONLY)
    fields.require("scale_attn_by_inverse_layer_idx", False, because=_ONLY)
    fields.require("add_cross_attention", False, because=_ONLY)
    (activation,) = fields.take("activation_function")
    dropout, *others = fields.take(*_GPT2_DROPOUTS)
    if others != [dropout, dropout]:
        raise ValueError(
            f"{', '.join(_GPT2_DROPOUTS)} are {dropout}, {others[0]}, {others[1]}; DecoderLM has one for all"
        )
    if activation not in _ACTIVATION:
        raise ValueError(f"activation_function={activation!r} is none of DecoderLM's; known: {', '.join(_ACTIVATION)}")
    sizes = dict(zip(_GPT2.values(), fields.take(*_GPT2)))
    sizes["d_ff"] = sizes["d_ff"] or 4 * sizes["d_model"]
    return sizes | dict(norm="layernorm", position="learned", activation=_ACTIVATION[activation], dropout=dropout)


def _from_llama(kind: str, fields: Fields) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(zip(_LLAMA.values(), fields.take(*_LLAMA)))
    sizes |= dict(norm="rmsnorm", position="rope", activation="swiglu")
    sizes |= dict(qkv_bias=False, attention_out_bias=False, ffn_bias=False)
    fields.require("hidden_act", "silu", "swish", because=_ONLY)
    head_dim = sizes["d_model"] // sizes["n_heads"]
    fields.require("head_dim", head_dim, None, because=f"DecoderLM's is hidden_size / num_attention_heads, {head_dim}")
    fields.require("attention_dropout", 0.0, because=_ONLY)
    rope, sizes["n_kv_heads"] = fields.take("rope_parameters", "num_key_value_heads")
    rope = dict(rope)
    sizes["rope_theta"] = rope.pop("rope_theta")
    for name, only in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if (value := rope.pop(name, only)) != only:
            raise ValueError(f"rope_parameters has {name}={value!r}, DecoderLM has only {name}={only!r}")
    if rope:
        raise ValueError(f"rope_parameters has {', '.join(sorted(rope))}, which DecoderLM's plain RoPE does not use")
    if kind == "llama":
        bias, ffn_bias = fields.take("attention_bias", "mlp_bias")
        return sizes | dict(qkv_bias=bias, attention_out_bias=bias, ffn_bias=ffn_bias)

    layers, context = sizes["n_layers"], sizes["seq_len"]
    top_k, window, coefficient = fields.take("num_experts_per_tok", "sliding_window", "router_aux_loss_coef")
    renormalize, moe_layers = True, tuple(range(layers))
    if kind == "mixtral":
        (experts,) = fields.take("num_local_experts")
        fields.require("router_jitter_noise", 0.0, because=_ONLY)
        if window is not None and window < context:
            raise ValueError(f"sliding_window={window} is shorter than the context of {context}; DecoderLM has none")
    else:
        experts, sizes["qkv_bias"], renormalize = fields.take("num_experts", "qkv_bias", "norm_topk_prob")
        fields.require("use_sliding_window", False, because=_ONLY)
        fields.require("shared_expert_intermediate_size", 0, because=_ONLY)
        fields.require("layer_types", ["full_attention"] * layers, because=_ONLY)
        fields.drop("max_window_layers", because="no layer has a window")
        dense, step, width = fields.take("mlp_only_layers", "decoder_sparse_step", "moe_intermediate_size")
        moe_layers = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
        if len(moe_layers) < layers and width != sizes["d_ff"]:
            raise ValueError(
                f"moe_intermediate_size={width} differs from intermediate_size={sizes['d_ff']} of the dense layers; "
                "DecoderLM has one width for both"
            )
        sizes["d_ff"] = width
    partial = None if len(moe_layers) == layers else moe_layers
    aux_weight = coefficient * top_k / max(1, len(moe_layers))
    moe = MoEConfig(num_experts=experts, top_k=top_k, renormalize=renormalize, layers=partial, aux_weight=aux_weight)
    return sizes | dict(moe=moe)
