"""What a router decides: the Routing of N tokens, softmax top-k, loads, capacity.

Shapes: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return count_ids(ids, routing.probabilities_NE.shape[-1])


def count_ids(expert_ids: Tensor, num_experts: int) -> Tensor:
    """counts_E: how often each of the numbers 0..E-1 stands among ids of any shape."""
    return torch.bincount(expert_ids.flatten(), minlength=num_experts)


def by_expert(values_NK: Tensor, expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """values_NE: each choice's value in its expert's place, 0 (or False) elsewhere; leading dimensions may be more."""
    return values_NK.new_zeros(*expert_ids_NK.shape[:-1], num_experts).scatter(-1, expert_ids_NK, values_NK)


def refuse_varying_choices(routing: Routing) -> None:
    """Raise ValueError where tokens have different numbers of choices: what is recorded has K for each.

    A choice that a capacity dropped is a choice; its weight is 0.
    """
    made_NK = routing.kept_NK if routing.wanted_NK is None else routing.wanted_NK
    if made_NK is not None and not made_NK.all():
        raise ValueError(
            "this routing rule gives tokens different numbers of experts, and what is recorded holds K for each; count "
            "them with upcycling.core.routing.expert_counts(routing) for each of model(tokens_BT).routings, or use "
            "evaluate_routing (a straight-through router: record it in evaluation mode)"
        )


def load_from_ids(expert_ids_NK: Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """load_E from the chosen experts alone: the fraction of all choices that each expert received; sums to 1."""
    return count_ids(expert_ids_NK, num_experts).to(dtype) / expert_ids_NK.numel()


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
