"""Parameters and floating-point operations of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import ModelConfig


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


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `config`'s model from its sizes alone; `DecoderLM(config)` has exactly as many."""
    d, f, kv = config.d_model, config.d_ff, config.kv_heads * config.head_dim
    up_matrices = 2 if config.activation == "swiglu" else 1

    def ffn_size(width: int) -> int:
        return up_matrices * _linear(d, width, config.ffn_bias) + _linear(width, d, config.ffn_bias)

    ffn = ffn_size(f)
    attention = _linear(d, d + 2 * kv, config.qkv_bias) + _linear(d, d, config.attention_out_bias)
    norm = d if config.norm == "rmsnorm" else 2 * d
    token_table = config.vocab_size * d
    position_table = config.seq_len * d if config.position == "learned" else 0
    head = _linear(d, config.vocab_size, config.head_bias)
    trunk = token_table + position_table + (head - token_table if config.tie_embeddings else head) + norm
    trunk += config.n_layers * (attention + 2 * norm)

    n_moe = len(config.moe_layers)
    total = active = trunk + (config.n_layers - n_moe) * ffn
    expert, router = ffn, 0
    if config.moe:
        expert = ffn_size(config.expert_width)
        router = _linear(d, config.moe.num_experts, config.moe.router_bias) * (2 if config.moe.noisy else 1)
        shared = ffn_size(config.shared_width) if config.moe.shared_experts else 0
        total += n_moe * (config.moe.num_experts * expert + shared + router)
        active += n_moe * (config.moe.top_k * expert + shared + router)
    looked_up = position_table + (0 if config.tie_embeddings else token_table)
    return ParameterCount(total, active, active - looked_up, expert, router, head)


def forward_flops(config: ModelConfig, tokens: int | None = None, head: bool = True) -> int:
    """Floating-point operations of one forward pass over a sequence of `tokens` (default: the whole context).

    Matrix products only, two operations for each multiply-add; `top_k` experts a token, whatever the routing rule;
    attention counts all T x T scores, as the usual counters do, although a causal kernel may skip half. A training
    step costs three times this: the backward pass has two products for each one of the forward pass.
    """
    t = config.seq_len if tokens is None else tokens
    d, f, kv = config.d_model, config.d_ff, config.kv_heads * config.head_dim
    per_unit = (3 if config.activation == "swiglu" else 2) * d
    per_token = config.n_layers * (d * (d + 2 * kv) + d * d)
    per_token += (config.n_layers - len(config.moe_layers)) * per_unit * f
    if config.moe:
        routers = 2 if config.moe.noisy else 1
        units = config.moe.top_k * config.expert_width + config.shared_width
        per_token += len(config.moe_layers) * (per_unit * units + routers * d * config.moe.num_experts)
    if head:
        per_token += d * config.vocab_size
    attention = config.n_layers * 2 * t * t * d
    return 2 * (t * per_token + attention)
