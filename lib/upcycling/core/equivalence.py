"""Is it still the same function, and does it look into the future? Two checks to run before and after upcycling."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tables import Table
from .initialisation import copy_into_experts
from .model import DecoderLM, evaluating

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Largest difference that rounding alone explains, for values of size 1 (scaled up where values are larger)."""


@dataclass(frozen=True)
class EquivalenceReport:
    """The result of `check_equivalence`; prints as a table."""

    dtype: torch.dtype
    tolerance: float
    per_sequence: list[float]  # max |logit difference| of each sequence
    per_layer: list[float]  # max |difference| of the residual stream after each layer
    weight_sums: dict[int, tuple[float, float]]  # MoE layer -> (smallest, largest) sum of a token's combine weights
    reasons: list[str] = field(default_factory=list)

    @property
    def max_abs_diff(self) -> float:
        return float(torch.tensor(self.per_sequence).max())  # unlike Python's max, it lets a NaN through

    @property
    def passed(self) -> bool:
        return self.max_abs_diff <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        verdict = "same function" if self.passed else "NOT the same function"
        lines = [
            f"{verdict}: max |logit difference| {self.max_abs_diff:.1e}, tolerance {self.tolerance:.1e} "
            f"({str(self.dtype).removeprefix('torch.')})"
        ]
        lines.append("sequence   " + "  ".join(f"{i}: {value:.1e}" for i, value in enumerate(self.per_sequence)))
        lines.append("layer      " + "  ".join(f"{i}: {value:.1e}" for i, value in enumerate(self.per_layer)))
        sums = "  ".join(f"{layer}: {low:.4f}..{high:.4f}" for layer, (low, high) in self.weight_sums.items())
        lines.append(f"weight sum {sums}")
        return "\n".join(lines + [f"because: {reason}" for reason in self.reasons])

    def _repr_html_(self) -> str:
        rows = [{"where": "logits", "max |difference|": self.max_abs_diff, "sum of combine weights": ""}]
        for i, value in enumerate(self.per_layer):
            sums = "{:.4f} to {:.4f}".format(*self.weight_sums[i]) if i in self.weight_sums else ""
            rows.append({"where": f"after layer {i}", "max |difference|": value, "sum of combine weights": sums})
        table = Table(rows, formats={"max |difference|": ".1e"}, below=self.reasons)
        colour, verdict = ("#00693e", "same function") if self.passed else ("#a4001d", "not the same function")
        return f"<b style='color:{colour}'>{verdict}</b>, tolerance {self.tolerance:.1e}{table._repr_html_()}"


