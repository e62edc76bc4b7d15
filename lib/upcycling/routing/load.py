"""Is this router healthy? Its load layer by layer, its balance over a whole validation set, and whether it can learn.

Shapes: L MoE layers, N tokens, K experts per token, E experts, B batch, T sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import IGNORE
from ..core.model import evaluating
from ..core.routing import count_ids
from ..tables import ShownAsTable, Table
from ..text.stream import TokenStream
from . import metrics
from .adapter import as_decoder_lm
from .trace import RoutingTrace

COLLAPSED = 0.25  # a layer has collapsed if it uses at most this much of the way from K to E experts
_TOO_FEW = 10  # choices per expert below which an uneven load may be chance


@dataclass(frozen=True, repr=False)
class LoadReport(ShownAsTable):
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
        return float(metrics.effective_experts(load_E)) <= self.top_k + COLLAPSED * (num_experts - self.top_k)

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
        fewest = min(float(metrics.effective_experts(self.load_LE[self.layers.index(layer)])) for layer in collapsed)
        pooled = float(metrics.max_over_mean(self.pooled_load_E))
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
                "max/mean": float(metrics.max_over_mean(load_E)),
                "CV": float(metrics.coefficient_of_variation(load_E)),
                "B": float(metrics.balance_score(load_E)),
                "effective experts": float(metrics.effective_experts(load_E)),
                "dead": int(metrics.dead_experts(load_E).sum()),
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

    def _as_table(self) -> Table:
        return Table(self.rows(), below=self.notes())


def load_report(trace: RoutingTrace | Tensor, num_experts: int | None = None) -> LoadReport:
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
    return LoadReport(layers, metrics.load_per_expert(expert_ids_LNK, num_experts), num_tokens, top_k)


@dataclass(frozen=True, repr=False)
class RoutingEvaluation(ShownAsTable):
    """Loss and balance over a whole stream; every average is over all its tokens, none over batches."""

    cross_entropy: float  # nats per target
    load: LoadReport
    aux_loss_L: Tensor  # balance loss of each layer from the whole set's loads and probabilities; 1 is even
    beta: float

    @property
    def balance_L(self) -> Tensor:
        """B of each layer."""
        return metrics.balance_score(self.load.load_LE)

    @property
    def balance(self) -> float:
        """B averaged over layers; not B of the pooled load, which a collapse in every layer can leave at 1."""
        return float(self.balance_L.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)

    @property
    def balanced_perplexity(self) -> float:
        """exp(CE) * exp(beta * (1 - B)), B averaged over layers: perplexity, raised where the load is uneven.

        At beta = 1 a wholly collapsed model (B = 0) costs as much as one more nat. A convention of the earlier projects
        behind this series, not of a paper: beta is a choice, so name it beside the number.
        """
        return math.exp(self.cross_entropy + self.beta * (1 - self.balance))

    def rows(self) -> list[dict]:
        """The load report's rows, each layer's with its balance loss."""
        losses = [*self.aux_loss_L.tolist(), "–"]
        return [row | {"balance loss": loss} for row, loss in zip(self.load.rows(), losses)]

    def _as_table(self) -> Table:
        summary = (
            f"cross-entropy {self.cross_entropy:.4f} nats, perplexity {self.perplexity:.3f}, balance B "
            f"{self.balance:.4f}, balanced perplexity (beta {self.beta:g}) {self.balanced_perplexity:.3f}"
        )
        return Table(self.rows(), above=[summary], below=self.load.notes())


@torch.no_grad()
def evaluate_routing(
    model: nn.Module, stream: TokenStream, *, batch_size: int = 32, seq_len: int | None = None, beta: float = 1.0
) -> RoutingEvaluation:
    """Cross-entropy, load and balance over a whole stream, in one pass and in eval mode.

    For a `DecoderLM`, whose context is the default of `seq_len`, or a transformers causal MoE (default: its context, at
    most 256 tokens; which probabilities count, see `TransformersLM.forward`). Padding at the stream's end is not
    counted. The balance loss is that of the whole set: batch by batch it comes out higher, because small batches are
    less even. Raises ValueError for a dense model.
    """
    lm = as_decoder_lm(model, seq_len)
    layers = lm.config.moe_layers
    if not layers:
        raise ValueError("the model is dense: it has no router to evaluate; upcycle it first, or use evaluate()")
    num_experts, top_k = lm.config.moe.num_experts, lm.config.moe.top_k
    device = next(lm.parameters()).device
    counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.float64)
    probability_LE = torch.zeros_like(counts_LE)
    total, tokens = 0.0, 0
    with evaluating(lm):
        for tokens_BT, targets_BT in stream.windows(batch_size, seq_len or lm.config.seq_len):
            real_N = (targets_BT != IGNORE).flatten().to(device)
            out = lm(tokens_BT.to(device), targets_BT.to(device))
            count = int(real_N.sum())
            total, tokens = total + out.loss.item() * count, tokens + count
            for i, routing in enumerate(out.routings):
                chosen_NK = real_N[:, None]
                if routing.kept_NK is not None:  # a rule whose number of experts varies, or a full expert
                    chosen_NK = chosen_NK & routing.kept_NK
                ids = routing.expert_ids_NK[chosen_NK.expand_as(routing.expert_ids_NK)]
                counts_LE[i] += count_ids(ids, num_experts).cpu()
                probability_LE[i] += routing.probabilities_NE[real_N].double().sum(0).cpu()
    load_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
    aux_loss_L = num_experts * (load_LE * probability_LE / tokens).sum(-1)
    report = LoadReport(tuple(layers), load_LE, tokens, top_k)
    return RoutingEvaluation(total / tokens, report, aux_loss_L, beta)
