"""Routing rules: how a router's scores become the experts of each token. One small class for each published rule.

    MoEConfig(num_experts=16, top_k=2, router=TopP(threshold=0.6))      # or router="top_p" for the defaults

The default, `MoEConfig(router=None)`, is softmax, then the `top_k` most probable (`core.routing.route`). Learned noise
(`noisy`), jitter, expert dropout, standardised scores, capacity and shared experts are fields of `MoEConfig` that go
with any rule.

    rule             experts per token    learns by              copies keep the function
    TopK             K                    chosen weights         if renormalised (after the softmax: always)
    Sampled          K, drawn             chosen weights         if renormalised
    SelectionBias    K                    chosen weights; bias   if renormalised
    StraightThrough  K (all computed)     all experts            if renormalised
    TopP             varies               chosen weights         if renormalised
    ReLURouter       varies               chosen weights         if renormalised and a score is above 0
    Hash             K, fixed by token    nothing                always
    ExpertChoice     varies               chosen weights         no: some tokens get no expert

Shapes: N tokens, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .routing import Routing, by_expert, route


@dataclass(frozen=True)
class Router:
    """What every rule has: `route`, and for rules with a memory `buffers` and `after_update`.

    `moves`: does `after_update` change anything? `preserves_function(renormalize)`: do experts that are copies of one
    FFN give exactly that FFN's output, for any scores?
    """

    moves: ClassVar[bool] = False

    def buffers(self, num_experts: int, top_k: int, vocab_size: int) -> dict[str, Tensor]:
        """The rule's memory, one set for each layer; saved with the model."""
        return {}

    def preserves_function(self, renormalize: bool) -> bool:
        return renormalize

    def route(
        self,
        logits_NE: Tensor,
        top_k: int,
        renormalize: bool = True,
        *,
        training: bool = False,
        state: dict[str, Tensor] | None = None,
        tokens_N: Tensor | None = None,
    ) -> Routing:
        """The decision for each token. `state` is what `buffers` made, `tokens_N` the token ids."""
        raise NotImplementedError

    def after_update(self, state: dict[str, Tensor], counts_E: Tensor, tokens: int, top_k: int) -> None:
        """Change `state` in place, given how the choices of an update over `tokens` tokens fell on the experts."""


@dataclass(frozen=True)
class TopK(Router):
    """Softmax and the K best, in either order.

    `softmax_first=True` (Switch, Mixtral, Qwen-MoE, OLMoE): softmax over all experts, then the K best, renormalised or
    not. False (GPT-OSS, and Megatron-LM's default): the K best scores, then softmax over those; the weights sum to 1
    whatever `renormalize` says. Renormalised, the two are the same function.
    """

    kind: str = field(default="top_k", init=False)
    softmax_first: bool = True

    def preserves_function(self, renormalize: bool) -> bool:
        return renormalize or not self.softmax_first

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        return route(logits_NE, top_k, renormalize or not self.softmax_first)


@dataclass(frozen=True)
class Sampled(Router):
    """In training the K experts are drawn without replacement from softmax(logits / temperature); else the K best.

    Drawn by the Gumbel-top-k trick (Kool et al. 2019, arXiv:1903.06059). `temperature` above 1 flattens the
    probabilities, below 1 sharpens them, in training and evaluation.
    """

    kind: str = field(default="sampled", init=False)
    temperature: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} is not above 0; 1 leaves the probabilities as they are")

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        best = route(logits_NE / self.temperature, top_k, renormalize)
        if not training:
            return best
        gumbel_NE = -torch.empty_like(best.logits_NE).exponential_().log()
        return _routing(best.logits_NE, best.probabilities_NE, best.logits_NE + gumbel_NE, top_k, renormalize)


@dataclass(frozen=True)
class SelectionBias(Router):
    """Sigmoid scores; a bias that only selection sees is moved towards balance. DeepSeek-V3 (arXiv:2412.19437), 2.1.2.

    The K largest of sigmoid(logits) + bias are chosen; their weights are the scores without the bias. After every
    update the bias of each expert rises by `rate` if it got less than the mean load and falls by `rate` if it got more.
    No balance loss is needed: combine with `aux_weight=0`.
    """

    kind: str = field(default="selection_bias", init=False)
    rate: float = 1e-3
    moves: ClassVar[bool] = True

    def __post_init__(self):
        if not self.rate >= 0:
            raise ValueError(f"rate={self.rate!r} is negative; DeepSeek-V3 uses 0.001")

    def buffers(self, num_experts: int, top_k: int, vocab_size: int) -> dict[str, Tensor]:
        return {"selection_bias_E": torch.zeros(num_experts)}

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        logits_NE = _at_least_float(logits_NE)
        scores_NE = logits_NE.sigmoid()
        biased_NE = (scores_NE + state["selection_bias_E"]).masked_fill(logits_NE == -torch.inf, -torch.inf)
        expert_ids_NK = biased_NE.topk(top_k, dim=-1).indices
        weights_NK = scores_NE.gather(-1, expert_ids_NK)
        if renormalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True).clamp(min=1e-20)
        p_NE = scores_NE / scores_NE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits_NE, p_NE, expert_ids_NK, weights_NK)

    def after_update(self, state, counts_E, tokens, top_k) -> None:
        counts_E = counts_E.to(state["selection_bias_E"].dtype)
        state["selection_bias_E"] += self.rate * (counts_E.mean() - counts_E).sign()


