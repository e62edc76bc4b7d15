"""Is the MoE better than simply training the dense model on? Arms at equal tokens, equal FLOPs and equal seconds.

    python -m upcycling.compare --seeds 0 1 2 --workers 2 --out notebooks/results/arms_worlds_quick.json

From one parent, as a practitioner has it, and for each seed: a dense control for each budget and the upcycled MoE; and,
for each budget, an MoE from scratch that also gets the parent's share. A seed orders the data and draws the routers
(from scratch: all weights). Every run has its own schedule, so each is annealed at its end.
The budget is what the upcycled MoE costs (its parent included for the runs from scratch):

    tokens    the same number of updates
    FLOPs     updates scaled by the ratio of matrix-product FLOPs per update
    seconds   updates scaled by the measured ratio of CPU seconds per update, dense and MoE interleaved, one thread

Runs are kept under `artifacts/`, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from .checkpoint import write_text
from .config import forward_flops
from .model import DecoderLM
from .moe import expert_load
from .series import Series, load_series, new_model
from .transfer import upcycle

BUDGETS = ("tokens", "FLOPs", "seconds")
ARMS = ("dense control", "upcycled MoE", "MoE from scratch")


@dataclass(frozen=True)
class Ratios:
    """What one MoE update costs, in dense updates."""

    flops: float
    seconds: float


def measure_ratios(series: Series, rounds: int = 40) -> Ratios:
    """Cost of an MoE update over that of a dense one: FLOPs counted, CPU seconds measured A B A B, medians."""
    preset = series.preset
    dense = new_model(preset.model, seed=0)
    models = [dense, upcycle(dense, preset.moe)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in models]
    seconds = [[], []]
    for step in range(rounds + 2):
        tokens_BT, targets_BT = series.train_stream.random_windows(
            preset.sparse.batch_size, preset.model.seq_len, seed=0, step=step
        )
        for model, optimizer, times in zip(models, optimizers, seconds, strict=True):
            start = time.process_time()
            model.objective(model(tokens_BT, targets_BT)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 2:  # the first two warm up
                times.append(time.process_time() - start)
    dense_time, moe_time = (statistics.median(times) for times in seconds)
    flops = forward_flops(models[1].config) / forward_flops(models[0].config)
    return Ratios(round(flops, 3), round(moe_time / dense_time, 3))


def updates_per_budget(series: Series, ratios: Ratios) -> dict[tuple[str, str], int]:
    """(arm, budget) -> updates. The upcycled MoE's are the same for all: it sets the budget."""
    first, second = series.preset.dense.steps, series.preset.sparse.steps
    worth = {"tokens": 1.0, "FLOPs": ratios.flops, "seconds": ratios.seconds}
    dense = {("dense control", budget): round(second * worth[budget]) for budget in BUDGETS}
    scratch = {("MoE from scratch", budget): round(first / worth[budget]) + second for budget in BUDGETS}
    return dense | {("upcycled MoE", budget): second for budget in BUDGETS} | scratch


@torch.no_grad()
def describe(series: Series, model: DecoderLM) -> dict:
    """Losses per domain and, for an MoE, the largest load (1 = even) and dead experts of each layer."""
    from .training import evaluate

    result = {"per_domain": {name: evaluate(model, stream) for name, stream in series.domain_streams().items()}}
    if model.config.moe is not None:
        tokens_BT, _ = series.validation_stream.random_windows(64, model.config.seq_len, seed=0, step=0)
        loads = [expert_load(routing) for routing in model(tokens_BT).routings]
        result["max_load"] = [float(load_E.max() * len(load_E)) for load_E in loads]
        result["dead_experts"] = [int((load_E == 0).sum()) for load_E in loads]
    return result


def run_arm(preset: str, corpus: str, seed: int, arm: str, ratios: Ratios) -> list[dict]:
    """One arm of one seed at every budget; a list of rows. Equal numbers of updates are the same run."""
    torch.set_num_threads(1)
    series = load_series(preset, corpus)
    quiet = dict(progress=False, verbose=False)
    rows = []
    for (name, budget), steps in updates_per_budget(series, ratios).items():
        if name != arm:
            continue
        if arm == "dense control":
            model, result = series.dense_control(seed, steps, **quiet)
        elif arm == "upcycled MoE":
            model, result = series.moe(seed, **quiet)
        else:
            model, result = series.moe_from_scratch(steps, seed, **quiet)
        print(f"seed {seed}  {arm:<16}  equal {budget:<7}  {steps:>5} updates  {result.final_loss:.4f}", flush=True)
        history = [(row["step"], row["val_loss"]) for row in result.history if row["val_loss"] is not None]
        rows.append(
            dict(arm=arm, budget=budget, seed=seed, updates=steps, val_loss=result.final_loss, history=history)
            | describe(series, model)
        )
    return rows


