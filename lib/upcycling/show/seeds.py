"""Figures of arms over seeds: a dot for each seed, a mark at their mean, its spread to either side."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..experiments.results import mean_and_spread, values
from .style import COLOURS, note, row_of_axes

Panels = Mapping[str, Mapping[str, Sequence[float]]]  # of each panel, of each arm in it, a value for each seed


def plot_arms(rows: Sequence[dict], floor: float | None = None, title: str = "") -> Figure:
    """Final validation loss of each arm at each equal budget: a dot per seed, a bar and its value at the mean.

    `rows` have arm, budget, seed and val_loss, as `upcycling.compare` writes them.
    """
    return _seed_panels(_by_budget(rows), (8.4, 3.6), _loss_label(floor), title, values=True)


def plot_comparison(result: Mapping, title: str = "") -> Figure:
    """A comparison of many arms: a panel for each budget, a line for each arm, a dot per seed, mean ± deviation.

    `result` is that of `upcycling.compare.compare` (or its JSON). The vertical band is the dense control, mean ± one
    standard deviation, so that what lies left of it is better than training the dense model on.
    """
    panels, control = _by_budget(result["rows"]), result.get("control", "dense control")
    size = (2.2 + 2.9 * len(panels), 1.3 + 0.36 * len(_names(panels)))
    label = _loss_label(result.get("floor"))
    return _seed_panels(panels, size, label, title, spread=True, control=control, colour=lambda *_: COLOURS[0])


def plot_selected(result: Mapping, title: str = "") -> Figure:
    """What each choice of documents does to the loss, less what random does: overall and for each domain.

    `result` is that of `upcycling.selected.study` (or its JSON). A dot for each seed, paired with random of that seed,
    beside mean ± standard deviation; left of the line is better than random.
    """
    from ..experiments.selected import REFERENCE

    arms = [arm for arm in dict.fromkeys(row["arm"] for row in result["rows"]) if arm != REFERENCE]
    panels = {}
    for panel, measure in ({"all": "val_loss"} | {name: name for name in result["rows"][0]["per_domain"]}).items():
        theirs = values(result, REFERENCE, measure)
        ours = {arm: values(result, arm, measure) for arm in arms}
        panels[panel] = {arm: [own[seed] - theirs[seed] for seed in own if seed in theirs] for arm, own in ours.items()}
    size = (2.4 + 1.75 * len(panels), 1.3 + 0.36 * len(arms))
    label = "loss less that of random (nats per token): to the left is better"
    return _seed_panels(panels, size, label, title, spread=True, zero=True, colour=lambda _, mean: COLOURS[mean > 0])


def plot_differences(differences: Mapping[str, Mapping[str, Sequence[float]]], x_label: str, title: str = "") -> Figure:
    """A panel for each group, a line for each comparison in it: a dot per seed, a bar at the mean, 0 as a line."""
    size = (2.4 + 3.1 * len(differences), 1.1 + 0.42 * len(_names(differences)))
    return _seed_panels(differences, size, x_label, title, zero=True)


def plot_jumps(rows: Sequence[Mapping], title: str = "", least: float = 1e-4) -> Figure:
    """What each initialisation costs at step 0, as `initial_jumps` measured it, on a logarithmic scale.

    `exact` rows have their own colour and shape; whatever is below `least` nats is drawn there.
    """
    figure, (axes,) = row_of_axes(1, (7.4, 1 + 0.21 * len(rows)), grid="x")
    looks = {True: ("D", COLOURS[2], "theory: exactly 0"), False: ("o", COLOURS[1], "theory: not 0")}
    for y, row in enumerate(rows):
        jump, (marker, colour, _) = max(row["jump"], least), looks[bool(row["exact"])]
        axes.plot([least, jump], [y, y], color="0.8", linewidth=1.5, zorder=1)
        axes.plot(jump, y, marker=marker, color=colour, markersize=5, zorder=2)
    for marker, colour, label in looks.values():
        axes.plot([], [], marker, color=colour, markersize=5, label=label)
    _name_lines(axes, [row["name"] for row in rows], fontsize=8)
    label = f"loss at step 0 minus the dense model's (nats per token; left edge: {least:g} or less)"
    axes.set(xscale="log", xlabel=label, title=title)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def _by_budget(rows: Sequence[dict]) -> Panels:
    panels: dict = {}
    for row in rows:
        panels.setdefault(f"equal {row['budget']}", {}).setdefault(row["arm"], []).append(row["val_loss"])
    return panels


def _names(panels: Panels) -> list[str]:
    return list(dict.fromkeys(name for values in panels.values() for name in values))


def _loss_label(floor: float | None) -> str:
    # the floor as words: a line far below would press the dots together
    return "validation loss (nats per token)" + ("" if floor is None else f"; entropy floor {floor:.2f}")


def _name_lines(axes: Axes, names: Sequence[str], **options) -> None:
    axes.set_yticks(range(len(names)), names, **options)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top


def _seed_panels(
    panels: Panels, size: tuple[float, float], x_label: str, title: str, *, spread: bool = False, values: bool = False,
    zero: bool = False, control: str | None = None, colour: Callable[[int, float], str] | None = None,
) -> Figure:  # fmt: skip
    """A panel for each group, a line for each arm; names stand on the same line in all panels.

    The mean is a bar, with its value beside it (`values`), or a square with its standard deviation (`spread`); the
    band is that of `control`; `zero` draws 0 as a line. `colour` is a function of line and mean (else each line has its
    own).
    """
    names = _names(panels)
    figure, row = row_of_axes(len(panels), size, title=title, grid="x", sharex=True, sharey=True)
    for axes, (panel, arms) in zip(row, panels.items()):
        if zero:
            axes.axvline(0, color="0.5", linewidth=1)
        for name, dots in arms.items():
            mean, deviation = mean_and_spread(dots)
            y, deviation = names.index(name), deviation if deviation == deviation else 0  # of one seed there is none
            hue = colour(y, mean) if colour else COLOURS[y % len(COLOURS)]
            if name == control:
                hue = "black"
                axes.axvspan(mean - deviation, mean + deviation, color="0.85", linewidth=0)
                axes.axvline(mean, color="0.5", linewidth=1)
            places = [y + 0.22 if spread else y] * len(dots)
            axes.scatter(dots, places, s=12 if spread else 22, color=hue, alpha=0.6, linewidth=0, zorder=3)
            if spread:
                axes.errorbar(mean, y, xerr=deviation, fmt="sD"[name == control], ms=5, color=hue, capsize=3, zorder=4)
            else:
                axes.vlines(mean, y - 0.3, y + 0.3, color=hue, linewidth=2.2)
            if values:
                note(axes, f"{mean:.3f}", (mean, y - 0.3), (0, 2), ha="center", fontsize=8, color="black")
        axes.set_title(panel)
    _name_lines(row[0], names)
    figure.supxlabel(x_label, fontsize=10)
    return figure
