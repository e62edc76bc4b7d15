"""Which recipe is better? Any arms from one parent at equal tokens, equal FLOPs and equal seconds, over several seeds.

    python -m upcycling.compare --seeds 0 1 2 --workers 2 --out notebooks/results/arms_worlds_quick.json
    python -m upcycling.compare --arms pooling --budgets tokens --workers 2 --out pooling.json

An `Arm` is a recipe: experts and how they begin, or neither for the dense control. A seed orders the data and draws the
routers (from scratch: all weights). Every run has its own schedule, so each is annealed at its end. The budget is what
the reference arm costs in the second phase (an arm from scratch gets the parent's share, too):

    tokens    the same number of updates
    FLOPs     updates scaled by the matrix products of one update, forward and backward, counted as they are executed
    seconds   updates scaled by the CPU seconds of one update: one thread, all arms in turn, medians

FLOPs and seconds are those of an arm as it begins; a rule with a variable number of experts may cost less or more
later. Runs and measured seconds are kept under `artifacts/`, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .accounting import flop_counter
from .checkpoint import write_text
from .config import MoEConfig, Preset
from .metrics import domain_divergence, max_over_mean
from .model import DecoderLM
from .moe import expert_counts
from .series import Series, add_series_arguments, artifacts_dir, key_of, load_series

BUDGETS = ("tokens", "FLOPs", "seconds")
SHARED_WITHIN = 0.02  # budgets of one arm whose updates differ by no more than this fraction share one run


@dataclass(frozen=True)
class Arm:
    """A recipe: `moe=None` stays dense; `init` is what `upcycle` takes; `start` is "parent" or "scratch"."""

    name: str
    moe: MoEConfig | None = None
    init: object = "copy"
    start: str = "parent"

    def __post_init__(self):
        if self.start not in ("parent", "scratch"):
            raise ValueError(f"start={self.start!r} is unknown; choose 'parent' or 'scratch'")

    def to_dict(self) -> dict:
        moe = None if self.moe is None else {name: _plain(value) for name, value in vars(self.moe).items()}
        return {"name": self.name, "moe": moe, "init": _plain(self.init), "start": self.start}


def _plain(value):
    """`value` if JSON can write it, else its repr (a rule or an initialisation with its settings)."""
    return value if isinstance(value, str | int | float | None) else repr(value)


# ---------------------------------------------------------------------------------------------------- sets of arms


DENSE = Arm("dense control")


def upcycling_arms(preset: Preset) -> list[Arm]:
    """Notebook 04: is upcycling better than training the dense model on, and than an MoE without a parent?"""
    return [
        DENSE,
        Arm("upcycled MoE", preset.moe),
        Arm("MoE from scratch", preset.moe, start="scratch"),
    ]


def pooling_arms(preset: Preset) -> list[Arm]:
    """Notebook 06: how much of "naive upcycling is bad" is the balance loss that pools the layers?"""
    from .initialisation import Drop

    layer, pooled = replace(preset.moe, balance="layer"), replace(preset.moe, balance="pooled")
    return [
        DENSE,
        Arm("copy, per layer", layer),
        Arm("copy, pooled", pooled),
        Arm("drop, per layer", layer, Drop(0.5)),
        Arm("drop, pooled", pooled, Drop(0.5)),
    ]


def router_arms(preset: Preset) -> list[Arm]:
    """Notebook 06: the same copies under every rule, one thing changed at a time."""
    from . import routers

    def changed(name: str, **fields) -> Arm:
        return Arm(name, replace(preset.moe, **fields))

    k = preset.moe.top_k
    return [
        DENSE,
        changed(f"softmax top-{k}"),
        changed("no balance loss", aux_weight=0.0),
        changed(f"noisy top-{k}", noisy=True),
        changed("sigmoid + selection bias", router=routers.SelectionBias(), aux_weight=0.0),
        changed("top-p 0.25", router=routers.TopP(0.25)),
        changed("ReLU", router=routers.ReLURouter(), aux_weight=0.0),
        changed("straight-through", router=routers.StraightThrough()),
        changed("expert choice (leaks)", router=routers.ExpertChoice(), aux_weight=0.0),
        changed("hash", router=routers.Hash(), aux_weight=0.0),
        changed(f"1 shared + top-{k}", shared_experts=1),
        changed("capacity 1.25", capacity_factor=1.25),
        changed("sampled", router=routers.Sampled()),
    ]


ARM_SETS: dict[str, Callable[[Preset], list[Arm]]] = {
    "upcycling": upcycling_arms,
    "pooling": pooling_arms,
    "routers": router_arms,
}


# --------------------------------------------------------------------------------------------------------- budgets


def update_flops(model: DecoderLM, tokens_BT, targets_BT) -> int:
    """Matrix-product FLOPs that one training update of `model` executes, two for each multiply-add.

    For a model that computes `top_k` experts this is three times `forward_flops`, B times.
    """
    with flop_counter() as counter:
        model.objective(model(tokens_BT, targets_BT)).backward()
    model.zero_grad()
    return counter.get_total_flops()


def costs(series: Series, arms: Sequence[Arm], rounds: int = 80) -> dict[str, dict[str, float]]:
    """{arm: {budget: what one of its updates costs in dense updates}}; arms of one configuration cost the same.

    The seconds are measured once for a configuration and kept under `artifacts/`: another measurement would ask for
    other numbers of updates, and every run would have to be made again.
    """
    models = {None: series.arm(DENSE).train()}
    for arm in arms:
        if arm.moe not in models:
            models[arm.moe] = series.arm(arm).train()
    batch_size, context = series.preset.sparse.batch_size, series.preset.model.seq_len
    batches = [series.train_stream.random_windows(batch_size, context, seed=0, step=step) for step in range(rounds + 2)]
    flops = {moe: update_flops(model, *batches[0]) for moe, model in models.items()}

    files = {
        moe: artifacts_dir() / "costs" / f"{key_of(models[None].config.to_dict(), model.config.to_dict(), batch_size)}"
        for moe, model in models.items()
        if moe is not None
    }
    missing = [None] + [moe for moe, file in files.items() if not file.exists()]
    if len(missing) > 1:
        measured = seconds_ratios([models[moe] for moe in missing], batches)
        for moe, ratio in zip(missing[1:], measured[1:], strict=True):
            write_text(files[moe], json.dumps({"seconds": ratio}))
    seconds = {moe: json.loads(file.read_text(encoding="utf-8"))["seconds"] for moe, file in files.items()}
    return {
        arm.name: {
            "tokens": 1.0,
            "FLOPs": round(flops[arm.moe] / flops[None], 3),
            "seconds": round(seconds.get(arm.moe, 1.0), 3),
        }
        for arm in arms
    }


def seconds_ratios(models: Sequence[DecoderLM], batches: Sequence[tuple]) -> list[float]:
    """CPU seconds of an update of each model over those of the first: medians over `batches` less the first two.

    All models take each batch in turn (which trains them), so that what else the machine does meets all of them.
    """
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in models]
    rounds = []
    for tokens_BT, targets_BT in batches:
        seconds = []
        for model, optimizer in zip(models, optimizers, strict=True):
            start = time.process_time()
            model.objective(model(tokens_BT, targets_BT)).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
        rounds.append([own / seconds[0] for own in seconds])
    return [statistics.median(ratios) for ratios in zip(*rounds[2:], strict=True)]


def updates_per_budget(
    preset: Preset, arms: Sequence[Arm], cost: dict[str, dict[str, float]], reference: str, budgets=BUDGETS, second=None
) -> dict[tuple[str, str], int]:
    """(arm, budget) -> updates; those of one arm that differ by less than 2 % become the first of them.

    The reference gets `second` updates (default: the preset's second phase).
    """
    updates, second = {}, second or preset.sparse.steps
    for arm in arms:
        for budget in budgets:
            own = cost[arm.name][budget]
            steps = round(second * cost[reference][budget] / own)
            if arm.start == "scratch":
                steps += round(preset.dense.steps / own)
            near = [n for (name, _), n in updates.items() if name == arm.name and abs(n - steps) <= SHARED_WITHIN * n]
            updates[arm.name, budget] = near[0] if near else steps
    return updates


# ------------------------------------------------------------------------------------------------------------ runs


@torch.no_grad()
def describe(series: Series, model: DecoderLM) -> dict:
    """Losses per domain and, for an MoE, each layer's routing of validation text.

    max_load (1 = even), dead_experts (never used), jsd (how far the domains' loads lie apart, in bits; None without
    domains), experts_per_token, and dropped, the fraction of choices that found their expert full.
    """
    from .training import evaluate

    result = {"per_domain": {name: evaluate(model, stream) for name, stream in series.domain_streams().items()}}
    if model.config.moe is None:
        return result
    tokens_BT, _ = series.validation_stream.random_windows(64, model.config.seq_len, seed=0, step=0)
    counts_LE, dropped_L = _choices(model, tokens_BT)
    windows = [tokens_BT for tokens_BT, _ in series.domain_windows(16).values()]
    jsd_L = [None] * len(counts_LE)
    if len(windows) > 1:
        jsd_L = domain_divergence(torch.stack([_choices(model, tokens_BT)[0] for tokens_BT in windows], dim=1)).tolist()
    return result | {
        "max_load": max_over_mean(counts_LE / counts_LE.sum(-1, keepdim=True)).tolist(),
        "dead_experts": (counts_LE == 0).sum(-1).tolist(),
        "jsd": jsd_L,
        "experts_per_token": (counts_LE.sum(-1) / tokens_BT.numel()).tolist(),
        "dropped": dropped_L.tolist(),
    }


def _choices(model: DecoderLM, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each expert of each layer was used (L, E), and the fraction of choices each layer dropped (L,)."""
    counts_PLE, dropped_PL = [], []
    for part_BT in tokens_BT.split(8):  # the logits of all windows at once would take a gigabyte
        routings = model(part_BT).routings
        counts_PLE.append(torch.stack([expert_counts(routing) for routing in routings]).double())
        dropped_PL.append(torch.tensor([0.0 if r.dropped is None else float(r.dropped) for r in routings]))
    return torch.stack(counts_PLE).sum(0), torch.stack(dropped_PL).mean(0)


def run_arm(preset: Preset, corpus: str, arm: Arm, seed: int, steps: int, budgets: Sequence[str]) -> list[dict]:
    """Train `arm` with `seed` for `steps` updates (or load that run); a row for each of the `budgets` it stands for."""
    with one_thread():
        series = Series(preset, corpus)
        model, result = series.train_arm(arm, seed, steps, progress=False, verbose=False)
        row = dict(arm=arm.name, budget=None, seed=seed, updates=steps, val_loss=result.final_loss)
        row["history"] = [(row["step"], row["val_loss"]) for row in result.history if row["val_loss"] is not None]
        row["cpu_seconds"] = result.history[-1]["cpu_seconds"]
        row |= describe(series, model)
    return [row | {"budget": budget} for budget in budgets]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as all runs of a comparison do, and with as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _finished(jobs: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Future]]:
    """(job, its future) as the jobs finish: here with one worker, else in as many processes."""
    if workers == 1:
        for job in jobs:
            future = Future()
            try:
                future.set_result(run_arm(*job))
            except Exception as error:
                future.set_exception(error)
            yield job, future
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
    try:
        futures = {pool.submit(run_arm, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, which nobody else would tell it."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def compare(
    arms: Sequence[Arm],
    budgets: Sequence[str] = BUDGETS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    preset: str | Preset | None = None,
    corpus: str | None = None,
    workers: int = 1,
    reference: str | None = None,
    updates: int | None = None,
    out: str | Path | None = None,
) -> dict:
    """Run all `arms` at all `budgets` for all `seeds`, in `workers` processes; return what tables and figures need.

    The budget is what `updates` updates (default: the preset's second phase) of the arm named `reference` cost
    (default: the first MoE that starts from the parent). `out` is written after each run, so that a comparison which
    is stopped leaves its rows. A run that fails does not stop the others: it is in result["failed"] with its error.
    Runs that were made before are loaded. Raises ValueError for arms, budgets or seeds that make no comparison.
    `preset` and `corpus` are those of `load_series`, or a Preset itself.
    """
    arms, budgets, seeds = list(arms), list(budgets), list(seeds)
    reference = _checked(arms, budgets, seeds, reference)
    series = Series(preset, corpus or preset.corpus) if isinstance(preset, Preset) else load_series(preset, corpus)
    preset = series.preset
    _ = series.train_stream, series.validation_stream, series.domain_streams()  # made once, before the processes start
    with one_thread(), torch.random.fork_rng(devices=[]):
        cost = costs(series, arms)
    planned_updates = updates_per_budget(preset, arms, cost, reference, budgets, updates)
    for name, per_budget in cost.items():
        planned = ", ".join(f"{planned_updates[name, budget]} for equal {budget}" for budget in budgets)
        print(f"{name}: an update costs {per_budget['FLOPs']:.2f} dense ones in FLOPs, ", end="")
        print(f"{per_budget['seconds']:.2f} in seconds; updates: {planned}", flush=True)

    jobs = []
    for seed in seeds:
        for arm in arms:
            for steps in dict.fromkeys(planned_updates[arm.name, budget] for budget in budgets):
                sharing = [budget for budget in budgets if planned_updates[arm.name, budget] == steps]
                jobs.append((preset, series.corpus_name, arm, seed, steps, sharing))
    control = next((arm.name for arm in arms if arm.moe is None and arm.start == "parent"), None)
    floor = series.floor
    result = {
        "date": datetime.date.today().isoformat(),
        "setting": setting(series),
        "corpus": series.name,
        "seeds": seeds,
        "arms": [arm.to_dict() for arm in arms],
        "reference": reference,
        "updates": updates or preset.sparse.steps,  # of the reference
        "control": control,
        "costs": cost,
        "ratios": {"flops": cost[reference]["FLOPs"], "seconds": cost[reference]["seconds"]},  # of the reference
        "shared_within": SHARED_WITHIN,
        "floor": None if floor is None else floor.overall,
        "machine": f"{platform.machine()}, one thread a run, torch {torch.__version__}",
        "failed": [],
        "rows": [],
    }
    names = [arm.name for arm in arms]
    with closing(_finished(jobs, workers)) as finished:
        for count, ((_, _, arm, seed, steps, sharing), future) in enumerate(finished, 1):
            head = f"[{count}/{len(jobs)}] seed {seed}  {arm.name}  {steps} updates  equal {', '.join(sharing)}"
            if error := future.exception():
                text = "".join(traceback.format_exception(error))
                result["failed"].append(dict(arm=arm.name, seed=seed, updates=steps, error=repr(error), traceback=text))
                print(f"{head}  FAILED: {error!r}", flush=True)
            else:
                result["rows"] += future.result()
                result["rows"].sort(
                    key=lambda r: (seeds.index(r["seed"]), names.index(r["arm"]), budgets.index(r["budget"]))
                )
                print(f"{head}  {future.result()[0]['val_loss']:.4f}", flush=True)
            if out is not None:
                write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def _checked(arms, budgets, seeds, reference) -> str:
    """The reference's name; ValueError for what makes no comparison."""
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"arms are told apart by name, but these are {names}; give each its own")
    if not budgets or not set(budgets) <= set(BUDGETS):
        raise ValueError(f"budgets={budgets!r} is none or has an unknown one; choose of {', '.join(BUDGETS)}")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds={seeds!r} holds none or one twice; a seed gives one run of each arm")
    upcycled = [arm.name for arm in arms if arm.moe is not None and arm.start == "parent"]
    if reference is None and not upcycled:
        raise ValueError("no arm is an MoE that starts from the parent; name the arm that sets the budget: reference=…")
    if reference is not None and reference not in names:
        raise ValueError(f"reference={reference!r} is none of the arms {', '.join(names)}")
    return reference or upcycled[0]