@dataclass(frozen=True)
class StraightThrough(Router):
    """The K best are used, but the router learns from all experts. DenseMixer (Yao et al. 2025).

    The forward pass is that of softmax top-k. In the backward pass the selection counts as the identity, so that every
    probability gets the gradient that its expert's output earned, divided by the sum of the K best if renormalised.
    (The released code then lets the K best go through the division, and only them; its authors' comment there names
    this form as the one it should be.) All E experts are computed: training costs E/K as many expert FLOPs; in
    evaluation only the K best are.
    """

    kind: str = field(default="straight_through", init=False)

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        best = route(logits_NE, top_k, renormalize)
        if not training:
            return best
        p_NE = best.probabilities_NE
        used_NE = by_expert(best.weights_NK.detach(), best.expert_ids_NK, p_NE.shape[-1])
        kept_NE = torch.zeros_like(p_NE, dtype=torch.bool).scatter(1, best.expert_ids_NK, True)
        scale_N1 = p_NE.detach().gather(1, best.expert_ids_NK).sum(-1, keepdim=True) if renormalize else 1
        weights_NE = used_NE + (p_NE - p_NE.detach()) / scale_N1
        return Routing(best.logits_NE, p_NE, _every_expert(p_NE), weights_NE, kept_NE, computes_all=True)


@dataclass(frozen=True)
class TopP(Router):
    """The smallest set of experts whose probabilities add up to `threshold`: harder tokens get more experts.

    Huang et al. 2024 (arXiv:2403.07652). `entropy_weight` times the mean entropy (nats) of the probabilities is added
    to the objective, without which the router spreads out to use more experts. `top_k` plays no part in the choice.
    """

    kind: str = field(default="top_p", init=False)
    threshold: float = 0.4
    entropy_weight: float = 1e-4

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} is no share of the probability; choose 0 < threshold <= 1")
        if not self.entropy_weight >= 0:
            raise ValueError(f"entropy_weight={self.entropy_weight!r} is negative; 0 leaves the entropy alone")

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        logits_NE = _at_least_float(logits_NE)
        p_NE = logits_NE.softmax(-1)
        sorted_NE, ids_NE = p_NE.sort(dim=-1, descending=True, stable=True)
        before_NE = torch.cat([torch.zeros_like(sorted_NE[:, :1]), sorted_NE.cumsum(-1)[:, :-1]], dim=-1)
        kept_NE = (before_NE < self.threshold) & (sorted_NE > 0)  # the first is always kept
        weights_NE = sorted_NE * kept_NE
        if renormalize:
            weights_NE = weights_NE / weights_NE.sum(-1, keepdim=True)
        penalty = None
        if self.entropy_weight:  # clamped, for the slope of -p log p at 0 is infinite
            penalty = self.entropy_weight * torch.special.entr(p_NE.clamp(min=1e-20)).sum(-1).mean()
        return Routing(logits_NE, p_NE, ids_NE, weights_NE, kept_NE, penalty=penalty)


@dataclass(frozen=True)
class ReLURouter(Router):
    """Every expert with a score above 0, weighted by its score. ReMoE (Wang et al. 2024, arXiv:2412.14711).

    Differentiable where top-k is not. An L1 penalty on the scores, weighted by each expert's share of the choices,
    drives the mean number of experts per token to `top_k`: after each update a layer's coefficient is multiplied by
    `factor` when more experts were active, and divided by it when fewer were (ReMoE: one for all layers).
    In runs of a few hundred updates the paper's `factor` of 1.2 overshoots K back and forth; 1.05 holds it. A router
    without bias on inputs that are symmetric about 0 has half its scores above 0 whatever its weights. ReMoE's own
    weights are the bare scores (`renormalize=False`). A token whose scores are all negative gets no expert.
    """

    kind: str = field(default="relu", init=False)
    start: float = 1e-8
    factor: float = 1.2
    moves: ClassVar[bool] = True

    def __post_init__(self):
        if not (self.start > 0 and self.factor > 1):
            raise ValueError(f"start={self.start!r} must be above 0 and factor={self.factor!r} above 1")

    def preserves_function(self, renormalize: bool) -> bool:
        return False

    def buffers(self, num_experts: int, top_k: int, vocab_size: int) -> dict[str, Tensor]:
        return {"penalty_weight": torch.tensor(self.start)}

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        logits_NE = _at_least_float(logits_NE)
        scores_NE = logits_NE.relu()
        kept_NE = scores_NE > 0
        share_E = kept_NE.sum(0) * (kept_NE.shape[1] / max(1, top_k * kept_NE.shape[0]))
        penalty = state["penalty_weight"] * (share_E * scores_NE.mean(0)).sum()
        weights_NE = scores_NE
        if renormalize:
            weights_NE = scores_NE / scores_NE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits_NE, logits_NE.softmax(-1), _every_expert(scores_NE), weights_NE, kept_NE, penalty=penalty)

    def after_update(self, state, counts_E, tokens, top_k) -> None:
        more = counts_E.sum() > top_k * tokens
        state["penalty_weight"] *= torch.where(more, self.factor, 1 / self.factor)


