"""What a router did, in numbers: how even the load is, how specialised the experts are, whether the router can learn.

Every function is pure: expert ids, labels or probabilities in, a tensor out. Most take any leading dimensions, so a
whole trace (L, N, K) gives one number a layer. A number by itself says little: each docstring says what a router
that learned nothing would score (`uniform`), and `shuffled_baseline` and `uniform_baseline` measure it on your data.

Shapes: L MoE layers, N tokens, K experts per token, E experts, C classes (domains, token ids), V vocabulary.
Information is in bits, cross-entropy in nats. "OLMoE" is Muennighoff et al. 2024, arXiv:2409.02060, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..core.routing import by_expert, count_ids, load_from_ids

# ------------------------------------------------------------------------------------------------------------- load


def load_per_expert(expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """load_E (or load_LE): the fraction of all N*K choices that each expert received; sums to 1.

    Range 0..1/K. Uniform: 1/E each, give or take sqrt(1 / (N K E)). Shuffling tokens does not change it.
    """
    ids_LNK = _checked_ids(expert_ids_NK, num_experts).reshape(-1, *expert_ids_NK.shape[-2:])
    load_LE = torch.stack([load_from_ids(ids_NK, num_experts, torch.float64) for ids_NK in ids_LNK])
    return load_LE.reshape(*expert_ids_NK.shape[:-2], num_experts)


def max_over_mean(load_E: Tensor) -> Tensor:
    """The busiest expert's load over the mean load: how much longer it works than it would in a balanced layer.

    Range 1 (even) .. E/K (all tokens share K experts). Uniform: barely above 1, about
    1 + sqrt(2 E ln E / (N K)), so a handful of tokens looks uneven by chance.
    """
    return load_E.amax(-1) * load_E.shape[-1]


def coefficient_of_variation(load_E: Tensor) -> Tensor:
    """Standard deviation over mean of the load; its square is the balance loss of Shazeer et al. 2017, section 4.

    Range 0 (even) .. sqrt(E/K - 1) (all tokens share K experts). Uniform: about sqrt(E / (N K)), not 0.
    """
    return load_E.std(-1, correction=0) * load_E.shape[-1]


def balance_score(load_E: Tensor) -> Tensor:
    """B, the load's entropy over its largest value: -sum_e load_e log load_e / log E (Shannon's evenness).

    Range log K / log E (all tokens share K experts) .. 1 (even); 1 where there is only one expert. Uniform: about
    1 - (E-1) / (2 N K ln E).
    """
    num_experts = load_E.shape[-1]
    if num_experts == 1:
        return torch.ones_like(load_E[..., 0])
    return _entropy(load_E) / math.log2(num_experts)


def effective_experts(load_E: Tensor) -> Tensor:
    """1 / sum_e load_e^2: as many experts, evenly used, would give the same sum of squares (inverse Simpson index).

    Range K (all tokens share K experts) .. E (even). Uniform: about E / (1 + E / (N K)).
    """
    return 1 / load_E.square().sum(-1)


def dead_experts(load_E: Tensor, threshold: float = 0.1) -> Tensor:
    """Which experts (bool, same shape) receive at most `threshold` times the mean load; 0 means never chosen at all.

    Uniform: none, once N K is well above E; an expert is missed altogether with probability (1 - K/E)^N, so do not
    call an expert dead on a sentence. Shuffling tokens does not change it.
    """
    return load_E * load_E.shape[-1] <= threshold


# --------------------------------------------------------------------------------------------------- specialisation


def domain_specialization(
    expert_ids_NK: Tensor, labels_N: Tensor, num_experts: int, num_classes: int | None = None
) -> Tensor:
    """share_CE (or share_LCE): N_{E,D} / N_D, the fraction of domain D's tokens that have expert E among their K.

    OLMoE, section 5.3. Range 0..1; a row sums to K; a class without tokens gives a row of NaN. `labels_N` are class
    numbers 0..C-1. Uniform: K/E everywhere. Shuffled: each row is the load times K, give or take sampling.
    """
    counts_CE = _counts(expert_ids_NK, labels_N, num_experts, num_classes)
    return counts_CE * expert_ids_NK.shape[-1] / counts_CE.sum(-1, keepdim=True)


def domain_divergence(share_CE: Tensor) -> Tensor:
    """Mean over pairs of domains of the Jensen-Shannon divergence of their expert loads, in bits.

    Rows are divided by their sums first, so both `domain_specialization` and raw counts will do. JSD is
    H((p+q)/2) - (H(p)+H(q))/2. Range 0 (domains are routed alike) .. 1 (no expert in common).
    Classes without tokens are left out; NaN with fewer than two. Uniform and shuffled: above 0, about
    (E-1) / (8 ln 2) * (1/n_1 + 1/n_2) bits for two domains of n choices each, so compare with `shuffled_baseline`.
    """
    p_CE = share_CE / share_CE.sum(-1, keepdim=True)
    pairs = [jensen_shannon(p_CE[..., i, :], p_CE[..., j, :]) for i, j in combinations(range(p_CE.shape[-2]), 2)]
    if not pairs:
        return p_CE.new_full(p_CE.shape[:-2], torch.nan)
    return torch.stack(pairs, -1).nanmean(-1)


def jensen_shannon(p_E: Tensor, q_E: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions over experts, in bits, 0..1 (Lin 1991)."""
    # rounding may leave a difference of equal entropies just below 0; NaN passes through clamp
    return (_entropy((p_E + q_E) / 2) - (_entropy(p_E) + _entropy(q_E)) / 2).clamp(0, 1)


