"""Figures of the series, each a function of data that returns a matplotlib figure.

The palette is Okabe and Ito's, made for colour-blind readers; lines differ in dash as well as colour, so that they can
be told apart in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def plot_losses(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    floor: float | None = None,
    boundary: float | None = None,
    title: str = "",
    x_label: str = "optimizer updates",
    y_label: str = "validation loss (nats per token)",
    log_y: bool = False,
):
    """Loss curves by name, each a list of (x, loss); the entropy floor and the dense -> MoE boundary as lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for i, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)], label=name, linewidth=1.8)
    if floor is not None:
        axes.axhline(floor, color="0.35", linewidth=1, linestyle=":")
        axes.annotate(
            f"entropy floor {floor:.2f}", (1, floor), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="0.25",
        )  # fmt: skip
    if boundary is not None:
        axes.axvline(boundary, color="0.6", linewidth=1)
        axes.annotate(
            "upcycled here", (boundary, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
            textcoords="offset points", va="top", fontsize=9, color="0.25",
        )  # fmt: skip
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def history_curve(history: Sequence[dict], start: int = 0, value: str = "val_loss") -> list[tuple[int, float]]:
    """(update, value) for the rows of a training history that have one; `start` shifts a second phase to the right."""
    return [(start + row["step"], row[value]) for row in history if row.get(value) is not None]


def plot_arms(rows: Sequence[dict], floor: float | None = None, title: str = ""):
    """Final validation loss of each arm at each equal budget: a dot per seed, a bar and its value at the mean.

    `rows` have arm, budget, seed and val_loss, as `upcycling.compare` writes them.
    """
    import matplotlib.pyplot as plt

    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, panels = plt.subplots(1, len(budgets), figsize=(8.4, 3.6), sharey=True, layout="constrained", squeeze=False)
    for axes, budget in zip(panels[0], budgets, strict=True):
        for i, arm in enumerate(arms):
            losses = [row["val_loss"] for row in rows if (row["arm"], row["budget"]) == (arm, budget)]
            if losses:
                axes.scatter(
                    [i] * len(losses), losses, marker="os^Dv"[i % 5], s=28, color=COLOURS[i], alpha=0.75, zorder=3
                )
                mean = sum(losses) / len(losses)
                axes.hlines(mean, i - 0.3, i + 0.3, color=COLOURS[i], linewidth=2)
                axes.annotate(
                    f"{mean:.3f}", (i, max(losses)), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
                )
        axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms], fontsize=9)
        axes.set(title=f"equal {budget}", xlim=(-0.6, len(arms) - 0.4))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # the floor as words: a line far below would press the dots together
    below = "" if floor is None else f"\nentropy floor {floor:.2f}"
    panels[0][0].set_ylabel("validation loss (nats per token)" + below)
    if title:
        figure.suptitle(title)
    return figure


def plot_comparison(result: Mapping, title: str = ""):
    """A comparison of many arms: a panel for each budget, a line for each arm, a dot per seed, mean ± deviation.

    `result` is that of `upcycling.compare.compare` (or its JSON). The vertical band is the dense control, mean ± one
    standard deviation, so that what lies left of it is better than training the dense model on.
    """
    import matplotlib.pyplot as plt

    from ..experiments.results import losses, summarize

    summary = summarize(result)
    budgets = list(dict.fromkeys(row["budget"] for row in summary))
    arms = list(dict.fromkeys(row["arm"] for row in summary))
    control = result.get("control", "dense control")
    figure, panels = plt.subplots(
        1,
        len(budgets),
        figsize=(2.2 + 2.9 * len(budgets), 1.3 + 0.36 * len(arms)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, budget in zip(panels[0], budgets, strict=True):
        for row in (row for row in summary if row["budget"] == budget):
            y, is_control = arms.index(row["arm"]), row["arm"] == control
            colour, spread = COLOURS[6 if is_control else 0], row["spread"] if row["spread"] == row["spread"] else 0
            if is_control:
                axes.axvspan(row["mean"] - spread, row["mean"] + spread, color="0.85", linewidth=0)
                axes.axvline(row["mean"], color="0.5", linewidth=1)
            dots = list(losses(result, row["arm"], budget).values())
            axes.scatter(dots, [y + 0.22] * len(dots), s=12, color=colour, alpha=0.55, linewidth=0, zorder=3)
            axes.errorbar(row["mean"], y, xerr=spread, fmt="sD"[is_control], ms=5, color=colour, capsize=3, zorder=4)
        axes.set_title(f"equal {budget}")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(arms)), arms)
    panels[0][0].set_ylim(len(arms) - 0.4, -0.6)  # the first arm on top
    floor = result.get("floor")
    below = "" if floor is None else f"; entropy floor {floor:.2f}"
    figure.supxlabel("validation loss (nats per token)" + below, fontsize=10)
    if title:
        figure.suptitle(title)
    return figure