# The fields of MoEConfig that every stored setting has.
_ALWAYS_STORED = (
    "num_experts", "top_k", "renormalize", "router_bias", "noisy", "layers", "router_std", "aux_weight", "z_weight",
)  # fmt: skip


def setting(series: Series) -> dict:
    """What the result depends on; a stored result holds for these settings only.

    A field of MoEConfig that was added later appears only where it is not at its default, so that results which were
    stored before it existed still hold.
    """
    preset = series.preset
    moe, default = asdict(preset.moe), asdict(MoEConfig())
    return json.loads(
        json.dumps(
            {
                "model": preset.model.to_dict(),
                "moe": {name: moe[name] for name in moe if name in _ALWAYS_STORED or moe[name] != default[name]},
                "dense": asdict(replace(preset.dense, seed=0)),
                "sparse": asdict(replace(preset.sparse, seed=0)),
                "train_tokens": series.train_stream.key,
                "validation_tokens": series.validation_stream.key,
            }
        )
    )


# ---------------------------------------------------------------------------------------------------------- tables


def losses(result: dict, arm: str, budget: str) -> dict[int, float]:
    """{seed: final validation loss} of one arm at one budget."""
    rows = (row for row in result["rows"] if (row["arm"], row["budget"]) == (arm, budget))
    return {row["seed"]: row["val_loss"] for row in rows}