def compare(preset: str, corpus: str, seeds: list[int], workers: int = 1, scratch: bool = True) -> dict:
    """Run all arms for all seeds, in `workers` processes, and return everything a table and a figure need."""
    series = load_series(preset, corpus)
    _ = series.train_stream, series.validation_stream, series.domain_streams()  # made once, before the processes start
    ratios = measure_ratios(series)
    print(f"an MoE update costs {ratios.flops:.2f} dense updates in FLOPs, {ratios.seconds:.2f} in seconds", flush=True)
    arms = ARMS if scratch else ARMS[:2]
    jobs = [(preset, corpus, seed, arm, ratios) for seed in seeds for arm in arms]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = [row for part in pool.map(run_arm, *zip(*jobs, strict=True)) for row in part]
    floor = series.floor
    return {
        "date": datetime.date.today().isoformat(),
        "setting": setting(series),
        "corpus": series.name,
        "seeds": seeds,
        "ratios": asdict(ratios),
        "floor": None if floor is None else floor.overall,
        "machine": f"{platform.machine()}, one thread a run, torch {torch.__version__}",
        "rows": rows,
    }


def setting(series: Series) -> dict:
    """What the result depends on; a stored result holds for these settings only."""
    preset = series.preset
    return json.loads(
        json.dumps(
            {
                "model": preset.model.to_dict(),
                "moe": asdict(preset.moe),
                "dense": asdict(replace(preset.dense, seed=0)),
                "sparse": asdict(replace(preset.sparse, seed=0)),
                "train_tokens": series.train_stream.key,
                "validation_tokens": series.validation_stream.key,
            }
        )
    )


def summarize(result: dict) -> list[dict]:
    """One row per arm and budget: mean and standard deviation of the validation loss over the seeds."""
    rows = []
    for budget in BUDGETS:
        for arm in ARMS:
            losses = [row["val_loss"] for row in result["rows"] if (row["arm"], row["budget"]) == (arm, budget)]
            if losses:
                updates = next(r["updates"] for r in result["rows"] if (r["arm"], r["budget"]) == (arm, budget))
                spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
                rows.append(dict(budget=budget, arm=arm, updates=updates, mean=statistics.mean(losses), spread=spread))
    return rows


def margin(result: dict, budget: str) -> tuple[float, float]:
    """(how far the upcycled MoE ends below the dense control, the larger of the two arms' standard deviations)."""
    by_arm = {row["arm"]: row for row in summarize(result) if row["budget"] == budget}
    dense, moe = by_arm["dense control"], by_arm["upcycled MoE"]
    return dense["mean"] - moe["mean"], max(dense["spread"], moe["spread"])


def table(result: dict) -> str:
    """The summary as text, with each arm's gap to the entropy floor where that is known."""
    floor = result["floor"]
    lines = [f"{'equal':<8} {'arm':<17} {'updates':>7}  {'val loss':>8}  {'± seeds':>7}  {'above floor':>11}"]
    for row in summarize(result):
        gap = "" if floor is None else f"{row['mean'] - floor:.3f}"
        lines.append(
            f"{row['budget']:<8} {row['arm']:<17} {row['updates']:>7}  "
            f"{row['mean']:>8.3f}  {row['spread']:>7.4f}  {gap:>11}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m upcycling.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=os.environ.get("UPCYCLING_PRESET", "quick"))
    parser.add_argument(
        "--corpus", default=os.environ.get("UPCYCLING_CORPUS"), help="a name or path; default: the preset's"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument("--no-scratch", action="store_true", help="leave out the MoE from scratch, the longest arm")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args(arguments)
    corpus = options.corpus or load_series(options.preset).corpus_name
    result = compare(options.preset, corpus, options.seeds, options.workers, not options.no_scratch)
    print(table(result))
    if options.out:
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
