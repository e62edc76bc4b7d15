"""Mixture-of-Experts: route, dispatch, experts, combine.

Shapes: B batch, T sequence, N = B*T tokens, D model width, E experts, K experts per token, R = N*K routed rows.

The layer as a sentence (`MoELayer.forward` and `experts_sorted`):

    routing = layer.route(x_ND)                     which K experts each token goes to, and their weights
    rows = dispatch(routing)                        every choice a row, sorted by expert
    y_RD = experts(x_ND[rows.token_R], ...)         each expert is an ordinary FFN over the rows that it was sent
    y_ND = combine(y_RD, routing, rows)             each token's K results, added up with its weights

`experts_loop` is the definition of the last three; `experts_sorted` computes the same with one sort.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import faster, uncompiled
from .config import ModelConfig
from .experts import Experts, linear
from .routing import Routing, limit_capacity, route


def experts_loop(experts: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """y_ND, the definition: for each expert, take the tokens that chose it, compute, add with their weights."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(routing.probabilities_NE.shape[-1]):
        chosen_NK = routing.expert_ids_NK == e
        if routing.kept_NK is not None and not routing.computes_all:
            chosen_NK = chosen_NK & routing.kept_NK
        token_R, choice_R = torch.where(chosen_NK)
        weight_R1 = routing.weights_NK[token_R, choice_R].unsqueeze(-1).to(x_ND.dtype)
        y_ND = y_ND.index_add(0, token_R, weight_R1 * experts.expert(e, x_ND[token_R]))
    return y_ND


