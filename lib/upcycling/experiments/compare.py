"""Which recipe is better? Any arms from one parent at equal tokens, equal FLOPs and equal seconds, over several seeds.

An `Arm` is a recipe: experts and how they begin, or neither for the dense control. A seed orders the data and draws the
routers (from scratch: all weights). Every run has its own schedule, so each is annealed at its end. The budget is what
the reference arm costs in the second phase (an arm from scratch gets the parent's share, too):

    tokens    the same number of updates
    FLOPs     updates scaled by the matrix products of one update, forward and backward, counted as they are executed
    seconds   updates scaled by the CPU seconds of one update: one thread, all arms in turn, medians

FLOPs and seconds are those of an arm as it begins; a rule with a variable number of experts may cost less or more
later. Runs and measured seconds are kept under `artifacts/`, so an interrupted comparison goes on where it stopped.
"""

import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from ..core.model import DecoderLM
from ..core.routing import expert_counts
from ..routing.metrics import domain_divergence, max_over_mean
from ..training.evaluation import evaluate
from .arms import Arm
from .budgets import BUDGETS, SHARED_WITHIN, costs, updates_per_budget
from .presets import Preset
from .results import overview, table
from .series import Series, load_series
from .store import begin, save, setting
from .workers import finished, torch_threads

__all__ = ["BUDGETS", "Arm", "compare", "describe", "overview", "run_arm", "setting", "table"]


@torch.no_grad()
def describe(series: Series, model: DecoderLM) -> dict:
    """Losses per domain and, for an MoE, each layer's routing of validation text.

    max_load (1 = even), dead_experts (never used), jsd (how far the domains' loads lie apart, in bits; None without
    domains), experts_per_token, and dropped, the fraction of choices that found their expert full.
    """
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
    with torch_threads():
        series = Series(preset, corpus)
        model, result = series.train_arm(arm, seed, steps, progress=False, verbose=False)
        row = dict(arm=arm.name, budget=None, seed=seed, updates=steps, val_loss=result.final_loss)
        row["history"] = [(row["step"], row["val_loss"]) for row in result.history if row["val_loss"] is not None]
        row["cpu_seconds"] = result.history[-1]["cpu_seconds"]
        row |= describe(series, model)
    return [row | {"budget": budget} for budget in budgets]


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
    with torch_threads(), torch.random.fork_rng(devices=[]):
        cost = costs(series, arms)
    planned = updates_per_budget(preset, arms, cost, reference, budgets, updates)
    for name, per_budget in cost.items():
        shown = ", ".join(f"{steps} for equal {' and '.join(sharing)}" for steps, sharing in planned[name].items())
        print(f"{name}: an update costs {per_budget['FLOPs']:.2f} dense ones in FLOPs, ", end="")
        print(f"{per_budget['seconds']:.2f} in seconds; updates: {shown}", flush=True)

    jobs = [
        (preset, series.corpus_name, arm, seed, steps, sharing)
        for seed in seeds
        for arm in arms
        for steps, sharing in planned[arm.name].items()
    ]
    control = next((arm.name for arm in arms if arm.moe is None and arm.start == "parent"), None)
    floor = series.floor
    result = begin(series, None, "rows") | {
        "seeds": seeds,
        "arms": [arm.to_dict() for arm in arms],
        "reference": reference,
        "updates": updates or preset.sparse.steps,  # of the reference
        "control": control,
        "costs": cost,
        "ratios": {"flops": cost[reference]["FLOPs"], "seconds": cost[reference]["seconds"]},  # of the reference
        "shared_within": SHARED_WITHIN,
        "floor": None if floor is None else floor.overall,
        "failed": [],
    }
    names = [arm.name for arm in arms]
    with closing(finished(run_arm, jobs, workers)) as done:
        for count, ((_, _, arm, seed, steps, sharing), future) in enumerate(done, 1):
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
            save(result, out, indent=1)
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
