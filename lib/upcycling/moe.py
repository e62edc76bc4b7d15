"""Mixture-of-Experts: route, dispatch, compute, combine.

Shapes: N tokens, D model width, F FFN width, E experts, K experts per token, R = N*K routed rows.

The forward pass of `MoELayer`, step by step:
  1. `router`      x_ND -> logits_NE, a score for each expert
  2. `route`       softmax, keep the K best, renormalise -> Routing
  3. dispatch      each token's vector goes to its K experts
  4. `Experts`     each expert is an ordinary FFN over the rows that it was sent
  5. combine       each token's K results are added up with its combine weights

`experts_loop` is the definition of 3-5; `experts_sorted` computes the same with one sort and grouped matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What one router decided for N tokens in one forward pass."""

    logits_NE: Tensor
    probabilities_NE: Tensor  # softmax over all experts
    expert_ids_NK: Tensor  # the chosen experts, best first
    weights_NK: Tensor  # combine weights; each row sums to 1 when renormalised


def route(logits_NE: Tensor, top_k: int, renormalize: bool = True) -> Routing:
    """The `top_k` most probable experts of each token and their combine weights.

    Softmax over all experts, then the K largest, then (if `renormalize`) each row divided by its sum. Computed in
    float32 at least. Raises ValueError when `top_k` is not in 1..E.
    """
    num_experts = logits_NE.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} but there are {num_experts} experts; choose 1..{num_experts}")
    logits_NE = logits_NE if logits_NE.dtype == torch.float64 else logits_NE.float()
    probabilities_NE = logits_NE.softmax(-1)
    weights_NK, expert_ids_NK = probabilities_NE.topk(top_k, dim=-1)
    if renormalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return Routing(logits_NE, probabilities_NE, expert_ids_NK, weights_NK)


def expert_load(routing: Routing) -> Tensor:
    """load_E: the fraction of all N*K routed rows that each expert received; sums to 1."""
    probabilities_NE = routing.probabilities_NE
    return load_from_ids(routing.expert_ids_NK, probabilities_NE.shape[-1], probabilities_NE.dtype)


def load_from_ids(expert_ids_NK: Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """load_E from the chosen experts alone: the fraction of all choices that each expert received; sums to 1."""
    counts_E = torch.bincount(expert_ids_NK.flatten(), minlength=num_experts)
    return counts_E.to(dtype) / expert_ids_NK.numel()


def aux_loss(routing: Routing) -> Tensor:
    """Balance loss of one layer: E * sum_e load_e * mean_probability_e; 1 at perfect balance, whatever K.

    It is E when one expert takes everything (K=1), and E/K when all tokens share the same K experts. Each of the K
    choices counts in the load. The load is a count and has no gradient; the gradient reaches the router through the
    mean probabilities, and pushes down the probability of experts that are over-used. Switch Transformers
    (Fedus et al. 2021, arXiv:2101.03961), eq. 4, without its coefficient and with all K choices in the load.
    """
    load_E, mean_probability_E = expert_load(routing), routing.probabilities_NE.mean(0)
    return load_E.numel() * (load_E * mean_probability_E).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the router's logits: keeps them small. ST-MoE (Zoph et al. 2022), eq. 5."""
    return routing.logits_NE.logsumexp(-1).square().mean()


class Experts(nn.Module):
    """E feed-forward networks in stacked weights: w_up_EFD, (w_gate_EFD,) w_down_EDF and, if configured, biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, d, f = config.moe.num_experts, config.d_model, config.d_ff
        self.activation = config.activation
        self.w_up_EFD = nn.Parameter(torch.empty(e, f, d))
        self.w_gate_EFD = nn.Parameter(torch.empty(e, f, d)) if config.activation == "swiglu" else None
        self.w_down_EDF = nn.Parameter(torch.empty(e, d, f))
        has_gate_bias = config.ffn_bias and config.activation == "swiglu"
        self.b_up_EF = nn.Parameter(torch.zeros(e, f)) if config.ffn_bias else None
        self.b_gate_EF = nn.Parameter(torch.zeros(e, f)) if has_gate_bias else None
        self.b_down_ED = nn.Parameter(torch.zeros(e, d)) if config.ffn_bias else None

    def forward(self, x_RD: Tensor, expert_ids_R: Tensor, counts_E: Tensor) -> Tensor:
        """y_RD: row r through expert expert_ids_R[r]; rows are sorted by expert, counts_E is how many each has."""
        up_RF = grouped_linear(x_RD, self.w_up_EFD, self.b_up_EF, expert_ids_R, counts_E)
        gate_RF = None
        if self.w_gate_EFD is not None:
            gate_RF = grouped_linear(x_RD, self.w_gate_EFD, self.b_gate_EF, expert_ids_R, counts_E)
        return grouped_linear(
            activate(self.activation, up_RF, gate_RF), self.w_down_EDF, self.b_down_ED, expert_ids_R, counts_E
        )

    def expert(self, e: int, x_ND: Tensor) -> Tensor:
        """y_ND: x_ND through expert `e` alone; the definition of what an expert computes."""

        def linear(x, weight, bias):
            return F.linear(x, weight[e], None if bias is None else bias[e])

        up_NF = linear(x_ND, self.w_up_EFD, self.b_up_EF)
        gate_NF = None if self.w_gate_EFD is None else linear(x_ND, self.w_gate_EFD, self.b_gate_EF)
        return linear(activate(self.activation, up_NF, gate_NF), self.w_down_EDF, self.b_down_ED)


def activate(name: str, up_NF: Tensor, gate_NF: Tensor | None) -> Tensor:
    """The FFN's hidden units: gelu(up), gelu_tanh(up) (OpenAI's GPT-2), relu(up), or silu(gate) * up for swiglu."""
    if name == "swiglu":
        return F.silu(gate_NF) * up_NF
    if name == "relu":
        return F.relu(up_NF)
    return F.gelu(up_NF, approximate="tanh" if name == "gelu_tanh" else "none")


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, expert_ids_R: Tensor, counts_E: Tensor) -> Tensor:
    """y_RO: rows sorted by expert, each times its expert's matrix, plus its expert's bias.

    One grouped matrix product where torch has it for this dtype and these widths, else a product per expert.
    """
    if torch.is_autocast_enabled(x_RI.device.type):  # grouped_mm does not take part in autocast by itself
        dtype = torch.get_autocast_dtype(x_RI.device.type)
        x_RI, w_EOI = x_RI.to(dtype), w_EOI.to(dtype)
        b_EO = None if b_EO is None else b_EO.to(dtype)
    if _has_grouped_mm(x_RI, w_EOI):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_RO = F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=offsets_E)
    else:
        rows = x_RI.split(counts_E.tolist())
        # unbind, not w[e]: indexing a stacked parameter gives each expert a gradient as large as the whole stack
        y_RO = torch.cat([x @ w.t() for x, w in zip(rows, w_EOI.unbind(), strict=True)])
    # index_select keeps the backward pass a plain sum into (E, O)
    return y_RO if b_EO is None else y_RO + b_EO.index_select(0, expert_ids_R)


def _has_grouped_mm(x_RI: Tensor, w_EOI: Tensor) -> bool:
    """torch's grouped_mm wants float32 or bfloat16 and rows whose bytes are a multiple of 16; see its documentation."""
    aligned = all(width * x_RI.element_size() % 16 == 0 for width in w_EOI.shape[1:])
    return hasattr(F, "grouped_mm") and x_RI.dtype in (torch.float32, torch.bfloat16) and aligned and len(x_RI) > 0


