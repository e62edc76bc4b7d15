"""Text in figures: colours and ink, characters that no font shows, strips of tokens, whatever the text."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from seen import runs, words

from upcycling.show import (
    plot_coactivation,
    plot_expert_matrix,
    plot_flow,
    plot_knockout,
    plot_layer_loads,
    plot_losses,
    plot_saturation,
    plot_specialisation,
    plot_token_losses,
    plot_token_strip,
    strips,
)
from upcycling.show.style import expert_colour, ink, png, printable

pytestmark = pytest.mark.filterwarnings("error")  # a glyph that the font lacks would be one

HOSTILE = [
    "</script><script>alert(1)</script>", "😀", "שלום", "مرحبا", "\x00", "a" * 10_000, "$\\frac{$", "$é_{$", "\u202e",
    "e\u0301", "中文", "\ud800", "\u2028", " ", "", "\n", "%s {0}",
]  # fmt: skip


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
        plot_coactivation(np.ones((3, 3)), chance=0, title=title),
        plot_flow([[[0]]], [[[1.0]]], 2, [0], title=title),
        plot_losses({name: [(0, 0.5), (1, 1)] for name in HOSTILE}),
        plot_saturation({name: [(0, 0.5), (1, 1)] for name in HOSTILE}, title=title),
        plot_specialisation({name: [(0, 0.5), (1, 1)] for name in HOSTILE}, y_label="$x$ 😀", title=title),
    ]
    for figure in figures:
        assert png(figure).startswith(b"\x89PNG")
    assert not plt.get_fignums(), "png closes the figure"


def test_png_is_the_same_for_the_same_figure():
    draw = [png(plot_token_strip(["a", "b"], [0, 1])) for _ in range(2)]
    assert draw[0] == draw[1]


def test_token_strip():
    figure = plot_token_strip(
        ["Once", " upon", "\n", "a"], [[3, 9], [1, 0], [3, 1], [2, 3]], followed=1, title="layer 0"
    )
    (axes,) = figure.axes
    assert {"Once", " upon", "↵", "a", "3 9", "1 0", "3 1", "2 3"} == words(axes)
    boxes = next(c for c in axes.collections if not hasattr(c, "strings"))
    assert [to_hex(c) for c in boxes.get_facecolor()] == [expert_colour(e) for e in (3, 1, 3, 2)]
    assert [to_hex(edge) == "#000000" for edge in boxes.get_edgecolor()] == [False, True, False, False], "framed"
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


def test_token_strip_wraps_and_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(strips, "COLUMNS", 20)
    monkeypatch.setattr(strips, "MOST_TOKENS", 12)
    figure = plot_token_strip(["token"] * 50, np.zeros(50, int), title="long")
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
