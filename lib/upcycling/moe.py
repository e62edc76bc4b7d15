"""Mixture-of-Experts: route, dispatch, compute, combine.

Shapes: N tokens, D model width, F FFN width, E experts, K experts per token, R = N*K routed rows.

The forward pass of `MoELayer`, step by step:
  1. `router`      x_ND -> logits_NE, a score for each expert
  2. `route`       softmax, keep the K best, renormalise -> Routing
  3. dispatch      each token's vector goes to its K experts
  4. `Experts`     each expert is an ordinary FFN over the rows that it was sent
  5. combine       each token's K results are added up with its combine weights

`experts_loop` is the definition of 3-5; `experts_sorted` computes the same with one sort and grouped matrix products.
Other rules for step 2 are in `upcycling.routers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .config import ModelConfig
from .products import NARROWEST, few_rows_linear, gradient_like, linear, product, row_linear, takes_onednn


@dataclass(frozen=True)
class Routing:
    """What one router decided for N tokens in one forward pass.

    K is `top_k`, or E where a rule chooses a number of experts that varies from token to token: then `kept_NK` marks
    the choices that were made. A choice that is not kept has weight 0 and is not computed (unless `computes_all`).
    """

    logits_NE: Tensor
    probabilities_NE: Tensor  # softmax over all experts; each row sums to 1
    expert_ids_NK: Tensor  # the chosen experts, best first
    weights_NK: Tensor  # combine weights; each row sums to 1 when renormalised
    kept_NK: Tensor | None = None  # bool; None: all are kept
    computes_all: bool = False  # experts that are not kept are computed too, for the router's gradient
    wanted_NK: Tensor | None = None  # with a capacity: what kept_NK was before full experts turned some away,
    dropped: Tensor | None = None  # and the fraction of choices that they turned away
    penalty: Tensor | None = None  # a term that the rule adds to the objective, already weighted
    clean_logits_NE: Tensor | None = None  # noisy routers in training: the logits before the noise,
    noise_std_NE: Tensor | None = None  # and the noise's standard deviation


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


def expert_load(routing: Routing, wanted: bool = False) -> Tensor:
    """load_E: the fraction of all choices that each expert received; sums to 1. `wanted`: see `expert_counts`."""
    counts_E = expert_counts(routing, wanted).to(routing.probabilities_NE.dtype)
    return counts_E / counts_E.sum().clamp(min=1)


def expert_counts(routing: Routing, wanted: bool = False) -> Tensor:
    """counts_E: how many of the choices that were kept fell on each expert.

    With `wanted` those that a capacity dropped count, too: balancing must see the demand, not what full experts left.
    """
    chosen_NK = routing.wanted_NK if wanted and routing.wanted_NK is not None else routing.kept_NK
    ids = routing.expert_ids_NK if chosen_NK is None else routing.expert_ids_NK[chosen_NK]
    return torch.bincount(ids.flatten(), minlength=routing.probabilities_NE.shape[-1])


def refuse_varying_choices(routing: Routing) -> None:
    """Raise ValueError where tokens have different numbers of choices: what is recorded has K for each.

    A choice that a capacity dropped is a choice; its weight is 0.
    """
    made_NK = routing.kept_NK if routing.wanted_NK is None else routing.wanted_NK
    if made_NK is not None and not made_NK.all():
        raise ValueError(
            "this routing rule gives tokens different numbers of experts, and what is recorded holds K for each; count "
            "them with upcycling.moe.expert_counts(routing) for each of model(tokens_BT).routings, or use "
            "evaluate_routing (a straight-through router: record it in evaluation mode)"
        )


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

    What the same loss is at perfect balance elsewhere, that is by what to divide its coefficient to compare it:

        1     here, summed over layers by the objective; Switch (K=1); MegaBlocks, there the mean over layers
        K     transformers 5.23 (Mixtral, Qwen-MoE, OLMoE): each choice counts as a whole token; all layers are pooled
        1/K   a code that divides the counts by K, to make a load of them, and the loss once more

    With a capacity the load is what was asked for, dropped choices included: else a full expert would look balanced.
    """
    load_E, mean_probability_E = expert_load(routing, wanted=True), routing.probabilities_NE.mean(0)
    return load_E.numel() * (load_E * mean_probability_E).sum()


