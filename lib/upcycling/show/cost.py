"""Figures of what models cost: latency by length, throughput by batch, memory and FLOPs side by side.

Each is a function of data that returns a matplotlib figure; colours and dashes are those of `upcycling.plots`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .training import COLOURS, DASHES

_MARKERS = "os^Dv"


def plot_latency(
    prefill: Mapping[str, Mapping[int, float]], decode: Mapping[str, Mapping[int, float]], title: str = ""
):
    """Milliseconds by length, a line for each model: left a whole prompt, right one more token after so many.

    Both are {model: {tokens: seconds}}.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    panels[0].set(xlabel="tokens of the prompt", ylabel="prefill: ms for the prompt", yscale="log")
    _lines(panels[0], {name: _scaled(points, 1e3) for name, points in prefill.items()})
    _lines(panels[1], {name: _scaled(points, 1e3) for name, points in decode.items()})
    panels[1].set(xlabel="tokens before it", ylabel="decode: ms for one token", ylim=(0, None))
    panels[0].legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_throughput(throughput: Mapping[str, Mapping[int, float]], *, relative_to: str, title: str = ""):
    """Tokens per second of decoding by batch size, left; right the same over that of the model `relative_to`.

    {model: {batch size: tokens per second}}.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    panels[0].set(ylabel="decode: tokens per second", yscale="log")
    _lines(panels[0], throughput)
    base = throughput[relative_to]
    _lines(panels[1], {name: {b: v / base[b] for b, v in points.items()} for name, points in throughput.items()})
    panels[1].set(ylabel=f"speed / that of “{relative_to}”", ylim=(0, None))
    for axes in panels:
        axes.set_xlabel("sequences in the batch")
    panels[0].legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_memory_and_flops(accounts: Mapping, title: str = ""):
    """The twins side by side: memory of a training update by what it holds, and FLOPs of it.

    `accounts` are those of `upcycling.accounting.account`, by name; memory is in MiB.
    """
    import matplotlib.pyplot as plt

    parts = {
        "weights": [a.weights for a in accounts.values()],
        "gradients": [a.gradients for a in accounts.values()],
        "AdamW": [a.optimizer for a in accounts.values()],
        "activations": [a.activations or 0 for a in accounts.values()],
    }
    figure, (memory, flops) = plt.subplots(
        1, 2, figsize=(8.4, 3.4), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
    )
    places, below = range(len(accounts)), [0.0] * len(accounts)
    for i, (name, values) in enumerate(parts.items()):
        heights = [value / 2**20 for value in values]
        memory.bar(
            places, heights, 0.6, bottom=below, label=name, color=COLOURS[i], hatch=("", "//", "..", "xx")[i],
            edgecolor="white",
        )  # fmt: skip
        below = [low + height for low, height in zip(below, heights)]
    memory.set(ylabel="memory of training (MiB)", ylim=(0, 1.35 * max(below)))
    memory.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    _number(memory, places, below, "{:,.0f}")
    values = [a.update / 1e9 for a in accounts.values()]
    flops.bar(places, values, 0.6, color=COLOURS[5], edgecolor="white")
    flops.set(ylabel="FLOPs of an update (GFLOPs)", ylim=(0, 1.15 * max(values)))
    _number(flops, places, values, "{:,.0f}")
    for axes in (memory, flops):
        axes.set_xticks(places, [name.replace(", ", ",\n") for name in accounts], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _lines(axes, curves) -> None:
    from matplotlib.ticker import LogLocator

    for i, (name, points) in enumerate(curves.items()):
        axes.plot(
            list(points), list(points.values()), label=name, color=COLOURS[i], linestyle=DASHES[i], marker=_MARKERS[i],
            markersize=5, linewidth=1.8,
        )  # fmt: skip
    lengths = list(next(iter(curves.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scaled(points, factor):
    return {x: factor * y for x, y in points.items()}


def _number(axes, places, heights, form) -> None:
    for place, height in zip(places, heights):
        axes.annotate(form.format(height), (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=9)
