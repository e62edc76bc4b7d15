"""Losses that keep experts in use, one number per layer.

Shapes: N tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing, by_expert, expert_load


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
    chosen_NE = by_expert(chosen_NK.to(routing.probabilities_NE.dtype), routing.expert_ids_NK, e)
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
    if routing.noise_std_NE is None or routing.clean_logits_NE is None:
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
