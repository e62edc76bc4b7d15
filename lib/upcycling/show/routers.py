"""Figures of notebook 06: initial jumps, who chooses whom under a rule, and paired differences between arms.

Each is a function of data that returns a matplotlib figure. Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.routing import Routing, by_expert
from .training import COLOURS


def weights_by_expert(routing: Routing) -> Tensor:
    """weights_NE: each expert's combine weight for each token; 0 where it is not used."""
    weights_NK = routing.weights_NK.detach()
    if routing.kept_NK is not None:
        weights_NK = weights_NK * routing.kept_NK
    return by_expert(weights_NK, routing.expert_ids_NK, routing.probabilities_NE.shape[-1])


def plot_choices(routings: Mapping[str, Routing], title: str = "", columns: int = 4):
    """One panel for each routing of a few tokens: its combine weights, and a cross where a full expert dropped one."""
    import matplotlib.pyplot as plt

    rows = -(-len(routings) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.5 * rows), layout="constrained")
    panels = list(panels.flat) if hasattr(panels, "flat") else [panels]
    for axes in panels[len(routings) :]:
        axes.remove()
    for index, (axes, (name, routing)) in enumerate(zip(panels, routings.items(), strict=False)):
        weights_NE = weights_by_expert(routing)
        wanted_NE = torch.zeros_like(weights_NE, dtype=torch.bool)
        if routing.wanted_NK is not None:
            tokens_R, places_R = torch.where(routing.wanted_NK & ~routing.kept_NK)
            wanted_NE[tokens_R, routing.expert_ids_NK[tokens_R, places_R]] = True
        axes.imshow(weights_NE, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        for n, e in torch.cartesian_prod(*map(torch.arange, weights_NE.shape)).tolist():
            if wanted_NE[n, e]:
                axes.text(e, n, "×", ha="center", va="center", fontsize=13, color=COLOURS[1], fontweight="bold")
            elif weights_NE[n, e] > 0:
                axes.text(e, n, f"{weights_NE[n, e]:.2f}", ha="center", va="center", fontsize=7.5)
        axes.set_xticks(range(weights_NE.shape[1]))
        axes.set_yticks(range(weights_NE.shape[0]))
        axes.set_title(name, fontsize=9)
        axes.tick_params(length=0, labelsize=8)
        if index % columns == 0:
            axes.set_ylabel("token")
        if index + columns >= len(routings):
            axes.set_xlabel("expert")
    if title:
        figure.suptitle(title)
    return figure


def plot_jumps(rows: Sequence[Mapping], title: str = "", least: float = 1e-4):
    """What each initialisation costs at step 0, as `initial_jumps` measured it, on a logarithmic scale.

    `exact` rows have their own colour and shape; whatever is below `least` nats is drawn there.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.4, 1 + 0.21 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        jump, exact = max(row["jump"], least), bool(row["exact"])
        axes.plot([least, jump], [y, y], color="0.8", linewidth=1.5, zorder=1)
        axes.plot(jump, y, marker="Do"[not exact], color=COLOURS[2 if exact else 1], markersize=5, zorder=2)
    for marker, colour, label in (("D", COLOURS[2], "theory: exactly 0"), ("o", COLOURS[1], "theory: not 0")):
        axes.plot([], [], marker, color=colour, markersize=5, label=label)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel(f"loss at step 0 minus the dense model's (nats per token; left edge: {least:g} or less)")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    if title:
        axes.set_title(title)
    return figure


def plot_differences(differences: Mapping[str, Mapping[str, Sequence[float]]], x_label: str, title: str = ""):
    """A panel for each group, a line for each comparison in it: a dot per seed, a bar at the mean, 0 as a line."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for group in differences.values() for name in group))
    figure, panels = plt.subplots(
        1, len(differences), figsize=(2.4 + 3.1 * len(differences), 1.1 + 0.42 * len(names)),
        sharex=True, sharey=True, layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, (group, values_by_name) in zip(panels[0], differences.items(), strict=True):
        axes.axvline(0, color="0.5", linewidth=1)
        for name, values in values_by_name.items():
            y, mean = names.index(name), sum(values) / len(values)
            colour = COLOURS[y % len(COLOURS)]
            axes.scatter(values, [y] * len(values), s=22, color=colour, alpha=0.6, linewidth=0, zorder=3)
            axes.vlines(mean, y - 0.3, y + 0.3, color=colour, linewidth=2.2)
        axes.set_title(group)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(x_label, fontsize=10)
    if title:
        figure.suptitle(title)
    return figure
