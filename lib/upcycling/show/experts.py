"""Figures of which an expert is a column: loads, shares, costs of knock-outs, choices.

Experts are told apart by their number; each cell's value is written into it, colour only helps the eye.

Shapes: N tokens, E experts, K experts per token, L MoE layers, C columns (domains, token classes), R rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..core.routing import Routing, by_expert
from . import style


def plot_load(loads_by_layer: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """Share of the routed rows that each expert received, one row of bars for each name; the dashed line is even."""
    count = len(loads_by_layer)
    figure, panels = style.row_of_axes(count, (2.6 * count + 0.8, 2.6), title=title, sharey=True)
    for axes, (name, load_E) in zip(panels, loads_by_layer.items()):
        axes.bar(range(len(load_E)), [float(value) for value in load_E], color=style.COLOURS[0])
        axes.axhline(1 / len(load_E), color=style.COLOURS[1], linestyle="--", linewidth=1.2)
        axes.set(title=name, xlabel="expert", ylim=(0, None))
    panels[0].set_ylabel("share of routed rows")
    return figure


def plot_expert_matrix(
    share_CE,
    names: Sequence[str],
    *,
    null: float | None = None,
    kind: str = "domain",
    quantity: str = "share of the domain's tokens",
    vmax: float | None = None,
    title: str = "",
) -> Figure:
    """Domains (or another `kind` of row, with these names) x experts: a share in each cell, drawn and written in %.

    `share_CE` is what `metrics.domain_specialization` returns. `null` is what chance gives, marked on the colour bar;
    `vmax` fixes the end of the colour scale (a share). Raises ValueError where the shapes do not fit.
    """
    share_CE = style.checked_matrix(share_CE, (len(names), None), f"{len(names)} {kind} names")
    chance = {} if null is None else {"chance": null}
    return heat_map(share_CE, names, quantity, "expert", kind, title=title, scale=(0, vmax), marks=chance)


def plot_expert_classes(
    share_CE, classes: Sequence[str], *, quantity: str = "share of the class's tokens", **options: Any
) -> Figure:
    """Token classes (digits, punctuation, names, ...) x experts: `plot_expert_matrix`, whose options it takes."""
    return plot_expert_matrix(share_CE, classes, kind="token class", quantity=quantity, **options)


def plot_knockout(
    cost_EC, domains: Sequence[str], *, noise=None, limit: float | None = None, title: str = ""
) -> Figure:
    """Domains x experts: the loss (nats per token) that removing the expert costs the domain; red costs, blue gains.

    `cost_EC` is one layer of a `KnockoutTable`. With `noise` (nats; a number, or anything that broadcasts to (E, C))
    the cells beyond it on either side are framed.
    `limit` fixes the ends of the colour scale, else the largest cost is the end. Not-a-number (not measured) is grey.
    Raises ValueError where the shapes do not fit.
    """
    cost_EC = style.checked_matrix(cost_EC, (None, len(domains)), f"{len(domains)} domain names")
    framed_CE = None if noise is None else (np.abs(cost_EC) > style.shaped_like(cost_EC, noise, "noise")).T
    limit = style.scale_end(np.abs(cost_EC)) if limit is None else limit
    x_label = "expert removed" + ("" if noise is None else " (framed: beyond the noise)")
    look = {"scale": (-limit, limit), "cmap": style.DIFFERENCE, "framed_RE": framed_CE}
    quantity = "change of loss (nats per token)"
    return heat_map(cost_EC.T, domains, quantity, x_label, "domain", title=title, write=style.signed, **look)


def plot_layer_loads(
    load_LE, layers: Sequence[int], *, alarm: Sequence[int] = (), vmax: float | None = None, title: str = ""
) -> Figure:
    """Layers x experts: each expert's load in units of the even share (1 is even), the mean over the layers on top.

    `load_LE` are fractions of the layer's routed rows. A dead expert is marked ×. The layers in `alarm` get a warning
    sign: the mean may look balanced while one of them has collapsed. Raises ValueError where the shapes do not fit.
    """
    load_LE = style.checked_matrix(load_LE, (len(layers), None), f"{len(layers)} layers")
    times_even = np.vstack([load_LE.mean(0), load_LE]) * load_LE.shape[1]
    rows = ["all layers"] + [f"{'⚠ ' if layer in alarm else ''}layer {layer}" for layer in layers]
    scale = (0, max(2.0, style.scale_end(times_even)) if vmax is None else vmax)
    look = {"scale": scale, "write": lambda times: f"{times:.1f}" if times else "×", "marks": {"even": 1}}
    figure = heat_map(times_even, rows, "load / even share", "expert", title=title, **look)
    figure.axes[0].axhline(0.5, color="black", linewidth=1.5)
    return figure


def weights_by_expert(routing: Routing) -> Tensor:
    """weights_NE: each expert's combine weight for each token; 0 where it is not used."""
    weights_NK = routing.weights_NK.detach()
    if routing.kept_NK is not None:
        weights_NK = weights_NK * routing.kept_NK
    return by_expert(weights_NK, routing.expert_ids_NK, routing.probabilities_NE.shape[-1])