def experts_loop(experts: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """y_ND, the definition: for each expert, take the tokens that chose it, compute, add with their weights."""
    y_ND = torch.zeros_like(x_ND)
    for e in range(routing.probabilities_NE.shape[-1]):
        token_R, choice_R = torch.where(routing.expert_ids_NK == e)
        weight_R1 = routing.weights_NK[token_R, choice_R].unsqueeze(-1).to(x_ND.dtype)
        y_ND = y_ND.index_add(0, token_R, weight_R1 * experts.expert(e, x_ND[token_R]))
    return y_ND


def experts_sorted(experts: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """y_ND, the fast path: sort the N*K rows by expert, compute them in groups, put them back and add up."""
    num_experts = routing.probabilities_NE.shape[-1]
    n, k = routing.expert_ids_NK.shape
    expert_ids_R, order_R = routing.expert_ids_NK.flatten().sort(stable=True)
    counts_E = torch.bincount(expert_ids_R, minlength=num_experts)
    x_RD = x_ND.index_select(0, order_R // k)
    y_RD = experts(x_RD, expert_ids_R, counts_E)
    row_of_NK = order_R.argsort().view(n, k)
    # embedding_bag looks up each token's K rows and adds them with their weights in one pass
    return F.embedding_bag(row_of_NK, y_RD, mode="sum", per_sample_weights=routing.weights_NK.to(y_RD.dtype))


class MoELayer(nn.Module):
    """A router and its experts in place of an FFN; `forward` returns the output and the Routing that made it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.top_k, self.renormalize = moe.top_k, moe.renormalize
        self.router = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias)
        self.noise = nn.Linear(config.d_model, moe.num_experts, bias=moe.router_bias) if moe.noisy else None
        self.experts = Experts(config)

    def router_logits(self, x_ND: Tensor) -> Tensor:
        """logits_NE; in training, a noisy router adds N(0,1) * softplus(noise(x)) (Shazeer et al. 2017, eq. 4)."""
        logits_NE = self.router(x_ND)
        if self.noise is not None and self.training:
            logits_NE = logits_NE + torch.randn_like(logits_NE) * F.softplus(self.noise(x_ND))
        return logits_NE

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = route(self.router_logits(x_ND), self.top_k, self.renormalize)
        y_ND = experts_sorted(self.experts, x_ND, routing)
        return y_ND.view_as(x_BTD), routing
