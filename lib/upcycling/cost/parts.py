"""A model's parts as counting needs them, read from its modules (those of a configuration on the meta device).

Parameters and floating-point operations of a configuration are counted from them.
"""

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..core.config import ModelConfig
from ..core.experts import Experts
from ..core.model import DecoderLM, FeedForward
from ..routing.adapter import context_length
from ..routing.gradient import expert_weights, router_weights
from ..routing.hf_routers import find_routers, looks_like_moe


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
class Parts:
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


def parts_of(model: nn.Module | ModelConfig, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts of a DecoderLM, of what a ModelConfig describes (in `dtype`), or of a transformers causal LM."""
    if isinstance(model, ModelConfig):
        plain = replace(model, moe=model.moe and replace(model.moe, router=None))  # a rule may draw a table
        with torch.device("meta"):
            model = DecoderLM(plain).to(dtype)
    if isinstance(model, DecoderLM):
        config = model.config
        attention = _Layer(2 * config.d_model, 2 * config.kv_heads * config.head_dim)
        return _counted(model, model.head, config.seq_len, config.n_layers * (attention,))
    lm: Any = model
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"a {type(model).__name__} is not a causal language model: give a DecoderLM, a ModelConfig or a "
            "transformers ...ForCausalLM"
        )
    return _counted(model, head, context_length(lm.config), _attention_layers(lm.config.get_text_config()))


def _counted(model: nn.Module, head: Any, longest: int, layers: tuple[_Layer, ...]) -> Parts:
    has_experts = any(looks_like_moe(module) for module in model.modules())
    routers = find_routers(model) if has_experts else []
    routed = {id(weight): weight for router in routers for weight in expert_weights(model, router)}
    share = routers[0].holder.top_k / len(next(iter(routed.values()))) if routers else 0.0
    deciding = [weight for router in routers for weight in router_weights(router)]
    tables, in_products, per_token = {}, {id(head.weight)}, 0.0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            stacked_bias = weight.ndim == 2 and (id(weight) in routed or isinstance(module, Experts))
            if isinstance(module, nn.Embedding):
                tables[id(weight)] = weight.numel()
            elif weight.ndim > 1 and not stacked_bias and module is not head:
                in_products.add(id(weight))
                per_token += 2 * weight.numel() * (share if id(weight) in routed else 1)
    return Parts(
        name=type(model).__name__,
        longest=longest,
        bytes_each=next(model.parameters()).element_size(),
        total=sum(weight.numel() for weight in model.parameters()),
        experts=sum(weight.numel() for weight in routed.values()),
        share=share,
        router=sum(weight.numel() for weight in deciding),
        embeddings=sum(tables.values()),
        looked_up=sum(size for key, size in tables.items() if key not in in_products),
        head=head.weight.numel(),
        per_token=round(per_token),
        layers=layers,
    )


def _attention_layers(config: Any) -> tuple[_Layer, ...]:
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


def _attention_layer(config: Any, kind: str) -> _Layer:
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


def _refuse(config: Any, what: str) -> NoReturn:
    raise ValueError(
        f"{config.model_type} has {what}, whose products are not known here; count what a run of it executes with "
        "upcycling.cost.account.flop_counter"
    )


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. Each definition counts a tied embedding matrix once.

    `total`: every parameter. `active`: those that one token's forward pass uses: as `total`, with only `top_k` of the
    experts per MoE layer; the whole router and the head are counted. `active_without_embeddings`: `active` less the
    parameters that are only looked up, that is the position table and, when the head has a matrix of its own, the
    token table; the head stays counted.
    """

    total: int
    active: int
    active_without_embeddings: int
    expert: int  # one expert, or the dense FFN
    router: int  # one MoE layer's router
    head: int

    def __str__(self) -> str:
        return f"{self.total:,} parameters, {self.active:,} active per token"


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `config`'s model; it is built on the meta device, so that nothing has its size."""
    parts = parts_of(config)
    with torch.device("meta"):
        ffn = Experts(config, 1) if config.moe else FeedForward(config)
    return ParameterCount(
        total=parts.total,
        active=parts.active,
        active_without_embeddings=parts.active - parts.looked_up,
        expert=sum(weight.numel() for weight in ffn.parameters()),
        router=parts.router // max(len(config.moe_layers), 1),
        head=parts.head + (config.vocab_size if config.head_bias else 0),
    )


def forward_flops(config: ModelConfig, tokens: int | None = None, head: bool = True) -> int:
    """Floating-point operations of one forward pass over a sequence of `tokens` (default: the whole context).

    Matrix products only, two operations for each multiply-add; `top_k` experts a token, whatever the routing rule;
    attention counts all T x T scores, as the usual counters do, although a causal kernel may skip half. A training
    step costs three times this: the backward pass has two products for each one of the forward pass.
    """
    t, parts = config.seq_len if tokens is None else tokens, parts_of(config)
    return t * (parts.per_token + (2 * parts.head if head else 0)) + parts.score_flops(t, t)
