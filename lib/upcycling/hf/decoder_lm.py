"""DecoderLM to and from Hugging Face's own classes: Llama, GPT-2, Mixtral and, for what Mixtral lacks, Qwen2-MoE.

    RMSNorm, RoPE, SwiGLU, dense                  LlamaForCausalLM
    the same, all layers MoE, renormalised        MixtralForCausalLM
    the same, some layers MoE, or not normalised  Qwen2MoeForCausalLM with an empty shared expert
    LayerNorm, learned positions, GELU or ReLU    GPT2LMHeadModel

Each weight is copied once into its place, each setting carried; the logits agree to rounding. What has no exact
counterpart is refused with the name of the setting, in both directions.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..core.config import ModelConfig, MoEConfig
from ..core.model import DecoderLM
from ..text.tokenizer import UNKNOWN, bos_eos, save_tokenizer

# Their module (or parameter) in a layer -> ours. Several of ours stand one after another in one of theirs.
_LLAMA_LAYER = {
    "input_layernorm": ["attention_norm"],
    "self_attn.q_proj": ["attention.q"],
    "self_attn.k_proj": ["attention.k"],
    "self_attn.v_proj": ["attention.v"],
    "self_attn.o_proj": ["attention.out"],
    "post_attention_layernorm": ["ffn_norm"],
    "mlp.gate_proj": ["ffn.gate"],
    "mlp.up_proj": ["ffn.up"],
    "mlp.down_proj": ["ffn.down"],
    "mlp.gate": ["ffn.router"],
    "mlp.experts.gate_up_proj": ["ffn.experts.w_gate_EFD", "ffn.experts.w_up_EFD"],
    "mlp.experts.down_proj": ["ffn.experts.w_down_EDF"],
    # Qwen2-MoE's shared expert has no units here, so that its output and its gate's gradient are zero
    "mlp.shared_expert.gate_proj": [],
    "mlp.shared_expert.up_proj": [],
    "mlp.shared_expert.down_proj": [],
    "mlp.shared_expert_gate": [],
}
_LLAMA = {"model.embed_tokens": ["token_embedding"], "model.norm": ["norm"], "lm_head": ["head"]}
_GPT2_LAYER = {
    "ln_1": ["attention_norm"],
    "attn.c_attn": ["attention.q", "attention.k", "attention.v"],
    "attn.c_proj": ["attention.out"],
    "ln_2": ["ffn_norm"],
    "mlp.c_fc": ["ffn.up"],
    "mlp.c_proj": ["ffn.down"],
}
_GPT2 = {
    "transformer.wte": ["token_embedding"],
    "transformer.wpe": ["position_embedding"],
    "transformer.ln_f": ["norm"],
    "lm_head": ["head"],
}
_NAMES = {"llama": (_LLAMA, _LLAMA_LAYER), "gpt2": (_GPT2, _GPT2_LAYER)}
_NAMES |= {"mixtral": _NAMES["llama"], "qwen2_moe": _NAMES["llama"]}

_GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_GPT2_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# Fields of a transformers configuration that do not change the logits.
_HARMLESS = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "model_type", "problem_type"),
    *("id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward", "pretraining_tp"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    "reorder_and_upcast_attn",  # GPT-2: the same scores, in float32 also where the model is not
}


def to_hf(model: DecoderLM, tokenizer: Tokenizer | None = None):
    """`model` as the transformers class that computes the same logits; see the top of this module for which.

    Returns a new model in `model`'s dtype, device and mode; torch's random state is untouched. Biases that the class
    always has and `model` lacks are zeros (GPT-2's, and Llama's when some of q, k, v, out have one). With a
    `tokenizer` the ids of its special tokens are entered. transformers' balance loss pools all layers and is top_k at
    balance, so its coefficient is `aux_weight * layers / top_k`: the same size where layers agree.
    (With it on, transformers 5.23 cannot generate() from a padded batch: pass output_router_logits=False there.)
    What only training uses and the class lacks stays behind: z-loss, balance="sequence" or "importance", router jitter,
    expert dropout.
    Raises ValueError, naming the setting, for what no class expresses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not isinstance(model, DecoderLM):
        raise TypeError(f"to_hf takes a DecoderLM, not a {type(model).__name__}; from_hf goes the other way")
    kind = _kind_of(model.config)
    settings = _settings(model.config, kind) | _special_tokens(tokenizer, model.config.vocab_size)
    weight, own = model.token_embedding.weight, model.state_dict()
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(kind, **settings)
        theirs = AutoModelForCausalLM.from_config(config, dtype=weight.dtype)  # buffers stay float32
    state = {}
    for name, value in theirs.state_dict().items():
        parts = [own[part] for part in _ours(kind, name) if part in own]
        joined = torch.cat(parts, dim=_joined_dim(name)) if parts else torch.zeros_like(value)
        state[name] = joined.t() if _transposed(kind, name) else joined
    theirs.load_state_dict(state)
    return theirs.to(weight.device).train(model.training)


