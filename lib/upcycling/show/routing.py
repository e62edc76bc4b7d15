"""Figures of what a router does, each a function of data (arrays or lists) that returns a matplotlib figure.

Experts are told apart by their number, written into every cell and strip; colour only helps the eye. Measures use
magma (perceptually uniform, paper-white at 0), differences red and blue around white at 0.

Shapes: N tokens, E experts, K experts per token, L MoE layers, C columns (domains, token classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .style import draw_strings, expert_colour, ink, label_text, new_axes, strip_figure
from .training import COLOURS

Curves = Mapping[str, Sequence[tuple[float, float]]]
_MEASURE, _DIFFERENCE = "magma_r", "RdBu_r"
_MARK = COLOURS[1]


# --- strips of tokens


def plot_token_strip(
    texts: Sequence[str],
    experts_N,
    *,
    followed: int | None = None,
    columns: int = 100,
    max_tokens: int = 400,
    title: str = "",
):
    """The text as boxes in the colour of each token's first expert, whose number stands below it.

    `experts_N` may be (N, K): then all K numbers stand there, best first. `followed` is the index of a token to frame.
    Lines hold `columns` characters; tokens after the first `max_tokens` are left out, and the title says so.
    Raises ValueError where texts and experts differ in length.
    """
    experts = np.asarray(experts_N)
    _same_length(texts, experts, "rows of experts")
    experts_NK = experts[:max_tokens].reshape(min(len(texts), max_tokens), -1 if experts.size else 1).astype(int)
    colours = [expert_colour(row[0]) for row in experts_NK.tolist()]
    notes = [" ".join(map(str, row)) for row in experts_NK.tolist()]
    legend = "below each token: " + ("its expert" if experts_NK.shape[1] == 1 else "its experts, best first")
    return strip_figure(texts, colours, notes, legend, followed, columns, max_tokens, title)


def plot_token_losses(
    texts: Sequence[str],
    change_N,
    *,
    limit: float | None = None,
    columns: int = 100,
    max_tokens: int = 400,
    title: str = "",
):
    """The text as boxes coloured by the change of each token's loss (nats): red costs, blue gains, white is 0.

    The number below is the change. `limit` fixes the end of the colour scale, else the largest change is the end.
    Not-a-number (a token that was not predicted) is grey. Raises ValueError where texts and changes differ in length.
    """
    import matplotlib

    change_N = np.asarray(change_N, dtype=float)
    _same_length(texts, change_N, "changes of loss")
    change_N = change_N[:max_tokens]
    limit = _limit(change_N) if limit is None else limit
    colours_N4 = matplotlib.colormaps[_DIFFERENCE](0.5 + 0.5 * np.nan_to_num(change_N) / limit)
    colours_N4[~np.isfinite(change_N)] = (0.8, 0.8, 0.8, 1)
    notes = [_signed(value) for value in change_N]
    legend = f"below each token: change of its loss (nats); full red is +{limit:.2g}, full blue −{limit:.2g}"
    return strip_figure(texts, colours_N4.tolist(), notes, legend, None, columns, max_tokens, title)


# --- matrices with an expert axis


def plot_expert_matrix(
    share_CE,
    names: Sequence[str],
    *,
    null=None,
    spread=None,
    kind: str = "domain",
    quantity: str = "share of the domain's tokens",
    vmax: float | None = None,
    title: str = "",
):
    """Domains (or another `kind` of row, with these names) x experts: a share in each cell, drawn and written in %.

    `share_CE` is what `metrics.domain_specialization` returns. `null` is what chance gives: a number, which is marked
    on the colour bar, or anything that broadcasts to (C, E). With `spread` (the null's standard deviation, same shapes)
    the cells more than three spreads above it are framed. `vmax` fixes the end of the colour scale (a share).
    Raises ValueError where the shapes do not fit.
    """
    share_CE = _checked(share_CE, names, kind, "({}, experts)")
    framed_CE = None
    if spread is not None:
        if null is None:
            raise ValueError("spread is given but no null to count it from; give null as well")
        framed_CE = share_CE > _like(null, share_CE, "null") + 3 * _like(spread, share_CE, "spread")
    scale = (0, _top(share_CE) if vmax is None else vmax)
    axes, bar = _heat(share_CE, names, _MEASURE, scale, f"{quantity} (%)", _per_cent, framed_CE, title)
    note = "" if framed_CE is None else " (framed: more than three spreads above chance)"
    axes.set(xlabel="expert" + note, ylabel=label_text(kind))
    bar.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
    if null is not None and np.ndim(null) == 0:
        _mark(bar, float(null), "chance")
    return axes.figure


def plot_expert_classes(share_CE, classes: Sequence[str], *, quantity: str = "share of the class's tokens", **options):
    """Token classes (digits, punctuation, names, ...) x experts: `plot_expert_matrix`, whose options it takes."""
    return plot_expert_matrix(share_CE, classes, kind="token class", quantity=quantity, **options)


def plot_knockout(
    cost_EC,
    domains: Sequence[str],
    *,
    experts: Sequence[int] | None = None,
    noise=None,
    limit: float | None = None,
    title: str = "",
):
    """Domains x experts: the loss (nats per token) that removing the expert costs the domain; red costs, blue gains.

    `cost_EC` is one layer of a `KnockoutTable`, `experts` the numbers of its rows where they are not all from 0. With
    `noise` (nats; a number, or anything that broadcasts to (E, C)) the cells beyond it on either side are framed.
    `limit` fixes the ends of the colour scale, else the largest cost is the end. Not-a-number (not measured) is grey.
    Raises ValueError where the shapes do not fit.
    """
    cost_EC = _checked(np.asarray(cost_EC).T, domains, "domain", "(experts, {})").T
    if experts is not None and len(experts) != len(cost_EC):
        raise ValueError(f"{len(experts)} expert numbers but {len(cost_EC)} rows of costs; give one for each")
    framed_EC = None if noise is None else np.abs(cost_EC) > _like(noise, cost_EC, "noise")
    limit = _limit(cost_EC) if limit is None else limit
    axes, _ = _heat(
        cost_EC.T, domains, _DIFFERENCE, (-limit, limit), "change of loss (nats per token)", _signed,
        None if framed_EC is None else framed_EC.T, title, experts,
    )  # fmt: skip
    note = "" if noise is None else " (framed: beyond the noise)"
    axes.set(xlabel="expert removed" + note, ylabel="domain")
    return axes.figure


def plot_layer_loads(
    load_LE, layers: Sequence[int], *, alarm: Sequence[int] = (), vmax: float | None = None, title: str = ""
):
    """Layers x experts: each expert's load in units of the even share (1 is even), the mean over the layers on top.

    `load_LE` are fractions of the layer's routed rows. A dead expert is marked ×. The layers in `alarm` get a warning
    sign: the mean may look balanced while one of them has collapsed. Raises ValueError where the shapes do not fit.
    """
    load_LE = np.asarray(load_LE, dtype=float)
    if load_LE.ndim != 2 or len(load_LE) != len(layers) or not load_LE.size:
        raise ValueError(
            f"the loads have shape {load_LE.shape} but there are {len(layers)} layers; give (layers, experts)"
        )
    times_even = np.vstack([load_LE.mean(0), load_LE]) * load_LE.shape[1]
    rows = ["all layers"] + [f"{'⚠ ' if layer in alarm else ''}layer {layer}" for layer in layers]
    scale = (0, max(2.0, _top(times_even)) if vmax is None else vmax)
    axes, bar = _heat(times_even, rows, _MEASURE, scale, "load / even share", _times, None, title)
    axes.set_xlabel("expert")
    axes.axhline(0.5, color="black", linewidth=1.5)
    _mark(bar, 1, "even")
    return axes.figure


def _per_cent(value):
    return f"{100 * value:.0f}"


def _times(value):
    return f"{value:.1f}" if value else "×"


def _signed(value):
    if not np.isfinite(value):
        return "–"
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0"


def _heat(values_RE, rows, cmap, scale, quantity, write, framed_RE, title, numbers=None):
    """axes, bar: rows x experts as colours, each cell with its value written into it, and the colour bar."""
    import matplotlib
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    count, experts = values_RE.shape
    cell = min(0.5, max(8 / experts, min(0.2, 14 / experts)))  # inches
    narrow = cell < 0.35  # then the number stands upright, turned by a quarter
    names = [label_text(name, 24) for name in rows]
    margins = (0.5 + 0.08 * max(map(len, names), default=0), 1.3, 0.5, 0.1)
    figure, axes = new_axes(max(cell * experts, 3), (0.42 if narrow else 0.32) * count, margins=margins, title=title)
    image = axes.imshow(
        np.ma.masked_invalid(values_RE), matplotlib.colormaps[cmap].with_extremes(bad="0.85"),
        vmin=scale[0], vmax=scale[1], aspect="auto", interpolation="nearest",
    )  # fmt: skip
    spots = [(e, r) for r in range(count) for e in range(experts)]
    faces = image.to_rgba(np.ma.masked_invalid(values_RE))
    written = ["–" if np.isnan(values_RE[r, e]) else write(values_RE[r, e]) for e, r in spots]
    if cell > 0.16:
        draw_strings(axes, written, spots, [ink(faces[r, e]) for e, r in spots], 6.5, turned=narrow)
    step = 1 + int(0.16 / cell)  # of hundreds of experts, not each number finds room
    shown = range(0, experts, step)
    numbers = [str((range(experts) if numbers is None else numbers)[e]) for e in shown]
    draw_strings(axes, numbers, [(e, 0) for e in shown], "black", 6 if narrow else 7, below=True)
    axes.set_xticks([])
    axes.xaxis.labelpad = 18
    axes.set_yticks(range(count), names, fontsize=9)
    axes.tick_params(length=0)
    if framed_RE is not None:
        frames = [Rectangle((e - 0.46, r - 0.46), 0.92, 0.92) for e, r in spots if framed_RE[r, e]]
        for colour, width in (("white", 4), ("black", 2)):  # seen on light and dark cells
            axes.add_collection(PatchCollection(frames, facecolors="none", edgecolors=colour, linewidths=width))
    box, wide = axes.get_position(), figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.5 / wide, box.y0, 0.13 / wide, box.height))
    figure.colorbar(image, cax=bar)
    bar.set_ylabel(label_text(quantity), fontsize=8)
    bar.tick_params(labelsize=8)
    return axes, bar


def _mark(bar, value, text):
    """A line across the colour bar with a word to its left."""
    bar.axhline(value, color=_MARK, linewidth=2)
    bar.annotate(text, (0, value), xycoords=("axes fraction", "data"), xytext=(-2, 0), textcoords="offset points",
                 ha="right", va="center", fontsize=7, color=_MARK)  # fmt: skip


def _checked(values, names, kind, shape):
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or len(values) != len(names) or not values.size:
        wanted = shape.format(len(names))
        raise ValueError(f"the values have shape {values.shape} but there are {len(names)} {kind} names; give {wanted}")
    return values


def _like(value, values, name):
    """`value` with the shape of `values`."""
    value = np.asarray(value, dtype=float)
    try:
        return np.broadcast_to(value, values.shape)
    except ValueError:
        raise ValueError(f"{name} has shape {value.shape}, which does not fit {values.shape}") from None


def _top(values):
    """The largest finite value, or 1 where there is none above 0: the end of a colour scale."""
    return float(max(np.asarray(values)[np.isfinite(values)], default=0)) or 1.0


def _limit(values):
    return _top(np.abs(values))


# --- checks and scales


def _same_length(texts, values, what):
    if len(texts) != len(values):
        raise ValueError(f"{len(texts)} texts but {len(values)} {what}; give one for each token")