def experts_sorted(experts: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """y_ND as `experts_loop` defines it, up to rounding: one sort, and each expert's rows together."""
    rows = dispatch(routing)
    if len(rows.token_R) == 0:
        return x_ND * 0
    y_RD = experts(x_ND.index_select(0, rows.token_R), rows.expert_R, rows.counts_E)
    return combine(y_RD, routing, rows)


class Rows(NamedTuple):
    """The choices of all tokens as rows sorted by expert; choices that were not kept have none."""

    token_R: Tensor  # whose vector a row is
    expert_R: Tensor  # where it goes
    counts_E: Tensor  # how many rows each expert has
    row_of_NK: Tensor  # the row of each choice; of one that was not kept (weight 0) the last row


def dispatch(routing: Routing) -> Rows:
    """The rows of `routing`, sorted by expert and within an expert by token."""
    num_experts = routing.probabilities_NE.shape[-1]
    n, k = routing.expert_ids_NK.shape
    ids_NK, kept_NK = routing.expert_ids_NK, None if routing.computes_all else routing.kept_NK
    if kept_NK is not None:
        ids_NK = ids_NK.masked_fill(~kept_NK, num_experts)  # sorted behind all experts
    expert_R, order_R = ids_NK.flatten().sort(stable=True)
    row_of_NK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(n * k, device=order_R.device)).view(n, k)
    counts_E = torch.bincount(expert_R, minlength=num_experts)[:num_experts]
    if kept_NK is not None:
        rows = int(counts_E.sum())
        expert_R, order_R, row_of_NK = expert_R[:rows], order_R[:rows], row_of_NK.clamp(max=max(rows - 1, 0))
    return Rows(order_R // k, expert_R, counts_E, row_of_NK)


def combine(y_RD: Tensor, routing: Routing, rows: Rows) -> Tensor:
    """y_ND: the K rows of each token, looked up and added with its combine weights in one pass."""
    return F.embedding_bag(rows.row_of_NK, y_RD, mode="sum", per_sample_weights=routing.weights_NK.to(y_RD.dtype))


class MoELayer(nn.Module):
    """A router and its experts in place of an FFN; `forward` returns the output and the Routing that made it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.moe is None:
            raise ValueError("the configuration is dense: give ModelConfig(moe=MoEConfig(...))")
        self.moe = moe = config.moe
        self.top_k, self.renormalize = moe.top_k, moe.renormalize
        self.router = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias)
        self.noise = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias) if moe.noisy else None
        self.experts = Experts(config)
        self.shared = Experts(config, 1, config.shared_width) if moe.shared_experts else None
        self.rule_state = nn.Module()  # what a rule of core.routers remembers between updates
        if moe.router is not None:
            for name, tensor in moe.router.buffers(moe.num_experts, moe.top_k, config.vocab_size).items():
                self.rule_state.register_buffer(name, tensor)

    def router_logits(self, x_ND: Tensor) -> Tensor:
        """logits_NE; in training, a noisy router adds N(0,1) * softplus(noise(x)) (Shazeer et al. 2017, eq. 4)."""
        return self._noisy_logits(x_ND)[0]

    def _noisy_logits(self, x_ND: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        moe = self.moe
        if moe.router_jitter and self.training:  # Switch Transformers (arXiv:2101.03961), section 2.4
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - moe.router_jitter, 1 + moe.router_jitter)
        logits_NE = self.router(x_ND)
        if moe.logit_norm is not None:  # Skywork-MoE (arXiv:2406.06563), section 4.1
            std_NE, mean_NE = torch.std_mean(logits_NE, -1, keepdim=True, correction=0)
            logits_NE = moe.logit_norm * (logits_NE - mean_NE) / (std_NE + 1e-6)
        clean_NE = noise_std_NE = None
        if self.noise is not None and self.training:
            clean_NE, noise_std_NE = logits_NE, F.softplus(self.noise(x_ND))
            logits_NE = clean_NE + torch.randn_like(clean_NE) * noise_std_NE
        if moe.expert_dropout and self.training:
            lot_E = torch.rand(moe.num_experts, device=x_ND.device)
            spared_E = lot_E >= lot_E.topk(self.top_k).values[-1]  # never fewer than K experts remain
            logits_NE = logits_NE.masked_fill((lot_E < moe.expert_dropout) & ~spared_E, -math.inf)
        return logits_NE, clean_NE, noise_std_NE

    def route(self, x_ND: Tensor, tokens_N: Tensor | None = None) -> Routing:
        """The rule's decision for each token. `tokens_N`, the token ids, is needed by hash routing only."""
        logits_NE, clean_NE, noise_std_NE = self._noisy_logits(x_ND)
        if self.moe.router is None:
            routing = route(logits_NE, self.top_k, self.renormalize)
        else:
            state = dict(self.rule_state.named_buffers())
            routing = self.moe.router.route(
                logits_NE, self.top_k, self.renormalize, training=self.training, state=state, tokens_N=tokens_N
            )
        if clean_NE is not None:
            routing = replace(routing, clean_logits_NE=clean_NE, noise_std_NE=noise_std_NE)
        return routing if self.moe.capacity_factor is None else limit_capacity(routing, self.moe.capacity_factor)

    @uncompiled  # how many rows an expert gets depends on the data: torch.compile takes the rest of a block
    def forward(self, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(y_BTD, the Routing of the N = B*T tokens). `tokens_BT`, the token ids, is needed by hash routing only.

        y_BTD[b, t] is the sum over the token's K experts of combine weight times expert output, plus the shared
        experts' output if there are any. Any leading dimensions will do: (N, D) as well as (B, T, D).
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.route(x_ND, None if tokens_BT is None else tokens_BT.flatten())
        y_ND = faster("one token", self.experts, x_ND, routing)
        if y_ND is None:
            y_ND = experts_sorted(self.experts, x_ND, routing)
        if self.shared is not None:
            y_ND = y_ND + self.shared.expert(0, x_ND, linear)
        return y_ND.view_as(x_BTD), routing

    @torch.no_grad()
    def after_update(self, counts_E: Tensor, tokens: int) -> None:
        """Move what the rule remembers, after an optimizer update whose `tokens` fell on the experts as counted."""
        if self.moe.router is not None:
            self.moe.router.after_update(dict(self.rule_state.named_buffers()), counts_E, tokens, self.top_k)