def from_hf(model_or_folder) -> DecoderLM:
    """A DecoderLM with the logits of a Llama, Mixtral, Qwen2-MoE (without shared expert) or GPT-2 of transformers.

    Takes the model or the folder (or hub name) of one; a folder's weights are read from safetensors only. Returns a
    new model in its dtype, device and mode; torch's random state is untouched. Raises ValueError, naming the field
    or the weight, for what DecoderLM does not express (scaled RoPE, sliding windows, a free head width, ...) and for
    weights that do not fit, and OSError where there is no model.
    """
    from ..routing.hf_routers import check_model
    from .plan import load_dense, read_config

    theirs = model_or_folder
    if isinstance(theirs, str | os.PathLike):
        try:
            _model_config(read_config(theirs))  # before any weight is read
            theirs = load_dense(theirs)
        except OSError as error:
            raise OSError(
                f"no model could be read from {str(model_or_folder)!r} ({str(error).splitlines()[0]}); from_hf takes a "
                "folder with config.json and safetensors, as save_pretrained writes it, or a name on the hub"
            ) from error
    check_model(theirs, "from_hf", or_else=" or a folder")
    config = _model_config(theirs.config)
    kind, state = theirs.config.model_type, {}
    for name, value in theirs.state_dict().items():
        parts = _ours(kind, name)
        value = value.t() if _transposed(kind, name) else value
        state |= zip(parts, value.chunk(len(parts), dim=_joined_dim(name)) if parts else (), strict=True)
    if config.tie_embeddings and not torch.equal(state["head.weight"], state["token_embedding.weight"]):
        raise ValueError(
            "lm_head.weight is not the embedding although the configuration ties them; set tie_word_embeddings=False"
        )
    with torch.random.fork_rng(devices=[]):
        own = DecoderLM(config).to(dtype=theirs.dtype, device=theirs.device)
    own.load_state_dict(state)
    return own.train(theirs.training)