def pooled_aux_loss(routings: list[Routing]) -> Tensor:
    """The balance loss over all layers at once, as transformers computes it (there times K); 1 at "balance".

    Loads and probabilities are averaged over the layers before they are multiplied, so layers that collapse on
    different experts cancel: four layers, each on an expert of its own out of four, give 1. For comparison only.
    """
    load_E = torch.stack([expert_load(routing, wanted=True) for routing in routings]).mean(0)
    mean_probability_E = torch.stack([routing.probabilities_NE.mean(0) for routing in routings]).mean(0)
    return load_E.numel() * (load_E * mean_probability_E).sum()


def sequence_aux_loss(routing: Routing, sequences: int) -> Tensor:
    """The mean over `sequences` of each one's own balance loss; 1 when every sequence is balanced.

    The N tokens are `sequences` rows of equal length. Stricter than `aux_loss`, which lets one sequence favour some
    experts if another favours the rest. DeepSeek-V3 (arXiv:2412.19437), eq. 17-20, without its coefficient.
    Raises ValueError when the tokens cannot be divided so.
    """
    n, e = routing.probabilities_NE.shape
    if n % sequences:
        raise ValueError(f"{n} tokens are not {sequences} sequences of equal length")
    chosen_NK = routing.kept_NK if routing.wanted_NK is None else routing.wanted_NK
    if chosen_NK is None:
        chosen_NK = torch.ones_like(routing.expert_ids_NK)
    chosen_NE = torch.zeros_like(routing.probabilities_NE)
    chosen_NE = chosen_NE.scatter_add(1, routing.expert_ids_NK, chosen_NK.to(chosen_NE.dtype))
    counts_BE = chosen_NE.view(sequences, -1, e).sum(1)
    load_BE = counts_BE / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    mean_probability_BE = routing.probabilities_NE.view(sequences, -1, e).mean(1)
    return e * (load_BE * mean_probability_BE).sum(-1).mean()


def importance_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' total combine weights; 0 at balance, E - 1 at collapse on one.

    Shazeer et al. 2017 (arXiv:1701.06538), eq. 6-7. Its gradient reaches the chosen experts' weights only.
    """
    zeros_E = routing.probabilities_NE.new_zeros(routing.probabilities_NE.shape[-1])
    weights_NK = routing.weights_NK.to(zeros_E.dtype)
    return _squared_variation(zeros_E.index_add(0, routing.expert_ids_NK.flatten(), weights_NK.flatten()))


def load_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' smooth load, for noisy routers in training; 0 at balance.

    An expert's smooth load is the sum over tokens of the probability that it would be among the K best if its own
    noise were drawn again: differentiable, unlike a count. Shazeer et al. 2017 (arXiv:1701.06538), appendix A.
    Raises ValueError for a routing without noise.
    """
    if routing.noise_std_NE is None:
        raise ValueError("the smooth load needs a noisy router in training mode; set MoEConfig(noisy=True)")
    noisy_NE, k = routing.logits_NE, routing.expert_ids_NK.shape[1]
    best_NK1 = noisy_NE.topk(min(k + 1, noisy_NE.shape[1]), dim=-1).values
    if best_NK1.shape[1] == k:  # every expert is chosen, whatever the noise
        return noisy_NE.new_zeros(())
    chosen_NE = noisy_NE >= best_NK1[:, k - 1 : k]
    threshold_NE = torch.where(chosen_NE, best_NK1[:, k : k + 1], best_NK1[:, k - 1 : k])
    threshold_NE = threshold_NE.clamp(min=-1e4)  # -inf where expert dropout leaves K: nothing can push those out
    distance_NE = (routing.clean_logits_NE - threshold_NE) / routing.noise_std_NE
    return _squared_variation(torch.special.ndtr(distance_NE).sum(0))


def _squared_variation(total_E: Tensor) -> Tensor:
    return total_E.var(correction=0) / total_E.mean().square().clamp(min=1e-20)


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the router's logits: keeps them small. ST-MoE (Zoph et al. 2022), eq. 5."""
    return routing.logits_NE.logsumexp(-1).square().mean()


