"""Mixture-of-Experts: route, dispatch, compute, combine.

Shapes: N tokens, D model width, F FFN width, E experts, K experts per token, R = N*K routed rows.

The forward pass of `MoELayer`, step by step:
  1. `router`      x_ND -> logits_NE, a score for each expert
  2. `route`       softmax, keep the K best, renormalise -> Routing
  3. dispatch      each token's vector goes to its K experts
  4. `Experts`     each expert is an ordinary FFN over the rows that it was sent
  5. combine       each token's K results are added up with its combine weights

`experts_loop` is the definition of 3-5; `experts_sorted` computes the same with one sort, each expert's rows together.
Step 4 is in `upcycling.experts`, other rules for step 2 are in `upcycling.routers`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.combine import _Combine
from ..kernels.products import linear, row_linear
from .config import ModelConfig
from .experts import Experts
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
    """y_ND, the fast path: sort the N*K rows by expert, compute them in groups, put them back and add up."""
    num_experts = routing.probabilities_NE.shape[-1]
    n, k = routing.expert_ids_NK.shape
    ids_NK, all_rows = routing.expert_ids_NK, True
    if routing.kept_NK is not None and not routing.computes_all:
        ids_NK, all_rows = ids_NK.masked_fill(~routing.kept_NK, num_experts), False  # sorted behind all experts
    expert_ids_R, order_R = ids_NK.flatten().sort(stable=True)
    row_of_NK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(n * k, device=order_R.device)).view(n, k)
    counts_E = torch.bincount(expert_ids_R, minlength=num_experts)[:num_experts]
    if not all_rows:
        rows = int(counts_E.sum())
        if rows == 0:
            return x_ND * 0
        expert_ids_R, order_R, row_of_NK = expert_ids_R[:rows], order_R[:rows], row_of_NK.clamp(max=rows - 1)
    y_RD = experts(x_ND.index_select(0, order_R // k), expert_ids_R, counts_E)
    weights_NK = routing.weights_NK.to(y_RD.dtype)
    if not torch.is_grad_enabled():
        return F.embedding_bag(row_of_NK, y_RD, mode="sum", per_sample_weights=weights_NK)
    return _Combine.apply(y_RD, weights_NK, row_of_NK, order_R)


def experts_of_one(experts: Experts, x_1D: Tensor, routing: Routing) -> Tensor:
    """y_1D of a single token on a CPU, as in generation, without gradients: its K experts, nothing to sort."""
    y_KD = torch.cat([experts.expert(e, x_1D, row_linear) for e in routing.expert_ids_NK[0].tolist()])
    return routing.weights_NK.to(y_KD.dtype) @ y_KD


class MoELayer(nn.Module):
    """A router and its experts in place of an FFN; `forward` returns the output and the Routing that made it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.moe = moe = config.moe
        self.top_k, self.renormalize = moe.top_k, moe.renormalize
        self.router = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias)
        self.noise = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias) if moe.noisy else None
        self.experts = Experts(config)
        self.shared = Experts(config, 1, config.shared_width) if moe.shared_experts else None
        self.rule_state = nn.Module()  # what a rule of upcycling.routers remembers between updates
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

    # As torch.compiler.disable, which would load the compiler here. How many rows an expert gets depends on the data:
    # torch.compile takes the rest of a block and leaves this as it is.
    @torch._disable_dynamo
    def forward(self, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.route(x_ND, None if tokens_BT is None else tokens_BT.flatten())
        one = len(x_ND) == 1 and x_ND.device.type == "cpu" and routing.kept_NK is None
        compute = experts_of_one if one and not torch.is_grad_enabled() else experts_sorted
        y_ND = compute(self.experts, x_ND, routing)
        if self.shared is not None:
            y_ND = y_ND + self.shared.expert(0, x_ND, linear)
        return y_ND.view_as(x_BTD), routing

    @torch.no_grad()
    def after_update(self, counts_E: Tensor, tokens: int) -> None:
        """Move what the rule remembers, after an optimizer update whose `tokens` fell on the experts as counted."""
        if self.moe.router is not None:
            self.moe.router.after_update(dict(self.rule_state.named_buffers()), counts_E, tokens, self.top_k)
