"""Matrices with experts as columns show the data that they were given, and refuse what does not fit."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from seen import frames, levels, names, runs, words, written

from upcycling.core.routers import ExpertChoice, StraightThrough, TopP
from upcycling.core.routing import limit_capacity, route
from upcycling.show import (
    plot_choices,
    plot_expert_classes,
    plot_expert_matrix,
    plot_knockout,
    plot_layer_loads,
    plot_load,
    weights_by_expert,
)

pytestmark = pytest.mark.filterwarnings("error")
SHARE = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
LOGITS_NE = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [2.0, 1.5, -1.0]])


def cells(axes):
    """What is written into the cells, a list for each row."""
    texts = written(axes)
    columns, rows = (1 + int(max(place[i] for place in texts)) for i in range(2))
    return [[texts[e, r] for e in range(columns)] for r in range(rows)]


def test_expert_matrix():
    figure = plot_expert_matrix(SHARE, ["code", "stories"], null=0.25, vmax=0.6, title="layer 1")
    axes, bar = figure.axes
    assert np.allclose(axes.images[0].get_array(), SHARE)
    assert axes.images[0].get_clim() == (0, 0.6)
    assert cells(axes) == [["50", "30", "20", "0"], ["10", "20", "30", "40"]]
    assert runs(axes)[1].strings == ("0", "1", "2", "3"), "the experts' numbers"
    assert names(axes) == ["code", "stories"] and axes.get_title(loc="left") == "layer 1"
    assert axes.get_ylabel() == "domain" and axes.get_xlabel().startswith("expert")
    assert "(%)" in bar.get_ylabel()
    assert levels(bar) == [0.25] and words(bar) == {"chance"}


def test_class_matrix_names_its_axis():
    axes, bar = plot_expert_classes(SHARE, ["digits", "names"]).axes
    assert axes.get_ylabel() == "token class" and "class" in bar.get_ylabel()
    assert frames(axes) == set()


def test_cells_are_written_in_ink_that_can_be_read():
    axes = plot_expert_matrix(SHARE, ["code", "stories"]).axes[0]
    inks = runs(axes)[0].get_facecolor()
    assert to_hex(inks[0]) == "#ffffff", "the darkest cell"
    assert to_hex(inks[3]) == "#000000", "the lightest"


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
    axes, bar = plot_knockout(cost_EC, ["code", "stories"], noise=0.1).axes
    image = axes.images[0]
    assert np.allclose(np.ma.filled(image.get_array(), np.nan), cost_EC.T, equal_nan=True)
    assert image.get_clim() == (-0.8, 0.8), "centred at 0"
    assert cells(axes) == [["+0.80", "-0.20", "–"], ["+0.01", "0", "+0.05"]]
    assert frames(axes) == {(0, 0), (1, 0)}, "beyond the noise, either way"
    red, _, blue, _ = image.to_rgba(image.get_array())[0, 0]
    assert red > blue, "costs are red"
    assert "nats" in bar.get_ylabel() and axes.get_ylabel() == "domain" and "removed" in axes.get_xlabel()
    assert plot_knockout(cost_EC, ["a", "b"], limit=2).axes[0].images[0].get_clim() == (-2, 2)


def test_matrices_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 4\) but there are 3 domain names; give \(3, experts\)"):
        plot_expert_matrix(SHARE, ["a", "b", "c"])
    with pytest.raises(ValueError, match="noise has shape"):
        plot_knockout(SHARE.T, ["a", "b"], noise=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"shape \(4, 2\) but there are 1 domain names; give \(experts, 1\)"):
        plot_knockout(SHARE.T, ["a"])
    with pytest.raises(ValueError, match="3 layers"):
        plot_layer_loads(np.ones((2, 4)), [0, 1, 2])


def test_layer_loads_show_the_collapse_that_the_mean_hides():
    load_LE = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    axes, bar = plot_layer_loads(load_LE, [2, 5], alarm=[5]).axes
    assert np.allclose(axes.images[0].get_array(), [[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 2, 2]])
    assert names(axes) == ["all layers", "layer 2", "⚠ layer 5"]
    assert cells(axes) == [["1.0"] * 4, ["2.0", "2.0", "×", "×"], ["×", "×", "2.0", "2.0"]]
    assert levels(bar) == [1] and words(bar) == {"even"}
    assert plot_layer_loads(load_LE, [2, 5], vmax=4).axes[0].images[0].get_clim() == (0, 4)


def test_load():
    figure = plot_load({"layer 0": [0.5, 0.25, 0.25, 0.0], "layer 1": [0.5, 0.5]}, title="Load")
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == [0.5, 0.25, 0.25, 0.0]
    assert [bar.get_height() for bar in second.patches] == [0.5, 0.5]
    assert (levels(first), levels(second)) == ([0.25], [0.5]), "an even share"
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 1"] and figure.get_suptitle() == "Load"
    assert first.get_xlabel() == "expert"
    assert first.get_ylabel() == "share of routed rows"


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
    assert [axes.get_title() for axes in figure.axes] == ["plain", "full"] and figure.get_suptitle() == "toy"
    assert cells(figure.axes[0]) == [["1.00", "", ""]] * 3
    assert cells(figure.axes[1]) == [["1.00", "", ""], ["×", "", ""], ["×", "", ""]]
    assert figure.axes[0].get_ylabel() == "token" and figure.axes[1].get_xlabel() == "expert"
