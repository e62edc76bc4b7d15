"""Figures of the routing show the data that they were given, whatever the text."""

import itertools
import warnings

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")


import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb

from upcycling.routing import metrics
from upcycling.show.flow import layer_flows, plot_coactivation, plot_flow
from upcycling.show.over_training import plot_saturation, plot_specialisation
from upcycling.show.routing import (
    plot_expert_classes,
    plot_expert_matrix,
    plot_knockout,
    plot_layer_loads,
    plot_token_losses,
    plot_token_strip,
)
from upcycling.show.style import expert_colour, ink, png, printable

HOSTILE = [
    "</script><script>alert(1)</script>", "😀", "שלום", "مرحبا", "\x00", "a" * 10_000, "$\\frac{$", "$é_{$", "\u202e",
    "e\u0301", "中文", "\ud800", "\u2028", " ", "", "\n", "%s {0}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_warnings_and_closed_figures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def runs(axes):
    """The artists of `draw_strings`, in the order in which they were drawn."""
    return [artist for artist in axes.collections if hasattr(artist, "strings")]


def words(axes):
    return {text for run in runs(axes) for text in run.strings} | {text.get_text() for text in axes.texts}


def frames(axes):
    """(expert, row) of the framed cells."""
    framed = [c for c in axes.collections if c.get_linewidth()[0] == 2 and to_hex(c.get_edgecolor()[0]) == "#000000"]
    boxes = [path.get_extents() for c in framed for path in c.get_paths()]
    return {(round((b.x0 + b.x1) / 2), round((b.y0 + b.y1) / 2)) for b in boxes}


def bar_lines(figure):
    """Where the colour bar is marked."""
    return [line.get_ydata()[0] for line in figure.axes[1].lines if list(line.get_xdata()) == [0, 1]]


# --- colours and text


def test_experts_of_a_usual_layer_have_different_colours_and_readable_ink():
    colours = [expert_colour(e) for e in range(24)]
    assert len(set(colours)) == 24
    for colour in colours:
        channels = np.array(to_rgb(colour))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminance = linear @ (0.2126, 0.7152, 0.0722)
        contrast = (luminance + 0.05) / 0.05 if ink(colour) == "black" else 1.05 / (luminance + 0.05)
        assert contrast >= 4.5, f"{ink(colour)} on {colour}"
        assert ink(channels) == ink(colour)


@pytest.mark.parametrize(
    "text, shown",
    [
        (" time", " time"),
        ("a\nb\tc\r", "a↵b⇥c↤"),
        ("\x00", "\\u{0}"),
        ("😀", "\\u{1F600}"),
        ("\u202e", "\\u{202E}"),
        ("  ", "␣␣"),
        ("", "∅"),
        ("x" * 30, "x" * 23 + "…"),
        ("😀" * 5, "\\u{1F600}\\u{1F600}\\u{1F…"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_hostile_text_draws_without_a_warning_everywhere():
    count = len(HOSTILE)
    title = "$\\frac{$" + "".join(HOSTILE)
    figures = [
        plot_token_strip(HOSTILE, np.arange(count), title=title),
        plot_token_losses(HOSTILE, np.linspace(-1, 1, count), title=title),
        plot_expert_matrix(np.full((count, 4), 0.2), HOSTILE, kind=HOSTILE[0], quantity="$_", title=title),
        plot_knockout(np.zeros((4, count)), HOSTILE, title=title),
        plot_layer_loads(np.full((1, 4), 0.25), [0], title=title),
        plot_coactivation(np.ones((3, 3)), chance=0, quantity=HOSTILE[6], title=title),
        plot_flow([[[0]]], [[[1.0]]], 2, [0], title=title),
        plot_saturation({name: [(0, 0.5), (1, 1)] for name in HOSTILE}, title=title),
        plot_specialisation({name: [(0, 0.5), (1, 1)] for name in HOSTILE}, y_label="$x$ 😀", title=title),
    ]
    for figure in figures:
        assert png(figure).startswith(b"\x89PNG")
    assert not plt.get_fignums(), "png closes the figure"


def test_png_is_the_same_for_the_same_figure():
    draw = [png(plot_token_strip(["a", "b"], [0, 1])) for _ in range(2)]
    assert draw[0] == draw[1]


# --- strips


def test_token_strip():
    figure = plot_token_strip(
        ["Once", " upon", "\n", "a"], [[3, 9], [1, 0], [3, 1], [2, 3]], followed=1, title="layer 0"
    )
    (axes,) = figure.axes
    assert {"Once", " upon", "↵", "a", "3 9", "1 0", "3 1", "2 3"} == words(axes)
    boxes = next(c for c in axes.collections if not hasattr(c, "strings"))
    assert [to_hex(c) for c in boxes.get_facecolor()] == [expert_colour(e) for e in (3, 1, 3, 2)]
    assert [width == max(boxes.get_linewidth()) for width in boxes.get_linewidth()] == [False, True, False, False]
    places = [path.get_extents() for path in boxes.get_paths()]
    assert places[0].x1 < places[1].x0 < places[2].x0 and places[0].y0 == places[1].y0 == places[2].y0
    assert places[3].y0 > places[2].y1 and places[3].x0 == 0, "a line break starts a line"
    for run in runs(axes):
        for colour, (x, y) in zip(run.get_facecolor(), run.get_offsets(), strict=True):
            inside = [i for i, box in enumerate(places) if box.x0 < x < box.x1 and box.y0 < y < box.y1]
            assert len(inside) == 1, "each text lies in one box"
            assert to_hex(colour) == to_hex(ink(to_hex(boxes.get_facecolor()[inside[0]])))
    assert axes.get_title(loc="left") == "layer 0"
    assert "experts, best first" in axes.get_xlabel()


def test_token_strip_wraps_and_says_what_it_left_out():
    figure = plot_token_strip(["token"] * 50, np.zeros(50, int), columns=20, max_tokens=12, title="long")
    (axes,) = figure.axes
    boxes = axes.collections[0].get_paths()
    assert len(boxes) == 12
    assert max(path.get_extents().x1 for path in boxes) <= 20
    assert len({path.get_extents().y0 for path in boxes}) == 4
    assert axes.get_title(loc="left") == "long (first 12 of 50 tokens)"
    assert "its expert" in axes.get_xlabel()


def test_strips_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="2 texts but 3 rows of experts"):
        plot_token_strip(["a", "b"], [1, 2, 3])
    with pytest.raises(ValueError, match="1 texts but 2 changes"):
        plot_token_losses(["a"], [0.1, 0.2])


def test_strip_of_nothing():
    assert words(plot_token_strip([], np.zeros((0, 2), int)).axes[0]) == set()


def test_token_losses():
    (axes,) = plot_token_losses(["a", "b", "c", "d"], [np.nan, 0.5, -0.25, 0.001]).axes
    assert {"–", "+0.50", "-0.25", "0"} <= words(axes)
    none, worse, better, same = axes.collections[0].get_facecolor()[:, :3]
    assert np.ptp(none) < 0.01, "grey"
    assert worse[0] > worse[2] + 0.2 and better[2] > better[0] + 0.1, "red costs, blue gains"
    assert min(same) > 0.95, "white is no change"
    assert "nats" in axes.get_xlabel() and "+0.5" in axes.get_xlabel()
    fixed = plot_token_losses(["a"], [0.5], limit=5).axes[0].collections[0].get_facecolor()[0]
    assert min(fixed[:3]) > min(worse), "limit fixes the scale"


# --- matrices

SHARE = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])


def test_expert_matrix():
    figure = plot_expert_matrix(SHARE, ["code", "stories"], null=0.25, spread=0.05, vmax=0.6, title="layer 1")
    axes, bar = figure.axes
    image = axes.images[0]
    assert np.allclose(image.get_array(), SHARE)
    assert image.get_clim() == (0, 0.6)
    cells, numbers = runs(axes)
    assert cells.strings == ("50", "30", "20", "0", "10", "20", "30", "40")
    assert cells.get_offsets().tolist() == [[e, r] for r in range(2) for e in range(4)]
    assert numbers.strings == ("0", "1", "2", "3")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["code", "stories"]
    assert axes.get_ylabel() == "domain" and axes.get_xlabel().startswith("expert")
    assert frames(axes) == {(0, 0)}, "only 0.5 is more than three spreads above 0.25"
    assert "three spreads" in axes.get_xlabel()
    assert "(%)" in bar.get_ylabel()
    assert bar_lines(figure) == [0.25] and bar.texts[0].get_text() == "chance"


def test_expert_matrix_takes_the_metric_and_its_baseline():
    labels_N = torch.arange(600) % 3
    ids_NK = torch.stack([labels_N, 3 + torch.randint(0, 3, (600,), generator=torch.Generator().manual_seed(0))], 1)

    def statistic(ids, labels):
        return metrics.domain_specialization(ids, labels, 6)

    null = metrics.shuffled_baseline(statistic, ids_NK, labels_N)
    share_CE = statistic(ids_NK, labels_N)
    figure = plot_expert_matrix(share_CE, ["a", "b", "c"], null=null.mean, spread=null.standard_deviation)
    assert frames(figure.axes[0]) == {(0, 0), (1, 1), (2, 2)}
    assert bar_lines(figure) == [], "a null that differs from cell to cell is no line"


def test_class_matrix_names_its_axis():
    axes, bar = plot_expert_classes(SHARE, ["digits", "names"]).axes
    assert axes.get_ylabel() == "token class" and "class" in bar.get_ylabel()
    assert frames(axes) == set()


def test_cells_are_written_in_ink_that_can_be_read():
    axes = plot_expert_matrix(SHARE, ["code", "stories"]).axes[0]
    cells = runs(axes)[0]
    assert to_hex(cells.get_facecolor()[0]) == "#ffffff", "the darkest cell"
    assert to_hex(cells.get_facecolor()[3]) == "#000000", "the lightest"


def test_many_experts_keep_within_the_page_and_their_numbers_apart():
    for experts in (16, 64, 256):
        figure = plot_expert_matrix(np.full((5, experts), 1 / experts), list("abcde"))
        figure.draw_without_rendering()
        axes = figure.axes[0]
        assert figure.get_figwidth() < 17
        numbers = runs(axes)[-1]
        wide = max(path.get_extents().width for path in numbers.get_paths())  # inches
        cell = axes.get_position().width * figure.get_figwidth() / experts
        step = int(numbers.strings[1])
        assert wide < step * cell * 1.05, f"the numbers of {experts} experts overlap"


def test_knockout():
    cost_EC = np.array([[0.8, 0.01], [-0.2, 0.0], [np.nan, 0.05]])
    axes, bar = plot_knockout(cost_EC, ["code", "stories"], experts=[3, 5, 7], noise=0.1).axes
    image = axes.images[0]
    assert np.allclose(np.ma.filled(image.get_array(), np.nan), cost_EC.T, equal_nan=True)
    assert image.get_clim() == (-0.8, 0.8), "centred at 0"
    cells, numbers = runs(axes)
    assert cells.strings == ("+0.80", "-0.20", "–", "+0.01", "0", "+0.05")
    assert numbers.strings == ("3", "5", "7")
    assert frames(axes) == {(0, 0), (1, 0)}, "beyond the noise, either way"
    red, _, blue, _ = image.to_rgba(image.get_array())[0, 0]
    assert red > blue, "costs are red"
    assert "nats" in bar.get_ylabel() and axes.get_ylabel() == "domain" and "removed" in axes.get_xlabel()
    assert plot_knockout(cost_EC, ["a", "b"], limit=2).axes[0].images[0].get_clim() == (-2, 2)


def test_there_is_no_figure_of_nothing():
    empty = np.zeros((0, 0))
    for draw in (
        lambda: plot_expert_matrix(empty, []),
        lambda: plot_expert_matrix(np.zeros((2, 0)), ["a", "b"]),
        lambda: plot_knockout(empty, []),
        lambda: plot_layer_loads(empty, []),
        lambda: plot_coactivation(empty, chance=0.5),
        lambda: plot_saturation({}),
        lambda: plot_specialisation({"layer 0": []}),
    ):
        with pytest.raises(ValueError, match="give "):
            draw()


def test_matrices_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 4\) but there are 3 domain names; give \(3, experts\)"):
        plot_expert_matrix(SHARE, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no null"):
        plot_expert_matrix(SHARE, ["a", "b"], spread=0.1)
    with pytest.raises(ValueError, match="null has shape"):
        plot_expert_matrix(SHARE, ["a", "b"], null=[0.1, 0.2, 0.3], spread=0.1)
    with pytest.raises(ValueError, match="1 domain names"):
        plot_knockout(SHARE.T, ["a"])
    with pytest.raises(ValueError, match="2 expert numbers but 4 rows"):
        plot_knockout(SHARE.T, ["a", "b"], experts=[0, 1])
    with pytest.raises(ValueError, match="3 layers"):
        plot_layer_loads(np.ones((2, 4)), [0, 1, 2])


def test_layer_loads_show_the_collapse_that_the_mean_hides():
    load_LE = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    figure = plot_layer_loads(load_LE, [2, 5], alarm=[5])
    axes = figure.axes[0]
    assert np.allclose(axes.images[0].get_array(), [[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 2, 2]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["all layers", "layer 2", "⚠ layer 5"]
    assert runs(axes)[0].strings == tuple(["1.0", "1.0", "1.0", "1.0", "2.0", "2.0", "×", "×", "×", "×", "2.0", "2.0"])
    assert bar_lines(figure) == [1]
    assert plot_layer_loads(load_LE, [2, 5], vmax=4).axes[0].images[0].get_clim() == (0, 4)


# --- paths


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


def test_coactivation_draws_what_is_above_chance():
    share_EE = np.array([[1, 0.6, 0.1, 0.2], [0.3, 1, 0.2, 0.1], [0.1, 0.4, 1, 0.1], [np.nan] * 4])
    figure = plot_coactivation(share_EE, chance=1 / 3)
    edges = edges_of(figure)
    assert set(edges) == {(0, 1), (1, 2)}, "either direction counts; the diagonal and dead experts do not"
    assert edges[0, 1] > edges[1, 2]
    assert {"0", "1", "2", "3"} <= words(figure.axes[0])
    key = [text.get_text() for text in figure.axes[1].texts]
    assert key[:3] == ["0.4", "0.5", "0.6"] and "share" in key[3]
    few = plot_coactivation(share_EE, chance=1 / 3, max_edges=1, title="layer 0")
    assert set(edges_of(few)) == {(0, 1)}
    assert few.axes[0].get_title(loc="left") == "layer 0 (strongest 1 of 2)"
    assert max(edges_of(plot_coactivation(share_EE, chance=1 / 3, vmax=1.2)).values()) < edges[0, 1]


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


def test_flow():
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
    strongest = plot_flow(IDS, WEIGHTS, 3, [4, 7], max_ribbons=1).axes[0]
    assert len(strongest.collections[0].get_paths()) == 1 and "50 % of the weight" in strongest.get_xlabel()
    with pytest.raises(ValueError, match="2 layers of routing but 1"):
        plot_flow(IDS, WEIGHTS, 3, [4])


def test_flow_of_one_token_has_its_weights():
    (axes,) = plot_flow(IDS[:, :1], WEIGHTS[:, :1], 3, [0, 1]).axes
    assert np.allclose([path.get_extents().height for path in axes.collections[1].get_paths()], [0.75, 0.25, 1])


# --- over training


def test_saturation():
    curves = {"layer 0": [(0, 0.1), (10, 0.9)], "layer 1": [(0, 0.1), (10, 0.5)]}
    axes = plot_saturation(curves, chance=0.125, now=5).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert {name: list(zip(*lines[name].get_data())) for name in curves} == curves
    assert lines["layer 0"].get_linestyle() != lines["layer 1"].get_linestyle()
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert places["chance"] < places["layer 1"] < places["layer 0"], "each name at the end of its line"
    assert [0.125, 0.125] in [list(line.get_ydata()) for line in axes.lines]
    assert [5, 5] in [list(line.get_xdata()) for line in axes.lines]
    assert axes.get_ylim()[0] == 0 and axes.get_xlabel() == "optimizer updates" and "experts" in axes.get_ylabel()


def test_specialisation():
    curves = {f"layer {i}": [(0, 0.0), (10, 0.3)] for i in range(24)}
    axes = plot_specialisation(curves, null=0.02, spread=0.01, y_max=0.5, title="playback").axes[0]
    assert axes.get_ylim() == (0, 0.5)
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert np.allclose((band.y0, band.y1), (-0.01, 0.05))
    places = sorted(text.get_position()[1] for text in axes.texts)
    assert len(places) == 25 and min(np.diff(places)) > 0.035 and places[-1] < 1.001, "names do not touch"
    assert len({to_hex(line.get_color()) for line in axes.lines if line.get_label() in curves}) == 24
    assert "bits" in axes.get_ylabel()