class Experts(nn.Module):
    """E feed-forward networks in stacked weights: w_up_EFD, (w_gate_EFD,) w_down_EDF and, if configured, biases."""

    def __init__(self, config: ModelConfig, num_experts: int | None = None, width: int | None = None):
        super().__init__()
        e, d, f = num_experts or config.moe.num_experts, config.d_model, width or config.expert_width
        self.activation = config.activation
        self.w_up_EFD = nn.Parameter(torch.empty(e, f, d))
        self.w_gate_EFD = nn.Parameter(torch.empty(e, f, d)) if config.activation == "swiglu" else None
        self.w_down_EDF = nn.Parameter(torch.empty(e, d, f))
        has_gate_bias = config.ffn_bias and config.activation == "swiglu"
        self.b_up_EF = nn.Parameter(torch.zeros(e, f)) if config.ffn_bias else None
        self.b_gate_EF = nn.Parameter(torch.zeros(e, f)) if has_gate_bias else None
        self.b_down_ED = nn.Parameter(torch.zeros(e, d)) if config.ffn_bias else None

    def forward(self, x_RD: Tensor, expert_ids_R: Tensor, counts_E: Tensor) -> Tensor:
        """y_RD: row r through expert expert_ids_R[r]; rows are sorted by expert, counts_E is how many each has.

        For the backward pass it keeps the rows and the hidden units before and after the activation, R (D + 2 F)
        numbers; for swiglu R (D + 4 F), expert by expert R (D + 2 F), as it computes what follows the gate again.
        """
        few, narrowest = len(x_RD) < 4 * len(counts_E), min(self.w_up_EFD.shape[1:])
        on_cpu = x_RD.device.type == "cpu"
        if few and narrowest >= NARROWEST and on_cpu and len(x_RD) and not torch.is_grad_enabled():
            parts = zip(range(len(counts_E)), x_RD.split(counts_E.tolist()))
            return torch.cat([self.expert(e, x, few_rows_linear) for e, x in parts if len(x)])
        enough = not few or narrowest >= 512  # for what oneDNN costs per expert
        if len(x_RD) and enough and takes_onednn(x_RD, self.w_up_EFD):
            weights = (self.w_up_EFD, self.w_gate_EFD, self.w_down_EDF, self.b_up_EF, self.b_gate_EF, self.b_down_ED)
            return _ExpertByExpert.apply(self.activation, counts_E.tolist(), x_RD, *weights)
        up_RF = grouped_linear(x_RD, self.w_up_EFD, self.b_up_EF, expert_ids_R, counts_E)
        gate_RF = None
        if self.w_gate_EFD is not None:
            gate_RF = grouped_linear(x_RD, self.w_gate_EFD, self.b_gate_EF, expert_ids_R, counts_E)
        return grouped_linear(
            activate(self.activation, up_RF, gate_RF), self.w_down_EDF, self.b_down_ED, expert_ids_R, counts_E
        )

    def expert(self, e: int, x_ND: Tensor, linear=F.linear) -> Tensor:
        """y_ND: x_ND through expert `e` alone; the definition of what an expert computes."""

        def apply(x, weight, bias):
            return linear(x, weight[e], None if bias is None else bias[e])

        up_NF = apply(x_ND, self.w_up_EFD, self.b_up_EF)
        gate_NF = None if self.w_gate_EFD is None else apply(x_ND, self.w_gate_EFD, self.b_gate_EF)
        return apply(activate(self.activation, up_NF, gate_NF), self.w_down_EDF, self.b_down_ED)


