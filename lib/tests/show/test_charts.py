"""Lines, bars and dots show the data that they were given, in the units that their axes name."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from seen import curves, levels, names, words
from tiny import TINY

from upcycling.cost.account import account
from upcycling.show import (
    history_curve,
    plot_latency,
    plot_length_bias,
    plot_losses,
    plot_memory_and_flops,
    plot_quotas,
    plot_saturation,
    plot_specialisation,
    plot_throughput,
)

CURVES = {"dense": [(0, 3.0), (10, 2.0)], "MoE": [(10, 2.0), (20, 1.5)], "control": [(10, 2.0), (20, 1.8)]}


def test_losses():
    axes = plot_losses(CURVES, floor=0.567, boundary=10, title="Losses").axes[0]
    assert curves(axes) == {name: dict(points) for name, points in CURVES.items()}
    drawn = [line for line in axes.lines if line.get_label() in CURVES]
    assert len({line.get_color() for line in drawn}) == len({line.get_linestyle() for line in drawn}) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)
    assert words(axes) == {"entropy floor 0.57", "upcycled here"}
    assert levels(axes) == [0.567] and levels(axes, "x") == [10]
    assert axes.get_title() == "Losses"
    assert "nats per token" in axes.get_ylabel() and "updates" in axes.get_xlabel()


def test_losses_without_extras():
    axes = plot_losses({"dense": CURVES["dense"]}, x_label="seconds").axes[0]
    assert axes.get_legend() is None, "one curve needs no legend"
    assert words(axes) == set() and levels(axes) == levels(axes, "x") == []
    assert axes.get_xlabel() == "seconds"


def test_many_curves_differ():
    axes = plot_losses({f"curve {i}": [(0, i), (1, i)] for i in range(12)}).axes[0]
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 12


def test_history_curve():
    history = [
        {"step": 0, "val_loss": 3.0, "loss": None},
        {"step": 5, "val_loss": None, "loss": 2.5},
        {"step": 9, "val_loss": 0.0},
    ]
    assert history_curve(history) == [(0, 3.0), (9, 0.0)]
    assert history_curve(history, start=100) == [(100, 3.0), (109, 0.0)]
    assert history_curve(history, value="loss") == [(5, 2.5)]


def test_saturation():
    layers = {"layer 0": [(0, 0.1), (10, 0.9)], "layer 1": [(0, 0.1), (10, 0.5)]}
    axes = plot_saturation(layers, chance=0.125).axes[0]
    assert curves(axes) == {name: dict(points) for name, points in layers.items()}
    first, second = (line for line in axes.lines if line.get_label() in layers)
    assert first.get_linestyle() != second.get_linestyle()
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert places["chance"] < places["layer 1"] < places["layer 0"], "each name at the end of its line"
    assert levels(axes) == [0.125]
    assert axes.get_ylim()[0] == 0 and axes.get_xlabel() == "optimizer updates" and "experts" in axes.get_ylabel()


def test_specialisation():
    layers = {f"layer {i}": [(0, 0.0), (10, 0.3)] for i in range(24)}
    axes = plot_specialisation(layers, null=0.02, y_max=0.5, title="playback").axes[0]
    assert axes.get_ylim() == (0, 0.5)
    places = sorted(text.get_position()[1] for text in axes.texts)
    assert len(places) == 25 and min(np.diff(places)) > 0.035 and places[-1] < 1.001, "names do not touch"
    assert len({to_hex(line.get_color()) for line in axes.lines if line.get_label() in layers}) == 24
    assert "bits" in axes.get_ylabel()


def test_latency_is_drawn_in_milliseconds():
    prefill = {"dense": {8: 0.25, 32: 0.5}, "MoE": {8: 0.5, 32: 1.0}}
    decode = {"dense": {8: 0.125, 32: 0.125}, "MoE": {8: 0.25, 32: 0.5}}
    left, right = plot_latency(prefill, decode, "Latency").axes
    assert curves(left) == {"dense": {8: 250, 32: 500}, "MoE": {8: 500, 32: 1000}}
    assert curves(right) == {"dense": {8: 125, 32: 125}, "MoE": {8: 250, 32: 500}}
    assert "ms" in left.get_ylabel() and "ms" in right.get_ylabel() and "token" in left.get_xlabel()
    assert right.get_ylim()[0] == 0
    assert names(left, "x") == ["8", "32"]


def test_throughput_and_its_ratio():
    left, right = plot_throughput({"dense": {1: 10, 4: 40}, "MoE": {1: 20, 4: 30}}, relative_to="dense").axes
    assert curves(left) == {"dense": {1: 10, 4: 40}, "MoE": {1: 20, 4: 30}}
    assert curves(right) == {"dense": {1: 1, 4: 1}, "MoE": {1: 2, 4: 0.75}}
    assert "dense" in right.get_ylabel() and "sequences" in right.get_xlabel()


def test_memory_stacks_up_to_the_accounts():
    wide = replace(TINY.model, d_ff=4 * TINY.model.d_ff)
    accounts = {"narrow": account(TINY.model, 2, 16), "wide": account(wide, 2, 16)}
    memory, flops = plot_memory_and_flops(accounts).axes
    for i, a in enumerate(accounts.values()):
        held = (a.weights + a.gradients + a.optimizer + a.activations) / 2**20
        bars = [bars[i] for bars in memory.containers]
        assert sum(bar.get_height() for bar in bars) == pytest.approx(held)
        assert bars[-1].get_y() + bars[-1].get_height() == pytest.approx(held), "one on the other"
        assert flops.containers[0][i].get_height() == pytest.approx(a.update / 1e9)
        assert f"{held:,.0f}" in words(memory)
    assert [text.get_text() for text in memory.get_legend().get_texts()] == [
        "weights", "gradients", "AdamW", "activations",
    ]  # fmt: skip
    assert names(memory, "x") == names(flops, "x") == ["narrow", "wide"]


def test_scores_over_lengths_have_their_bound():
    first, second = plot_length_bias([10, 100], {"entropy": [1.0, 4.0], "other": [0.5, 0.6]}, bound="entropy").axes
    (bound,) = curves(first).values()
    assert np.allclose(list(bound.values()), np.log(list(bound))) and not second.lines
    assert first.collections[0].get_offsets().tolist() == [[10, 1.0], [100, 4.0]]


def test_quotas_go_from_the_largest_stratum_to_the_smallest():
    axes = plot_quotas([1, 9, 5], {"uniform": [1, 3, 4]}).axes[0]
    assert curves(axes) == {"uniform": {1: 3, 2: 4, 3: 1}}
    assert "documents" in axes.get_ylabel()