def vocabulary_specialization(
    expert_ids_NK: Tensor, token_ids_N: Tensor, num_experts: int, min_count: int = 10
) -> Tensor:
    """Mean over token ids x of max_E N_{x,E} / N_x: how much of a token's occurrences its favourite expert sees.

    OLMoE, section 5.4, averaged as there: each token id counts once, however frequent. Range K/E..1; NaN if no id
    occurs `min_count` times. An id that occurs once scores 1 whatever the router does, so rare ones are left out;
    OLMoE's figure keeps them (min_count=1). Uniform: K/E plus what a maximum over few occurrences gains, which is a
    lot, so compare with `shuffled_baseline` (labels: the token ids). `expert_ids_NK[..., :1]` gives the first choice
    alone, OLMoE's k = 1.
    """
    counts_VE = _counts(expert_ids_NK, token_ids_N, num_experts)
    occurrences_V = counts_VE.sum(-1) / expert_ids_NK.shape[-1]
    favourite_V = counts_VE.amax(-1) / occurrences_V
    return torch.where(occurrences_V >= max(min_count, 1), favourite_V, torch.nan).nanmean(-1)


def coactivation(expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """share_EE: N_ij / N_i, the fraction of expert i's tokens that also go to expert j (OLMoE, section 5.2).

    All pairs of a token's experts count, as in the paper's definition; its script counts neighbours in rank only.
    Range 0..1; the diagonal is 1, a row without tokens NaN; the rest of a row sums to K-1. Uniform: (K-1)/(E-1) off
    the diagonal. Shuffled (first choices against the rest): an expert is followed by the others as they are loaded.
    """
    ids_NK = _checked_ids(expert_ids_NK, num_experts)
    chosen_NE = by_expert(torch.ones_like(ids_NK, dtype=torch.float64), ids_NK, num_experts)
    together_EE = chosen_NE.transpose(-2, -1) @ chosen_NE
    return together_EE / together_EE.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def router_saturation(expert_ids_NK: Tensor, final_expert_ids_NK: Tensor) -> Tensor:
    """Mean over tokens of |E_t & E_T| / K: the share of a token's final experts that it already had at step t.

    OLMoE, section 5.1. Both must be routings of the same tokens, in the same order. Range 0..1; 1 at t = T. Uniform:
    K/E. Shuffled (`shuffled_baseline(router_saturation, ids_t, ids_T)`): sum of the products of the loads, times K.
    """
    if expert_ids_NK.shape != final_expert_ids_NK.shape:
        raise ValueError(
            f"the two routings have shapes {tuple(expert_ids_NK.shape)} and {tuple(final_expert_ids_NK.shape)}; "
            "record both on the same tokens with the same top_k"
        )
    same_NKK = expert_ids_NK.unsqueeze(-1) == final_expert_ids_NK.unsqueeze(-2)
    return same_NKK.any(-1).double().mean((-2, -1))


def router_margin(probabilities_NE: Tensor) -> Tensor:
    """margin_N: probability of the first choice minus that of the second; how decided the router is.

    Range 0 (a tie) .. 1; NaN where there is only one expert. Uniform probabilities: 0. Average it over tokens, or
    over a domain's tokens; shuffling tokens changes only the latter.
    """
    if probabilities_NE.shape[-1] == 1:
        return torch.full_like(probabilities_NE[..., 0], torch.nan)
    best_N2 = probabilities_NE.topk(2, dim=-1).values
    return best_N2[..., 0] - best_N2[..., 1]


def router_entropy(probabilities_NE: Tensor) -> Tensor:
    """entropy_N: the entropy of each token's probabilities over experts, in bits; 2 to its power counts experts.

    Rows are divided by their sums first, which leaves softmax routers as they are and makes sigmoid ones comparable.
    Range 0 (certain) .. log2 E. Uniform probabilities: log2 E. Shuffling tokens changes only averages per domain.
    """
    return _entropy(probabilities_NE / probabilities_NE.sum(-1, keepdim=True))


# --------------------------------------------------------------------------------------------------- null baselines


@dataclass(frozen=True)
class Baseline:
    """Mean and standard deviation of a statistic over repeats in which there was nothing to find."""

    mean: Tensor
    standard_deviation: Tensor

    def spreads(self, value: Tensor) -> Tensor:
        """How many standard deviations `value` lies above the mean."""
        return (value - self.mean) / self.standard_deviation


def shuffled_baseline(
    statistic: Callable[[Tensor, Tensor], Tensor],
    expert_ids_NK: Tensor,
    labels_N: Tensor,
    repeats: int = 20,
    seed: int = 0,
    *,
    groups_N: Tensor | None = None,
    within_N: Tensor | None = None,
) -> Baseline:
    """What `statistic(expert_ids_NK, labels_N)` gives when the labels have nothing to do with the routing.

    The labels are permuted over tokens; experts, loads and class sizes stay. `expert_ids_NK` may be (L, N, K): all
    layers see the same permutation. The labels may be another routing, (N, K) or (L, N, K), too. Three nulls:

    - plain: every token for itself. But tokens of one document are alike for reasons other than their domain (its
      names, its style); they are no independent evidence, so this null is too low and its spread too small.
    - `groups_N` (the number of each token's document or sequence): whole groups swap labels. Would other documents,
      dealt to the domains at random, differ as much? All tokens of a group must have one label. The one to use for
      domains; not for token ids, which differ within a document.
    - `within_N` (the token ids): labels are permuted among tokens of the same id. What remains is what the words
      alone explain: a router that looks at nothing but the token scores just that.

    None of them is an untrained router, which separates domains already, because it sees what the model computes: to
    say that something was *learned*, compare with the routing at step 0 as well. Raises ValueError for labels that
    do not fit.
    """
    dim = 0 if labels_N.dim() == 1 else -2
    if labels_N.shape[dim] != expert_ids_NK.shape[-2]:
        raise ValueError(f"there are {expert_ids_NK.shape[-2]} tokens but labels for {labels_N.shape[dim]}")
    if groups_N is not None and within_N is not None:
        raise ValueError("give groups_N or within_N, not both: they are different questions")
    generator = torch.Generator().manual_seed(seed)
    of_group_N, labels_G = None, labels_N
    if groups_N is not None:
        of_group_N, labels_G = _labels_of_groups(labels_N, groups_N)
    values = []
    for _ in range(repeats):
        order_G = torch.randperm(labels_G.shape[dim], generator=generator)
        if within_N is not None:  # the tokens of each id in random order take the places of the tokens of that id
            order_G = order_G[within_N[order_G].argsort(stable=True)][within_N.argsort(stable=True).argsort()]
        shuffled_G = labels_G.index_select(dim, order_G.to(labels_G.device))
        values.append(statistic(expert_ids_NK, shuffled_G if of_group_N is None else shuffled_G[of_group_N]))
    return _baseline(values)


def uniform_baseline(
    statistic: Callable[[Tensor], Tensor],
    num_tokens: int,
    num_experts: int,
    top_k: int,
    repeats: int = 20,
    seed: int = 0,
) -> Baseline:
    """What `statistic(expert_ids_NK)` gives when each of N tokens draws K different experts, all equally likely."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} but there are {num_experts} experts; choose 1..{num_experts}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.rand(num_tokens, num_experts, generator=generator) for _ in range(repeats))
    return _baseline([statistic(draw_NE.topk(top_k, dim=-1).indices) for draw_NE in draws])


def _baseline(values: list) -> Baseline:
    if len(values) < 2:
        raise ValueError(f"repeats={len(values)} gives no spread; choose at least 2, better 20")
    values_R = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
    return Baseline(values_R.mean(0), values_R.std(0))


def _labels_of_groups(labels_N: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor]:
    """(group number of each token, label of each group)."""
    if groups_N.shape != labels_N.shape:
        raise ValueError(f"groups_N has shape {tuple(groups_N.shape)}, labels_N {tuple(labels_N.shape)}")
    _, of_group_N = groups_N.unique(return_inverse=True)
    labels_G = labels_N.new_zeros(int(of_group_N.max()) + 1)
    labels_G[of_group_N] = labels_N
    if not torch.equal(labels_G[of_group_N], labels_N):
        raise ValueError("a group has tokens of more than one label; shuffle tokens instead, or take smaller groups")
    return of_group_N, labels_G


# ---------------------------------------------------------------------------------------------------------- helpers


def _entropy(p_E: Tensor) -> Tensor:
    """Entropy in bits; 0 log 0 is 0."""
    return (0 - torch.xlogy(p_E, p_E).sum(-1)) / math.log(2)  # 0 - x: no -0.0


def _counts(expert_ids_NK: Tensor, labels_N: Tensor, num_experts: int, num_classes: int | None = None) -> Tensor:
    """counts_CE (or counts_LCE): how many of the class's tokens chose the expert."""
    ids_LNK = _checked_ids(expert_ids_NK, num_experts).reshape(-1, *expert_ids_NK.shape[-2:])
    if labels_N.shape != ids_LNK.shape[1:2] or labels_N.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels_N.shape)} and type {labels_N.dtype} for {ids_LNK.shape[1]} tokens; "
            "give one integer a token"
        )
    low, high = (int(value) for value in labels_N.aminmax())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ValueError(f"label {low if low < 0 else high} is outside 0..{num_classes - 1}")
    cell_LNK = labels_N.long()[:, None] * num_experts + ids_LNK
    counts_LCE = torch.stack([count_ids(cell_NK, num_classes * num_experts) for cell_NK in cell_LNK])
    return counts_LCE.double().reshape(*expert_ids_NK.shape[:-2], num_classes, num_experts)


def _checked_ids(expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """The ids as int64, or ValueError for no tokens or an expert that is not there."""
    if expert_ids_NK.dim() < 2 or expert_ids_NK.numel() == 0:
        raise ValueError(
            f"expert ids have shape {tuple(expert_ids_NK.shape)}; expected (N, K) or (L, N, K) with at least one token"
        )
    low, high = (int(value) for value in expert_ids_NK.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(f"expert id {low if low < 0 else high} is outside 0..{num_experts - 1}; is num_experts right?")
    return expert_ids_NK.long()