@dataclass(frozen=True)
class Hash(Router):
    """K experts fixed by the token's id, with equal weights: nothing is learned. Roller et al. 2021 (arXiv:2106.04426).

    `seed` draws the table; layers share it.
    """

    kind: str = field(default="hash", init=False)
    seed: int = 0

    def preserves_function(self, renormalize: bool) -> bool:
        return True

    def buffers(self, num_experts: int, top_k: int, vocab_size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {"experts_of_VK": torch.rand(vocab_size, num_experts, generator=generator).argsort(-1)[:, :top_k]}

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        if tokens_N is None:
            raise ValueError("hash routing needs the token ids: call the whole model, or pass tokens_BT to the layer")
        expert_ids_NK = state["experts_of_VK"][tokens_N]
        weights_NK = torch.full_like(expert_ids_NK, 1 / top_k, dtype=_at_least_float(logits_NE).dtype)
        p_NE = by_expert(weights_NK, expert_ids_NK, logits_NE.shape[-1])
        return Routing(_at_least_float(logits_NE), p_NE, expert_ids_NK, weights_NK)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Each expert picks the N*K/E tokens that like it best: even loads by construction. Zhou et al. 2022.

    (arXiv:2202.09368.) A token may get many experts or none. Whether it is picked depends on all other tokens of the
    batch, later ones included, so in a causal model the future leaks into the past: a training loss too good to be
    true, and another function when tokens are generated one by one. For comparison only.
    """

    kind: str = field(default="expert_choice", init=False)

    def preserves_function(self, renormalize: bool) -> bool:
        return False

    def route(self, logits_NE, top_k, renormalize=True, *, training=False, state=None, tokens_N=None) -> Routing:
        logits_NE = _at_least_float(logits_NE)
        p_NE = logits_NE.softmax(-1)
        n, e = p_NE.shape
        tokens_CE = p_NE.topk(max(1, round(n * top_k / e)), dim=0).indices
        kept_NE = torch.zeros_like(p_NE, dtype=torch.bool).scatter(0, tokens_CE, True) & (p_NE > 0)
        weights_NE = p_NE * kept_NE
        if renormalize:
            weights_NE = weights_NE / weights_NE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits_NE, p_NE, _every_expert(p_NE), weights_NE, kept_NE)


ROUTERS = {
    rule().kind: rule for rule in (TopK, Sampled, SelectionBias, StraightThrough, TopP, ReLURouter, Hash, ExpertChoice)
}
"""The rules by name."""


def as_router(rule) -> Router:
    """The rule meant by `rule`: itself, its name, or the dict that a saved configuration holds.

    Raises ValueError for what is none of these.
    """
    if isinstance(rule, Router):
        return rule
    options = dict(rule) if isinstance(rule, dict) else {"kind": rule}
    kind = options.pop("kind", None)
    if kind not in ROUTERS:
        raise ValueError(f"router={rule!r} is unknown; choose one of {', '.join(map(repr, ROUTERS))}")
    try:
        return ROUTERS[kind](**options)
    except TypeError as error:
        raise ValueError(f"router={rule!r}: {error}") from None


def _routing(logits_NE, probabilities_NE, ranking_NE, top_k: int, renormalize: bool) -> Routing:
    """The K experts that rank first, weighted by their probabilities."""
    expert_ids_NK = ranking_NE.topk(top_k, dim=-1).indices
    weights_NK = probabilities_NE.gather(-1, expert_ids_NK)
    if renormalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return Routing(logits_NE, probabilities_NE, expert_ids_NK, weights_NK)


def _every_expert(x_NE: Tensor) -> Tensor:
    return torch.arange(x_NE.shape[1], device=x_NE.device).expand_as(x_NE)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
