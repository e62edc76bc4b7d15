"""How tokens go from layer to layer, and which experts work together."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.path import Path

from ..core.routing import by_expert
from . import style

MOST_EDGES, MOST_RIBBONS, LEAST_BAR = 60, 150, 0.01  # ribbons between two layers; a share of the combine weights


def plot_coactivation(strength_EE, *, chance, load_E=None, title: str = "") -> Figure:
    """Experts on a circle, joined where two are chosen together more often than by chance; wider is more often.

    `strength_EE` is what `metrics.coactivation` returns (of each pair the larger side counts, the diagonal does not);
    `chance`, (K-1)/(E-1) there, is a number or anything that broadcasts to (E, E). Discs grow with `load_E`. Of more
    than `MOST_EDGES` the strongest are drawn, and the title says so.
    Raises ValueError for a matrix that is not square.
    """
    experts = len(strength_EE)
    strength_EE = style.checked_matrix(strength_EE, (None, experts), f"{experts} experts")
    strength_EE = np.where(strength_EE > style.shaped_like(strength_EE, chance, "chance"), strength_EE, 0)
    strength_EE = np.triu(np.maximum(strength_EE, strength_EE.T), 1)
    edges = np.argwhere(strength_EE > 0)
    found = len(edges)
    edges = edges[np.argsort(strength_EE[strength_EE > 0], kind="stable")][-MOST_EDGES:]
    values = strength_EE[tuple(edges.T)]
    vmax = style.scale_end(values)
    angle_E = np.pi / 2 - 2 * np.pi * np.arange(experts) / experts
    place_E2 = np.stack([np.cos(angle_E), np.sin(angle_E)], -1)
    if len(edges) < found:
        title = f"{title} (strongest {len(edges)} of {found})".strip()
    figure, axes = style.new_axes(4.4, 4.4, margins=(0.1, 0.1, 0.75, 0.05), title=title)
    axes.set(xlim=(-1.12, 1.12), ylim=(-1.12, 1.12), xticks=[], yticks=[], xlabel="expert (number in the disc)")
    axes.spines[:].set_visible(False)

    def width(strength):
        return 0.3 + 6 * np.clip(strength / vmax, 0, 1) ** 2

    lines = dict(colors=style.COLOURS[0], alpha=0.7)
    axes.add_collection(LineCollection(place_E2[edges], linewidths=width(values), zorder=1, **lines))
    area = min(420, 6000 / experts)  # points squared
    areas = area if load_E is None else area * np.clip(np.asarray(load_E, dtype=float) * experts, 0.3, 2)
    colours = [style.expert_colour(e) for e in range(experts)]
    axes.scatter(*place_E2.T, s=areas, c=colours, edgecolors="0.2", linewidths=0.6, zorder=2)
    style.draw_strings(axes, map(str, range(experts)), place_E2, min(9, 300 / experts), on=colours)
    key = figure.add_axes((0.05, 0.02, 0.9, 0.075))
    key.set(xlim=(0, 3), ylim=(0, 1))
    key.axis("off")
    if found:
        samples = np.linspace(values.min(), vmax, 3)
        ends = [[(i + 0.1, 0.75), (i + 0.4, 0.75)] for i in range(3)]
        key.add_collection(LineCollection(ends, linewidths=width(samples), **lines))
        for i, sample in enumerate(samples):
            key.text(i + 0.45, 0.75, f"{sample:.2g}", va="center", fontsize=8)
    said = "share of an expert's tokens that the other one sees, too" if found else "no pair is above chance"
    key.text(1.5, 0.1, said, ha="center", va="center", fontsize=8)
    return figure


def layer_flows(expert_ids_LNK, weights_LNK, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """share_LE, flow_LEE: the tokens' weight at each expert, and how much goes from each one to each of the next layer.

    Each token's combine weights are divided by their sum: a layer's shares add up to 1. A token's flow from e to f is
    the product of its two weights (`flow_LEE` has one layer less). Raises ValueError where the shapes differ.
    """
    ids_LNK, weights_LNK = torch.as_tensor(expert_ids_LNK), torch.as_tensor(weights_LNK, dtype=torch.float64)
    shapes = tuple(ids_LNK.shape), tuple(weights_LNK.shape)
    if ids_LNK.dim() != 3 or shapes[0] != shapes[1] or not ids_LNK.numel():
        raise ValueError(f"expert ids {shapes[0]} and weights {shapes[1]}: give both as (layers, tokens, k)")
    shares_LNE = by_expert(weights_LNK / weights_LNK.sum(-1, keepdim=True), ids_LNK.long(), num_experts)
    flow_LEE = shares_LNE[:-1].mT @ shares_LNE[1:] / shares_LNE.shape[1]
    return shares_LNE.mean(1).numpy(), flow_LEE.numpy()


def plot_flow(expert_ids_LNK, weights_LNK, num_experts: int, layers: Sequence[int], *, title: str = "") -> Figure:
    """The way of a token (N = 1), or of a class of tokens, through the layers' experts, as a Sankey diagram.

    A bar is an expert, as high as its share of the combine weights (see `layer_flows`), its number in it; ribbons lead
    to the next layer's experts. Left out are bars below `LEAST_BAR` and, between two layers, all ribbons but the
    strongest `MOST_RIBBONS`; the axis says how much of the weight the drawn ones carry.
    Raises ValueError where the shapes do not fit.
    """
    share_LE, flow_LEE = layer_flows(expert_ids_LNK, weights_LNK, num_experts)
    if len(share_LE) != len(layers):
        raise ValueError(f"{len(share_LE)} layers of routing but {len(layers)} layer names; give one for each")
    used = max(int((share_E >= LEAST_BAR).sum()) for share_E in share_LE)
    gap, half = 0.022, 0.07  # between bars, in shares; half a bar's width, in layers
    height = min(max(2.2, 0.24 * used), 9)
    figure, axes = style.new_axes(1.3 * len(layers) + 0.6, height, margins=(0.45, 0.15, 0.5, 0.05), title=title)
    seen_LE = share_LE >= LEAST_BAR
    step_LE = seen_LE * (share_LE + gap)
    top_LE = step_LE.cumsum(1) - step_LE + (used - seen_LE.sum(1, keepdims=True)) * gap / 2
    ribbons, colours, drawn = [], [], 0.0
    codes = [Path.MOVETO] + [Path.CURVE4] * 3 + [Path.LINETO] + [Path.CURVE4] * 3 + [Path.CLOSEPOLY]
    for layer, flow_EE in enumerate(flow_LEE):
        leave_EE = top_LE[layer][:, None] + flow_EE.cumsum(1) - flow_EE
        arrive_EE = top_LE[layer + 1] + flow_EE.cumsum(0) - flow_EE
        seen_EE = np.where(np.outer(seen_LE[layer], seen_LE[layer + 1]), flow_EE, 0)
        strongest = np.argsort(-seen_EE, axis=None, kind="stable")[: min(MOST_RIBBONS, np.count_nonzero(seen_EE))]
        for e, f in zip(*np.unravel_index(strongest, seen_EE.shape)):
            a, b, thick = leave_EE[e, f], arrive_EE[e, f], flow_EE[e, f]
            left, middle, right = layer + half, layer + 0.5, layer + 1 - half
            upper = [(left, a), (middle, a), (middle, b), (right, b)]
            lower = [(right, b + thick), (middle, b + thick), (middle, a + thick), (left, a + thick), (left, a)]
            ribbons.append(Path(upper + lower, codes))
            colours.append(style.expert_colour(e))
            drawn += thick
    axes.add_collection(PathCollection(ribbons, facecolors=colours, edgecolors="none", alpha=0.5, zorder=1))
    bars = [(layer, e, top_LE[layer, e], share_LE[layer, e]) for layer, e in np.argwhere(seen_LE)]
    boxes = [(layer - half, y, 2 * half, share) for layer, _, y, share in bars]
    faces = [style.expert_colour(e) for _, e, _, _ in bars]
    style.draw_boxes(axes, boxes, facecolors=faces, edgecolors="0.2", linewidths=0.6, zorder=2)
    middles = [(layer, y + share / 2) for layer, _, y, share in bars]
    style.draw_strings(axes, [str(e) for _, e, _, _ in bars], middles, 7.5, on=faces)
    large = [(layer + half + 0.13, y + share / 2, share) for layer, _, y, share in bars if share * height > 0.2]
    style.draw_strings(axes, [f"{100 * share:.0f}%" for *_, share in large], [place[:2] for place in large], 6.5)
    axes.set(xlim=(-0.3, len(layers) - 0.5), ylim=(1.01 + (used - 1) * gap, -0.01), yticks=[])
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    part = "" if len(layers) == 1 else f" (ribbons: {100 * drawn / len(flow_LEE):.0f} % of the weight)"
    axes.set_xlabel("MoE layer" + part)
    axes.set_ylabel("share of the combine weights")
    axes.spines[:].set_visible(False)
    return figure