def plot_choices(routings: Mapping[str, Routing], title: str = "") -> Figure:
    """One panel for each routing of a few tokens: its combine weights, and a cross where a full expert dropped one."""
    columns = 4
    rows = -(-len(routings) // columns)
    figure, panels = style.row_of_axes(columns, (2.1 * columns, 2.5 * rows), title=title, rows=rows)
    for axes in panels[len(routings) :]:
        axes.remove()
    for index, (axes, (name, routing)) in enumerate(zip(panels, routings.items())):
        weights_NE = weights_by_expert(routing).numpy()
        _draw_cells(axes, weights_NE, lambda weight: f"{weight:.2f}" if weight else "", "Blues", (0, 1.3), 7.5)
        if routing.wanted_NK is not None:
            tokens_R, places_R = torch.where(routing.wanted_NK & ~routing.kept_NK)
            dropped_R2 = torch.stack([routing.expert_ids_NK[tokens_R, places_R], tokens_R], 1)
            style.draw_strings(axes, "×" * len(tokens_R), dropped_R2, 16, colour=style.COLOURS[1])
        axes.set_xticks(range(weights_NE.shape[1]))
        axes.set_yticks(range(weights_NE.shape[0]))
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("" if index % columns else "token")
        axes.set_xlabel("" if index + columns < len(routings) else "expert")
    return figure


def heat_map(
    values_RE: np.ndarray, rows: Sequence[str], quantity: str, x_label: str, y_label: str = "", *, title: str = "",
    scale: tuple[float, float | None] = (0, None), write: Callable[[float], str] | None = None,
    cmap: str = style.MEASURE, framed_RE: np.ndarray | None = None, marks: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Rows x experts as colours, each value written into its cell; a colour bar with `marks`, values by name.

    Without `write` the values are shares, in %.
    """
    scale = (scale[0], style.scale_end(values_RE) if scale[1] is None else scale[1])
    in_cell = write or (lambda share: f"{100 * share:.0f}")
    count, experts = values_RE.shape
    cell = min(0.5, max(8 / experts, min(0.2, 14 / experts)))  # inches
    narrow = cell < 0.35  # then the number stands upright, turned by a quarter
    names = [style.label_text(name, 24) for name in rows]
    margins = (0.5 + 0.08 * max(map(len, names), default=0), 1.3, 0.5, 0.1)
    figure, axes = style.new_axes(
        max(cell * experts, 3), (0.42 if narrow else 0.32) * count, margins=margins, title=title
    )
    image = _draw_cells(axes, values_RE, in_cell, cmap, scale, 6.5 if cell > 0.16 else 0, turned=narrow)
    shown = range(0, experts, 1 + int(0.16 / cell))  # of hundreds of experts, not each number finds room
    style.draw_strings(axes, map(str, shown), [(e, 0) for e in shown], 6 if narrow else 7, below=True)
    axes.set(xticks=[], xlabel=x_label, ylabel=style.label_text(y_label))
    axes.xaxis.labelpad = 18
    axes.set_yticks(range(count), names, fontsize=9)
    axes.tick_params(length=0)
    if framed_RE is not None:
        frames = [(e - 0.46, r - 0.46, 0.92, 0.92) for r, e in np.argwhere(framed_RE)]
        for colour, width in (("white", 4), ("black", 2)):  # seen on light and dark cells
            style.draw_boxes(axes, frames, facecolors="none", edgecolors=colour, linewidths=width)
    box, wide = axes.get_position(), figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.5 / wide, box.y0, 0.13 / wide, box.height))
    figure.colorbar(image, cax=bar)
    bar.set_ylabel(style.label_text(quantity if write else f"{quantity} (%)"), fontsize=8)
    bar.tick_params(labelsize=8)
    if write is None:
        bar.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}")
    for word, value in (marks or {}).items():
        bar.axhline(value, color=style.COLOURS[1], linewidth=2)
        look = {"ha": "right", "va": "center", "fontsize": 7, "color": style.COLOURS[1]}
        style.note(bar, word, (0, value), (-2, 0), ("axes fraction", "data"), **look)
    return figure


def _draw_cells(
    axes: Axes, values_RE: np.ndarray, write: Callable[[float], str], cmap: str, scale: tuple[float, float],
    size: float, *, turned: bool = False,
) -> Any:  # fmt: skip
    """Rows x experts as colours, each cell with its value written into it, not-a-number as grey and –; the image."""
    image = axes.imshow(
        np.ma.masked_invalid(values_RE), matplotlib.colormaps[cmap].with_extremes(bad="0.85"), vmin=scale[0],
        vmax=scale[1], aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.spines[:].set_visible(True)
    if size:
        places = [(e, r) for r, e in np.ndindex(values_RE.shape)]
        written = [write(value) if np.isfinite(value) else "–" for value in values_RE.flat]
        faces = image.to_rgba(image.get_array()).reshape(-1, 4)
        style.draw_strings(axes, written, places, size, on=faces, turned=turned)
    return image
