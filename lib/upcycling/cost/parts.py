"""A model's parts as counting needs them: read from our configuration or from a transformers one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.config import ModelConfig
from ..routing.adapter import context_length
from ..routing.gradient import expert_weights, router_weights
from ..routing.hf_routers import _LOOKS_LIKE_MOE, find_routers
from .parameters import count_parameters, forward_flops

# ----------------------------------------------------------------------------------------------- the parts of a model


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: all query heads' widths in scores and in sums, and numbers cached for a token.

    `expanded`: weights that a decoding step applies to each cached token again.
    """

    score_width: int
    cache_width: int
    window: int | None = None
    expanded: int = 0

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class _Parts:
    """What the account needs to know of a model: numbers of parameters, and FLOPs without scores and head."""

    name: str
    longest: int
    bytes_each: int
    total: int
    experts: int
    share: float  # of the experts that a token uses
    router: int
    embeddings: int
    looked_up: int  # parameters of tables that are no matrix of a product, too
    head: int  # parameters of the head's matrix
    per_token: int
    layers: tuple[_Layer, ...]

    @property
    def active(self) -> int:
        return self.total - self.experts + round(self.share * self.experts)

    def score_flops(self, queries: int, context: int) -> int:
        # many queries: with a mask, all scores are computed; a single one meets a cache that was cut to the window
        return sum(
            2 * queries * (context if queries > 1 else layer.seen(context)) * layer.score_width
            + 2 * (context - queries) * layer.expanded
            for layer in self.layers
        )

    def cached(self, context: int) -> int:
        return sum(layer.seen(context) * layer.cache_width for layer in self.layers)

    def read(self, tokens: int) -> float:
        """Bytes of the weights that a pass over `tokens` evenly routed tokens uses."""
        touched = 1 - (1 - self.share) ** tokens
        return self.bytes_each * (self.total - self.looked_up - self.experts * (1 - touched))


def _of_config(config: ModelConfig, dtype: torch.dtype) -> _Parts:
    count, moe, n_moe = count_parameters(config), config.moe, len(config.moe_layers)
    kv_width = config.kv_heads * config.head_dim
    layers = config.n_layers * (_Layer(2 * config.d_model, 2 * kv_width),)
    position_table = config.seq_len * config.d_model if config.position == "learned" else 0
    parts = _Parts(
        name="DecoderLM",
        longest=config.seq_len,
        bytes_each=dtype.itemsize,
        total=count.total,
        experts=n_moe * moe.num_experts * count.expert if moe else 0,
        share=moe.top_k / moe.num_experts if moe else 0.0,
        router=n_moe * count.router,
        embeddings=config.vocab_size * config.d_model + position_table,
        looked_up=count.active - count.active_without_embeddings,
        head=config.vocab_size * config.d_model,
        per_token=0,
        layers=layers,
    )
    return replace(parts, per_token=forward_flops(config, 1, head=False) - parts.score_flops(1, 1))


def _of_transformers(model: nn.Module) -> _Parts:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"a {type(model).__name__} is not a causal language model: give a DecoderLM, a ModelConfig or a "
            "transformers ...ForCausalLM"
        )
    has_experts = any(_LOOKS_LIKE_MOE.search(type(module).__name__) for module in model.modules())
    routers = find_routers(model) if has_experts else []
    routed = {id(weight): weight for router in routers for weight in expert_weights(model, router)}
    share = routers[0].holder.top_k / len(next(iter(routed.values()))) if routers else 0.0
    tables, in_products, per_token = {}, {id(head.weight)}, 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                tables[id(weight)] = weight.numel()
            elif id(weight) in routed:
                per_token += 2 * share * weight.numel() * (weight.ndim == 3)  # a stacked bias has two dimensions
            elif weight.ndim > 1 and module is not head:
                in_products.add(id(weight))
                per_token += 2 * weight.numel()
    config = model.config.get_text_config()
    some = next(model.parameters())
    return _Parts(
        name=type(model).__name__,
        longest=context_length(config),
        bytes_each=some.element_size(),
        total=sum(weight.numel() for weight in model.parameters()),
        experts=sum(weight.numel() for weight in routed.values()),
        share=share,
        router=sum(weight.numel() for router in routers for weight in router_weights(router)),
        embeddings=sum(tables.values()),
        looked_up=sum(size for key, size in tables.items() if key not in in_products),
        head=head.weight.numel(),
        per_token=round(per_token),
        layers=_attention_layers(config),
    )


def _attention_layers(config) -> tuple[_Layer, ...]:
    """The attention of each layer, from a transformers configuration; ValueError where layers mix tokens otherwise."""
    for name in ("index_topk", "num_kv_shared_layers", "attention_chunk_size"):
        if getattr(config, name, None):
            _refuse(config, f"attention with {name}={getattr(config, name)}")
    if not hasattr(config, "num_attention_heads"):
        _refuse(config, "no attention")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        plain = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [plain] * config.num_hidden_layers
    of_layers = getattr(config, "per_layer_config", None) or [config] * len(kinds)
    return tuple(_attention_layer(layer, kind) for layer, kind in zip(of_layers, kinds, strict=True))


def _attention_layer(config, kind: str) -> _Layer:
    if kind not in ("full_attention", "sliding_attention"):
        _refuse(config, f"layers of kind {kind!r}")
    window = config.sliding_window if kind == "sliding_attention" else None
    heads, rank = config.num_attention_heads, getattr(config, "kv_lora_rank", None)
    if rank:  # multi-head latent attention: the cache holds what keys and values are made from
        nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        return _Layer(heads * (nope + rope + v), rank + rope, window, expanded=rank * heads * (nope + v))
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return _Layer(heads * 2 * width, kv_heads * 2 * width, window)


def _refuse(config, what: str):
    raise ValueError(
        f"{config.model_type} has {what}, whose products are not known here; count what a run of it executes with "
        "upcycling.accounting.flop_counter"
    )
