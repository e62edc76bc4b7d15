"""The figures of notebook 06 show the data that they were given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

from upcycling.core.routers import ExpertChoice, StraightThrough, TopP
from upcycling.core.routing import limit_capacity, route
from upcycling.show.routers import plot_choices, plot_differences, plot_jumps, weights_by_expert

LOGITS_NE = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [2.0, 1.5, -1.0]])


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_weights_stand_under_their_expert():
    routing = route(LOGITS_NE, top_k=2)
    weights_NE = weights_by_expert(routing)
    assert weights_NE[1].tolist() == pytest.approx([0.8808, 0, 0.1192], abs=1e-4)
    assert torch.equal((weights_NE > 0).sum(1), torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("rule", [TopP(0.8), ExpertChoice()])
def test_experts_that_are_not_used_weigh_nothing(rule):
    routing = rule.route(LOGITS_NE, 1)
    weights_NE = weights_by_expert(routing)
    assert int((weights_NE > 0).sum()) == int(routing.kept_NK.sum()) < weights_NE.numel()


def test_computed_is_not_used():
    """The straight-through rule computes all experts and uses K of them."""
    routing = StraightThrough().route(LOGITS_NE, 2, training=True)
    assert torch.allclose(weights_by_expert(routing), weights_by_expert(route(LOGITS_NE, 2)))


def test_choices_show_weights_and_what_was_dropped():
    plain = route(LOGITS_NE, top_k=1)
    figure = plot_choices({"plain": plain, "full": limit_capacity(plain, 1.0)}, title="toy")
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [["1.00"] * 3, ["1.00", "×", "×"]]
    assert [axes.get_title() for axes in figure.axes] == ["plain", "full"]
    assert figure.axes[0].get_ylabel() == "token" and figure.axes[1].get_xlabel() == "expert"


def test_jumps():
    rows = [dict(name="copy", exact=True, jump=-1e-7), dict(name="drop", exact=False, jump=0.5)]
    axes = plot_jumps(rows).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["copy", "drop"]
    points = [(line.get_marker(), *line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [("D", 1e-4), ("o", 0.5)]
    assert "nats" in axes.get_xlabel() and axes.get_xscale() == "log"


def test_differences():
    figure = plot_differences({"a": {"x": [0.1, 0.3], "y": [-1.0]}, "b": {"y": [2.0, 4.0]}}, "nats per token")
    left, right = figure.axes
    assert [collection.get_offsets()[:, 0].tolist() for collection in left.collections[::2]] == [[0.1, 0.3], [-1.0]]
    assert right.collections[1].get_segments()[0][:, 0].tolist() == [3.0, 3.0]
    assert right.collections[0].get_offsets()[0][1] == 1  # "y" stands on the same line in both panels
