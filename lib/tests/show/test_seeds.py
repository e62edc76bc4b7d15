"""The figures of arms over seeds show the data that they were given."""

import json
from pathlib import Path

import pytest
from seen import curves, dots, intervals, levels, means, names, words

from upcycling.show import plot_arms, plot_comparison, plot_differences, plot_jumps, plot_selected

RESULTS = Path(__file__).resolve().parents[3] / "notebooks/results"


def rows_of(*arms, seeds=3):
    """(arm, budget, loss at seed 0), a tenth more for each seed."""
    return [
        dict(arm=arm, budget=budget, seed=seed, updates=9, val_loss=loss + seed / 10)
        for arm, budget, loss in arms
        for seed in range(seeds)
    ]


def test_arms():
    figure = plot_arms(
        rows_of(
            ("dense control", "tokens", 2.0), ("upcycled MoE", "tokens", 1.0), ("upcycled MoE", "FLOPs", 1.5), seeds=2
        ),
        title="Arms",
    )
    tokens, flops = figure.axes
    assert (tokens.get_title(), flops.get_title()) == ("equal tokens", "equal FLOPs")
    assert "nats per token" in figure.get_supxlabel() and figure.get_suptitle() == "Arms"
    assert names(tokens) == ["dense control", "upcycled MoE"]
    assert dots(tokens) == {0: [2.0, 2.1], 1: [1.0, 1.1]}
    assert means(tokens) == pytest.approx({0: 2.05, 1: 1.05})
    assert words(tokens) == {"2.050", "1.050"}, "the means, in figures"
    assert dots(flops) == {1: [1.5, 1.6]}, "an arm without rows at a budget leaves its place empty"
    colours = [
        {tuple(c.get_facecolor()[0][:3]) for c in axes.collections if len(c.get_offsets()) == 2} for axes in figure.axes
    ]
    assert len(colours[0]) == 2 and colours[1] < colours[0], "and keeps the others' colours"


def test_arms_name_the_floor_without_squeezing_the_dots():
    rows = [dict(arm="dense control", budget="tokens", seed=seed, val_loss=2.0 + seed / 100) for seed in range(3)]
    figure = plot_arms(rows, floor=0.5)
    assert "entropy floor 0.50" in figure.get_supxlabel()
    assert figure.axes[0].get_xlim()[0] > 1.9, "the axis shows the seeds' scatter, not the way down to the floor"


def test_comparison():
    rows = rows_of(("base", "tokens", 2.0), ("copy", "tokens", 1.0), ("drop", "tokens", 1.2), ("copy", "FLOPs", 1.5))
    figure = plot_comparison(dict(rows=rows, floor=0.5, control="base"), title="Arms")
    tokens, flops = figure.axes
    assert (tokens.get_title(), flops.get_title()) == ("equal tokens", "equal FLOPs")
    assert names(tokens) == ["base", "copy", "drop"]
    assert tokens.get_ylim()[0] > tokens.get_ylim()[1], "the first arm is on top"
    assert tokens.get_xlim() == flops.get_xlim(), "panels can be compared"
    assert means(tokens) == pytest.approx({0: 2.1, 1: 1.1, 2: 1.3})
    assert intervals(tokens)[1] == pytest.approx((1.0, 1.2)), "one standard deviation to each side"
    assert {line: pytest.approx(values) for line, values in dots(tokens).items()} == {
        0: [2.0, 2.1, 2.2], 1: [1.0, 1.1, 1.2], 2: [1.2, 1.3, 1.4],
    }  # fmt: skip
    (band,) = tokens.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((2.0, 2.2)), "the dense control's spread"
    assert not flops.patches and list(means(flops)) == [1], "an arm without rows at a budget leaves its place empty"
    assert "entropy floor 0.50" in figure.get_supxlabel() and figure.get_suptitle() == "Arms"


def test_comparison_of_one_seed_without_a_control():
    rows = [dict(arm="copy", budget="tokens", seed=0, updates=9, val_loss=1.0)]
    (axes,) = plot_comparison(dict(rows=rows, floor=None, control=None)).axes
    assert not axes.patches and means(axes) == {0: 1.0} and intervals(axes)[0] == (1.0, 1.0)


def test_selected_is_paired_with_random_of_the_same_seed():
    result = json.loads((RESULTS / "selection_worlds_quick.json").read_text(encoding="utf-8"))
    figure = plot_selected(result, title="Selected")
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    assert [axes.get_title() for axes in figure.axes] == ["all", *result["rows"][0]["per_domain"]]
    assert names(figure.axes[0]) == [arm for arm in arms if arm != "random"]
    losses = {(row["arm"], row["seed"]): row["val_loss"] for row in result["rows"]}
    for line, arm in enumerate(names(figure.axes[0])):
        seeds = [row["seed"] for row in result["rows"] if row["arm"] == arm]
        expected = [losses[arm, seed] - losses["random", seed] for seed in seeds]
        assert dots(figure.axes[0])[line] == pytest.approx(expected)
        assert means(figure.axes[0])[line] == pytest.approx(sum(expected) / len(expected))
    assert all(0 in levels(axes, "x") for axes in figure.axes) and "to the left is better" in figure.get_supxlabel()


def test_jumps():
    rows = [dict(name="copy", exact=True, jump=-1e-7), dict(name="drop", exact=False, jump=0.5)]
    axes = plot_jumps(rows, title="Jumps").axes[0]
    assert names(axes) == ["copy", "drop"]
    points = [(line.get_marker(), *line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [("D", 1e-4), ("o", 0.5)]
    assert list(curves(axes)) == ["theory: exactly 0", "theory: not 0"], "the legend says what the shapes mean"
    assert "nats" in axes.get_xlabel() and axes.get_xscale() == "log" and axes.get_title() == "Jumps"


def test_differences():
    figure = plot_differences({"a": {"x": [0.1, 0.3], "y": [-1.0]}, "b": {"y": [2.0, 4.0]}}, "nats per token")
    left, right = figure.axes
    assert dots(left) == {0: [0.1, 0.3], 1: [-1.0]}
    assert dots(right) == {1: [2.0, 4.0]}, "y stands on the same line in both panels"
    assert means(right) == {1: 3.0} and means(left) == pytest.approx({0: 0.2, 1: -1.0})
    assert levels(left, "x") == [0] and figure.get_supxlabel() == "nats per token"
