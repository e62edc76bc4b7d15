"""Figures of what a router does, each a function of data (arrays or lists) that returns a matplotlib figure.

Experts are told apart by their number, written into every cell and strip; colour only helps the eye. Measures use
magma (perceptually uniform, paper-white at 0), differences red and blue around white at 0.

Shapes: N tokens, E experts, K experts per token, L MoE layers, C columns (domains, token classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .drawing import draw_strings, expert_colour, ink, label_text, new_axes, strip_figure
from .plots import COLOURS, DASHES

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


# --- paths


def plot_coactivation(
    strength_EE,
    *,
    chance,
    load_E=None,
    vmax: float | None = None,
    max_edges: int = 60,
    quantity: str = "share of an expert's tokens that the other one sees, too",
    title: str = "",
):
    """Experts on a circle, joined where two are chosen together more often than by chance; wider is more often.

    `strength_EE` is what `metrics.coactivation` returns (of each pair the larger side counts, the diagonal does not);
    `chance`, (K-1)/(E-1) there, is a number or anything that broadcasts to (E, E). Discs grow with `load_E`. Of more
    than `max_edges` the strongest are drawn, and the title says so. `vmax` is the strength of the widest edge.
    Raises ValueError for a matrix that is not square.
    """
    from matplotlib.collections import LineCollection

    strength_EE = np.asarray(strength_EE, dtype=float)
    if strength_EE.ndim != 2 or strength_EE.shape[0] != strength_EE.shape[1] or not strength_EE.size:
        raise ValueError(f"the co-activations have shape {strength_EE.shape}; give (experts, experts)")
    experts = len(strength_EE)
    above_EE = strength_EE > _like(chance, strength_EE, "chance")
    strength_EE = np.where(above_EE, strength_EE, 0)
    strength_EE = np.triu(np.maximum(strength_EE, strength_EE.T), 1)
    edges = np.argwhere(strength_EE > 0)
    found = len(edges)
    edges = edges[np.argsort([strength_EE[i, j] for i, j in edges], kind="stable")][-max_edges:]
    values = np.array([strength_EE[i, j] for i, j in edges])
    vmax = _top(values) if vmax is None else vmax
    angle_E = np.pi / 2 - 2 * np.pi * np.arange(experts) / experts
    place_E2 = np.stack([np.cos(angle_E), np.sin(angle_E)], -1)
    if len(edges) < found:
        title = f"{title} (strongest {len(edges)} of {found})".strip()
    _, axes = new_axes(4.4, 4.4, margins=(0.1, 0.1, 0.75, 0.05), title=title)
    axes.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xticks=[], yticks=[], xlabel="expert (number in the disc)")
    axes.spines[:].set_visible(False)

    def width(strength):
        return 0.3 + 6 * np.clip(strength / vmax, 0, 1) ** 2

    lines = dict(colors=COLOURS[0], alpha=0.7)
    axes.add_collection(LineCollection(place_E2[edges], linewidths=width(values), zorder=1, **lines))
    area = min(420, 6000 / experts)  # points squared
    areas = area if load_E is None else area * np.clip(np.asarray(load_E, dtype=float) * experts, 0.3, 2)
    colours = [expert_colour(e) for e in range(experts)]
    axes.scatter(*place_E2.T, s=areas, c=colours, edgecolors="0.2", linewidths=0.6, zorder=2)
    draw_strings(axes, map(str, range(experts)), place_E2, [ink(c) for c in colours], min(9, 300 / experts), zorder=3)
    key = axes.figure.add_axes((0.05, 0.02, 0.9, 0.075))
    key.set(xlim=(0, 3), ylim=(0, 1))
    key.axis("off")
    if found:
        samples = np.linspace(values.min(), vmax, 3)
        key.add_collection(
            LineCollection([[(i + 0.1, 0.75), (i + 0.4, 0.75)] for i in range(3)], linewidths=width(samples), **lines)
        )
        for i, sample in enumerate(samples):
            key.text(i + 0.45, 0.75, f"{sample:.2g}", va="center", fontsize=8)
    key.text(
        1.5, 0.1, label_text(quantity) if found else "no pair is above chance", ha="center", va="center", fontsize=8
    )
    return axes.figure


def layer_flows(expert_ids_LNK, weights_LNK, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """share_LE, flow_LEE: the tokens' weight at each expert, and how much goes from each one to each of the next layer.

    Each token's combine weights are divided by their sum: a layer's shares add up to 1. A token's flow from e to f is
    the product of its two weights (`flow_LEE` has one layer less). Raises ValueError where the shapes differ.
    """
    ids_LNK, weights_LNK = np.asarray(expert_ids_LNK), np.asarray(weights_LNK, dtype=float)
    if ids_LNK.ndim != 3 or ids_LNK.shape != weights_LNK.shape or not ids_LNK.size:
        raise ValueError(
            f"expert ids {ids_LNK.shape} and weights {weights_LNK.shape}: give both as (layers, tokens, k)"
        )
    layers, count, _ = ids_LNK.shape
    weights_LNK = weights_LNK / weights_LNK.sum(-1, keepdims=True)
    share_LE, flow_LEE = np.zeros((layers, num_experts)), np.zeros((layers - 1, num_experts, num_experts))
    previous_NE = None
    for layer in range(layers):
        dense_NE = np.zeros((count, num_experts))
        np.put_along_axis(dense_NE, ids_LNK[layer], weights_LNK[layer], axis=1)
        share_LE[layer] = dense_NE.mean(0)
        if previous_NE is not None:
            flow_LEE[layer - 1] = previous_NE.T @ dense_NE / count
        previous_NE = dense_NE
    return share_LE, flow_LEE


def plot_flow(
    expert_ids_LNK,
    weights_LNK,
    num_experts: int,
    layers: Sequence[int],
    *,
    least: float = 0.01,
    max_ribbons: int = 150,
    title: str = "",
):
    """The way of a token (N = 1), or of a class of tokens, through the layers' experts, as a Sankey diagram.

    A bar is an expert, as high as its share of the combine weights (see `layer_flows`), its number in it; ribbons lead
    to the next layer's experts. Left out are bars below `least` (a share) and, between two layers, all ribbons but the
    strongest `max_ribbons`; the axis says how much of the weight the drawn ones carry.
    Raises ValueError where the shapes do not fit.
    """
    from matplotlib.collections import PatchCollection, PathCollection
    from matplotlib.patches import Rectangle
    from matplotlib.path import Path

    share_LE, flow_LEE = layer_flows(expert_ids_LNK, weights_LNK, num_experts)
    if len(share_LE) != len(layers):
        raise ValueError(f"{len(share_LE)} layers of routing but {len(layers)} layer names; give one for each")
    used = max(int((share_E >= least).sum()) for share_E in share_LE)
    gap, half = 0.022, 0.07  # between bars, in shares; half a bar's width, in layers
    height = min(max(2.2, 0.24 * used), 9)
    _, axes = new_axes(1.3 * len(layers) + 0.6, height, margins=(0.45, 0.15, 0.5, 0.05), title=title)
    top_LE = np.zeros_like(share_LE)
    bars, numbers, shares, ribbons, colours, drawn = [], [], [], [], [], 0.0
    codes = [Path.MOVETO] + [Path.CURVE4] * 3 + [Path.LINETO] + [Path.CURVE4] * 3 + [Path.CLOSEPOLY]
    for layer, share_E in enumerate(share_LE):
        y = (used - (share_E >= least).sum()) * gap / 2
        for e in np.flatnonzero(share_E >= least):
            top_LE[layer, e] = y
            bars.append((Rectangle((layer - half, y), 2 * half, share_E[e]), expert_colour(e)))
            numbers.append((str(e), (layer, y + share_E[e] / 2), ink(expert_colour(e))))
            if share_E[e] * height > 0.2:
                shares.append((f"{100 * share_E[e]:.0f}%", (layer + half + 0.13, y + share_E[e] / 2)))
            y += share_E[e] + gap
    for layer, flow_EE in enumerate(flow_LEE):
        leave_EE = top_LE[layer][:, None] + flow_EE.cumsum(1) - flow_EE
        arrive_EE = top_LE[layer + 1] + flow_EE.cumsum(0) - flow_EE
        seen_EE = np.where(np.outer(share_LE[layer] >= least, share_LE[layer + 1] >= least), flow_EE, 0)
        strongest = np.argsort(-seen_EE, axis=None, kind="stable")[: min(max_ribbons, np.count_nonzero(seen_EE))]
        for e, f in zip(*np.unravel_index(strongest, seen_EE.shape)):
            a, b, thick = leave_EE[e, f], arrive_EE[e, f], flow_EE[e, f]
            left, middle, right = layer + half, layer + 0.5, layer + 1 - half
            upper = [(left, a), (middle, a), (middle, b), (right, b)]
            lower = [(right, b + thick), (middle, b + thick), (middle, a + thick), (left, a + thick), (left, a)]
            ribbons.append(Path(upper + lower, codes))
            colours.append(expert_colour(e))
            drawn += thick
    axes.add_collection(PathCollection(ribbons, facecolors=colours, edgecolors="none", alpha=0.5, zorder=1))
    patches, faces = zip(*bars)
    axes.add_collection(PatchCollection(patches, facecolors=faces, edgecolors="0.2", linewidths=0.6, zorder=2))
    draw_strings(axes, *zip(*numbers), 7.5, zorder=3)
    if shares:
        draw_strings(axes, *zip(*shares), "black", 6.5, zorder=3)
    axes.set(xlim=(-0.3, len(layers) - 0.5), ylim=(1.01 + (used - 1) * gap, -0.01), yticks=[])
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    part = "" if len(layers) == 1 else f" (ribbons: {100 * drawn / len(flow_LEE):.0f} % of the weight)"
    axes.set_xlabel("MoE layer" + part)
    axes.set_ylabel("share of the combine weights")
    axes.spines[:].set_visible(False)
    return axes.figure


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


# --- checks and scales


def _same_length(texts, values, what):
    if len(texts) != len(values):
        raise ValueError(f"{len(texts)} texts but {len(values)} {what}; give one for each token")


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