@torch.no_grad()
def _run(model: DecoderLM, tokens_BT: Tensor):
    """(logits_BTV, the residual stream after each layer, routings) in evaluation mode."""
    streams = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: streams.append(out[0])) for block in model.blocks]
    try:
        with evaluating(model):
            output = model(tokens_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return output.logits_BTV, streams, output.routings


@torch.no_grad()
def check_equivalence(dense: DecoderLM, moe: DecoderLM, tokens_BT: Tensor, tolerance: float | None = None):
    """Compare the two models' logits on `tokens_BT` and, where they differ, say why.

    Returns an EquivalenceReport: `.max_abs_diff`, `.per_sequence`, `.per_layer`, `.tolerance`, `.passed`, `.reasons`.
    The default tolerance is that of the dtype (1e-12 float64, 1e-5 float32, 0.02 float16, 0.15 bfloat16) times the
    largest logit where that exceeds 1. Raises ValueError when the models cannot be compared at all.
    """
    a, b = dense.config, moe.config
    if a.moe is not None:
        raise ValueError(f"the first model has {a.moe.num_experts} experts; give the dense model first, then the MoE")
    shape_a, shape_b = ((c.n_layers, c.vocab_size, c.d_model, c.d_ff) for c in (a, b))
    if shape_a != shape_b:
        raise ValueError(
            f"the models have different shapes (layers, vocabulary, width, FFN width): {shape_a} and {shape_b}"
        )
    dtype = moe.token_embedding.weight.dtype
    logits_a, streams_a, _ = _run(dense, tokens_BT)
    logits_b, streams_b, routings = _run(moe, tokens_BT)
    if tolerance is None:
        tolerance = TOLERANCE[dtype] * max(1.0, float(logits_a.abs().max()))
    sums = {
        layer: (float(r.weights_NK.sum(-1).min()), float(r.weights_NK.sum(-1).max()))
        for layer, r in zip(b.moe_layers, routings, strict=True)
    }
    report = EquivalenceReport(
        dtype,
        tolerance,
        per_sequence=(logits_a.double() - logits_b.double()).abs().amax((1, 2)).tolist(),
        per_layer=[float((x.double() - y.double()).abs().max()) for x, y in zip(streams_a, streams_b, strict=True)],
        weight_sums=sums,
    )
    if not report.passed:
        report.reasons.extend(_why(dense, moe, report))
    return report


def _why(dense: DecoderLM, moe: DecoderLM, report: EquivalenceReport) -> list[str]:
    """The differences between the models that can explain different outputs, most likely first."""
    reasons = []
    rounding = 100 * torch.finfo(torch.promote_types(report.dtype, torch.float32)).eps  # as routing is computed
    for layer, (low, high) in report.weight_sums.items():
        if max(abs(low - 1), abs(high - 1)) > rounding:
            reasons.append(
                f"layer {layer}: a token's combine weights sum to {low:.3f}..{high:.3f}, so copies give that "
                "multiple of the dense FFN's output; renormalise the top-k weights (renormalize=True)"
            )
    other = moe.state_dict()
    for name, value in dense.state_dict().items():
        if name in other and not torch.equal(value, other[name].to(value)):
            reasons.append(
                f"{name} is not the dense model's; everything outside the FFNs must be carried over unchanged"
            )
    for layer in moe.config.moe_layers:
        experts = moe.blocks[layer].ffn.experts
        expected = type(experts)(moe.config).to(experts.w_up_EFD)
        copy_into_experts(dense.blocks[layer].ffn, expected)
        for name, value in experts.state_dict().items():
            if not torch.equal(value, expected.state_dict()[name]):
                reasons.append(f"layer {layer}: experts.{name} is not a copy of the dense FFN in every expert")
    for name in ("norm", "norm_eps", "position", "rope_theta", "activation", "n_heads", "causal"):  # not in the weights
        a, b = getattr(dense.config, name), getattr(moe.config, name)
        if a != b:
            reasons.append(f"{name}={a!r} in the dense model, {b!r} in the other")
    if not reasons:
        reasons.append(
            f"the weights agree and every weight sum is 1, so this is rounding: a tolerance of {report.tolerance:.1e} "
            f"is too strict for {str(report.dtype).removeprefix('torch.')}; compare in float32 or float64"
        )
    return reasons


@dataclass(frozen=True)
class CausalityReport:
    """The result of `check_causality`; prints as one line."""

    max_abs_diff: float
    tolerance: float
    leaks: list[tuple[int, int]]  # (position whose logits changed, first position that was altered)

    @property
    def passed(self) -> bool:
        return self.max_abs_diff <= self.tolerance

    def __str__(self) -> str:
        if self.passed:
            return f"causal: logits before an altered token moved by at most {self.max_abs_diff:.1e}"
        seen, altered = self.leaks[0]
        return (
            f"NOT causal: altering the tokens from position {altered} on changed the logits at position {seen} "
            f"(by up to {self.max_abs_diff:.1e}, tolerance {self.tolerance:.1e}): the model sees what it must predict; "
            "is the causal mask missing?"
        )


@torch.no_grad()
def check_causality(model: DecoderLM, tokens_BT: Tensor, cuts: int = 4, seed: int = 0) -> CausalityReport:
    """Does any position's prediction depend on a later token?

    At up to `cuts` positions c, spread over the sequence, every token from c on is replaced by another one, and the
    logits before c must not move beyond rounding. Raises ValueError for sequences of fewer than two tokens.
    """
    if tokens_BT.shape[1] < 2:
        raise ValueError(f"causality needs sequences of at least 2 tokens, got {tokens_BT.shape[1]}")
    t, vocab = tokens_BT.shape[1], model.config.vocab_size
    if vocab < 2:
        raise ValueError("a vocabulary of one token leaves nothing to alter")
    logits_BTV, _, _ = _run(model, tokens_BT)
    tolerance = TOLERANCE[logits_BTV.dtype] * max(1.0, float(logits_BTV.abs().max()))
    generator = torch.Generator().manual_seed(seed)
    worst, leaks = 0.0, []
    for cut in sorted({max(1, round(t * (i + 1) / (cuts + 1))) for i in range(cuts)}):
        # adding 1..V-1 modulo V gives a different token for certain
        shift = torch.randint(1, vocab, tokens_BT[:, cut:].shape, generator=generator).to(tokens_BT.device)
        altered_BT = torch.cat([tokens_BT[:, :cut], (tokens_BT[:, cut:] + shift) % vocab], dim=1)
        diff_T = (_run(model, altered_BT)[0][:, :cut].double() - logits_BTV[:, :cut].double()).abs().amax((0, 2))
        worst = float(torch.tensor([worst, float(diff_T.max())]).max())  # NaN stays NaN
        leaks += [(int(position), cut) for position in torch.where(~(diff_T <= tolerance))[0]]
    return CausalityReport(worst, tolerance, leaks)
