"""How routing changed over training: saturation and specialisation."""

from __future__ import annotations

from .routing import Curves
from .style import label_text, new_axes
from .training import COLOURS, DASHES

# --- over training


def plot_saturation(curves: Curves, *, chance: float | None = None, now: float | None = None, title: str = ""):
    """Router saturation by layer, each a list of (update, share): how many of the final experts are chosen already.

    `chance` is the overlap of random choices (K / E); `now` marks a moment. OLMoE (Muennighoff et al.
    2024), section 5.1.
    """
    label = "share of the final experts already chosen"
    return _over_training(curves, label, chance, None, now, (0, 1.03), title)


def plot_specialisation(
    curves: Curves,
    *,
    null: float | None = None,
    spread: float | None = None,
    now: float | None = None,
    y_label: str = "domain specialisation (bits)",
    y_max: float | None = None,
    title: str = "",
):
    """A measure of specialisation by layer, each a list of (update, value), over the null's line.

    With `spread` (the null's standard deviation) a band of three spreads on either side is shaded; `now` marks a
    moment, and `y_max` fixes the axis, for a playback.
    """
    return _over_training(curves, label_text(y_label), null, spread, now, (0, y_max), title)


def _over_training(curves, y_label, null, spread, now, y_range, title):
    import matplotlib

    if not curves or not all(curves.values()):
        raise ValueError("give at least one curve, each with at least one (update, value)")
    _, axes = new_axes(6.2, 3, margins=(0.65, 1.1, 0.5, 0.1), title=title)
    ends = []
    for i, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*points)
        # more layers than hues: from light to dark, in the order of the layers
        many = matplotlib.colormaps["viridis_r"](0.1 + 0.9 * i / len(curves))
        colour = COLOURS[i] if len(curves) <= len(COLOURS) else many
        axes.plot(
            xs, ys, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=1.7, marker=".", markersize=4,
            label=label_text(name, 16),
        )  # fmt: skip
        ends.append((ys[-1], label_text(name, 16), colour))
    if null is not None:
        axes.axhline(null, color="0.35", linestyle=":", linewidth=1.2)
        ends.append((null, "chance", "0.35"))
        if spread is not None:
            axes.axhspan(null - 3 * spread, null + 3 * spread, color="0.5", alpha=0.25, linewidth=0)
    if now is not None:
        axes.axvline(now, color="0.25", linewidth=1)
    axes.set_ylim(*y_range)
    axes.set(xlabel="optimizer updates", ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    # each line's name at its end, pushed up where names would touch; the highest may not leave the axes
    low, high = axes.get_ylim()
    room, lowest = 1 / max(22, len(ends)), 0.0
    for i, (value, name, colour) in enumerate(sorted(ends, key=lambda end: end[0])):
        lowest = max(lowest, min((value - low) / (high - low), 1 - room * (len(ends) - 1 - i)))
        axes.text(1.02, lowest, name, transform=axes.transAxes, color=colour, fontsize=8, va="center")
        lowest += room
    return axes.figure
