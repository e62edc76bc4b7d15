"""Figures of lines, bars and dots: losses and routing over updates, what models cost, documents by length."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .style import COLOURS, DASHES, label_text, new_axes, note, row_of_axes

Curves = Mapping[str, Sequence[tuple[float, float]]]


def plot_losses(
    curves: Curves,
    *,
    floor: float | None = None,
    boundary: float | None = None,
    title: str = "",
    x_label: str = "optimizer updates",
    y_label: str = "validation loss (nats per token)",
) -> Figure:
    """Loss curves by name, each a list of (x, loss); the entropy floor and the dense -> MoE boundary as lines."""
    figure, (axes,) = row_of_axes(1, (7, 3.8), grid="both")
    _draw_curves(axes, curves)
    if floor is not None:
        axes.axhline(floor, color="0.35", linewidth=1, linestyle=":")
        note(axes, f"entropy floor {floor:.2f}", (1, floor), (-4, 3), ("axes fraction", "data"), ha="right")
    if boundary is not None:
        axes.axvline(boundary, color="0.6", linewidth=1)
        note(axes, "upcycled here", (boundary, 1), (4, -4), ("data", "axes fraction"), va="top")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def history_curve(history: Sequence[dict], start: int = 0, value: str = "val_loss") -> list[tuple[int, float]]:
    """(update, value) for the rows of a training history that have one; `start` shifts a second phase to the right."""
    return [(start + row["step"], row[value]) for row in history if row.get(value) is not None]


def _draw_curves(axes: Axes, curves: Curves, *, markers: str = " ", **options: Any) -> list[str]:
    """A line for each curve, its name as label; their colours."""
    # more curves than hues: from light to dark, in their order
    many = [matplotlib.colormaps["viridis_r"](0.1 + 0.9 * i / len(curves)) for i in range(len(curves))]
    colours = COLOURS[: len(curves)] if len(curves) <= len(COLOURS) else many
    for i, (name, points) in enumerate(curves.items()):
        look = {"color": colours[i], "linestyle": DASHES[i % len(DASHES)], "marker": markers[i % len(markers)]}
        axes.plot(*zip(*points, strict=True), label=label_text(name, 40), **look, linewidth=1.8, **options)
    return list(colours)


def plot_saturation(curves: Curves, *, chance: float | None = None, title: str = "") -> Figure:
    """Router saturation by layer, each a list of (update, share): how many of the final experts are chosen already.

    `chance` is the overlap of random choices (K / E). OLMoE (Muennighoff et al. 2024), section 5.1.
    """
    label = "share of the final experts already chosen"
    return plot_specialisation(curves, null=chance, y_label=label, y_max=1.03, title=title)


def plot_specialisation(
    curves: Curves,
    *,
    null: float | None = None,
    y_label: str = "domain specialisation (bits)",
    y_max: float | None = None,
    title: str = "",
) -> Figure:
    """A measure of specialisation by layer, each a list of (update, value), over the null's line.

    `y_max` fixes the end of the axis. Raises ValueError without a curve, and for a curve without a point.
    """
    if not curves or not all(curves.values()):
        raise ValueError("give at least one curve, each with at least one (update, value)")
    figure, axes = new_axes(6.2, 3, margins=(0.65, 1.1, 0.5, 0.1), title=title)
    colours = _draw_curves(axes, curves, markers=".", markersize=4)
    ends = [(points[-1][1], label_text(name, 16), c) for (name, points), c in zip(curves.items(), colours)]
    if null is not None:
        axes.axhline(null, color="0.35", linestyle=":", linewidth=1.2)
        ends.append((null, "chance", "0.35"))
    axes.set(xlabel="optimizer updates", ylabel=label_text(y_label), ylim=(0, y_max))
    axes.spines[["top", "right"]].set_visible(False)
    # each line's name at its end, pushed up where names would touch; the highest may not leave the axes
    low, high = axes.get_ylim()
    room, lowest = 1 / max(22, len(ends)), 0.0
    for i, (value, name, colour) in enumerate(sorted(ends, key=lambda end: end[0])):
        lowest = max(lowest, min((value - low) / (high - low), 1 - room * (len(ends) - 1 - i)))
        axes.text(1.02, lowest, name, transform=axes.transAxes, color=colour, fontsize=8, va="center")
        lowest += room
    return figure


def plot_latency(
    prefill: Mapping[str, Mapping[int, float]], decode: Mapping[str, Mapping[int, float]], title: str = ""
) -> Figure:
    """Milliseconds by length, a line for each model: left a whole prompt, right one more token after so many.

    Both are {model: {tokens: seconds}}.
    """
    times = [{name: {x: 1e3 * y for x, y in c.items()} for name, c in part.items()} for part in (prefill, decode)]
    labels = ("prefill: ms for the prompt", "decode: ms for one token")
    return _log_and_linear(*times, ("tokens of the prompt", "tokens before it"), labels, title)


def plot_throughput(throughput: Mapping[str, Mapping[int, float]], *, relative_to: str, title: str = "") -> Figure:
    """Tokens per second of decoding by batch size, left; right the same over that of the model `relative_to`.

    {model: {batch size: tokens per second}}.
    """
    base = throughput[relative_to]
    ratios = {name: {size: value / base[size] for size, value in c.items()} for name, c in throughput.items()}
    labels = ("decode: tokens per second", f"speed / that of “{relative_to}”")
    return _log_and_linear(throughput, ratios, ("sequences in the batch",) * 2, labels, title)


def _log_and_linear(left: Mapping, right: Mapping, x_labels: Sequence, y_labels: Sequence, title: str) -> Figure:
    """Two panels of {name: {x: y}}, x in powers of 2: left on a logarithmic axis, right from 0 on."""
    figure, panels = row_of_axes(2, (8.4, 3.4), title=title, grid="both")
    for axes, curves, x_label, y_label in zip(panels, (left, right), x_labels, y_labels):
        _draw_curves(axes, {name: list(c.items()) for name, c in curves.items()}, markers="os^Dv", markersize=5)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xscale("log", base=2)
        lengths = list(next(iter(curves.values())))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    for axes in panels:
        axes.minorticks_off()
    panels[1].set_ylim(0)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def plot_memory_and_flops(accounts: Mapping, title: str = "") -> Figure:
    """The twins side by side: memory of a training update by what it holds, and FLOPs of it.

    `accounts` are those of `upcycling.account`, by name; memory is in MiB.
    """
    parts = {"weights": "weights", "gradients": "gradients", "AdamW": "optimizer", "activations": "activations"}
    memory = {name: [(getattr(a, part) or 0) / 2**20 for a in accounts.values()] for name, part in parts.items()}
    flops = {"": [a.update / 1e9 for a in accounts.values()]}
    figure, panels = row_of_axes(2, (8.4, 3.4), title=title, width_ratios=(3, 2))
    labels = ("memory of training (MiB)", "FLOPs of an update (GFLOPs)")
    for axes, stacks, label, colours, room in zip(
        panels, (memory, flops), labels, (COLOURS, COLOURS[5:]), (1.35, 1.15)
    ):
        top = np.zeros(len(accounts))
        for (name, values), colour, hatch in zip(stacks.items(), colours, ("", "//", "..", "xx")):
            bars = axes.bar(
                range(len(top)), values, 0.6, bottom=top, label=name, color=colour, hatch=hatch, edgecolor="white"
            )
            top += values
        axes.bar_label(bars, [f"{value:,.0f}" for value in top], padding=3, fontsize=9)
        axes.set(ylabel=label, ylim=(0, room * max(top)))
        axes.set_xticks(range(len(top)), [name.replace(", ", ",\n") for name in accounts], fontsize=9)
    panels[0].legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    return figure


def plot_length_bias(
    lengths: Sequence[int], scores: Mapping[str, Sequence[float]], *, bound: str = "", title: str = ""
) -> Figure:
    """Scores of documents over their lengths in tokens (log axis), a panel for each score by name.

    `bound` names the score, in nats, that cannot exceed log n, which its panel then shows as a line.
    """
    figure, panels = row_of_axes(len(scores), (4.2 * len(scores), 3.2), title=title)
    for i, (axes, (name, values)) in enumerate(zip(panels, scores.items())):
        axes.scatter(lengths, values, s=8, color=COLOURS[i % len(COLOURS)], alpha=0.35, linewidth=0)
        if name == bound:
            n = np.geomspace(min(lengths), max(lengths))
            axes.plot(n, np.log(n), color="0.3", linestyle=":", label="log n, the most there can be")
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="length of the document (tokens)", ylabel=name)
    return figure


def plot_quotas(
    sizes: Sequence[int], quotas: Mapping[str, Sequence[int]], *, unit: str = "documents", title: str = ""
) -> Figure:
    """What each allocation grants each stratum: strata from the largest to the smallest, their sizes as a grey area."""
    order = np.argsort(-np.asarray(sizes), kind="stable")
    ranks = np.arange(1, len(order) + 1)
    figure, (axes,) = row_of_axes(1, (7.4, 3.4))
    axes.fill_between(ranks, np.asarray(sizes)[order], step="mid", color="0.88", label="all there are")
    curves = {name: list(zip(ranks, np.asarray(granted)[order])) for name, granted in quotas.items()}
    _draw_curves(axes, curves, drawstyle="steps-mid")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="strata, the largest first", ylabel=f"{unit} (log scale)", title=title)
    axes.legend(frameon=False, fontsize=9)
    return figure
