"""How the layer's cost grows: with the tokens (linearly) and with the experts at fixed k (hardly)."""

import math
import statistics
from dataclasses import replace

import torch

from ..core.moe import MoELayer
from .layer import A, Output, batches, forward_and_backward
from .measure import Bench, Comparison

TOKENS = (256, 1024, 4096, 16384)
EXPERTS = (4, 8, 16, 32, 64)


def compare(bench: Bench) -> list[Comparison]:
    """Exponents of a power law fitted to seconds of forward and backward, each beside what a linear cost would give.

    The ratio is the exponent itself: 1 for a cost that grows as the tokens do, 0 for one that does not depend on E.
    """
    by_tokens = _seconds(bench, {n: replace(A, tokens=n) for n in TOKENS})
    by_experts = _seconds(bench, {e: replace(A, experts=e, tokens=TOKENS[-1]) for e in EXPERTS})
    setting = f"{A.activation} d {A.d} ff {A.f}, 8 experts top-2, tokens {TOKENS}"
    return [
        _exponent(setting, "tokens", by_tokens, 1.1),
        _exponent(f"the same, {TOKENS[-1]:,} tokens, experts {EXPERTS}", "experts", by_experts, 0.15),
    ]


def _seconds(bench: Bench, shapes) -> dict[int, list[float]]:
    """{size: seconds per round} of a layer's forward and backward pass; the sizes run in turn.

    Few tokens run up to sixteen times in a row: a single short run would be one that finds nothing in the cache.
    """
    most = max(shape.tokens for shape in shapes.values())
    repeats = {size: min(16, most // shape.tokens) for size, shape in shapes.items()}
    inputs = {shape.tokens: batches(shape, bench.device, max(8, repeats[size])) for size, shape in shapes.items()}

    functions = {}
    for size, shape in shapes.items():
        layer = MoELayer(shape.model).to(bench.device)
        for weight in layer.experts.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        functions[size] = forward_and_backward(Output(layer), inputs[shape.tokens], repeats[size])
    rounds = 3 if bench.quick else max(6, bench.rounds // 3)
    seconds = bench.times(functions, rounds=rounds)
    return {size: [value / repeats[size] for value in values] for size, values in seconds.items()}


def exponent(seconds: dict[int, float]) -> float:
    """The slope of the least-squares line through (log size, log seconds)."""
    xs, ys = [math.log(size) for size in seconds], [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(xs, ys).slope


def _exponent(setting: str, what: str, seconds: dict[int, list[float]], goal: float) -> Comparison:
    rounds = len(next(iter(seconds.values())))
    slopes = [exponent({size: values[r] for size, values in seconds.items()}) for r in range(rounds)]
    lower, middle, upper = statistics.quantiles(slopes, n=4, method="inclusive")
    return Comparison("scaling", f"seconds ~ {what}^x", "x", setting, "time", middle, lower, upper, rounds, goal)
