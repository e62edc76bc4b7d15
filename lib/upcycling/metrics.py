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

from .config import IGNORE
from .moe import load_from_ids

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


def balanced_perplexity(cross_entropy: Tensor | float, balance: Tensor | float, beta: float = 1.0) -> Tensor | float:
    """exp(cross_entropy) * exp(beta * (1 - balance)): perplexity, raised by what the load lacks of being even.

    `cross_entropy` in nats per token, `balance` is B (0..1). Range 1..inf; equals the perplexity at B = 1, and at
    beta = 1 a wholly collapsed layer (B = 0) costs as much as one more nat. A convention of the earlier projects
    behind this series, not of a paper: beta is a choice, so name it beside the number. Uniform routing: B = 1, so the
    plain perplexity.
    """
    exponent = cross_entropy + beta * (1 - balance)
    return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)


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
    H((p+q)/2) - (H(p)+H(q))/2 (Lin 1991, section IV). Range 0 (domains are routed alike) .. 1 (no expert in common).
    Classes without tokens are left out; NaN with fewer than two. Uniform and shuffled: above 0, about
    (E-1) / (8 ln 2) * (1/n_1 + 1/n_2) bits for two domains of n choices each, so compare with `shuffled_baseline`.
    """
    p_CE = share_CE / share_CE.sum(-1, keepdim=True)
    pairs = [jensen_shannon(p_CE[..., i, :], p_CE[..., j, :]) for i, j in combinations(range(p_CE.shape[-2]), 2)]
    if not pairs:
        return p_CE.new_full(p_CE.shape[:-2], torch.nan)
    return torch.stack(pairs, -1).nanmean(-1)


def jensen_shannon(p_E: Tensor, q_E: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions over experts, in bits, 0..1 (Lin 1991, section IV)."""
    # rounding may leave a difference of equal entropies just below 0; NaN passes through clamp
    return (_entropy((p_E + q_E) / 2) - (_entropy(p_E) + _entropy(q_E)) / 2).clamp(0, 1)


def vocabulary_specialization(
    expert_ids_NK: Tensor, token_ids_N: Tensor, num_experts: int, min_count: int = 10
) -> Tensor:
    """Mean over token ids x of max_E N_{x,E} / N_x: how much of a token's occurrences its favourite expert sees.

    OLMoE, section 5.4, averaged as there: each token id counts once, however frequent. Range K/E..1; NaN if no id
    occurs `min_count` times. An id that occurs once scores 1 whatever the router does; `min_count` leaves the rare
    ones out. Uniform: K/E plus what a maximum over few occurrences gains, which is a lot, so compare with
    `shuffled_baseline`. Pass `expert_ids_NK[..., :1]` for the first choice alone, as in OLMoE's figure for k = 1.
    """
    counts_VE = _counts(expert_ids_NK, token_ids_N, num_experts)
    occurrences_V = counts_VE.sum(-1) / expert_ids_NK.shape[-1]
    favourite_V = counts_VE.amax(-1) / occurrences_V
    return torch.where(occurrences_V >= max(min_count, 1), favourite_V, torch.nan).nanmean(-1)


