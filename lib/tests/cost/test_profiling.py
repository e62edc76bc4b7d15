"""The profile's kinds of operation: names fall where they belong, and nothing of the time is lost."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY

from upcycling.core.config import MoEConfig
from upcycling.cost.profile import KINDS, as_text, kind_of, time_by_kind
from upcycling.experiments.series import new_model

NAMES = {
    "matrix products": ["aten::mm", "aten::addmm", "aten::_grouped_mm", "mkldnn::_linear_pointwise"],
    "attention": [
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ],
    "norms and elementwise": ["aten::mul", "aten::add_", "aten::silu_backward", "aten::_softmax", "aten::rsqrt"],
    "loss": ["aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::nll_loss_forward"],
    "routing and moving rows": ["aten::sort", "aten::topk", "aten::index_select", "aten::_embedding_bag"],
    "copying and clearing memory": ["aten::copy_", "aten::cat", "aten::fill_"],
    "optimizer": ["aten::_fused_adamw_", "Optimizer.step#AdamW.step", "aten::_foreach_norm"],
    "between operations": ["aten::view", "MmBackward0", "autograd::engine::evaluate_function: MmBackward0", "_Linear"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_of_their_kind(kind):
    assert {name: kind_of(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


def training_step(config):
    model = new_model(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_BT = torch.zeros(2, 16, dtype=torch.long)

    def step():
        model.objective(model(tokens_BT, tokens_BT)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture(scope="module")
def seconds():
    moe = replace(TINY.model, moe=MoEConfig(num_experts=4, top_k=2))
    return time_by_kind({"dense": training_step(TINY.model), "MoE": training_step(moe)}, rounds=2)


def test_a_training_step_has_all_kinds_and_only_the_moe_moves_many_rows(seconds):
    for of_kind in seconds.values():
        assert tuple(of_kind) == KINDS
        assert all(value > 0 for value in of_kind.values())
    dense, moe = seconds["dense"], seconds["MoE"]
    assert moe["routing and moving rows"] > 2 * dense["routing and moving rows"], "a dense one looks up tokens alone"


def test_nothing_of_a_call_is_lost():
    x = torch.randn(300, 300)

    def products():
        for _ in range(30):
            x @ x

    kinds = time_by_kind({"products": products}, rounds=2)["products"]
    share = kinds["matrix products"] / sum(kinds.values())
    assert share > 0.75, "nearly all of it; two thirds, if what an operation calls were counted twice"


def test_a_call_is_counted_once_a_round():
    calls = []
    time_by_kind({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]


def test_the_least_disturbed_call_is_kept():
    x, calls = torch.randn(300, 300), []

    def disturbed_once():
        calls.append(1)
        for _ in range(40 * (len(calls) == 2)):
            x @ x

    assert time_by_kind({"a": disturbed_once}, rounds=3)["a"]["matrix products"] == 0


def test_the_table_says_what_a_kind_adds():
    nothing = dict.fromkeys(KINDS, 0.0)
    dense = nothing | {"matrix products": 0.16, "attention": 0.04}
    moe = nothing | {"matrix products": 0.18, "attention": 0.04, "optimizer": 0.08}
    table = as_text({"dense": dense, "MoE": moe}, "dense").split("\n")
    lines = {line[:28].strip(): line[28:].split() for line in table}
    assert lines["matrix products"] == ["80.0", "90.0", "+10.0"]
    assert lines["optimizer"] == ["0.0", "40.0", "+40.0"]
    assert lines["all"] == ["100.0", "150.0", "+50.0"]
