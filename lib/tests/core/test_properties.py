"""Over drawn sizes, loads and masks: the sorted path is the loop, and what holds for every routing rule."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from upcycling.core.config import ACTIVATIONS, ModelConfig, MoEConfig
from upcycling.core.experts import Experts
from upcycling.core.moe import MoELayer, experts_loop, experts_sorted
from upcycling.core.routers import ROUTERS, ReLURouter, Sampled, SelectionBias, TopK, TopP
from upcycling.core.routing import Routing, expert_counts, limit_capacity, route

VOCAB = 13
RULES = [TopK(), TopK(softmax_first=False), Sampled(0.7), SelectionBias(), TopP(0.6), ReLURouter()]
RULES = [None, *RULES, *(ROUTERS[kind]() for kind in ("straight_through", "hash", "expert_choice"))]
VARYING = ("top_p", "relu", "expert_choice")  # experts per token


def kind_of(rule) -> str | None:
    return None if rule is None else rule.kind


def model_config(d=8, f=6, activation="swiglu", bias=False, **moe):
    return ModelConfig.smol(
        vocab_size=VOCAB, d_model=d, n_layers=1, n_heads=1, d_ff=f, seq_len=8, activation=activation, ffn_bias=bias,
        position="none", moe=MoEConfig(**moe),
    )  # fmt: skip


def within(actual, expected, tolerance=1e-12):
    """Equal within `tolerance` of the largest entry (1 at least)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.numel():
        scale = max(1.0, float(expected.detach().abs().max()))
        assert float((actual - expected).detach().abs().max()) <= tolerance * scale


# ------------------------------------------------------------------------------------------- the loop and the fast path


@st.composite
def dispatches(draw):
    """Random experts in float64, rows for them, and for each row K different experts of which some are kept."""
    num_experts = draw(st.integers(1, 7))
    n, k = draw(st.integers(0, 20)), draw(st.integers(1, num_experts))
    config = model_config(
        d=draw(st.integers(1, 9)), f=draw(st.integers(1, 9)), activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()), num_experts=num_experts, top_k=k,
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 2**31)))
    experts = Experts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    favoured = draw(st.sampled_from([0.0, 0.5, 10.0]))  # even loads, uneven ones, K experts take all
    ids_NK = (torch.rand(n, num_experts) + favoured * torch.randperm(num_experts)).topk(k, dim=-1).indices
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.8, 1.0]))
    kept_NK = None if share is None else torch.rand(n, k) < share
    return experts, torch.randn(n, config.d_model).double(), ids_NK, torch.rand(n, k).double(), kept_NK


def values_and_gradients(path, experts, x_ND, ids_NK, given_NK, kept_NK, computes_all):
    x_ND, given_NK = x_ND.clone().requires_grad_(), given_NK.clone().requires_grad_()
    weights_NK = given_NK if kept_NK is None else given_NK * kept_NK
    if computes_all and kept_NK is not None:  # as in StraightThrough: no weight, but a gradient
        weights_NK = weights_NK + (given_NK - given_NK.detach()) * ~kept_NK
    p_NE = x_ND.new_full((len(x_ND), len(experts.w_up_EFD)), 1 / len(experts.w_up_EFD))
    y_ND = path(experts, x_ND, Routing(p_NE.log(), p_NE, ids_NK, weights_NK, kept_NK, computes_all))
    dy_ND = torch.cos(torch.arange(y_ND.numel(), dtype=y_ND.dtype)).view_as(y_ND)
    named = dict(x=x_ND, weights=given_NK, **dict(experts.named_parameters()))
    gradients = torch.autograd.grad((y_ND * dy_ND).sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, gradients), y=y_ND)


@settings(max_examples=150)
@given(dispatches(), st.booleans())
def test_sorted_equals_the_loop(dispatch, computes_all):
    """Values and gradients in float64: with and without a mask, idle experts, no kept row, no token."""
    expected = values_and_gradients(experts_loop, *dispatch, computes_all)
    actual = values_and_gradients(experts_sorted, *dispatch, computes_all)
    for name, value in expected.items():
        within(actual[name], value)


@settings(max_examples=60)
@given(dispatches())
def test_sorted_equals_the_loop_without_gradients(dispatch):
    experts, x_ND, ids_NK, weights_NK, kept_NK = dispatch
    p_NE = x_ND.new_full((len(x_ND), len(experts.w_up_EFD)), 1 / len(experts.w_up_EFD))
    routing = Routing(p_NE.log(), p_NE, ids_NK, weights_NK if kept_NK is None else weights_NK * kept_NK, kept_NK)
    with torch.no_grad():
        within(experts_sorted(experts, x_ND, routing), experts_loop(experts, x_ND, routing))


