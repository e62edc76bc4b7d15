"""Is this router healthy? Its load layer by layer, its balance over a whole validation set, and whether it can learn.

Shapes: L MoE layers, N tokens, K experts per token, E experts, B batch, T sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import as_decoder_lm
from .config import IGNORE
from .metrics import (
    balance_score,
    balanced_perplexity,
    coefficient_of_variation,
    dead_experts,
    effective_experts,
    load_per_expert,
    max_over_mean,
    router_entropy,
    router_margin,
)
from .moe import MoELayer
from .routing import Router, find_routers, record_routing

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

    def notes(self) -> list[str]:
        """The lines below the table: how much it rests on, and the alarm."""
        num_experts = self.load_LE.shape[-1]
        notes = [f"{self.num_tokens:,} tokens, top-{self.top_k} of {num_experts} experts"]
        if self._too_few_tokens:
            notes.append(f"too few tokens to judge: give at least {-(-_TOO_FEW * num_experts // self.top_k)}")
        return notes + ([self.alarm] if self.alarm else [])

    def __str__(self) -> str:
        return render_text(self.rows(), self.notes())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_html(self.rows(), self.notes())


def load_report(trace, num_experts: int | None = None) -> LoadReport:
    """The load of every layer and of all layers pooled, from a RoutingTrace or from expert_ids_LNK and `num_experts`.

    Why both: with four layers each collapsed on a different expert, the pooled load is perfectly even, and a balance
    loss that pools the layers (transformers' `load_balancing_loss_func`) is at its best.
    Raises ValueError for ids of another shape and for a trace with not-a-numbers.
    """
    if isinstance(trace, Tensor):
        if trace.dim() != 3 or num_experts is None:
            raise ValueError(
                f"expert ids have shape {tuple(trace.shape)} and num_experts is {num_experts}; give (L, N, K) and E"
            )
        expert_ids_LNK, layers = trace, tuple(range(len(trace)))
    else:
        if not bool(trace.weights.isfinite().all() and trace.probabilities.isfinite().all()):
            raise ValueError("the trace has probabilities or weights that are not numbers: the model has diverged")
        expert_ids_LNK, layers, num_experts = trace.expert_ids, tuple(trace.layers), trace.num_experts
    _, num_tokens, top_k = expert_ids_LNK.shape
    return LoadReport(layers, load_per_expert(expert_ids_LNK, num_experts), num_tokens, top_k)


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

    def rows(self) -> list[dict]:
        """The load report's rows, each layer's with its balance loss."""
        losses = [*self.aux_loss_L.tolist(), "–"]
        return [row | {"balance loss": loss} for row, loss in zip(self.load.rows(), losses)]

    def _summary(self) -> str:
        return (
            f"cross-entropy {self.cross_entropy:.4f} nats, perplexity {self.perplexity:.3f}, balance B "
            f"{self.balance:.4f}, balanced perplexity (beta {self.beta:g}) {self.balanced_perplexity:.3f}"
        )

    def __str__(self) -> str:
        return f"{self._summary()}\n{render_text(self.rows(), self.load.notes())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_html(self.rows(), [self._summary(), *self.load.notes()])


@torch.no_grad()
def evaluate_routing(
    model, stream, *, batch_size: int = 32, seq_len: int | None = None, beta: float = 1.0
) -> RoutingEvaluation:
    """Cross-entropy, load, balance and confidence over a whole stream, in one pass and in eval mode.

    For a `DecoderLM`, whose context is the default of `seq_len`, or a transformers causal MoE (default: its context, at
    most 256 tokens; which probabilities count, see `TransformersLM.forward`). Padding at the stream's end is not
    counted. The balance loss is that of the whole set: batch by batch it comes out higher, because small batches are
    less even. Raises ValueError for a dense model.
    """
    model = as_decoder_lm(model, seq_len)
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
                probabilities_NE, chosen_NK = routing.probabilities_NE[real_N].double(), real_N[:, None]
                if routing.kept_NK is not None:  # a rule whose number of experts varies, or a full expert
                    chosen_NK = chosen_NK & routing.kept_NK
                ids = routing.expert_ids_NK[chosen_NK.expand_as(routing.expert_ids_NK)]
                counts_LE[i] += torch.bincount(ids, minlength=num_experts).cpu()
                probability_LE[i] += probabilities_NE.sum(0).cpu()
                confidence = [router_margin(probabilities_NE).sum(), router_entropy(probabilities_NE).sum()]
                confidence_L2[i] += torch.stack(confidence).cpu()
    finally:
        model.train(was_training)
    load_LE, (margin_L, entropy_L) = counts_LE / counts_LE.sum(-1, keepdim=True), (confidence_L2 / tokens).unbind(1)
    aux_loss_L = num_experts * (load_LE * probability_LE / tokens).sum(-1)
    report = LoadReport(tuple(layers), load_LE, tokens, top_k)
    return RoutingEvaluation(total / tokens, report, aux_loss_L, margin_L, entropy_L, beta)


# ------------------------------------------------------------------------------------------- the router's gradient

SILENT = 1e-5
"""A router gradient below this fraction of its experts' gradient is rounding: where it is 0 by construction, 3e-8 was
measured in float32 and in bfloat16; where the router learns, 0.02 and more."""


@dataclass(frozen=True)
class RouterDiagnosis:
    """What `diagnose_router` found in one layer; gradients are norms of the cross-entropy's, without a balance loss."""

    layer: int
    num_experts: int
    top_k: int
    router_gradient: float
    expert_gradient: float
    tied: bool  # all rows of the router are equal: every token sees a tie
    experts_identical: bool
    constant_weight_sum: bool  # a token's combine weights add up to the same number, whatever was chosen
    frozen: bool  # the router's weights do not ask for a gradient
    experts_used: int  # experts that got at least one of these tokens

    @property
    def silent(self) -> bool:
        """Whether the cross-entropy leaves the router where it is."""
        return self.router_gradient <= SILENT * self.expert_gradient

    @property
    def finding(self) -> str:
        """What holds in this layer, what follows from it and what to do, in plain words."""
        if self.num_experts == 1:
            return "there is only one expert, so there is nothing to learn"
        causes = []
        if self.frozen:
            causes.append("the router is frozen (requires_grad=False), so nothing moves it")
        if self.top_k == 1 and self.constant_weight_sum and self.silent:
            causes.append(
                "top-1 with renormalised weights: the weight is always 1, so the loss gives the router no gradient, "
                "now or ever: use top_k of 2 or more, or do not renormalise"
            )
        if self.tied:
            causes.append(
                "all rows of the router are equal (a zero router?), so every token sees a tie and goes to the same "
                f"{self.top_k} of {self.num_experts} experts with equal weights: copies stay copies and the other "
                "experts never learn: draw the router from N(0, 0.02)"
            )
        if causes:
            return "; ".join(causes)
        if self.experts_identical and self.silent:
            return (
                "the experts are identical and the weights renormalised, so it makes no difference which are chosen "
                "and the gradient is 0: right after copying that is as it should be, and it ends as the experts drift "
                "apart on different tokens (noise on the experts ends it at once)"
            )
        if self.experts_identical:
            return (
                "the experts are identical and the weights not renormalised: the gradient only says how large the "
                "output should be, not which expert to choose"
            )
        if self.silent:
            return "the gradient is 0 to rounding although the experts differ: do they compute the same?"
        return "the loss reaches the router"


@dataclass(frozen=True)
class Diagnosis:
    """A RouterDiagnosis per MoE layer; renders as a table with the findings below."""

    layers: tuple[RouterDiagnosis, ...]

    @property
    def can_learn(self) -> bool:
        """Whether the cross-entropy moves the router of every layer."""
        return not any(layer.silent for layer in self.layers)

    def rows(self) -> list[dict]:
        """One dict a layer: the columns of the table."""
        return [
            {
                "layer": found.layer,
                "router gradient": f"{found.router_gradient:.1e}",
                "experts' gradient": f"{found.expert_gradient:.1e}",
                "tied": found.tied,
                "identical experts": found.experts_identical,
                "constant weight sum": found.constant_weight_sum,
                "experts used": f"{found.experts_used} of {found.num_experts}",
            }
            for found in self.layers
        ]

    @property
    def findings(self) -> list[str]:
        """The sentences, those that hold in several layers once."""
        layers_of: dict[str, list[str]] = {}
        for found in self.layers:
            layers_of.setdefault(found.finding, []).append(str(found.layer))
        return [
            f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {finding}"
            for finding, layers in layers_of.items()
        ]

    def __str__(self) -> str:
        return render_text(self.rows(), self.findings)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_html(self.rows(), self.findings)


def diagnose_router(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Diagnosis:
    """What the cross-entropy of this batch tells each router, and if it tells it nothing, why.

    For a `DecoderLM` or a transformers MoE. `targets_BT[b, t]` follows `tokens_BT[b, t]`; IGNORE (-100) is not
    counted. In eval mode, on the cross-entropy alone: a balance loss moves even a router that learns nothing.
    Weights, their `.grad` and the training mode are left as they were. Raises ValueError for a dense model.
    """
    routers, was_training = find_routers(model), model.training
    model.eval()
    try:
        with torch.enable_grad(), record_routing(model) as trace:
            out = model(tokens_BT)
            logits_BTV = out.logits_BTV if hasattr(out, "logits_BTV") else out.logits
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE)
        weights = [weight for router in routers for weight in router_weights(router) + expert_weights(model, router)]
        wanted = [weight for weight in weights if weight.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
    finally:
        model.train(was_training)
    gradient_of = {id(weight): gradient for weight, gradient in zip(wanted, gradients) if gradient is not None}
    return Diagnosis(tuple(_diagnose(model, router, i, trace, gradient_of) for i, router in enumerate(routers)))


def _diagnose(model, router: Router, i: int, trace, gradient_of: dict) -> RouterDiagnosis:
    of_router, of_experts = router_weights(router), expert_weights(model, router)
    num_experts = trace.num_experts
    rows_EX = torch.cat([weight.detach().reshape(num_experts, -1) for weight in of_router], dim=1)
    sums_N = trace.weights[i].sum(-1)
    rounding = max(1e-5, 2 * torch.finfo(of_router[0].dtype).eps)
    return RouterDiagnosis(
        layer=router.layer,
        num_experts=num_experts,
        top_k=trace.top_k,
        router_gradient=_norm(of_router, gradient_of),
        expert_gradient=_norm(of_experts, gradient_of),
        tied=bool((rows_EX == rows_EX[0]).all()),
        experts_identical=all(bool((weight == weight[0]).all()) for weight in of_experts),
        constant_weight_sum=float(sums_N.max() - sums_N.min()) <= rounding * float(sums_N.mean()),
        frozen=not any(weight.requires_grad for weight in of_router),
        experts_used=len(trace.expert_ids[i].unique()),
    )


def router_weights(router: Router) -> list[nn.Parameter]:
    """The weights that turn a token into the router's logits."""
    return list(router.module.parameters())


def expert_weights(model: nn.Module, router: Router) -> list[nn.Parameter]:
    """The stacked weights of the router's experts, each with E in front; shared experts are not among them."""
    in_decoder_lm = isinstance(router.holder, MoELayer)
    layer = router.holder if in_decoder_lm else model.get_submodule(router.name.rpartition(".")[0])
    return list(layer.experts.parameters())


def _norm(weights: list[nn.Parameter], gradient_of: dict) -> float:
    """The norm of the weights' gradients together, 0 where there is none."""
    return sum(float(gradient_of[id(w)].float().square().sum()) for w in weights if id(w) in gradient_of) ** 0.5


# ----------------------------------------------------------------------------------------------------------- tables


def render_text(rows: list[dict], notes: list[str]) -> str:
    """A table of `rows`, the keys as header, right-aligned, with the notes below it."""
    lines = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines] + notes)


def render_html(rows: list[dict], notes: list[str]) -> str:
    """The same as an HTML table."""

    def line(tag: str, cells) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(_cell(cell))}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line("td", row.values()) for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead>{line('th', rows[0])}</thead><tbody>{body}</tbody></table>{below}"


def _cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
