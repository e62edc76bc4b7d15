"""Every routing rule on examples by hand; what copies, gradients, capacity, causality and a resumed run make of it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upcycling import (
    MoEConfig,
    TrainConfig,
    check_causality,
    check_equivalence,
    generate,
    intervene,
    record_routing,
    to_hf,
    train,
    upcycle,
)
from upcycling.core import experts as experts_module
from upcycling.core.config import BALANCES, ModelConfig
from upcycling.core.model import DecoderLM
from upcycling.core.moe import MoELayer, experts_loop, experts_sorted
from upcycling.core.routers import (
    ROUTERS,
    ExpertChoice,
    Hash,
    ReLURouter,
    Sampled,
    SelectionBias,
    StraightThrough,
    TopK,
    TopP,
    as_router,
)
from upcycling.core.routing import expert_counts, expert_load, limit_capacity, route
from upcycling.cost.parts import count_parameters, forward_flops
from upcycling.routing.metrics import max_over_mean
from upcycling.routing.snapshots import RoutingSnapshots
from upcycling.text.stream import TokenStream

RULES = [None, *ROUTERS]
FIXED_K = [None, "top_k", "sampled", "selection_bias", "straight_through", "hash"]
NOISES = {
    "noisy": dict(noisy=True),
    "jitter": dict(router_jitter=0.3),
    "expert dropout": dict(expert_dropout=0.5),
}


def make_config(router=None, d=8, depth=2, vocab=11, **moe):
    experts = MoEConfig(**(dict(num_experts=4, top_k=2, router=router, router_std=0.5) | moe))
    return ModelConfig.smol(vocab_size=vocab, d_model=d, n_layers=depth, n_heads=2, d_ff=12, seq_len=12, moe=experts)


def make_model(router=None, seed=0, **settings) -> DecoderLM:
    """A float64 model whose weights are all random and large enough to matter."""
    torch.manual_seed(seed)
    model = DecoderLM(make_config(router, **settings)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_layer(router=None, dtype=torch.float32, seed=0, **settings) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(make_config(router, **settings)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def make_tokens(rows=3, length=12, vocab=11, seed=1):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def decide(rule, probabilities, top_k, renormalize=True, **keywords):
    """The rule's Routing of scores whose softmax is `probabilities`."""
    return rule.route(torch.tensor(probabilities).log(), top_k, renormalize, **keywords)


def assert_chosen(routing, experts):
    """Token n kept exactly the experts of experts[n]."""
    kept_NK = torch.ones_like(routing.expert_ids_NK, dtype=torch.bool) if routing.kept_NK is None else routing.kept_NK
    actual = [sorted(ids[kept].tolist()) for ids, kept in zip(routing.expert_ids_NK, kept_NK)]
    assert actual == [sorted(chosen) for chosen in experts]


# -------------------------------------------------------------------------------------------------- each rule, by hand


def test_top_k_in_either_order():
    eighths = [[0.125, 0.5, 0.125, 0.25]]
    for first, renormalize, expected in (
        (True, True, [2 / 3, 1 / 3]),
        (True, False, [0.5, 0.25]),
        (False, True, [2 / 3, 1 / 3]),
        (False, False, [2 / 3, 1 / 3]),  # softmax over the chosen scores alone
    ):
        routing = decide(TopK(softmax_first=first), eighths, 2, renormalize)
        assert routing.expert_ids_NK.tolist() == [[1, 3]]
        torch.testing.assert_close(routing.weights_NK, torch.tensor([expected]))
    after_NK = torch.tensor(eighths).log().topk(2).values.softmax(-1)
    torch.testing.assert_close(decide(TopK(softmax_first=False), eighths, 2).weights_NK, after_NK)


def test_sampled_draws_by_the_tempered_probabilities():
    """Scores 2 log p at temperature 2 are probabilities p; without replacement, so the second follows p/(1-p_first)."""
    p_E, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), 40_000
    logits_NE = (2 * p_E.log()).expand(n, 4)
    rule = Sampled(temperature=2.0)
    torch.manual_seed(0)
    drawn = rule.route(logits_NE, 2, False, training=True)
    first_E = drawn.expert_ids_NK[:, 0].bincount(minlength=4) / n
    torch.testing.assert_close(first_E, p_E, atol=0.01, rtol=0)
    after_0_E = drawn.expert_ids_NK[drawn.expert_ids_NK[:, 0] == 0, 1].bincount(minlength=4).float()
    torch.testing.assert_close(after_0_E / after_0_E.sum(), torch.tensor([0, 0.6, 0.3, 0.1]), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.weights_NK, p_E[drawn.expert_ids_NK])
    evaluated = rule.route(logits_NE[:1], 2)
    assert evaluated.expert_ids_NK.tolist() == [[0, 1]]
    torch.testing.assert_close(evaluated.weights_NK, torch.tensor([[0.625, 0.375]]))