class _ExpertByExpert(torch.autograd.Function):
    """`Experts.forward` by oneDNN's products, one expert after the other, so that its rows stay in the cache.

    oneDNN makes a program for each number of rows that it meets. That takes 0.2 ms, as multiplying 40 rows does at 512
    by 1,024, and routers send another number each time. So the numbers are rounded up: a few rows of the neighbours
    are computed, too, and left out (`_blocks`).
    The backward pass writes each expert's gradients into one tensor for all.
    """

    @staticmethod
    def forward(ctx, activation, counts, x_RD, w_up_EFD, w_gate_EFD, w_down_EDF, b_up_EF, b_gate_EF, b_down_ED):
        y_RD, hidden, blocks = torch.empty_like(x_RD), [], [*_blocks(counts)]
        for e, rows, block, own in blocks:
            up_BF, gate_BF = product(x_RD[block], w_up_EFD[e], None if b_up_EF is None else b_up_EF[e]), None
            if w_gate_EFD is not None:
                gate_BF = product(x_RD[block], w_gate_EFD[e], None if b_gate_EF is None else b_gate_EF[e])
            act_BF = activate(activation, up_BF, gate_BF)
            y_RD[rows] = product(act_BF, w_down_EDF[e], None if b_down_ED is None else b_down_ED[e])[own]
            hidden += [up_BF, act_BF if gate_BF is None else gate_BF]
        ctx.activation, ctx.counts, ctx.blocks = activation, counts, blocks
        ctx.save_for_backward(x_RD, w_up_EFD, w_gate_EFD, w_down_EDF, b_up_EF, b_gate_EF, b_down_ED, *hidden)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        saved = ctx.saved_tensors
        x_RD, weights, hidden = saved[0], saved[1:7], iter(saved[7:])
        w_up_EFD, w_gate_EFD, w_down_EDF = weights[:3]
        dy_RD, dx_RD = dy_RD.contiguous(), torch.empty_like(x_RD)
        gradients = [gradient_like(w) if wanted else None for w, wanted in zip(weights, ctx.needs_input_grad[3:])]
        dw_up_EFD, dw_gate_EFD, dw_down_EDF, db_up_EF, db_gate_EF, db_down_ED = gradients
        for e, rows, block, own in ctx.blocks:
            x_BD, dy_BD, up_BF, other_BF = x_RD[block], _only(own, dy_RD[block]), next(hidden), next(hidden)
            dact_BF = product(dy_BD, w_down_EDF[e].t())
            if w_gate_EFD is None:
                act_BF, dup_BF, dgate_BF = other_BF, activate_backward(ctx.activation, dact_BF, up_BF), None
            else:
                silu_BF = F.silu(other_BF)
                act_BF, dup_BF = silu_BF * up_BF, silu_BF.mul_(dact_BF)
                dgate_BF = torch.ops.aten.silu_backward(dact_BF.mul_(up_BF), other_BF)
            for dw, db, dout_BO, in_BI in (
                (dw_down_EDF, db_down_ED, dy_BD, act_BF),
                (dw_up_EFD, db_up_EF, dup_BF, x_BD),
                (dw_gate_EFD, db_gate_EF, dgate_BF, x_BD),
            ):
                if dw is not None:
                    dw[e] = product(dout_BO.t(), in_BI.t())
                if db is not None:
                    db[e] = dout_BO.sum(0)
            dx_BD = product(dup_BF, w_up_EFD[e].t())
            if dgate_BF is not None:
                dx_BD += product(dgate_BF, w_gate_EFD[e].t())
            dx_RD[rows] = dx_BD[own]
        for e, count in enumerate(ctx.counts):
            for gradient in gradients:
                if count == 0 and gradient is not None:
                    gradient[e] = 0
        return None, None, dx_RD, *gradients


