"""What does it cost on this machine? Things that do the same work run in turn, and the ratios of their times.

A time on its own says little: clocks change, other work disturbs. So the candidates of a line run A B C A B C in one
process, and what is reported is the median of the ratios within the rounds, with the range that holds the middle half
of them. With one thread on a CPU the clock counts this process's CPU seconds, which other work disturbs least; with
more threads, or on a GPU (where it stops when the work is done, not when it was handed over), the wall's.

Each case is a module of this package with a function `compare(bench)` that returns its `Comparison`s.
"""

import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..experiments.workers import torch_threads
from ..files import write_text
from ..tables import Table

CASES = ("layer", "scaling", "step", "generation", "tokenizing", "recording")


@dataclass(frozen=True)
class Comparison:
    """`name` beside `peer`: the median of paired ratios of their times, and its quartiles.

    measure "time": ours / peer, a goal is not to be exceeded. "speed": peer / ours, a goal is to be reached.
    """

    case: str
    name: str
    peer: str
    setting: str
    measure: str
    ratio: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    goal: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.measure == "time" else self.ratio >= self.goal


@dataclass(frozen=True)
class Bench:
    """How to measure: rounds per comparison (`quick`: also fewer shapes), device, threads."""

    rounds: int = 15
    quick: bool = False
    device: str = "cpu"
    threads: int = 1

    def clock(self) -> float:
        """Seconds: of this process's CPU with one thread on a CPU, else of the wall when the device has finished."""
        if self.device == "cpu":
            return time.process_time() if self.threads == 1 else time.perf_counter()
        torch.accelerator.synchronize()
        return time.perf_counter()

    def times(
        self, functions: dict[str, Callable[[], object]], rounds: int | None = None, warm_up: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each function in each round, run in turn; each round begins with the next one.

        The first `warm_up` rounds are left out (default: two, one if `quick`). `rounds` defaults to the bench's.
        """
        warm_up = warm_up if warm_up is not None else 1 if self.quick else 2
        names = list(functions)
        seconds = {name: [] for name in names}
        for number in range(warm_up + (rounds or self.rounds)):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                start = self.clock()
                functions[name]()
                seconds[name].append(self.clock() - start)
        return {name: values[warm_up:] for name, values in seconds.items()}


def compared(
    case: str, setting: str, seconds: dict[str, list[float]], name: str, peer: str, measure="time", goal=None
) -> Comparison:
    """The Comparison of two of the candidates that `Bench.times` ran; at least two rounds."""
    above, below = (name, peer) if measure == "time" else (peer, name)
    ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(case, name, peer, setting, measure, middle, lower, upper, len(ratios), goal)


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as text, a line each, a heading for each setting."""
    rows = [
        {
            "ours": c.name,
            "peer": c.peer,
            "ratio": c.ratio,
            "of": c.measure,
            "middle half": f"{c.lower_quartile:.2f}-{c.upper_quartile:.2f}",
            "goal": "" if c.goal is None else f"{'<=' if c.measure == 'time' else '>='} {c.goal:.2f}",
            "": "" if c.goal is None else "reached" if c.reached else "MISSED",
        }
        for c in comparisons
    ]
    columns = ["ours", "peer", "ratio", "of", "middle half", "goal", ""]
    header, *shown = str(Table(rows, columns, left=True, strip=True)).splitlines()
    lines, heading = [header], None
    for comparison, line in zip(comparisons, shown, strict=True):
        if heading != (heading := f"{comparison.case}: {comparison.setting}"):
            lines += ["", heading]
        lines.append(line)
    return "\n".join(lines)


def measured(bench: Bench, cases: Sequence[str] | None = None, out: Path | None = None) -> list[Comparison]:
    """What all `cases` (default: `CASES`) compare, also written to `out` after each of them.

    Raises ValueError for a case that does not exist and a device that torch does not see.
    """
    for case in cases or ():
        if case not in CASES:
            raise ValueError(f"there is no case {case!r}; choose from {', '.join(CASES)}")
    if bench.device != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"device={bench.device!r}: torch sees no accelerator here; leave it out")
    results = []
    with torch_threads(bench.threads), _pinned(bench.threads):
        for case in cases or CASES:
            print(f"{case} ...", file=sys.stderr, flush=True)
            results += importlib.import_module(f"{__package__}.{case}").compare(bench)
            if out:  # after each case, so that an interrupted bench leaves what it has measured
                write_text(out, json.dumps(_record(bench, results), indent=1) + "\n")
    return results


@contextmanager
def _pinned(count: int) -> Iterator[None]:
    """Run on the last `count` cores that this process may use (the first serve the system's interrupts)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _record(bench: Bench, results: Sequence[Comparison]) -> dict:
    what = f"{platform.machine()}, {bench.device}, {bench.threads} thread(s), torch {torch.__version__}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": what,
        "comparisons": [asdict(comparison) | {"reached": comparison.reached} for comparison in results],
    }