@st.composite
def layers(draw):
    """(an MoELayer in float64 with everything random, x_BTD, tokens_BT)."""
    rule = draw(st.sampled_from(RULES))
    num_experts = draw(st.integers(1, 6))
    moe = dict(
        num_experts=num_experts, top_k=draw(st.integers(1, num_experts)), router=rule, renormalize=draw(st.booleans()),
        router_bias=draw(st.booleans()), shared_experts=draw(st.integers(0, 2)),
        capacity_factor=draw(st.sampled_from([None, 0.5, 1.0])), logit_norm=draw(st.sampled_from([None, 2.0])),
    )  # fmt: skip
    least = 1 if kind_of(rule) == "expert_choice" else 0
    b, t = draw(st.integers(1, 3)), draw(st.integers(least, 6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = MoELayer(model_config(bias=draw(st.booleans()), **moe)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if kind_of(rule) == "selection_bias":
        layer.rule_state.selection_bias_E.normal_()
    return layer.train(draw(st.booleans())), torch.randn(b, t, 8).double(), torch.randint(VOCAB, (b, t))


@pytest.mark.filterwarnings("ignore:std_mean")  # of no token, of one expert
@settings(max_examples=80)
@given(layers(), st.booleans())
def test_a_layer_is_its_routing_carried_out_by_the_loop(drawn, grad):
    """The output is that of the loop for the Routing that came with it, plus the shared experts, whatever the path."""
    layer, x_BTD, tokens_BT = drawn
    with torch.set_grad_enabled(grad):
        y_BTD, routing = layer(x_BTD, tokens_BT)
        x_ND = x_BTD.flatten(0, 1)
        expected_ND = experts_loop(layer.experts, x_ND, routing)
        if layer.shared is not None:
            expected_ND = expected_ND + layer.shared.expert(0, x_ND)
    within(y_BTD, expected_ND.view_as(x_BTD))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_few_tokens_as_in_generation(tokens, top_k):
    torch.manual_seed(0)
    layer = MoELayer(model_config(num_experts=4, top_k=top_k)).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_BTD = torch.randn(tokens, 1, 8).double()
    with torch.no_grad():
        y_BTD, routing = layer(x_BTD)
    within(y_BTD.flatten(0, 1), experts_loop(layer.experts, x_BTD.flatten(0, 1), routing).detach())


# ------------------------------------------------------------------------------------------------------- routing rules


@st.composite
def decisions(draw, rules=RULES):
    """(rule, its arguments) over drawn N, E, K, scores from flat to one-sided, and what the rule remembers."""
    rule = draw(st.sampled_from(rules))
    num_experts = draw(st.integers(1, 8))
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, num_experts))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    logits_NE = draw(st.sampled_from([0.01, 1.0, 5.0])) * torch.randn(n, num_experts).double()
    state = {} if rule is None else rule.buffers(num_experts, k, VOCAB)
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if "selection_bias_E" in state:
        state["selection_bias_E"].normal_()
    options = dict(top_k=k, renormalize=draw(st.booleans()), training=draw(st.booleans()), state=state)
    return rule, logits_NE, options | dict(tokens_N=torch.randint(VOCAB, (n,)))


def decide(rule, logits_NE, options) -> Routing:
    if rule is None:
        return route(logits_NE, options["top_k"], options["renormalize"])
    torch.manual_seed(0)
    return rule.route(logits_NE, **options)


def kept_of(routing):
    return torch.ones_like(routing.expert_ids_NK, dtype=torch.bool) if routing.kept_NK is None else routing.kept_NK


def by_expert(routing) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_NE, kept_NE): 0 and False where the expert was not chosen."""
    zeros_NE = torch.zeros_like(routing.probabilities_NE)
    kept_NE = zeros_NE.bool().scatter(1, routing.expert_ids_NK, kept_of(routing))
    return zeros_NE.scatter(1, routing.expert_ids_NK, routing.weights_NK), kept_NE


@settings(max_examples=200)
@given(decisions())
def test_what_a_rule_decides_is_a_routing(decision):
    """Weights from 0, summing to 1 where renormalised; an expert is named once; what is not kept has weight 0."""
    rule, logits_NE, options = decision
    routing, k = decide(*decision), options["top_k"]
    n, num_experts = logits_NE.shape
    kept_NK, sums_N = kept_of(routing), routing.weights_NK.sum(-1)
    width = num_experts if routing.kept_NK is not None else k
    assert routing.expert_ids_NK.shape == routing.weights_NK.shape == kept_NK.shape == (n, width)
    assert all(len(set(ids)) == width and set(ids) <= set(range(num_experts)) for ids in routing.expert_ids_NK.tolist())
    assert (routing.weights_NK >= 0).all() and (routing.weights_NK[~kept_NK] == 0).all()
    within(routing.probabilities_NE.sum(-1), torch.ones(n).double())
    assert (routing.probabilities_NE >= 0).all()
    if kind_of(rule) not in VARYING:
        assert (kept_NK.sum(-1) == k).all()
    if kind_of(rule) == "top_p":
        assert (kept_NK.sum(-1) >= 1).all()
    always = rule is not None and rule.preserves_function(False)
    if options["renormalize"] or always:
        within(sums_N, kept_NK.any(-1).double())  # 0 where a token has no expert
    elif kind_of(rule) not in ("relu", "selection_bias"):
        assert (sums_N <= 1 + 1e-12).all(), "probabilities of different experts"
    if routing.kept_NK is None and kind_of(rule) not in ("sampled", "selection_bias"):
        assert (routing.weights_NK.diff(dim=-1) <= 1e-12).all(), "best first"


@settings(max_examples=150)
@given(decisions([rule for rule in RULES if kind_of(rule) != "expert_choice"]), st.integers(0, 2**31))
def test_no_token_decides_for_another(decision, seed):
    """In another order, or alone: each token's experts and weights stay what they were."""
    rule, logits_NE, options = decision
    options["training"] &= kind_of(rule) != "sampled"  # which draws for each token
    order_N = torch.randperm(len(logits_NE), generator=torch.Generator().manual_seed(seed))
    weights_NE, kept_NE = by_expert(decide(rule, logits_NE, options))
    for chosen_N in (order_N, order_N[:1]):
        part = options | dict(tokens_N=options["tokens_N"][chosen_N])
        part_weights_NE, part_kept_NE = by_expert(decide(rule, logits_NE[chosen_N], part))
        within(part_weights_NE, weights_NE[chosen_N])
        assert torch.equal(part_kept_NE, kept_NE[chosen_N])


