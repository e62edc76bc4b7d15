"""Parameters and floating-point operations of a model, from its configuration alone."""

from dataclasses import dataclass

import torch

from ..core.config import ModelConfig
from ..core.experts import Experts
from ..core.model import FeedForward
from .parts import parts_of


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