def paired(result: dict, budget: str, arm: str, rival: str) -> tuple[float, float]:
    """(mean of `arm` less `rival`, standard deviation of the difference) over the seeds that both have.

    A seed gives both the same data in the same order, so that much of the scatter is common and cancels. The deviation
    is NaN for a single seed; so are both where the arms share none.
    """
    ours, theirs = losses(result, arm, budget), losses(result, rival, budget)
    return mean_and_spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    mean = statistics.mean(values) if values else float("nan")
    return mean, statistics.stdev(values) if len(values) > 1 else float("nan")


def summarize(result: dict) -> list[dict]:
    """One row per budget and arm: mean and standard deviation of the validation loss over the seeds, and

    its difference from the dense control at the same budget with the spread of that difference (see `paired`).
    """
    rows = []
    control = result.get("control", DENSE.name)
    for budget in BUDGETS:
        for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
            mean, spread = mean_and_spread(list(losses(result, arm, budget).values()))
            if mean == mean:
                updates = next(r["updates"] for r in result["rows"] if (r["arm"], r["budget"]) == (arm, budget))
                difference, paired_spread = paired(result, budget, arm, control)
                rows.append(
                    dict(budget=budget, arm=arm, updates=updates, mean=mean, spread=spread)
                    | dict(difference=difference, paired_spread=paired_spread)
                )
    return rows


