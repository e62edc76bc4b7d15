"""What runs showed: differences paired by seed, with intervals, as tables."""

import statistics
from collections.abc import Mapping, Sequence

from ..tables import Table
from .arms import DENSE
from .budgets import BUDGETS

_ROUTING = {  # column -> entry of a row, what becomes of its layers, format
    "max load": ("max_load", max, ".2f"),
    "dead": ("dead_experts", sum, ".1f"),
    "JSD": ("jsd", statistics.mean, ".3f"),
    "experts": ("experts_per_token", statistics.mean, ".2f"),
    "dropped": ("dropped", statistics.mean, ".1%"),
}


def values(result: dict, arm: str, measure: str = "val_loss", budget: str | None = None) -> dict[int, float]:
    """{seed: value} of one arm (at one budget); `measure` is an entry of its rows, or a domain: its loss there."""
    rows = [row for row in result["rows"] if row["arm"] == arm and budget in (None, row.get("budget"))]
    return {row["seed"]: row.get("per_domain", {}).get(measure, row.get(measure)) for row in rows}


def losses(result: dict, arm: str, budget: str) -> dict[int, float]:
    """{seed: final validation loss} of one arm at one budget."""
    return values(result, arm, budget=budget)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """(mean of ours less theirs, standard deviation of the difference) over the seeds that both have.

    A seed gives all arms the same data in the same order, so that much of the scatter is common and cancels. The
    deviation is NaN for a single seed; so are both where the arms share none.
    """
    return mean_and_spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def verdict(difference: tuple[float, float]) -> str:
    """ "better" or "worse" where the mean difference exceeds two of its spreads, else "not told apart"."""
    mean, spread = difference
    if not abs(mean) > 2 * spread:
        return "not told apart"
    return "better" if mean < 0 else "worse"


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
            ours = losses(result, arm, budget)
            mean, spread = mean_and_spread(list(ours.values()))
            if mean == mean:
                updates = next(r["updates"] for r in result["rows"] if (r["arm"], r["budget"]) == (arm, budget))
                difference, paired_spread = paired(ours, losses(result, control, budget))
                rows.append(
                    dict(budget=budget, arm=arm, updates=updates, mean=mean, spread=spread)
                    | dict(difference=difference, paired_spread=paired_spread)
                )
    return rows


def margin(result: dict, budget: str) -> tuple[float, float]:
    """(how far the arm that set the budget ends below the dense control, the larger of their standard deviations)."""
    by_arm = {row["arm"]: row for row in summarize(result) if row["budget"] == budget}
    ours, theirs = by_arm[result.get("reference", "upcycled MoE")], by_arm[result.get("control", DENSE.name)]
    return theirs["mean"] - ours["mean"], max(ours["spread"], theirs["spread"])


def table(result: dict) -> str:
    """The losses as text, a line for each budget and arm, with the gap to the entropy floor where that is known."""
    shown = {"budget": "equal", "arm": "arm", "updates": "updates", "mean": "val loss", "spread": "± seeds"}
    floor = result["floor"]
    rows = [
        {name: row[key] for key, name in shown.items()} | {"above floor": "" if floor is None else row["mean"] - floor}
        for row in summarize(result)
    ]
    width = {"equal": 8, "arm": 17, "updates": 7, "val loss": 9, "± seeds": 8, "above floor": 12}
    return str(Table(rows, left=["equal", "arm"], width=width, formats={"± seeds": ".4f"}, gap=" "))


def overview(result: dict) -> str:
    """One line per arm, in Markdown: losses at each budget, the paired difference from dense, and the routing.

    The routing is that of the first budget, means over the seeds: the highest load of any layer, dead experts of all
    layers together, and means over layers of JSD (bits), experts per token and the fraction of dropped choices.
    """
    summary, control = summarize(result), result.get("control", DENSE.name)
    budgets = list(dict.fromkeys(row["budget"] for row in summary))
    lines = {row["arm"]: {"arm": row["arm"]} for row in summary}
    columns = ["arm", *(name for budget in budgets for name in (f"equal {budget}", f"{budget}: from dense"))]
    for row in summary:
        line = lines[row["arm"]]
        line[f"equal {row['budget']}"] = plus_minus(row["mean"], row["spread"])
        if row["arm"] != control:
            line[f"{row['budget']}: from dense"] = plus_minus(row["difference"], row["paired_spread"], "+")
    for arm, line in lines.items():
        rows = [row for row in result["rows"] if (row["arm"], row["budget"]) == (arm, budgets[0])]
        for column, (name, over_layers, style) in _ROUTING.items():
            known = [over_layers(row[name]) for row in rows if row.get(name) and None not in row[name]]
            line[column] = format(statistics.mean(known), style) if known else ""
    columns = [name for name in [*columns, *_ROUTING] if any(line.get(name) for line in lines.values())]
    text = Table(lines.values(), columns).markdown()
    if "shared_within" in result and len(budgets) > 1:
        text += f"\n\nBudgets whose updates differ by no more than {result['shared_within']:.0%} share one run."
    return text


def plus_minus(mean: float, spread: float, sign: str = "") -> str:
    """ "1.2345 ± 0.0123"; a mean alone where there is no spread (NaN), nothing where there is no mean."""
    if mean != mean:
        return ""
    return f"{mean:{sign}.4f}" + ("" if spread != spread else f" ± {spread:.4f}")
