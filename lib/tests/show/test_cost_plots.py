"""The figures of costs show the data that they were given, in the units that their axes name."""

from dataclasses import replace

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tiny import TINY

from upcycling.cost.account import account
from upcycling.show.cost import plot_latency, plot_memory_and_flops, plot_throughput


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def drawn(axes):
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_latency_is_drawn_in_milliseconds():
    prefill = {"dense": {8: 0.25, 32: 0.5}, "MoE": {8: 0.5, 32: 1.0}}
    decode = {"dense": {8: 0.125, 32: 0.125}, "MoE": {8: 0.25, 32: 0.5}}
    left, right = plot_latency(prefill, decode, "Latency").axes
    assert drawn(left) == {"dense": {8: 250, 32: 500}, "MoE": {8: 500, 32: 1000}}
    assert drawn(right) == {"dense": {8: 125, 32: 125}, "MoE": {8: 250, 32: 500}}
    assert "ms" in left.get_ylabel() and "ms" in right.get_ylabel() and "token" in left.get_xlabel()
    assert right.get_ylim()[0] == 0
    assert [text.get_text() for text in left.get_xticklabels()] == ["8", "32"]


def test_throughput_and_its_ratio():
    left, right = plot_throughput({"dense": {1: 10, 4: 40}, "MoE": {1: 20, 4: 30}}, relative_to="dense").axes
    assert drawn(left) == {"dense": {1: 10, 4: 40}, "MoE": {1: 20, 4: 30}}
    assert drawn(right) == {"dense": {1: 1, 4: 1}, "MoE": {1: 2, 4: 0.75}}
    assert "dense" in right.get_ylabel() and "sequences" in right.get_xlabel()


def test_memory_stacks_up_to_the_accounts():
    wide = replace(TINY.model, d_ff=4 * TINY.model.d_ff)
    accounts = {"narrow": account(TINY.model, 2, 16), "wide": account(wide, 2, 16)}
    memory, flops = plot_memory_and_flops(accounts).axes
    for i, a in enumerate(accounts.values()):
        held = sum(bar.get_height() for bars in memory.containers for bar in [bars[i]])
        assert held == pytest.approx((a.weights + a.gradients + a.optimizer + a.activations) / 2**20)
        assert flops.containers[0][i].get_height() == pytest.approx(a.update / 1e9)
    assert [text.get_text() for text in memory.get_legend().get_texts()] == [
        "weights", "gradients", "AdamW", "activations",
    ]  # fmt: skip