def margin(result: dict, budget: str, arm: str | None = None, rival: str | None = None) -> tuple[float, float]:
    """(how far `arm` ends below `rival`, the larger of the two arms' standard deviations).

    By default the arm that set the budget and the dense control.
    """
    by_arm = {row["arm"]: row for row in summarize(result) if row["budget"] == budget}
    ours = by_arm[arm or result.get("reference", "upcycled MoE")]
    theirs = by_arm[rival or result.get("control", DENSE.name)]
    return theirs["mean"] - ours["mean"], max(ours["spread"], theirs["spread"])


def table(result: dict) -> str:
    """The losses as text, a line for each budget and arm, with the gap to the entropy floor where that is known."""
    floor, rows = result["floor"], summarize(result)
    width = max([17, *(len(row["arm"]) for row in rows)])
    lines = [f"{'equal':<8} {'arm':<{width}} {'updates':>7}  {'val loss':>8}  {'± seeds':>7}  {'above floor':>11}"]
    for row in rows:
        gap = "" if floor is None else f"{row['mean'] - floor:.3f}"
        lines.append(
            f"{row['budget']:<8} {row['arm']:<{width}} {row['updates']:>7}  "
            f"{row['mean']:>8.3f}  {row['spread']:>7.4f}  {gap:>11}"
        )
    return "\n".join(lines)