def save_hf(model: DecoderLM, folder: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
    """Write `to_hf(model)` and the tokenizer to `folder`, for `AutoModelForCausalLM` and `AutoTokenizer`.

    Safetensors and JSON only. Files are written beside the folder and moved in whole, config.json last, so that a
    new folder loads only when it is complete; the parts of a sharded model that was there are deleted. Raises
    ValueError as `to_hf` does.
    """
    folder = Path(folder)
    theirs, temporary = to_hf(model, tokenizer), folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        theirs.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        folder.mkdir(parents=True, exist_ok=True)
        written = set()
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
            written.add(file.name)
        for pattern in ("model-?????-of-?????.safetensors", "model.safetensors.index.json"):
            for stale in folder.glob(pattern):  # of a larger model that was here before
                if stale.name not in written:
                    stale.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kind_of(config: ModelConfig) -> str:
    """The transformers model_type that expresses `config`; a ValueError names the setting where there is none."""
    moe = config.moe
    shape = (config.norm, config.position)
    llama = shape == ("rmsnorm", "rope") and config.activation == "swiglu"
    gpt2 = shape == ("layernorm", "learned") and config.activation != "swiglu"
    refusals = [
        (
            not config.causal,
            "causal=False has no standard class, they are all causal; build the model with causal=True",
        ),
        (
            config.head_bias,
            "head_bias=True: no standard class has a bias in its head; train with head_bias=False, which GPT-2's class "
            "expresses, also with activation='relu'",
        ),
        (
            not llama and not gpt2,
            f"norm={config.norm!r}, position={config.position!r}, activation={config.activation!r} is no standard "
            "class's combination; nearest are ModelConfig.smol (rmsnorm, rope, swiglu: Llama) and ModelConfig.simple "
            "(layernorm, learned, gelu or relu: GPT-2)",
        ),
        (
            moe and gpt2,
            f"activation={config.activation!r}: no standard class has experts without a gate; upcycle a "
            "ModelConfig.smol model, which becomes a Mixtral",
        ),
        (
            gpt2 and config.kv_heads != config.n_heads,
            f"n_kv_heads={config.n_kv_heads}: GPT-2 has one key/value head for each query head; use ModelConfig.smol "
            f"or n_kv_heads={config.n_heads}",
        ),
        (
            llama and config.dropout,
            f"dropout={config.dropout}: Llama and Mixtral have none beside attention's; give the weights to "
            "DecoderLM(replace(config, dropout=0.0)), which computes the same in evaluation",
        ),
        (
            moe and moe.router is not None and not _is_softmax_top_k(moe),
            f"router={moe and moe.router}: Mixtral and Qwen2-MoE know softmax top-k alone; use router=None, or 'top_k' "
            "with renormalize=True",
        ),
        (
            moe and moe.shared_experts,
            f"shared_experts={moe and moe.shared_experts}: Mixtral has none, Qwen2-MoE's stands behind a gate; use 0",
        ),
        (
            moe and moe.capacity_factor is not None,
            f"capacity_factor={moe and moe.capacity_factor}: no standard class drops tokens; give the weights to a "
            "model with capacity_factor=None",
        ),
        (
            moe and moe.logit_norm is not None,
            f"logit_norm={moe and moe.logit_norm}: no standard class standardises its router's scores; use None",
        ),
        (
            moe and moe.noisy,
            "noisy=True: no standard class has a noisy router; in evaluation noise is off, so give the weights without "
            "the `noise` ones to a model with noisy=False",
        ),
        (
            moe and moe.router_bias,
            "router_bias=True: Mixtral's and Qwen2-MoE's routers have no bias (GptOss has one, with an activation "
            "that engines fix otherwise); train with router_bias=False",
        ),
        (moe and config.ffn_bias, "ffn_bias=True: Mixtral's and Qwen2-MoE's experts have no bias; use ffn_bias=False"),
        (
            moe and config.attention_out_bias,
            "attention_out_bias=True: neither Mixtral nor Qwen2-MoE has it; use attention_out_bias=False",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise ValueError(reason)
    if gpt2:
        return "gpt2"
    if moe is None:
        return "llama"
    everywhere = len(config.moe_layers) == config.n_layers
    return "mixtral" if everywhere and moe.renormalize and not config.qkv_bias else "qwen2_moe"


def _is_softmax_top_k(moe: MoEConfig) -> bool:
    return moe.router.kind == "top_k" and (moe.router.softmax_first or moe.renormalize)


def _settings(config: ModelConfig, kind: str) -> dict:
    """The keyword arguments of transformers' configuration class."""
    settings = dict(
        vocab_size=config.vocab_size, tie_word_embeddings=config.tie_embeddings, initializer_range=config.init_std
    )
    if kind == "gpt2":
        dropouts = dict.fromkeys(_GPT2_DROPOUTS, config.dropout)
        return (
            settings
            | dropouts
            | dict(
                n_positions=config.seq_len,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_inner=config.d_ff,
                activation_function=_GPT2_ACTIVATION[config.activation],
                layer_norm_epsilon=config.norm_eps,
            )
        )
    settings |= dict(
        max_position_embeddings=config.seq_len,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    if kind == "llama":
        return settings | dict(attention_bias=config.qkv_bias or config.attention_out_bias, mlp_bias=config.ffn_bias)
    moe = config.moe
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


def _special_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> dict:
    if tokenizer is None:
        return dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"the tokenizer is a {type(tokenizer).__name__}, not one of the tokenizers library; of one of transformers "
            "give its backend_tokenizer"
        )
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model only {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    bos_id, eos_id = bos_eos(tokenizer)
    # never eos: the embedding of the padding token gets no gradient
    return dict(bos_token_id=eos_id if bos_id is None else bos_id, eos_token_id=eos_id) | dict(
        pad_token_id=tokenizer.token_to_id(UNKNOWN)
    )


def _model_config(config) -> ModelConfig:
    """Our configuration for a transformers one; every field is used, known to be harmless, or refused by name."""
    kind, fields = config.model_type, config.to_dict()
    if kind not in _NAMES:
        raise ValueError(
            f"model_type={kind!r} has no DecoderLM; from_hf takes {', '.join(_NAMES)}. To upcycle a model of another "
            "family into a standard class use upcycle_pretrained"
        )

    def take(name, default=None):
        return fields.pop(name, default)

    def require(name, *allowed):
        value = fields.pop(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r} has no counterpart in DecoderLM, only {name}={allowed[0]!r} has")

    require("is_encoder_decoder", False)
    sizes = dict(vocab_size=take("vocab_size"), tie_embeddings=take("tie_word_embeddings"))
    sizes |= dict(init_std=take("initializer_range"), head_bias=False)
    if kind == "gpt2":
        sizes |= _from_gpt2(take, require)
    else:
        sizes |= _from_llama(kind, take, require)
    unknown = sorted(set(fields) - _HARMLESS)
    if unknown:
        raise ValueError(
            f"{unknown[0]}={fields[unknown[0]]!r} is a field that from_hf does not know for {kind}, and it could "
            "change the model's function; remove it from the configuration if it does not"
        )
    return ModelConfig(**sizes)


def _from_gpt2(take, require) -> dict:
    require("scale_attn_weights", True)
    require("scale_attn_by_inverse_layer_idx", False)
    require("add_cross_attention", False)
    activation, width = take("activation_function"), take("n_embd")
    dropout, *others = (take(name) for name in _GPT2_DROPOUTS)
    if others != [dropout, dropout]:
        raise ValueError(
            f"{', '.join(_GPT2_DROPOUTS)} are {dropout}, {others[0]}, {others[1]}; DecoderLM has one for all"
        )
    if activation not in _ACTIVATION:
        raise ValueError(f"activation_function={activation!r} is none of DecoderLM's; known: {', '.join(_ACTIVATION)}")
    return dict(
        norm="layernorm",
        position="learned",
        activation=_ACTIVATION[activation],
        seq_len=take("n_positions"),
        d_model=width,
        n_layers=take("n_layer"),
        n_heads=take("n_head"),
        d_ff=take("n_inner") or 4 * width,
        norm_eps=take("layer_norm_epsilon"),
        dropout=dropout,
    )


def _from_llama(kind: str, take, require) -> dict:
    width, layers, heads, context = (
        take(name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    )
    require("hidden_act", "silu", "swish")
    require("head_dim", width // heads, None)  # hidden_size / num_attention_heads
    require("attention_dropout", 0.0)
    rope = dict(take("rope_parameters"))
    theta = rope.pop("rope_theta")
    for name, only in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if (value := rope.pop(name, only)) != only:
            raise ValueError(f"rope_parameters has {name}={value!r}, DecoderLM has only {name}={only!r}")
    if rope:
        raise ValueError(f"rope_parameters has {', '.join(sorted(rope))}, which DecoderLM's plain RoPE does not use")
    sizes = dict(
        norm="rmsnorm",
        position="rope",
        activation="swiglu",
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=take("num_key_value_heads"),
        seq_len=context,
        norm_eps=take("rms_norm_eps"),
        rope_theta=theta,
        d_ff=take("intermediate_size"),
        qkv_bias=False,
        attention_out_bias=False,
        ffn_bias=False,
    )
    if kind == "llama":
        bias = take("attention_bias", False)
        return sizes | dict(qkv_bias=bias, attention_out_bias=bias, ffn_bias=take("mlp_bias", False))

    top_k, moe_layers = take("num_experts_per_tok"), tuple(range(layers))
    moe = dict(renormalize=True, num_experts=take("num_local_experts") if kind == "mixtral" else take("num_experts"))
    window = take("sliding_window")
    if kind == "mixtral":
        require("router_jitter_noise", 0.0)
        if window is not None and window < context:
            raise ValueError(f"sliding_window={window} is shorter than the context of {context}; DecoderLM has none")
    else:
        require("use_sliding_window", False)
        require("shared_expert_intermediate_size", 0)
        require("layer_types", ["full_attention"] * layers)
        take("max_window_layers")
        sizes["qkv_bias"] = take("qkv_bias")
        dense, step, width = take("mlp_only_layers"), take("decoder_sparse_step"), take("moe_intermediate_size")
        moe_layers = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
        if len(moe_layers) < layers and width != sizes["d_ff"]:
            raise ValueError(
                f"moe_intermediate_size={width} differs from intermediate_size={sizes['d_ff']} of the dense layers; "
                "DecoderLM has one width for both"
            )
        sizes["d_ff"], moe["renormalize"] = width, take("norm_topk_prob")
    aux_weight = take("router_aux_loss_coef") * top_k / max(1, len(moe_layers))
    partial = None if len(moe_layers) == layers else moe_layers
    return sizes | dict(moe=MoEConfig(**moe, top_k=top_k, layers=partial, aux_weight=aux_weight))


def _ours(kind: str, name: str) -> list[str]:
    """Our parameters that stand, in this order, in their parameter `name`; ValueError for one that is unknown."""
    outer, layer = _NAMES[kind]
    module, _, suffix = name.rpartition(".")
    if module in outer:
        return [f"{ours}.{suffix}" for ours in outer[module]]
    parts = name.split(".", 3)  # model.layers.0.rest or transformer.h.0.rest
    if len(parts) == 4 and parts[1] in ("layers", "h"):
        block, rest = f"blocks.{parts[2]}.", parts[3]
        module, _, suffix = rest.rpartition(".")
        if rest in layer:
            return [block + ours for ours in layer[rest]]
        if module in layer:
            return [f"{block}{ours}.{suffix}" for ours in layer[module]]
    raise ValueError(
        f"the weight {name} has no place in DecoderLM; give a plain causal language model, with adapters merged"
    )


def _joined_dim(name: str) -> int:
    return 1 if ".experts." in name else 0  # experts are stacked: (E, 2F, D)


def _transposed(kind: str, name: str) -> bool:
    """GPT-2's Conv1D keeps its matrices as (in, out)."""
    return kind == "gpt2" and name.endswith(".weight") and ".c_" in name