@settings(max_examples=150)
@given(decisions(), st.integers(0, 2**31), st.sampled_from([None, 0.4, 1.0]))
def test_experts_may_be_renamed(decision, seed, capacity):
    """Old expert order_E[e] is called e: the same decision under the new names, also where experts are full."""
    rule, logits_NE, options = decision
    options["training"] &= kind_of(rule) != "sampled"
    order_E = torch.randperm(logits_NE.shape[1], generator=torch.Generator().manual_seed(seed))
    state = dict(options["state"])
    if "selection_bias_E" in state:
        state["selection_bias_E"] = state["selection_bias_E"][order_E]
    if "experts_of_VK" in state:
        state["experts_of_VK"] = order_E.argsort()[state["experts_of_VK"]]
    before = decide(rule, logits_NE, options)
    after = decide(rule, logits_NE[:, order_E], options | dict(state=state))
    if before.penalty is not None:
        within(after.penalty, before.penalty)
    within(after.probabilities_NE, before.probabilities_NE[:, order_E])
    if capacity is not None:
        before, after = limit_capacity(before, capacity), limit_capacity(after, capacity)
        assert after.dropped == before.dropped
    (weights_NE, kept_NE), (renamed_NE, renamed_kept_NE) = by_expert(before), by_expert(after)
    within(renamed_NE, weights_NE[:, order_E])
    assert torch.equal(renamed_kept_NE, kept_NE[:, order_E])
    assert torch.equal(expert_counts(after, wanted=True), expert_counts(before, wanted=True)[order_E])


@pytest.mark.filterwarnings("ignore:std_mean")
@settings(max_examples=60)
@given(layers(), st.integers(0, 2**31))
def test_a_layer_whose_experts_are_renamed_is_the_same_function(drawn, seed):
    layer, x_BTD, tokens_BT = drawn
    if kind_of(layer.moe.router) == "sampled":
        layer.eval()
    y_BTD, _ = layer(x_BTD, tokens_BT)
    order_E = torch.randperm(layer.moe.num_experts, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for tensor in (*layer.router.parameters(), *layer.experts.parameters()):
            tensor.copy_(tensor[order_E])
        for name, tensor in layer.rule_state.named_buffers():
            if name == "selection_bias_E":
                tensor.copy_(tensor[order_E])
            if name == "experts_of_VK":
                tensor.copy_(order_E.argsort()[tensor])
    within(layer(x_BTD, tokens_BT)[0], y_BTD)


def capacity_by_hand(routing, factor):
    """kept_NK and the number of choices dropped: a place at a time, all first choices before all second ones."""
    made_NK, num_experts = kept_of(routing), routing.probabilities_NE.shape[1]
    places = [math.ceil(factor * int(made_NK.sum()) / num_experts)] * num_experts
    kept_NK, dropped = torch.zeros_like(made_NK), 0
    for choice in range(made_NK.shape[1]):
        for token in range(len(made_NK)):
            expert = int(routing.expert_ids_NK[token, choice])
            if made_NK[token, choice]:
                kept_NK[token, choice] = places[expert] > 0
                dropped += places[expert] <= 0
                places[expert] -= 1
    return kept_NK, dropped


@settings(max_examples=150)
@given(decisions(), st.floats(0.05, 3.0))
@example((None, torch.zeros(4, 2).double(), dict(top_k=1, renormalize=True)), 1.0)  # all on one expert, half fits
def test_capacity_serves_in_order(decision, factor):
    before = decide(*decision)
    after = limit_capacity(before, factor)
    kept_NK, dropped = capacity_by_hand(before, factor)
    assert torch.equal(after.kept_NK, kept_NK) and torch.equal(after.wanted_NK, kept_of(before))
    assert float(after.dropped) == pytest.approx(dropped / max(1, int(kept_of(before).sum())))
    assert torch.equal(after.weights_NK, before.weights_NK * kept_NK), "dropped: 0; the others as they were"


def test_the_rules_that_are_drawn_are_all_there_are():
    assert {kind_of(rule) for rule in RULES} == {None, *ROUTERS}
    for rule in RULES:
        assert replace(MoEConfig(), router=rule).router == rule