def overview(result: dict) -> str:
    """One line per arm, in Markdown: losses at each budget, the paired difference from dense, and the routing.

    The routing is that of the first budget, means over the seeds: the highest load of any layer, dead experts of all
    layers together, and means over layers of JSD (bits), experts per token and the fraction of dropped choices.
    """
    summary = summarize(result)
    budgets = list(dict.fromkeys(row["budget"] for row in summary))
    control = result.get("control", DENSE.name)
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in summary):
        line = {"arm": arm}
        for row in summary:
            if row["arm"] == arm:
                line[f"equal {row['budget']}"] = _plus_minus(row["mean"], row["spread"])
                if arm != control:
                    line[f"{row['budget']}: from dense"] = _plus_minus(row["difference"], row["paired_spread"], "+")
        lines.append(line | _routing_cells([r for r in result["rows"] if (r["arm"], r["budget"]) == (arm, budgets[0])]))
    columns = ["arm"]
    for budget in budgets:
        columns += [f"equal {budget}", f"{budget}: from dense"]
    columns += list(_routing_cells([]))
    columns = [name for name in columns if any(line.get(name) for line in lines)]
    cells = [columns] + [[line.get(name, "") for name in columns] for line in lines]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    text = "\n".join("| " + " | ".join(c.ljust(width) for c, width in zip(row, widths)) + " |" for row in cells)
    if "shared_within" in result and len(budgets) > 1:
        text += f"\n\nBudgets whose updates differ by no more than {result['shared_within']:.0%} share one run."
    return text


