"""Figures show the data that they were given."""

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba

from upcycling.show.training import COLOURS, history_curve, plot_arms, plot_comparison, plot_load, plot_losses

CURVES = {"dense": [(0, 3.0), (10, 2.0)], "MoE": [(10, 2.0), (20, 1.5)], "control": [(10, 2.0), (20, 1.8)]}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_losses():
    axes = plot_losses(CURVES, floor=0.567, boundary=10, title="Losses").axes[0]
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert {name: drawn[name] for name in CURVES} == CURVES
    curves = [line for line in axes.lines if line.get_label() in CURVES]
    assert len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)
    assert any("entropy floor 0.57" in text for text in texts(axes))
    assert "upcycled here" in texts(axes)
    horizontal = [list(line.get_ydata()) for line in axes.lines if line.get_label() not in CURVES]
    assert [0.567, 0.567] in horizontal
    vertical = [list(line.get_xdata()) for line in axes.lines if line.get_label() not in CURVES]
    assert [10, 10] in vertical
    assert axes.get_title() == "Losses"
    assert "nats per token" in axes.get_ylabel()
    assert "updates" in axes.get_xlabel()


def test_losses_without_extras():
    axes = plot_losses({"dense": CURVES["dense"]}, log_y=True, x_label="seconds").axes[0]
    assert axes.get_legend() is None, "one curve needs no legend"
    assert texts(axes) == []
    assert len(axes.lines) == 1
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "seconds"


def test_history_curve():
    history = [
        {"step": 0, "val_loss": 3.0, "loss": None},
        {"step": 5, "val_loss": None, "loss": 2.5},
        {"step": 9, "val_loss": 0.0},
    ]
    assert history_curve(history) == [(0, 3.0), (9, 0.0)]
    assert history_curve(history, start=100) == [(100, 3.0), (109, 0.0)]
    assert history_curve(history, value="loss") == [(5, 2.5)]


def test_arms():
    rows = [
        dict(arm=arm, budget=budget, seed=seed, val_loss=loss + seed / 10)
        for arm, budget, loss in (
            ("dense control", "tokens", 2.0),
            ("upcycled MoE", "tokens", 1.0),
            ("upcycled MoE", "FLOPs", 1.5),
        )
        for seed in (0, 1)
    ]
    figure = plot_arms(rows, title="Arms")
    tokens, flops = figure.axes
    assert (tokens.get_title(), flops.get_title()) == ("equal tokens", "equal FLOPs")
    assert "nats per token" in tokens.get_ylabel()
    dots = [scatter for scatter in tokens.collections if len(scatter.get_offsets()) == 2]
    assert [scatter.get_offsets()[:, 1].tolist() for scatter in dots] == [[2.0, 2.1], [1.0, 1.1]]
    bars = [c.get_segments()[0][0][1] for c in tokens.collections if hasattr(c, "get_segments")]
    assert bars == pytest.approx([2.05, 1.05])
    assert [label.get_text().replace("\n", " ") for label in tokens.get_xticklabels()] == [
        "dense control",
        "upcycled MoE",
    ]
    only = [scatter for scatter in flops.collections if not hasattr(scatter, "get_segments")]
    assert len(only) == 1, "an arm without rows at a budget leaves its place empty"
    assert tuple(only[0].get_facecolor()[0][:3]) == to_rgba(COLOURS[1])[:3], "and keeps the others' colours"
    assert figure.get_suptitle() == "Arms"


def test_arms_name_the_floor_without_squeezing_the_dots():
    rows = [dict(arm="dense control", budget="tokens", seed=seed, val_loss=2.0 + seed / 100) for seed in range(3)]
    (axes,) = plot_arms(rows, floor=0.5).axes
    assert "entropy floor 0.50" in axes.get_ylabel()
    assert axes.get_ylim()[0] > 1.9, "the axis shows the seeds' scatter, not the way down to the floor"
    assert "2.010" in texts(axes), "the mean, in figures"


def test_comparison():
    rows = [
        dict(arm=arm, budget=budget, seed=seed, updates=9, val_loss=loss + seed / 10)
        for arm, budget, loss in (
            ("base", "tokens", 2.0),
            ("copy", "tokens", 1.0),
            ("drop", "tokens", 1.2),
            ("copy", "FLOPs", 1.5),
        )
        for seed in (0, 1, 2)
    ]
    figure = plot_comparison(dict(rows=rows, floor=0.5, control="base"), title="Arms")
    tokens, flops = figure.axes
    assert (tokens.get_title(), flops.get_title()) == ("equal tokens", "equal FLOPs")
    assert [label.get_text() for label in tokens.get_yticklabels()] == ["base", "copy", "drop"]
    assert tokens.get_ylim()[0] > tokens.get_ylim()[1], "the first arm is on top"
    assert tokens.get_shared_x_axes().joined(tokens, flops)
    means = [(container[0].get_xdata()[0], container[0].get_ydata()[0]) for container in tokens.containers]
    assert means == [(pytest.approx(2.1), 0), (pytest.approx(1.1), 1), (pytest.approx(1.3), 2)]
    (bar,) = tokens.containers[1][2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([1.0, 1.2]), "one standard deviation to each side"
    dots = [c.get_offsets()[:, 0].tolist() for c in tokens.collections if len(c.get_offsets()) == 3]
    assert dots == [pytest.approx([loss, loss + 0.1, loss + 0.2]) for loss in (2.0, 1.0, 1.2)]
    (band,) = tokens.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((2.0, 2.2)), "the dense control's spread"
    assert not flops.patches and len(flops.containers) == 1, "an arm without rows at a budget leaves its place empty"
    assert "entropy floor 0.50" in figure.get_supxlabel() and figure.get_suptitle() == "Arms"


def test_comparison_of_one_seed_without_a_control():
    rows = [dict(arm="copy", budget="tokens", seed=0, updates=9, val_loss=1.0)]
    (axes,) = plot_comparison(dict(rows=rows, floor=None, control=None)).axes
    assert not axes.patches and axes.containers[0][0].get_xdata()[0] == 1.0


def test_load():
    figure = plot_load({"layer 0": [0.5, 0.25, 0.25, 0.0], "layer 1": [0.5, 0.5]}, title="Load")
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == [0.5, 0.25, 0.25, 0.0]
    assert [bar.get_height() for bar in second.patches] == [0.5, 0.5]
    assert (first.lines[0].get_ydata()[0], second.lines[0].get_ydata()[0]) == (0.25, 0.5), "an even share"
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 1"]
    assert first.get_xlabel() == "expert"
    assert first.get_ylabel() == "share of routed rows"
