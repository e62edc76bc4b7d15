"""The verbs that repeat the series' studies over several seeds, and the bench: compare, knockouts, select, bench."""

import sys
from pathlib import Path
from typing import Any

from .options import argument, between, flag, numbers, one_of, option, some_of, verb, whole

PRESET = option("quick", str, "NAME", "sizes: quick, laptop, gpu or gpu-smol", env="UPCYCLING_PRESET")
CORPUS = option(None, str, "TEXTS", "a name or path (default: the preset's)", env="UPCYCLING_CORPUS")
SEEDS = option("0,1,2", numbers("seeds", "0,1,2"), "N,…", "a run of each arm for each of them")
OUT = option(None, Path, "FILE", "write the result here as JSON, and go on from what is there")
BUDGETS = ("tokens", "FLOPs", "seconds")
FRACTION = between(1e-9, 1, "fraction: give a number above 0 and up to 1")
ARMS = ("upcycling", "pooling", "routers")


@verb("compare", resumes=True)
def compare(
    preset: str = PRESET,
    corpus: str = CORPUS,
    seeds: Any = SEEDS,
    arms: str = option("upcycling", one_of(*ARMS), "SET", f"of arms: {', '.join(ARMS)}"),
    budgets: Any = option(",".join(BUDGETS), some_of(*BUDGETS), "NAME,…", "what all arms get the same of"),
    updates: int = option(None, whole(1), "N", "of the arm that sets the budget (default: the second phase's)"),
    workers: int = option(1, whole(1), "N", "processes, one thread each"),
    no_scratch: bool = flag("--no-scratch", "leave out the arms from scratch, the longest"),
    out: Path = option(None, Path, "FILE", "write the result here as JSON, after each run"),
) -> int:
    """Compare recipes at equal tokens, FLOPs and seconds.

    Arms from one parent, over several seeds, beside a dense control: upcycled or from scratch (notebook 04), with the
    balance loss of each layer or pooled, and with each routing rule (notebook 06).
    """
    from ..experiments.arms import ARM_SETS
    from ..experiments.compare import compare, overview, table
    from ..experiments.series import load_series

    series = load_series(preset, corpus)
    chosen = [arm for arm in ARM_SETS[arms](series.preset) if not (no_scratch and arm.start == "scratch")]
    result = compare(
        chosen, budgets, seeds, preset=series.preset, corpus=corpus, workers=workers, updates=updates, out=out
    )
    print(f"\n{table(result)}\n\n{overview(result)}")
    for failure in result["failed"]:
        print(f"\nFAILED: {failure['arm']}, seed {failure['seed']}:\n{failure['traceback']}", file=sys.stderr)
    return 1 if result["failed"] else 0


@verb("knockouts", resumes=True)
def knockouts(
    preset: str = PRESET,
    corpus: str = CORPUS,
    seeds: Any = SEEDS,
    windows: int = option(None, whole(1), "N", "at most so many windows per domain (default: all there are)"),
    out: Path = OUT,
) -> int:
    """Remove experts, and see what each domain loses.

    How far the experts of each seed's MoE have specialised in domains, against chance, and what the removal of each
    costs each domain (notebook 05).
    """
    from ..experiments import knockouts
    from ..experiments.series import load_series

    print(knockouts.table(knockouts.measure(load_series(preset, corpus), seeds, windows, out=out)))
    return 0


@verb("select", resumes=True)
def select(
    preset: str = PRESET,
    corpus: str = CORPUS,
    seeds: Any = SEEDS,
    share: float = option(0.25, FRACTION, "X", "of the training tokens to choose", "--fraction"),
    out: Path = OUT,
) -> int:
    """Train on chosen documents, and compare with random ones.

    A part of the corpus is chosen by each score and in each order, at one budget of tokens (notebook 08).
    """
    from ..experiments import selected
    from ..experiments.series import load_series

    series = load_series(preset, corpus)
    print(selected.table(selected.study(series, seeds, selected.CHOICES, fraction=share, out=out)))
    return 0


@verb("bench")
def bench(
    cases: list[str] = argument(
        "[CASE]...", "layer, scaling, step, generation, tokenizing, recording: all, or some", None
    ),
    quick: bool = flag("--quick", "fewer rounds and shapes, under three minutes in all"),
    rounds: int = option(None, whole(3), "N", "rounds per comparison (default: 15, with --quick 4)"),
    threads: int = option(1, whole(1), "N", "of torch, pinned to as many cores"),
    device: str = option("cpu", str, "NAME", "cpu or cuda"),
    json: Path = option(None, Path, "FILE", "write the results here, too"),
) -> int:
    """Measure this machine: things that do the same work, in turn.

    The ratios of their times, with their spread and goals.
    """
    from ..bench.measure import Bench, measured, table

    rounds = rounds if rounds is not None else 4 if quick else 15
    print(table(measured(Bench(rounds, quick, device, threads), cases, out=json)))
    return 0