def plot_load(loads_by_layer: Mapping[str, Sequence[float]], *, title: str = ""):
    """Share of the routed rows that each expert received, one row of bars for each name; the dashed line is even."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1,
        len(loads_by_layer),
        figsize=(2.6 * len(loads_by_layer) + 0.8, 2.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, load_E) in zip(panels[0], loads_by_layer.items(), strict=True):
        load_E = [float(value) for value in load_E]
        axes.bar(range(len(load_E)), load_E, color=COLOURS[0])
        axes.axhline(1 / len(load_E), color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes.set(title=name, xlabel="expert", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("share of routed rows")
    if title:
        figure.suptitle(title)
    return figure


def plot_length_bias(
    lengths: Sequence[int], scores: Mapping[str, Sequence[float]], *, bound: str = "", title: str = ""
):
    """Scores of documents over their lengths in tokens (log axis), a panel for each score by name.

    `bound` names the score, in nats, that cannot exceed log n, which its panel then shows as a line.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(1, len(scores), figsize=(4.2 * len(scores), 3.2), layout="constrained", squeeze=False)
    for i, (axes, (name, values)) in enumerate(zip(panels[0], scores.items(), strict=True)):
        axes.scatter(lengths, values, s=8, color=COLOURS[i], alpha=0.35, linewidth=0)
        if name == bound:
            n = np.geomspace(min(lengths), max(lengths))
            axes.plot(n, np.log(n), color="0.3", linestyle=":", label="log n, the most there can be")
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="length of the document (tokens)", ylabel=name)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    return figure


def plot_quotas(sizes: Sequence[int], quotas: Mapping[str, Sequence[int]], *, unit: str = "documents", title: str = ""):
    """What each allocation grants each stratum: strata from the largest to the smallest, their sizes as a grey area."""
    import matplotlib.pyplot as plt
    import numpy as np

    order = np.argsort(-np.asarray(sizes), kind="stable")
    rank = np.arange(1, len(order) + 1)
    figure, axes = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    axes.fill_between(rank, np.asarray(sizes)[order], step="mid", color="0.88", label="all there are")
    for i, (name, granted) in enumerate(quotas.items()):
        axes.step(rank, np.asarray(granted)[order], where="mid", color=COLOURS[i], linestyle=DASHES[i], label=name)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="strata, the largest first", ylabel=f"{unit} (log scale)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def plot_selected(result: Mapping, title: str = ""):
    """What each choice of documents does to the loss, less what random does: overall and for each domain.

    `result` is that of `upcycling.selected.study` (or its JSON). A dot for each seed, paired with random of that seed,
    beside mean ± standard deviation; left of the line is better than random.
    """
    import matplotlib.pyplot as plt

    from ..experiments.results import values
    from ..experiments.selected import REFERENCE, summarize

    rows = [row for row in summarize(result) if row["arm"] != REFERENCE]
    panels = {"all": "val_loss"} | {name: name for name in rows[0]["per_domain"]}
    figure, grid = plt.subplots(
        1, len(panels), figsize=(2.4 + 1.75 * len(panels), 1.3 + 0.36 * len(rows)), sharex=True, sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, (name, measure) in zip(grid[0], panels.items(), strict=True):
        theirs = values(result, REFERENCE, measure)
        axes.axvline(0, color="0.5", linewidth=1)
        for y, row in enumerate(rows):
            mean, spread = row["difference"] if measure == "val_loss" else row["per_domain"][name]
            ours = values(result, row["arm"], measure)
            dots = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            axes.scatter(dots, [y + 0.24] * len(dots), s=12, color=COLOURS[0], alpha=0.55, linewidth=0, zorder=3)
            error = spread if spread == spread else 0
            axes.errorbar(mean, y, xerr=error, fmt="s", ms=5, color=COLOURS[mean > 0], capsize=3, zorder=4)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(rows)), [row["arm"] for row in rows])
    grid[0][0].set_ylim(len(rows) - 0.4, -0.6)  # the first arm on top
    figure.supxlabel("loss less that of random (nats per token): to the left is better", fontsize=10)
    if title:
        figure.suptitle(title)
    return figure
