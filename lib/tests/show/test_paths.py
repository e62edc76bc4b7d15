"""Figures of ways through the layers show the data that they were given."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from seen import runs, words

from upcycling.show import paths, plot_coactivation, plot_flow
from upcycling.show.paths import layer_flows
from upcycling.show.style import expert_colour

pytestmark = pytest.mark.filterwarnings("error")


def edges_of(figure):
    axes = figure.axes[0]
    lines = axes.collections[0]
    places = axes.collections[1].get_offsets()

    def node(point):
        return int(np.linalg.norm(places - point, axis=1).argmin())

    return {
        tuple(sorted(map(node, segment))): width
        for segment, width in zip(lines.get_segments(), lines.get_linewidth(), strict=True)
    }


def test_coactivation_draws_what_is_above_chance(monkeypatch):
    share_EE = np.array([[1, 0.6, 0.1, 0.2], [0.3, 1, 0.2, 0.1], [0.1, 0.4, 1, 0.1], [np.nan] * 4])
    figure = plot_coactivation(share_EE, chance=1 / 3)
    edges = edges_of(figure)
    assert set(edges) == {(0, 1), (1, 2)}, "either direction counts; the diagonal and dead experts do not"
    assert edges[0, 1] > edges[1, 2]
    assert {"0", "1", "2", "3"} <= words(figure.axes[0])
    key = [text.get_text() for text in figure.axes[1].texts]
    assert key[:3] == ["0.4", "0.5", "0.6"] and "share" in key[3]
    monkeypatch.setattr(paths, "MOST_EDGES", 1)
    few = plot_coactivation(share_EE, chance=1 / 3, title="layer 0")
    assert set(edges_of(few)) == {(0, 1)}
    assert few.axes[0].get_title(loc="left") == "layer 0 (strongest 1 of 2)"


def test_coactivation_without_an_edge_and_of_the_wrong_shape():
    figure = plot_coactivation(np.zeros((3, 3)), chance=0.5)
    assert edges_of(figure) == {} and "no pair is above chance" in figure.axes[1].texts[-1].get_text()
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plot_coactivation(np.zeros((2, 3)), chance=0.5)
    sizes = plot_coactivation(np.zeros((3, 3)), chance=0.5, load_E=[0.6, 0.4, 0]).axes[0].collections[1].get_sizes()
    assert sizes[0] > sizes[1] > sizes[2] > 0


IDS = np.array([[[0, 1], [0, 2]], [[1, 2], [1, 0]]])  # 2 layers, 2 tokens
WEIGHTS = np.array([[[0.75, 0.25], [0.2, 0.2]], [[1.0, 0.0], [0.5, 0.5]]])


def test_layer_flows():
    share_LE, flow_LEE = layer_flows(IDS, WEIGHTS, 3)
    assert np.allclose(share_LE, [[0.625, 0.125, 0.25], [0.25, 0.75, 0]]), "weights are divided by their sum"
    assert np.allclose(flow_LEE[0].sum(1), share_LE[0]) and np.allclose(flow_LEE[0].sum(0), share_LE[1])
    assert np.isclose(flow_LEE[0, 0, 1], (0.75 * 1 + 0.5 * 0.5) / 2)
    with pytest.raises(ValueError, match="layers, tokens, k"):
        layer_flows(IDS, WEIGHTS[:1], 3)


def test_flow(monkeypatch):
    figure = plot_flow(torch.as_tensor(IDS), torch.as_tensor(WEIGHTS), 3, [4, 7], title="digits")
    (axes,) = figure.axes
    ribbons, bars = axes.collections[:2]
    boxes = [path.get_extents() for path in bars.get_paths()]
    assert np.allclose([box.height for box in boxes], [0.625, 0.125, 0.25, 0.25, 0.75])
    assert [to_hex(c) for c in bars.get_facecolor()] == [expert_colour(e) for e in (0, 1, 2, 0, 1)]
    assert runs(axes)[0].strings == ("0", "1", "2", "0", "1")
    assert {"62%", "75%"} <= words(axes)
    _, flow_LEE = layer_flows(IDS, WEIGHTS, 3)
    thick = [path.vertices[-2, 1] - path.vertices[0, 1] for path in ribbons.get_paths()]
    assert np.allclose(thick, sorted(flow_LEE[flow_LEE > 0], reverse=True))
    for side, ends in enumerate([(0, -2), (3, 4)]):  # the vertices at a ribbon's left and right end
        filled = np.zeros(5)
        spans = sorted((path.vertices[ends[0], 1], path.vertices[ends[1], 1]) for path in ribbons.get_paths())
        assert all(high <= low + 1e-9 for (_, high), (low, _) in itertools.pairwise(spans)), "ribbons lie side by side"
        for low, high in spans:
            at = [i for i, b in enumerate(boxes) if b.y0 - 1e-9 <= low and high <= b.y1 + 1e-9 and round(b.x0) == side]
            filled[at] += high - low
        assert np.allclose(filled, [0, 0, 0, 0.25, 0.75] if side else [0.625, 0.125, 0.25, 0, 0])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "7"]
    assert "100 % of the weight" in axes.get_xlabel() and "combine weights" in axes.get_ylabel()
    monkeypatch.setattr(paths, "MOST_RIBBONS", 1)
    strongest = plot_flow(IDS, WEIGHTS, 3, [4, 7]).axes[0]
    assert len(strongest.collections[0].get_paths()) == 1 and "50 % of the weight" in strongest.get_xlabel()
    with pytest.raises(ValueError, match="2 layers of routing but 1"):
        plot_flow(IDS, WEIGHTS, 3, [4])


def test_flow_of_one_token_has_its_weights():
    (axes,) = plot_flow(IDS[:, :1], WEIGHTS[:, :1], 3, [0, 1]).axes
    assert np.allclose([path.get_extents().height for path in axes.collections[1].get_paths()], [0.75, 0.25, 1])
