"""What does it cost on this machine? Two things side by side, as a ratio.

    python -m upcycling.bench --quick --json bench.json

A time on its own says little: clocks change, other work disturbs. So each line runs A and B in turn, A B A B, in one
process, and reports the median of the ratios of neighbouring runs, with the range that holds the middle half of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .checkpoint import write_text


@dataclass(frozen=True)
class Comparison:
    """Time of `name` over time of `peer`: the median of paired ratios, and their quartiles."""

    name: str
    peer: str
    setting: str
    ratio: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    goal: float | None  # the ratio should not be above this

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.ratio <= self.goal


def interleave(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int, warm_up: int = 3
) -> list[tuple[float, float]]:
    """Seconds of `ours` and of `peer`, run in turn; who goes first alternates. The first `warm_up` rounds are left out.

    On a GPU the clock stops when the work is done, not when it has been handed over.
    """
    pairs = []
    for round_number in range(warm_up + rounds):
        seconds = {}
        for function in (ours, peer) if round_number % 2 == 0 else (peer, ours):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[function] = time.perf_counter() - start
        pairs.append((seconds[ours], seconds[peer]))
    return pairs[warm_up:]


def compared(
    name: str, peer: str, setting: str, pairs: Sequence[tuple[float, float]], goal: float | None
) -> Comparison:
    """The comparison that `interleave`'s pairs amount to; at least two pairs."""
    ratios = [ours / theirs for ours, theirs in pairs]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(name, peer, setting, middle, lower, upper, len(ratios), goal)


def recording(rounds: int) -> list[Comparison]:
    """A forward pass of the quick preset's MoE on 2,048 tokens, with its routing recorded and without."""
    from .config import PRESETS
    from .routing import record_routing
    from .series import new_model

    preset = PRESETS["quick"]
    model = new_model(replace(preset.model, moe=preset.moe), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    size = (2048 // preset.model.seq_len, preset.model.seq_len)
    tokens_BT = torch.randint(preset.model.vocab_size, size, generator=generator)

    @torch.no_grad()
    def plain():
        model(tokens_BT)

    @torch.no_grad()
    def recorded():
        with record_routing(model):
            model(tokens_BT)

    setting = f"{size[0]} x {size[1]} tokens, {preset.moe.num_experts} experts, {preset.model.n_layers} layers"
    pairs = interleave(recorded, plain, rounds)
    return [compared("forward, routing recorded", "forward", setting, pairs, goal=1.10)]


CASES = {"recording": recording}


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text, a line each."""
    rows = [("ours", "peer", "setting", "ours/peer", "middle half", "goal", "")]
    for c in comparisons:
        goal, verdict = ("", "") if c.goal is None else (f"<= {c.goal:.2f}", "reached" if c.reached else "MISSED")
        spread = f"{c.lower_quartile:.3f}-{c.upper_quartile:.3f}"
        rows.append((c.name, c.peer, c.setting, f"{c.ratio:.3f}", spread, goal, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m upcycling.bench", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--rounds", type=int, default=60, help="A B pairs per comparison (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    options = parser.parse_args(arguments)
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; choose from {', '.join(CASES)}")
    if options.rounds < 6 or options.threads < 1:
        parser.error(
            f"--rounds {options.rounds} --threads {options.threads}: at least 6 rounds and 1 thread are needed"
        )
    torch.set_num_threads(options.threads)
    rounds = max(6, options.rounds // 3) if options.quick else options.rounds
    results = []
    for case in options.cases or CASES:
        print(f"{case}: {rounds} rounds ...", file=sys.stderr, flush=True)
        results += CASES[case](rounds)
    print(table(results))
    if options.json:
        written = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}",
            "comparisons": [asdict(comparison) for comparison in results],
        }
        write_text(options.json, json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