def coactivation(expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """share_EE: N_ij / N_i, the fraction of expert i's tokens that also go to expert j (OLMoE, section 5.2).

    Range 0..1; the diagonal is 1, a row without tokens NaN; the rest of a row sums to K-1. Uniform: (K-1)/(E-1) off
    the diagonal. Shuffled (first choices against the rest): an expert is followed by the others as they are loaded.
    """
    chosen_NE = _chosen(_checked_ids(expert_ids_NK, num_experts), num_experts)
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
    groups_N: Tensor | None = None,
) -> Baseline:
    """What `statistic(expert_ids_NK, labels_N)` gives when the labels have nothing to do with the routing.

    The labels are permuted over tokens; experts, loads and class sizes stay. `expert_ids_NK` may be (L, N, K): all
    layers see the same permutation. `labels_N` may be anything with N rows, another routing (N, K), too.

    Tokens of one document are alike for reasons other than its domain (its names, its style), so they are no
    independent evidence, and permuting single tokens understates the spread. With `groups_N` (a document's or
    sequence's number for each token) whole groups swap labels, which answers the question one usually means: would
    other documents, dealt to the domains at random, differ as much? All tokens of a group must have one label. Use
    it for domains; for token ids, which differ within a document, shuffle tokens. Raises ValueError otherwise.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats} gives no spread; choose at least 2, better 20")
    generator = torch.Generator().manual_seed(seed)
    of_group_N, labels_G = None, labels_N
    if groups_N is not None:
        of_group_N, labels_G = _labels_of_groups(labels_N, groups_N)
    values = []
    for _ in range(repeats):
        shuffled_G = labels_G[torch.randperm(len(labels_G), generator=generator).to(labels_G.device)]
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
    if repeats < 2:
        raise ValueError(f"repeats={repeats} gives no spread; choose at least 2, better 20")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.rand(num_tokens, num_experts, generator=generator) for _ in range(repeats))
    return _baseline([statistic(draw_NE.topk(top_k, dim=-1).indices) for draw_NE in draws])


def _baseline(values: list) -> Baseline:
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


# ------------------------------------------------------------------------------- load, pooled and layer by layer

COLLAPSED = 0.25  # a layer has collapsed if it uses at most this much of the way from K to E experts
_TOO_FEW = 10  # choices per expert below which an uneven load may be chance


@dataclass(frozen=True)
class LoadReport:
    """The load of each MoE layer and of all pooled, with an alarm where the pooled one hides a collapsed layer.

    `layers` are the numbers to call the layers by, `load_LE` sums to 1 in each row; tokens and top_k say how much it
    rests on.
    """

    layers: tuple[int, ...]
    load_LE: Tensor
    num_tokens: int
    top_k: int

    @property
    def pooled_load_E(self) -> Tensor:
        """The load over all layers together: what a balance loss that pools the layers sees."""
        return self.load_LE.mean(0)

    @property
    def collapsed_layers(self) -> tuple[int, ...]:
        """Layers whose `effective_experts` lie in the lowest quarter (COLLAPSED) of the range K..E."""
        return tuple(layer for layer, load_E in zip(self.layers, self.load_LE) if self._has_collapsed(load_E))

    def _has_collapsed(self, load_E: Tensor) -> bool:
        num_experts = load_E.shape[-1]
        if self._too_few_tokens or self.top_k == num_experts:
            return False
        return float(effective_experts(load_E)) <= self.top_k + COLLAPSED * (num_experts - self.top_k)

    @property
    def _too_few_tokens(self) -> bool:
        return self.num_tokens * self.top_k < _TOO_FEW * self.load_LE.shape[-1]

    @property
    def alarm(self) -> str | None:
        """One sentence that names the collapsed layers and says whether the pooled load shows it, or None."""
        collapsed = self.collapsed_layers
        if not collapsed:
            return None
        names = f"layer{'s' if len(collapsed) > 1 else ''} {', '.join(map(str, collapsed))}"
        fewest = min(float(effective_experts(self.load_LE[self.layers.index(layer)])) for layer in collapsed)
        pooled = float(max_over_mean(self.pooled_load_E))
        sees = "shows it, too" if self._has_collapsed(self.pooled_load_E) else "hides it"
        return (
            f"ALARM: {names} collapsed (down to {fewest:.1f} effective experts of {self.load_LE.shape[-1]}); the load "
            f"pooled over the layers {sees} (busiest expert {pooled:.2f} times the mean): balance each layer by itself"
        )

    def rows(self) -> list[dict]:
        """One dict a layer, then one for the pooled load (layer "pooled"): the columns of the table."""
        named = [*zip(map(str, self.layers), self.load_LE), ("pooled", self.pooled_load_E)]
        return [
            {
                "layer": name,
                "max/mean": float(max_over_mean(load_E)),
                "CV": float(coefficient_of_variation(load_E)),
                "B": float(balance_score(load_E)),
                "effective experts": float(effective_experts(load_E)),
                "dead": int(dead_experts(load_E).sum()),
                "busiest": int(load_E.argmax()),
            }
            for name, load_E in named
        ]

    def _notes(self) -> list[str]:
        num_experts = self.load_LE.shape[-1]
        notes = [f"{self.num_tokens:,} tokens, top-{self.top_k} of {num_experts} experts"]
        if self._too_few_tokens:
            notes.append(f"too few tokens to judge: give at least {-(-_TOO_FEW * num_experts // self.top_k)}")
        return notes + ([self.alarm] if self.alarm else [])

    def __str__(self) -> str:
        rows = [[_cell(value) for value in row.values()] for row in self.rows()]
        header = list(self.rows()[0])
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in [header, *rows]]
        return "\n".join(lines + self._notes())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag, cells):
            return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

        rows = self.rows()
        body = "".join(line("td", map(_cell, row.values())) for row in rows)
        notes = "".join(f"<p>{'<b>' + note + '</b>' if note == self.alarm else note}</p>" for note in self._notes())
        return f"<table><thead>{line('th', rows[0])}</thead><tbody>{body}</tbody></table>{notes}"


def load_report(trace, num_experts: int | None = None) -> LoadReport:
    """The load of every layer and of all layers pooled, from a RoutingTrace or from expert_ids_LNK and `num_experts`.

    Why both: with four layers each collapsed on a different expert, the pooled load is perfectly even, and a balance
    loss that pools the layers (transformers' `load_balancing_loss_func`) is at its best.
    """
    if isinstance(trace, Tensor):
        if trace.dim() != 3 or num_experts is None:
            raise ValueError(
                f"expert ids have shape {tuple(trace.shape)} and num_experts is {num_experts}; give (L, N, K) and E"
            )
        expert_ids_LNK, layers = trace, tuple(range(len(trace)))
    else:
        expert_ids_LNK, layers, num_experts = trace.expert_ids, tuple(trace.layers), trace.num_experts
    _, num_tokens, top_k = expert_ids_LNK.shape
    return LoadReport(layers, load_per_expert(expert_ids_LNK, num_experts), num_tokens, top_k)


def _cell(value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------- a whole validation set


@dataclass(frozen=True)
class RoutingEvaluation:
    """Loss and balance over a whole stream; every average is over all its tokens, none over batches."""

    cross_entropy: float  # nats per target
    load: LoadReport
    aux_loss_L: Tensor  # balance loss of each layer from the whole set's loads and probabilities; 1 is even
    margin_L: Tensor  # mean router_margin
    entropy_L: Tensor  # mean router_entropy, bits
    beta: float

    @property
    def balance_L(self) -> Tensor:
        """B of each layer."""
        return balance_score(self.load.load_LE)

    @property
    def balance(self) -> float:
        """B averaged over layers; not B of the pooled load, which a collapse in every layer can leave at 1."""
        return float(self.balance_L.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)

    @property
    def balanced_perplexity(self) -> float:
        """exp(CE) * exp(beta * (1 - B)), with B averaged over layers."""
        return balanced_perplexity(self.cross_entropy, self.balance, self.beta)

    def __str__(self) -> str:
        return (
            f"cross-entropy {self.cross_entropy:.4f} nats, perplexity {self.perplexity:.3f}, balance B "
            f"{self.balance:.4f}, balanced perplexity (beta {self.beta:g}) {self.balanced_perplexity:.3f}\n{self.load}"
        )

    __repr__ = __str__


@torch.no_grad()
def evaluate_routing(
    model, stream, *, batch_size: int = 32, seq_len: int | None = None, beta: float = 1.0
) -> RoutingEvaluation:
    """Cross-entropy, load, balance and confidence of a DecoderLM over a whole stream, in one pass and in eval mode.

    `seq_len` defaults to the model's context. Padding at the stream's end is not counted. The balance loss is that of
    the whole set: batch by batch it comes out higher, because small batches are less even. Raises ValueError for a
    dense model.
    """
    layers = model.config.moe_layers
    if not layers:
        raise ValueError("the model is dense: it has no router to evaluate; upcycle it first, or use evaluate()")
    num_experts, top_k = model.config.moe.num_experts, model.config.moe.top_k
    device, was_training = next(model.parameters()).device, model.training
    counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.float64)
    probability_LE, confidence_L2 = torch.zeros_like(counts_LE), torch.zeros(len(layers), 2, dtype=torch.float64)
    total, tokens = 0.0, 0
    model.eval()
    try:
        for tokens_BT, targets_BT in stream.windows(batch_size, seq_len or model.config.seq_len):
            real_N = (targets_BT != IGNORE).flatten().to(device)
            out = model(tokens_BT.to(device), targets_BT.to(device))
            count = int(real_N.sum())
            total, tokens = total + out.loss.item() * count, tokens + count
            for i, routing in enumerate(out.routings):
                ids_NK, probabilities_NE = routing.expert_ids_NK[real_N], routing.probabilities_NE[real_N].double()
                counts_LE[i] += torch.bincount(ids_NK.flatten(), minlength=num_experts).cpu()
                probability_LE[i] += probabilities_NE.sum(0).cpu()
                confidence = [router_margin(probabilities_NE).sum(), router_entropy(probabilities_NE).sum()]
                confidence_L2[i] += torch.stack(confidence).cpu()
    finally:
        model.train(was_training)
    load_LE, (margin_L, entropy_L) = counts_LE / (tokens * top_k), (confidence_L2 / tokens).unbind(1)
    aux_loss_L = num_experts * (load_LE * probability_LE / tokens).sum(-1)
    report = LoadReport(tuple(layers), load_LE, tokens, top_k)
    return RoutingEvaluation(total / tokens, report, aux_loss_L, margin_L, entropy_L, beta)


# ---------------------------------------------------------------------------------------------------------- helpers


def _entropy(p_E: Tensor) -> Tensor:
    """Entropy in bits; 0 log 0 is 0."""
    return (0 - torch.xlogy(p_E, p_E).sum(-1)) / math.log(2)  # 0 - x: no -0.0


def _chosen(expert_ids_NK: Tensor, num_experts: int) -> Tensor:
    """chosen_NE: 1 where the token uses the expert, else 0."""
    shape = (*expert_ids_NK.shape[:-1], num_experts)
    return torch.zeros(shape, dtype=torch.float64, device=expert_ids_NK.device).scatter_(-1, expert_ids_NK, 1.0)


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
    size = num_classes * num_experts
    counts_LCE = torch.stack([torch.bincount(cell_NK.flatten(), minlength=size) for cell_NK in cell_LNK])
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