def test_selection_bias_chooses_but_does_not_weigh():
    logits_NE = torch.tensor([[0.9, 0.6, 0.5, 0.2]]).logit()
    state = {"selection_bias_E": torch.tensor([-0.5, 0.0, 0.2, 0.0])}  # .4 .6 .7 .2
    routing = SelectionBias().route(logits_NE, 2, state=state)
    assert routing.expert_ids_NK.tolist() == [[2, 1]]
    torch.testing.assert_close(routing.weights_NK, torch.tensor([[0.5, 0.6]]) / 1.1)
    torch.testing.assert_close(routing.probabilities_NE, torch.tensor([[0.9, 0.6, 0.5, 0.2]]) / 2.2)
    torch.testing.assert_close(
        SelectionBias().route(logits_NE, 2, False, state=state).weights_NK, torch.tensor([[0.5, 0.6]])
    )

    SelectionBias(rate=0.01).after_update(state, torch.tensor([7, 2, 3, 0]), tokens=6, top_k=2)  # the mean is 3
    torch.testing.assert_close(state["selection_bias_E"], torch.tensor([-0.51, 0.01, 0.2, 0.01]))


def test_straight_through_uses_k_and_learns_from_all():
    """Forward: softmax top-k. Gradient: that of the mixture of all experts, over the K best's sum if renormalised."""
    torch.manual_seed(0)
    y_NED = torch.randn(5, 4, 3, dtype=torch.float64)
    logits_NE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for renormalize in (False, True):
        routing = StraightThrough().route(logits_NE, 2, renormalize, training=True)
        best = route(logits_NE, 2, renormalize)
        assert_chosen(routing, best.expert_ids_NK.tolist())
        used_NE = torch.zeros_like(logits_NE).scatter(1, best.expert_ids_NK, best.weights_NK)
        assert torch.equal(routing.weights_NK, used_NE)
        assert routing.computes_all
        p_NE = logits_NE.softmax(-1)
        mixture_NE = p_NE / best.probabilities_NE.topk(2).values.sum(-1, keepdim=True).detach() if renormalize else p_NE
        target_ND = torch.randn(5, 3, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((weights_NE[..., None] * y_NED).sum(1).mul(target_ND).sum(), logits_NE)[0]
            for weights_NE in (routing.weights_NK, mixture_NE)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        evaluated = StraightThrough().route(logits_NE, 2, renormalize)
        assert evaluated.kept_NK is None and torch.equal(evaluated.expert_ids_NK, best.expert_ids_NK)


@pytest.mark.parametrize(("threshold", "experts"), [(0.45, [1]), (0.6, [1, 3]), (0.8, [1, 3, 0]), (1.0, [0, 1, 2, 3])])
def test_top_p_takes_the_smallest_set_that_reaches_the_threshold(threshold, experts):
    p = [0.15, 0.5, 0.1, 0.25]
    routing = decide(TopP(threshold, entropy_weight=0.1), [p], 2, renormalize=False)
    assert_chosen(routing, [experts])
    assert routing.expert_ids_NK.tolist() == [[1, 3, 0, 2]], "best first"
    expected = [value if e in experts else 0.0 for e, value in zip((1, 3, 0, 2), (0.5, 0.25, 0.15, 0.1))]
    torch.testing.assert_close(routing.weights_NK, torch.tensor([expected]))
    assert routing.penalty.item() == pytest.approx(-0.1 * sum(x * math.log(x) for x in p))
    assert decide(TopP(threshold), [p], 2).weights_NK.sum().item() == pytest.approx(1)
    assert decide(TopP(threshold, entropy_weight=0), [p], 2).penalty is None


def test_relu_takes_every_positive_score():
    logits_NE = torch.tensor([[2.0, -1.0, 1.0, 0.0], [3.0, -1.0, -2.0, -3.0], [-1.0, -1.0, -1.0, -1.0]])
    state = {"penalty_weight": torch.tensor(0.5)}
    routing = ReLURouter().route(logits_NE, 2, False, state=state)
    assert_chosen(routing, [[0, 2], [0], []])
    torch.testing.assert_close(routing.weights_NK, logits_NE.clamp(min=0))
    # E/(kN) = 2/3 times the choices (2, 0, 1, 0), times mean scores (5, 0, 1, 0)/3
    assert routing.penalty.item() == pytest.approx(0.5 * (2 / 3) * (2 * 5 / 3 + 1 * 1 / 3))
    torch.testing.assert_close(
        ReLURouter().route(logits_NE, 2, state=state).weights_NK,
        torch.tensor([[2 / 3, 0, 1 / 3, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
    )
    rule = ReLURouter(factor=1.5)
    rule.after_update(state, torch.tensor([4, 3, 0, 0]), tokens=3, top_k=2)  # 7 of at most 6
    assert state["penalty_weight"].item() == pytest.approx(0.75)
    rule.after_update(state, torch.tensor([2, 0, 1, 0]), tokens=3, top_k=2)
    assert state["penalty_weight"].item() == pytest.approx(0.5)


def test_hash_is_fixed_by_the_token():
    rule = Hash(seed=3)
    state = rule.buffers(8, 2, 1000)
    tokens_N = torch.tensor([5, 9, 5])
    first, second = (rule.route(torch.randn(3, 8), 2, state=state, tokens_N=tokens_N) for _ in range(2))
    assert torch.equal(first.expert_ids_NK, second.expert_ids_NK), "the scores play no part"
    assert first.expert_ids_NK[0].tolist() == first.expert_ids_NK[2].tolist()
    assert (first.weights_NK == 0.5).all()
    table_VK = state["experts_of_VK"]
    assert (table_VK[:, 0] != table_VK[:, 1]).all(), "an expert is chosen once"
    assert max_over_mean(table_VK.flatten().bincount(minlength=8) / 2000) < 1.2, "even over the vocabulary"
    assert torch.equal(Hash(seed=3).buffers(8, 2, 1000)["experts_of_VK"], table_VK)
    assert not torch.equal(Hash(seed=4).buffers(8, 2, 1000)["experts_of_VK"], table_VK)
    with pytest.raises(ValueError, match="needs the token ids"):
        make_layer("hash")(torch.randn(1, 3, 8))


def test_expert_choice_lets_experts_pick():
    p_NE = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]
    routing = decide(ExpertChoice(), p_NE, 1, renormalize=False)  # each expert picks 4 * 1 / 2 tokens
    assert_chosen(routing, [[0], [0], [1], [1]])
    torch.testing.assert_close(routing.weights_NK, torch.tensor([[0.9, 0], [0.8, 0], [0, 0.3], [0, 0.4]]))
    p_NE = [[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8]]
    routing = decide(ExpertChoice(), p_NE, 1)
    assert_chosen(routing, [[0], [0], [1], [1]])
    p_NE = [[0.5, 0.3, 0.2], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]
    routing = decide(ExpertChoice(), p_NE, 2)  # 3 * 2 / 3 tokens each
    assert_chosen(routing, [[0, 1, 2], [0, 1], [2]])
    torch.testing.assert_close(routing.weights_NK[1], torch.tensor([5 / 9, 4 / 9, 0]))
    assert expert_counts(routing).tolist() == [2, 2, 2], "even by construction"


# ------------------------------------------------------------------------------------------------ what all rules share


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_rule_by_name_by_dict_and_in_a_saved_configuration(kind):
    rule = ROUTERS[kind]()
    assert as_router(kind) == as_router(rule) == as_router({"kind": kind}) == rule
    config = make_config(rule)
    assert config.moe.router == make_config(kind).moe.router == rule
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_configuration_from_before_the_rules():
    values = make_config().to_dict()
    for name in ("router", "balance", "shared_experts", "expert_d_ff", "capacity_factor", "expert_dropout",
                 "router_jitter", "logit_norm"):  # fmt: skip
        del values["moe"][name]
    assert ModelConfig.from_dict(values) == make_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(router="topk"), "router='topk' is unknown; choose one of 'top_k', 'sampled'"),
        (dict(router={"kind": "top_p", "p": 0.5}), "unexpected keyword argument 'p'"),
        (dict(router=3), "router=3 is unknown"),
        (dict(balance="even"), "balance='even' is unknown"),
        (dict(capacity_factor=0), "capacity_factor=0 is not a positive number"),
        (dict(logit_norm=math.inf), "logit_norm=inf is not a positive number"),
        (dict(expert_dropout=1.0), "expert_dropout=1.0 is outside"),
        (dict(router_jitter=-0.1), "router_jitter=-0.1 is outside"),
        (dict(shared_experts=-1), "shared_experts=-1 is too small"),
        (dict(expert_d_ff=0), "expert_d_ff=0 is too small"),
        (dict(router="top_p", noisy=True, balance="importance"), "not of router='top_p'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


@pytest.mark.parametrize("wrong", [lambda: TopP(0), lambda: TopP(1.1), lambda: TopP(entropy_weight=-1),
                                   lambda: Sampled(0), lambda: SelectionBias(-1), lambda: ReLURouter(start=0),
                                   lambda: ReLURouter(factor=1)])  # fmt: skip
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_numbers_at_the_edge():
    assert (SelectionBias(0).rate, TopP(1, entropy_weight=0).threshold) == (0, 1), "no moves; every expert"


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("router", [*RULES, TopK(softmax_first=False)])
def test_do_copies_keep_the_function(router, renormalize):
    """Exactly where the rule claims it, and nowhere else."""
    torch.manual_seed(0)
    dense = DecoderLM(replace(make_config(), moe=None)).double()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    settings = make_config(router, renormalize=renormalize, num_experts=4 if router == "relu" else 8).moe
    moe = upcycle(dense, settings)
    report = check_equivalence(dense, moe, make_tokens(6))
    claims = renormalize if router is None else settings.router.preserves_function(renormalize)
    assert report.passed == claims
    largest = max(1.0, float(dense(make_tokens(6)).logits_BTV.detach().abs().max()))
    assert report.max_abs_diff < 1e-12 * largest if claims else report.max_abs_diff > 1e-2
    if claims:  # in training, too
        tokens_BT = make_tokens(6)
        torch.testing.assert_close(moe.train()(tokens_BT).logits_BTV, dense(tokens_BT).logits_BTV)


@pytest.mark.parametrize(
    ("router", "balance"),
    [(rule, "layer") for rule in RULES if rule != "straight_through"] + [(None, balance) for balance in BALANCES[1:]],
)
def test_gradients_of_the_objective(router, balance):
    """Against finite differences; straight-through is no derivative: it has its own test."""
    noisy = balance == "importance" and router in (None, "top_k")
    model = make_model(router, d=4, vocab=5, balance=balance, aux_weight=1.0, z_weight=0.5, noisy=noisy)
    if router == "relu":
        for block in model.blocks:
            block.ffn.rule_state.penalty_weight.fill_(0.5)
    if router == "top_p":
        model.config = replace(model.config, moe=replace(model.config.moe, router=TopP(0.6, entropy_weight=0.5)))
    tokens_BT, targets_BT = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[2, 4], [3, 0]])  # no two alike: no ties
    names = ["blocks.0.ffn.router.weight", "blocks.1.ffn.router.weight"]
    names += ["blocks.0.ffn.noise.weight"] if noisy else []
    parameters = dict(model.named_parameters())

    def objective(*values):
        torch.manual_seed(5)  # the same draws each time
        out = functional_call(model, dict(zip(names, values)), (tokens_BT, targets_BT))
        return model.objective(out)

    assert torch.autograd.gradcheck(objective, [parameters[name] for name in names])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("router", RULES)
def test_noise_only_in_training(router, noise):
    model, tokens_BT = make_model(router, num_experts=8, **NOISES[noise]), make_tokens()
    model.eval()
    assert torch.equal(model(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    model.train()
    if router != "hash":
        assert not torch.equal(model(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    plain = make_model(router, num_experts=8).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    assert torch.equal(plain(tokens_BT).logits_BTV, model.eval()(tokens_BT).logits_BTV), "in evaluation it is not there"


@pytest.mark.parametrize("router", RULES)
@pytest.mark.parametrize("noise", [{}, dict(expert_dropout=0.9, noisy=True, router_jitter=0.1)])
def test_how_many_experts_are_active(router, noise):
    """Exactly K of each token where K is fixed, none twice."""
    model = make_model(router, num_experts=6, **noise)
    for training in (True, False):
        for routing in model.train(training)(make_tokens()).routings:
            n, k = routing.expert_ids_NK.shape
            kept_NK = torch.ones(n, k, dtype=torch.bool) if routing.kept_NK is None else routing.kept_NK
            assert all(len(set(ids)) == k for ids in routing.expert_ids_NK.tolist())
            if router in FIXED_K:
                assert (kept_NK.sum(-1) == 2).all()
            if router == "top_p":
                assert (kept_NK.sum(-1) >= 1).all()
            assert int(expert_counts(routing).sum()) == int(kept_NK.sum())


def test_expert_dropout_takes_experts_out_for_all_tokens():
    """An expert that is out of the choice is chosen by no token; never do fewer than K remain."""
    for router in (rule for rule in RULES if rule != "hash"):
        layer = make_layer(router, num_experts=8, expert_dropout=0.6)
        if router == "selection_bias":
            layer.rule_state.selection_bias_E.fill_(0.3)  # a bias must not bring it back
        x_ND, used = torch.randn(200, 8), []
        for _ in range(30):
            routing = layer.route(x_ND)
            out_E = routing.logits_NE.isinf().all(0)
            assert not routing.logits_NE[:, ~out_E].isinf().any()
            assert (expert_counts(routing)[out_E] == 0).all(), router
            assert int((~out_E).sum()) >= 2
            used.append(float(out_E.float().mean()))
        assert 0.45 < sum(used) / 30 < 0.65, "6 in 10, but for the K that are spared"


def test_scores_standardised_over_the_experts():
    layer = make_layer(logit_norm=2.0, num_experts=8)
    layer.router.weight.data *= 100
    logits_NE = layer.router_logits(torch.randn(50, 8))
    torch.testing.assert_close(logits_NE.mean(-1), torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_NE.std(-1, correction=0), torch.full((50,), 2.0), atol=1e-4, rtol=0)


def test_jitter_multiplies_the_routers_input():
    layer = make_layer(router_jitter=0.25, num_experts=8)
    layer.router.weight.data = torch.eye(8)
    ratio_NE = layer.router_logits(torch.ones(4000, 8))
    assert 0.75 <= ratio_NE.min() < 0.76 and 1.24 < ratio_NE.max() <= 1.25
    assert ratio_NE.mean().item() == pytest.approx(1, abs=0.01)


def test_shared_experts_are_added_for_every_token():
    layer = make_layer(shared_experts=2, expert_d_ff=5, dtype=torch.float64)
    assert layer.shared.w_up_EFD.shape == (1, 10, 8) and layer.experts.w_up_EFD.shape == (4, 5, 8)
    x_BTD = torch.randn(2, 3, 8, dtype=torch.float64)
    y_BTD, routing = layer(x_BTD)
    routed_ND = experts_loop(layer.experts, x_BTD.flatten(0, 1), routing)
    torch.testing.assert_close(y_BTD.flatten(0, 1), routed_ND + layer.shared.expert(0, x_BTD.flatten(0, 1)))


# ------------------------------------------------------------------------------------------- the loop and the fast path


def both_paths(layer, routing, x_ND):
    """Output and gradients of both paths for one routing, as two dicts."""
    results = []
    inputs = [x_ND, *layer.parameters()]
    for path in (experts_loop, experts_sorted):
        y_ND = path(layer.experts, x_ND, routing)
        scale_ND = torch.linspace(-1, 1, y_ND.numel(), dtype=y_ND.dtype).view_as(y_ND)
        gradients = torch.autograd.grad((y_ND * scale_ND).sum(), inputs, retain_graph=True, materialize_grads=True)
        results.append([y_ND, *gradients])
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("router", RULES)
def test_sorted_equals_the_loop(router, capacity, dtype, tolerance):
    layer = make_layer(router, dtype, num_experts=6, capacity_factor=capacity)
    for n in (1, 33):
        for away in ([], [0, 3], [1, 2, 3, 4, 5]):  # all in use, two empty, one takes all it can
            x_ND = torch.randn(n, 8, dtype=dtype, requires_grad=True)
            push_E = torch.zeros(6, dtype=dtype)
            push_E[away] = -30.0
            handle = layer.router.register_forward_hook(lambda _m, _i, out, push_E=push_E: out + push_E)
            routing = layer.route(x_ND, torch.arange(n) % 11)
            handle.remove()
            expected, actual = both_paths(layer, routing, x_ND)
            # of the largest of all: the router's gradient is a difference of large numbers
            scale = max(float(value.detach().abs().max()) for value in expected)
            for one, other in zip(expected, actual):
                assert (one - other).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_choice_kept_at_all(dtype):
    layer = make_layer("relu", dtype)
    x_ND = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    layer.router.weight.data.zero_()  # no score is above 0
    routing = layer.route(x_ND)
    assert not routing.kept_NK.any() and int(expert_counts(routing).sum()) == 0
    for expected, actual in zip(*both_paths(layer, routing, x_ND)):
        assert torch.equal(expected, actual) and not actual.any()
    assert limit_capacity(routing, 1.0).dropped == 0, "nothing was dropped of nothing"


@pytest.mark.parametrize("router", RULES)
def test_extreme_shapes_and_scores(router):
    """One token, one expert, all experts, equal scores, huge scores: finite values and gradients."""
    extremes = dict(logit_norm=1.0, expert_dropout=0.5, noisy=True)
    for num_experts, top_k in ((1, 1), (4, 1), (4, 4)):
        for settings in ({}, extremes, dict(capacity_factor=0.5)):
            for scale in (0.0, 1000.0):
                layer = make_layer(router, num_experts=num_experts, top_k=top_k, **settings)
                layer.router.weight.data *= scale
                for n in (1, 9):
                    y_BTD, routing = layer(torch.randn(1, n, 8), torch.zeros(1, n, dtype=torch.long))
                    loss = y_BTD.square().sum() + (0 if routing.penalty is None else routing.penalty)
                    loss = loss + routing.probabilities_NE.square().sum()
                    loss.backward()
                    assert y_BTD.isfinite().all()
                    for name, parameter in layer.named_parameters():
                        assert parameter.grad is None or parameter.grad.isfinite().all(), (name, settings, scale, n)


@pytest.mark.parametrize("router", RULES)
def test_precisions(router):
    tokens_BT = make_tokens()
    expected = make_model(router).eval()(tokens_BT).logits_BTV
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        model = make_model(router).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(tokens_BT, tokens_BT)
            model.objective(out).backward()
            evaluated = model.eval()(tokens_BT)
        for routing in (*out.routings, *evaluated.routings):
            assert routing.weights_NK.dtype == routing.probabilities_NE.dtype == torch.float32
        for parameter in model.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        if dtype == torch.float32 and not autocast:
            torch.testing.assert_close(evaluated.logits_BTV.double(), expected, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- recomputation, cache, causality


@pytest.mark.parametrize("router", RULES)
def test_gradient_checkpointing_makes_the_same_routing_again(router):
    """With every kind of random number in play."""
    model = make_model(router, noisy=True, router_jitter=0.3, expert_dropout=0.3, num_experts=8, capacity_factor=1.0)
    tokens_BT, results = make_tokens(), []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(7)
        model.zero_grad()
        model.objective(model(tokens_BT, tokens_BT)).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("router", RULES)
def test_generation_with_a_cache(router):
    """The same tokens with and without; expert choice, which sees the batch, only runs."""
    model, prompt_BT = make_model(router), make_tokens(4, 5)
    cached_BT, plain_BT = (generate(model, prompt_BT, 7, use_cache=use_cache) for use_cache in (True, False))
    assert cached_BT.shape == (4, 12)
    if router != "expert_choice":
        assert torch.equal(cached_BT, plain_BT)


@pytest.mark.parametrize("router", RULES)
def test_only_expert_choice_leaks_the_future(router):
    report = check_causality(make_model(router), make_tokens())
    assert report.passed == (router != "expert_choice"), str(report)


def test_expert_choice_leaks_by_hand():
    """The last token's score decides whether the first is picked; alone, a token is picked by every expert."""
    first = decide(ExpertChoice(), [[0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [0.3, 0.7]], 1)
    second = decide(ExpertChoice(), [[0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0.8, 0.2]], 1)
    assert_chosen(first, [[0], [0], [1], [1]])
    assert_chosen(second, [[1], [1], [0], [0]])
    assert_chosen(decide(ExpertChoice(), [[0.6, 0.4]], 1), [[0, 1]])


# ------------------------------------------------------------------------------------------------------------- capacity


def test_capacity_by_hand():
    """Five tokens, two experts, K=1: each expert takes ceil(1.0 * 5 / 2) = 3, first come, first served."""
    routing = limit_capacity(route(torch.tensor([[2.0, 0], [2, 0], [0, 2], [2, 0], [2, 0]]), 1, False), 1.0)
    assert routing.kept_NK.flatten().tolist() == [True, True, True, True, False]
    assert routing.dropped.item() == pytest.approx(1 / 5)
    assert (routing.weights_NK[4] == 0).all() and (routing.weights_NK[:4] > 0.8).all(), "the rest is not rescaled"
    assert expert_counts(routing).tolist() == [3, 1]
    assert expert_counts(routing, wanted=True).tolist() == [4, 1], "balancing sees what was asked for"
    torch.testing.assert_close(expert_load(routing), torch.tensor([3 / 4, 1 / 4]))
    torch.testing.assert_close(expert_load(routing, wanted=True), torch.tensor([4 / 5, 1 / 5]))


def test_first_choices_go_before_second_ones():
    """K=2 of 2 experts, capacity 2: each token's second choice finds the place taken by a later token's first."""
    routing = limit_capacity(route(torch.tensor([[1.0, 0], [0, 1], [0, 1]]), 2), 0.5)
    assert routing.expert_ids_NK.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert routing.kept_NK.tolist() == [[True, False], [True, True], [True, False]]
    assert routing.dropped.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("router", RULES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 100.0])
def test_no_expert_takes_more_than_its_capacity(router, factor):
    layer = make_layer(router, num_experts=6, capacity_factor=factor)
    for training in (True, False):
        _, routing = layer.train(training)(torch.randn(2, 20, 8), make_tokens(2, 20))
        wanted_E, kept_E = expert_counts(routing, wanted=True), expert_counts(routing)
        capacity = math.ceil(factor * int(wanted_E.sum()) / 6)
        assert torch.equal(kept_E, wanted_E.clamp(max=capacity)), "full experts are full, the others lose nothing"
        assert routing.dropped.item() == pytest.approx(float(1 - kept_E.sum() / wanted_E.sum()), abs=1e-6)
        assert (routing.weights_NK[~routing.kept_NK] == 0).all()
        assert routing.dropped == 0 if factor == 100.0 else factor == 1.0 or routing.dropped > 0.5


def test_the_balance_loss_and_the_bias_see_the_demand():
    """All tokens want expert 0: with or without a capacity, that is the load to be balanced."""
    plain, limited = (make_layer("selection_bias", capacity_factor=factor, top_k=1) for factor in (None, 1.0))
    x_ND = torch.randn(40, 8)
    for push in (0.0, 5.0):
        outs = []
        for layer in (plain, limited):
            handle = layer.router.register_forward_hook(
                lambda _m, _i, out, push=push: out + torch.tensor([push, push / 2, 0, 0])
            )
            outs.append(layer.route(x_ND))
            handle.remove()
        assert outs[1].dropped > 0
        for routing in outs:
            assert torch.equal(expert_counts(routing, wanted=True), expert_counts(outs[0]))


def test_straight_through_keeps_its_gradient_under_a_capacity():
    logits_NE = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    plain = StraightThrough().route(logits_NE, 2, training=True)
    limited = limit_capacity(plain, 0.5)
    assert limited.dropped > 0
    y_NE = torch.randn(12, 4, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((r.weights_NK * y_NE).sum(), logits_NE, retain_graph=True)[0] for r in (plain, limited)
    ]
    torch.testing.assert_close(*gradients)
    assert (limited.weights_NK[~limited.kept_NK] == 0).all()


def test_what_capacity_makes_depend_on_what():
    """K=1: on earlier tokens of the batch. K=2: a later token's first choice displaces an earlier one's second."""
    one_BT = make_tokens(1)
    assert check_causality(make_model(top_k=1, capacity_factor=0.5), one_BT).passed
    reports = [check_causality(make_model(top_k=2, capacity_factor=0.5, seed=seed), one_BT) for seed in range(5)]
    assert not all(report.passed for report in reports)

    model = make_model(top_k=1, capacity_factor=0.5).eval()
    alone_TV = model(one_BT).logits_BTV[0]
    below_BT = torch.cat([make_tokens(3, seed=4), one_BT])
    assert not torch.allclose(model(below_BT).logits_BTV[-1], alone_TV), "sequences above take the places"
    for t in range(1, 13):  # a token alone always finds a place
        routing = model(one_BT[:, t - 1 : t]).routings[0]
        assert routing.dropped == 0


# ------------------------------------------------------------------------------------------------------ rules that move


def test_the_selection_bias_balances():
    """A router that prefers some experts: 400 updates bring the load to even, and without them it stays as it was."""
    layer = make_layer(SelectionBias(rate=0.01), num_experts=8, top_k=2)
    layer.router.weight.data *= 0.5
    layer.router.register_forward_hook(lambda _m, _i, out: out + torch.linspace(-2, 2, 8))
    counts = []
    for step in range(400):
        routing = layer.route(torch.randn(256, 8, generator=torch.Generator().manual_seed(step)))
        counts.append(expert_counts(routing))
        layer.after_update(counts[-1], 256)
    first_E, last_E = sum(counts[:10]), sum(counts[-100:])
    assert max_over_mean(first_E / first_E.sum()) > 2.5 and max_over_mean(last_E / last_E.sum()) < 1.05
    bias_E = layer.state_dict()["rule_state.selection_bias_E"]
    assert (bias_E.diff() < 0).all(), "the preferred are held back most"
    layer.eval()(torch.randn(1, 5, 8))
    assert torch.equal(layer.rule_state.selection_bias_E, bias_E)


def test_relu_is_driven_to_k_experts():
    """By its penalty, from about half of 16 experts to 2 a token."""
    layer = make_layer(ReLURouter(start=1e-2, factor=1.05), num_experts=16, top_k=2, router_bias=True)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    active = []
    for step in range(300):
        x_ND = torch.randn(128, 8, generator=torch.Generator().manual_seed(step))
        routing = layer.route(x_ND)
        y_ND = experts_sorted(layer.experts, x_ND, routing)
        optimizer.zero_grad()
        ((y_ND - x_ND).square().mean() + routing.penalty).backward()
        optimizer.step()
        active.append(float(routing.kept_NK.sum()) / 128)
        layer.after_update(expert_counts(routing), 128)
    assert active[0] > 6
    assert sum(active[-100:]) / 100 == pytest.approx(2, abs=0.3)


def make_streams():
    return [
        TokenStream.from_ids(torch.randint(11, (400,), generator=torch.Generator().manual_seed(i)), vocab_size=11)
        for i in range(2)
    ]


@pytest.mark.parametrize("router", [SelectionBias(rate=0.02), ReLURouter(factor=2.0), "sampled"])
def test_training_moves_the_rule_and_resumes_bit_for_bit(router, tmp_path):
    """Six updates in one go, or stopped after three and resumed: the same weights and the same memory of the rule."""
    settings = TrainConfig(
        steps=6, batch_size=2, accumulation=2, schedule="constant", checkpoint_every=3, eval_every=3, log_every=1
    )
    models = {name: make_model(router, expert_dropout=0.2).float() for name in ("whole", "resumed")}
    start = {name: tensor.clone() for name, tensor in models["whole"].state_dict().items()}
    quiet = dict(progress=False, verbose=False)
    train(models["whole"], *make_streams(), settings, directory=tmp_path / "whole", **quiet)
    train(models["resumed"], *make_streams(), replace(settings, steps=3), directory=tmp_path / "resumed", **quiet)
    fresh = make_model(router, expert_dropout=0.2, seed=9).float()
    train(fresh, *make_streams(), settings, directory=tmp_path / "resumed", **quiet)
    whole, resumed = models["whole"].state_dict(), fresh.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    for name in (name for name in whole if "rule_state" in name):
        assert not torch.equal(whole[name], start[name]), name
    if isinstance(router, SelectionBias):
        steps_E = whole["blocks.0.ffn.rule_state.selection_bias_E"] / 0.02
        torch.testing.assert_close(steps_E, steps_E.round())
        assert steps_E.abs().max() <= 6, "one step an update, however many micro-batches"


def test_the_penalty_is_part_of_the_objective():
    model = make_model(TopP(0.5, entropy_weight=0.3), aux_weight=0.0)
    out = model(make_tokens(), make_tokens())
    entropies = [-(r.probabilities_NE * r.probabilities_NE.log()).sum(-1).mean() for r in out.routings]
    torch.testing.assert_close(model.objective(out) - out.loss, 0.3 * sum(entropies))


# ----------------------------------------------------------------------------------------- what reads a model's routing


@pytest.mark.parametrize("router", RULES)
def test_recording_takes_what_has_k_choices_and_refuses_the_rest(router, tmp_path):
    model, tokens_BT = make_model(router, num_experts=6).eval(), make_tokens()
    snapshots = RoutingSnapshots(tokens_BT)
    if router in FIXED_K:
        with record_routing(model) as trace:
            out = model(tokens_BT)
        assert torch.equal(trace.expert_ids, torch.stack([routing.expert_ids_NK for routing in out.routings]))
        snapshots(0, model)
        assert torch.equal(snapshots.expert_ids[0], trace.expert_ids)
    else:
        with pytest.raises(ValueError, match="gives tokens different numbers of experts"), record_routing(model):
            model(tokens_BT)
        with pytest.raises(ValueError, match="gives tokens different numbers of experts"):
            snapshots(0, model)


def test_a_recorded_choice_that_was_dropped_has_weight_zero():
    model = make_model(num_experts=6, capacity_factor=0.5).eval()
    with record_routing(model) as trace:
        out = model(make_tokens())
    for i, routing in enumerate(out.routings):
        assert torch.equal(trace.expert_ids[i], routing.expert_ids_NK)
        assert torch.equal(trace.weights[i] == 0, ~routing.kept_NK) and not routing.kept_NK.all()


@pytest.mark.parametrize("router", [rule for rule in RULES if rule != "hash"])
def test_a_removed_expert_is_not_used(router):
    model, tokens_BT = make_model(router, num_experts=6).eval(), make_tokens()
    expected = model(tokens_BT).logits_BTV
    if router == "selection_bias":
        model.blocks[0].ffn.rule_state.selection_bias_E[3] = 0.5
    with intervene(model, remove={0: [3]}):
        out = model(tokens_BT)
    assert expert_counts(out.routings[0])[3] == 0 and expert_counts(out.routings[1]).sum() > 0
    assert out.logits_BTV.isfinite().all() and not torch.equal(out.logits_BTV, expected)
    if router in (None, "top_k", "sampled", "selection_bias", "straight_through"):
        with intervene(model, top_k=3):
            assert all(routing.expert_ids_NK.shape[1] == 3 for routing in model(tokens_BT).routings)


def test_interventions_that_a_rule_would_not_heed():
    for settings, asked, message in (
        (dict(router="hash"), dict(remove=[0]), "hash routing follows the token ids"),
        (dict(router="top_p"), dict(top_k=1), "router='top_p' does not choose a fixed number"),
        (dict(router="relu"), dict(top_k=1), "router='relu' does not choose a fixed number"),
        (dict(logit_norm=1.0), dict(remove=[0]), "logit_norm=1.0 standardises the scores"),
        (dict(logit_norm=1.0), dict(temperature=2.0), "logit_norm=1.0 standardises the scores"),
    ):
        with pytest.raises(ValueError, match=message), intervene(make_model(**settings), **asked):
            pass
    with intervene(make_model(logit_norm=1.0), top_k=1):
        pass


def test_export_refuses_what_no_class_has():
    for settings, message in (
        (dict(router="selection_bias"), r"router=SelectionBias\(.*know softmax top-k alone"),
        (dict(router=TopK(softmax_first=False), renormalize=False), "know softmax top-k alone"),
        (dict(shared_experts=1), "shared_experts=1: Mixtral has none"),
        (dict(capacity_factor=1.25), "capacity_factor=1.25: no standard class drops tokens"),
        (dict(logit_norm=2.0), "logit_norm=2.0: no standard class"),
    ):
        with pytest.raises(ValueError, match=message):
            to_hf(make_model(**settings))


@pytest.mark.parametrize(
    "settings",
    [dict(router="top_k"), dict(expert_d_ff=8), dict(expert_d_ff=8, layers=(1,)),
     dict(router=TopK(softmax_first=False), balance="sequence")],
)  # fmt: skip
def test_export_of_what_a_class_has(settings):
    model, tokens_BT = make_model(**settings).float().eval(), make_tokens()
    theirs = to_hf(model)
    torch.testing.assert_close(theirs(input_ids=tokens_BT).logits, model(tokens_BT).logits_BTV, rtol=1e-4, atol=1e-4)
    assert theirs.config.output_router_logits == (settings.get("balance") != "sequence")


@pytest.mark.parametrize("settings", [dict(shared_experts=2), dict(expert_d_ff=5), dict(shared_experts=1, noisy=True)])
def test_parameters_and_flops_with_shared_and_narrow_experts(settings, monkeypatch):
    monkeypatch.setattr(experts_module, "_has_grouped_mm", lambda *_: False)  # which the counter does not know
    model = DecoderLM(make_config(**settings)).train()  # noise is computed in training only
    assert model.num_parameters() == count_parameters(model.config).total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(make_tokens(1))
    assert forward_flops(model.config) == counter.get_total_flops()
