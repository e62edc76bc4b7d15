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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .config import ModelConfig
from .experts import Experts
from .products import linear, row_linear


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