def _blocks(counts: list[int]) -> Iterator[tuple[int, slice, slice, slice]]:
    """(expert, its rows, a block that holds them, where in the block they are) for each expert that has any.

    Rows are sorted by expert. A block has a multiple of 4 rows, from 256 on of 8, from 512 on of 16, and so forth: 32
    sizes per octave, at most 3 % more rows from 128 on. Under a FLOP counter it has the expert's own rows alone.
    """
    exact = _get_current_dispatch_mode() is not None
    end, total = 0, sum(counts)
    for e, count in enumerate(counts):
        start, end = end, end + count
        if count:
            step = 1 if exact else max(4, 1 << max(0, count.bit_length() - 6))
            size = min(-(-count // step) * step, total)
            first = min(start, total - size)
            yield e, slice(start, end), slice(first, first + size), slice(start - first, end - first)


def _only(own: slice, x_BI: Tensor) -> Tensor:
    """x_BI with 0 in all rows but its own: then whatever is made of them adds nothing to a gradient."""
    if own == slice(0, len(x_BI)):
        return x_BI
    x_BI = x_BI.clone()
    x_BI[: own.start] = 0
    x_BI[own.stop :] = 0
    return x_BI


def activate(name: str, up_NF: Tensor, gate_NF: Tensor | None) -> Tensor:
    """The FFN's hidden units: gelu(up), gelu_tanh(up) (OpenAI's GPT-2), relu(up), or silu(gate) * up for swiglu."""
    if name == "swiglu":
        return F.silu(gate_NF) * up_NF
    if name == "relu":
        return F.relu(up_NF)
    return F.gelu(up_NF, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_backward(name: str, dact_NF: Tensor, up_NF: Tensor) -> Tensor:
    """dup_NF of gelu, gelu_tanh or relu, in the memory of dact_NF."""
    if name == "relu":
        return dact_NF.masked_fill_(up_NF <= 0, 0)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(dact_NF, up_NF, approximate=approximate, grad_input=dact_NF)


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


class _Combine(torch.autograd.Function):
    """y_ND: each token's K rows of y_RD, looked up and added with their weights in one pass.

    `embedding_bag` with a backward pass of its own: each row is looked up by one choice at most, so its gradient can
    be gathered, where embedding_bag would add into zeros. order_R: which of the N*K choices a row belongs to.
    """

    @staticmethod
    def forward(ctx, y_RD, weights_NK, row_of_NK, order_R):
        ctx.save_for_backward(y_RD, weights_NK, row_of_NK, order_R)
        return F.embedding_bag(row_of_NK, y_RD, mode="sum", per_sample_weights=weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        y_RD, weights_NK, row_of_NK, order_R = ctx.saved_tensors
        n, k = weights_NK.shape
        dy_RD = dy_ND.index_select(0, order_R // k).mul_(weights_NK.flatten()[order_R].unsqueeze(-1))
        if not ctx.needs_input_grad[1]:
            return dy_RD, None, None, None
        choices_R = torch.arange(n * k, device=order_R.device)
        dweights_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy_ND, y_RD, row_of_NK.flatten(), choices_R[::k], choices_R // k, 0
        )
        return dy_RD, dweights_R.view(n, k), None, None


def experts_of_one(experts: Experts, x_1D: Tensor, routing: Routing) -> Tensor:
    """y_1D of a single token on a CPU, as in generation, without gradients: its K experts, nothing to sort."""
    y_KD = torch.cat([experts.expert(e, x_1D, row_linear) for e in routing.expert_ids_NK[0].tolist()])
    return routing.weights_NK.to(y_KD.dtype) @ y_KD


def limit_capacity(routing: Routing, factor: float) -> Routing:
    """The routing in which each expert takes no more than ceil(factor * choices / E); what comes later is dropped.

    All tokens' first choices are served in the order of the batch, then all second ones, as in GShard (Lepikhin et al.
    2020, arXiv:2006.16668), algorithm 1; rules whose choices are not listed best first are served in token order. A
    dropped choice gets weight 0 and the others are not rescaled: a token that loses all of them keeps only the residual
    stream. `routing.dropped` is the fraction of choices lost.

    What is dropped depends on the rest of the batch. With K=1 that is on earlier tokens alone; with K of 2 or more a
    later token's first choice goes before an earlier one's second, and where K varies the capacity itself depends on
    all choices: then the future leaks into the past. A token by itself never finds an expert full (factor >= 1/K).
    """
    n, k = routing.expert_ids_NK.shape
    num_experts = routing.probabilities_NE.shape[-1]
    made_NK = torch.ones_like(routing.expert_ids_NK, dtype=torch.bool) if routing.kept_NK is None else routing.kept_NK
    capacity = math.ceil(factor * int(made_NK.sum()) / num_experts)
    made_KN, ids_KN = made_NK.t().flatten(), routing.expert_ids_NK.t().flatten()  # all first choices, all second, ...
    chosen_ME = F.one_hot(ids_KN, num_experts) * made_KN.unsqueeze(-1)
    place_M = (chosen_ME.cumsum(0) * chosen_ME).sum(-1)  # the how-manieth for its expert, from 1
    kept_NK = (made_KN & (place_M <= capacity)).view(k, n).t()
    lost_NK, weights_NK = made_NK & ~kept_NK, routing.weights_NK
    if routing.computes_all:  # the weight goes, the gradient stays
        weights_NK = torch.where(lost_NK, weights_NK - weights_NK.detach(), weights_NK)
    else:
        weights_NK = weights_NK * kept_NK
    dropped = lost_NK.sum() / made_NK.sum().clamp(min=1)
    return replace(routing, kept_NK=kept_NK, weights_NK=weights_NK, wanted_NK=made_NK, dropped=dropped)


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