def _plus_minus(mean: float, spread: float, sign: str = "") -> str:
    if mean != mean:
        return ""
    return f"{mean:{sign}.4f}" + ("" if spread != spread else f" ± {spread:.4f}")


def _routing_cells(rows: Sequence[dict]) -> dict[str, str]:
    """The routing columns of `overview`: means over `rows`, empty where they are not known."""

    def cell(name, over_layers, style):
        values = [over_layers(row[name]) for row in rows if row.get(name) and None not in row[name]]
        return format(statistics.mean(values), style) if values else ""

    mean = statistics.mean
    return {
        "max load": cell("max_load", max, ".2f"),
        "dead": cell("dead_experts", sum, ".1f"),
        "JSD": cell("jsd", mean, ".3f"),
        "experts": cell("experts_per_token", mean, ".2f"),
        "dropped": cell("dropped", mean, ".1%"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m upcycling.compare", description=__doc__.splitlines()[0])
    add_series_arguments(parser)
    parser.add_argument("--arms", choices=sorted(ARM_SETS), default="upcycling", help="default: upcycling")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="default: all")
    parser.add_argument("--updates", type=int, help="of the arm that sets the budget; default: the second phase's")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument("--no-scratch", action="store_true", help="leave out the arms from scratch, the longest")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, after each run")
    options = parser.parse_args(arguments)
    preset = load_series(options.preset).preset
    arms = [arm for arm in ARM_SETS[options.arms](preset) if not (options.no_scratch and arm.start == "scratch")]
    result = compare(
        arms, options.budgets, options.seeds,
        preset=preset, corpus=options.corpus, workers=options.workers, updates=options.updates, out=options.out,
    )  # fmt: skip
    print(f"\n{table(result)}\n\n{overview(result)}")
    for failure in result["failed"]:
        print(f"\nFAILED: {failure['arm']}, seed {failure['seed']}:\n{failure['traceback']}", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
