"""Routing by hand, the sorted path against the loop that defines the layer, the losses and what they push."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from upcycling.core import experts as experts_module
from upcycling.core.balance import aux_loss, importance_loss, load_loss, pooled_aux_loss, sequence_aux_loss, z_loss
from upcycling.core.config import ACTIVATIONS, ModelConfig, MoEConfig
from upcycling.core.initialisation import copy_into_experts
from upcycling.core.model import DecoderLM, FeedForward
from upcycling.core.moe import MoELayer, experts_loop, experts_sorted
from upcycling.core.routing import Routing, expert_load, limit_capacity, route


def make_config(d=8, f=12, activation="gelu", bias=True, **moe):
    experts = MoEConfig(**(dict(num_experts=4, top_k=2, router_bias=True) | moe))
    return ModelConfig(
        vocab_size=9, d_model=d, n_layers=1, n_heads=2, d_ff=f, seq_len=8, activation=activation, ffn_bias=bias,
        moe=experts,
    )  # fmt: skip


def make_layer(dtype=torch.float32, seed=0, **sizes):
    """An MoE layer of which every weight and bias is random."""
    torch.manual_seed(seed)
    layer = MoELayer(make_config(**sizes)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def chosen(expert_ids_NK, num_experts, probabilities_NE=None):
    """A Routing in which these experts were chosen, with equal weights and (if not given) uniform probabilities."""
    ids_NK = torch.tensor(expert_ids_NK)
    n, k = ids_NK.shape
    if probabilities_NE is None:
        probabilities_NE = torch.full((n, num_experts), 1 / num_experts)
    return Routing(probabilities_NE.log(), probabilities_NE, ids_NK, torch.full((n, k), 1 / k))


# -------------------------------------------------------------------------------------------------------------- routing


def test_route_by_hand():
    logits_NE = torch.tensor([[1.0, 2.0, 3.0, 2.0], [8.0, 1.0, 2.0, 4.0]]).log()  # probabilities in eighths, fifteenths
    routing = route(logits_NE, top_k=1)
    assert routing.expert_ids_NK.tolist() == [[2], [0]]
    assert routing.weights_NK.tolist() == [[1.0], [1.0]]

    routing = route(logits_NE[1:], top_k=3)
    torch.testing.assert_close(routing.probabilities_NE, torch.tensor([[8.0, 1.0, 2.0, 4.0]]) / 15)
    assert routing.expert_ids_NK.tolist() == [[0, 3, 2]], "the chosen experts come best first"
    torch.testing.assert_close(routing.weights_NK, torch.tensor([[8.0, 4.0, 2.0]]) / 14)
    unscaled = route(logits_NE[1:], top_k=3, renormalize=False)
    torch.testing.assert_close(unscaled.weights_NK, torch.tensor([[8.0, 4.0, 2.0]]) / 15)
    torch.testing.assert_close(routing.logits_NE, logits_NE[1:])


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_weights_sum_to_one_and_fall(top_k):
    logits_NE = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    routing = route(logits_NE, top_k)
    torch.testing.assert_close(routing.weights_NK.sum(-1), torch.ones(50))
    assert (routing.weights_NK.diff(dim=-1) <= 0).all()
    assert all(len(set(ids)) == top_k for ids in routing.expert_ids_NK.tolist()), "an expert is chosen once"
    assert torch.equal(routing.expert_ids_NK, logits_NE.argsort(dim=-1, descending=True)[:, :top_k])


def test_ties_send_every_token_to_the_same_experts():
    routing = route(torch.zeros(64, 8), top_k=2)
    assert len({tuple(ids) for ids in routing.expert_ids_NK.tolist()}) == 1
    assert (routing.weights_NK == 0.5).all()


def test_routing_is_computed_in_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        routing = route(torch.randn(3, 4).to(dtype), 2)
        assert routing.probabilities_NE.dtype == routing.weights_NK.dtype == routing.logits_NE.dtype == expected


@pytest.mark.parametrize("top_k", [0, 9])
def test_route_refuses_more_experts_than_there_are(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} but there are 8 experts; choose 1..8"):
        route(torch.zeros(1, 8), top_k)


# ------------------------------------------------------------------------------------------- the loop and the fast path


def compute(path, layer, x_ND, only=None):
    """Output and gradients (x, router, experts) of one path; `only` keeps all but these experts empty."""
    x_ND = x_ND.clone().requires_grad_()
    logits_NE = layer.router(x_ND)
    if only is not None:
        away_E = torch.full((logits_NE.shape[-1],), -50.0, dtype=logits_NE.dtype)
        away_E[only] = 0.0
        logits_NE = logits_NE + away_E
    routing = route(logits_NE, layer.top_k)
    y_ND = path(layer.experts, x_ND, routing)
    scale_ND = torch.linspace(-1, 1, y_ND.numel(), dtype=y_ND.dtype).view_as(y_ND)
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad((y_ND * scale_ND).sum(), [x_ND, *named.values()])
    return routing, dict(zip(["y", "x", *named], [y_ND, *gradients], strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "d", "f", "tolerance"),
    [
        (torch.float32, 8, 12, 2e-5),  # grouped_mm
        (torch.float32, 6, 10, 2e-5),  # a product per expert
        (torch.float64, 8, 12, 1e-13),
    ],
)
def test_sorted_equals_the_loop(activation, bias, dtype, d, f, tolerance):
    for num_experts, top_k in ((1, 1), (2, 1), (2, 2), (8, 2), (8, 8)):
        layer = make_layer(dtype, d=d, f=f, activation=activation, bias=bias, num_experts=num_experts, top_k=top_k)
        for n in (1, 2, 7, 64):
            x_ND = torch.randn(n, d, dtype=dtype)
            _, expected = compute(experts_loop, layer, x_ND)
            _, actual = compute(experts_sorted, layer, x_ND)
            for name, value in expected.items():
                difference = (actual[name] - value).abs().max() / value.abs().max().clamp(min=1)
                assert difference <= tolerance, (name, n, num_experts, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("only", [[0, 1], [6, 7], [2, 5]])
def test_sorted_equals_the_loop_with_empty_experts(dtype, only):
    for d, f in ((8, 12), (6, 10)):
        layer = make_layer(dtype, d=d, f=f, activation="swiglu", num_experts=8, top_k=2)
        x_ND = torch.randn(20, d, dtype=dtype)
        routing, expected = compute(experts_loop, layer, x_ND, only)
        _, actual = compute(experts_sorted, layer, x_ND, only)
        assert set(routing.expert_ids_NK.flatten().tolist()) == set(only)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)
        for name in (name for name in actual if name.startswith("experts.")):
            used_E = actual[name].flatten(1).abs().sum(1) > 0
            assert used_E.nonzero().flatten().tolist() == only, f"{name}: only experts that were used learn"


def test_the_loop_by_hand():
    """Against a sum over tokens and choices that uses neither `Experts.expert` nor any sorting."""
    layer = make_layer(torch.float64, activation="swiglu", num_experts=4, top_k=2)
    experts, x_ND = layer.experts, torch.randn(5, 8, dtype=torch.float64)
    routing = route(layer.router(x_ND), 2)
    y_ND = torch.zeros_like(x_ND)
    for n, k in product(range(5), range(2)):
        e = int(routing.expert_ids_NK[n, k])
        up_F = experts.w_up_EFD[e] @ x_ND[n] + experts.b_up_EF[e]
        gate_F = experts.w_gate_EFD[e] @ x_ND[n] + experts.b_gate_EF[e]
        hidden_F = up_F * gate_F * torch.sigmoid(gate_F)
        y_ND[n] += routing.weights_NK[n, k] * (experts.w_down_EDF[e] @ hidden_F + experts.b_down_ED[e])
    for path in (experts_loop, experts_sorted):
        torch.testing.assert_close(path(experts, x_ND, routing), y_ND, rtol=1e-12, atol=1e-12)
    y_1ND, _ = layer(x_ND[None])
    torch.testing.assert_close(y_1ND[0], y_ND, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_equals_the_dense_ffn(activation, bias):
    config = make_config(activation=activation, bias=bias, num_experts=1, top_k=1)
    torch.manual_seed(0)
    ffn, layer = FeedForward(config).double(), MoELayer(config).double()
    copy_into_experts(ffn, layer.experts)
    x_BTD = torch.randn(2, 3, 8, dtype=torch.float64)
    y_BTD, routing = layer(x_BTD)
    torch.testing.assert_close(y_BTD, ffn(x_BTD), rtol=1e-13, atol=1e-13)
    assert (routing.weights_NK == 1).all()


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_which_widths_take_the_grouped_product(monkeypatch):
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs))
    for sizes, dtype, expected in (
        (dict(d=8, f=12), torch.float32, 2),
        (dict(d=8, f=12, activation="swiglu"), torch.float32, 3),
        (dict(d=8, f=16), torch.bfloat16, 2),
        (dict(d=8, f=12), torch.bfloat16, 0),  # rows of 24 bytes
        (dict(d=6, f=12), torch.float32, 0),
        (dict(d=8, f=10), torch.float32, 0),
        (dict(d=8, f=12), torch.float64, 0),
    ):
        calls.clear()
        make_layer(dtype, **sizes)(torch.randn(1, 5, sizes["d"], dtype=dtype))
        assert len(calls) == expected, (sizes, dtype)


def test_without_a_grouped_product_the_result_is_the_same(monkeypatch):
    layer, x_ND = make_layer(num_experts=8), torch.randn(30, 8)
    _, expected = compute(experts_sorted, layer, x_ND)
    monkeypatch.setattr(experts_module, "_has_grouped_mm", lambda *_: False)
    _, actual = compute(experts_sorted, layer, x_ND)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


def test_the_sorted_path_passes_gradcheck():
    layer = make_layer(torch.float64, d=4, f=3, activation="swiglu", num_experts=3, top_k=2)
    routing = route(torch.randn(4, 3, dtype=torch.float64), 2)
    names, values = zip(*layer.experts.named_parameters(), strict=True)

    def function(x_ND, weights_NK, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        experts = lambda *inputs: torch.func.functional_call(layer.experts, weights, inputs)  # noqa: E731
        return experts_sorted(experts, x_ND, replace(routing, weights_NK=weights_NK))

    x_ND = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    weights_NK = routing.weights_NK.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x_ND, weights_NK, *values))


def test_under_autocast():
    """Values near those of float32, experts computed in bfloat16, gradients in the weights' own float32."""
    for sizes in (dict(d=16, f=32), dict(d=6, f=10)):
        layer, x_BTD = make_layer(**sizes), torch.randn(2, 8, sizes["d"], requires_grad=True)
        expected, routing = layer(x_BTD)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD, _ = layer(x_BTD)
            loop_ND = experts_loop(layer.experts, x_BTD.flatten(0, 1), routing)
        assert y_BTD.dtype == torch.bfloat16
        scale = expected.abs().max()
        # a token whose router is near a tie may be sent elsewhere in bfloat16
        assert ((y_BTD.float() - expected).abs() > 0.05 * scale).any(-1).sum() <= 1
        assert ((loop_ND - expected.flatten(0, 1)).abs() < 0.05 * scale).all()
        y_BTD.float().square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_aux_loss_is_one_at_balance(top_k):
    ids_NK = [[(token + choice) % 8 for choice in range(top_k)] for token in range(16)]
    routing = chosen(ids_NK, 8)
    assert expert_load(routing).tolist() == [1 / 8] * 8
    assert aux_loss(routing).item() == pytest.approx(1)


def test_aux_loss_at_collapse():
    certain_NE = F.one_hot(torch.full((16,), 3), 8).float()
    assert aux_loss(chosen([[3]] * 16, 8, certain_NE)).item() == pytest.approx(8), "E when one expert takes everything"
    for top_k in (2, 4):
        same = list(range(top_k))
        shared_NE = (torch.arange(8) < top_k).float().expand(16, 8) / top_k
        assert aux_loss(chosen([same] * 16, 8, shared_NE)).item() == pytest.approx(8 / top_k), "E/k for shared k"


def test_every_choice_counts():
    """First choices are balanced, second ones all go to expert 0: whoever counts the first alone sees balance."""
    probabilities_NE = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).expand(3, 4)
    routing = chosen([[1, 0], [2, 0], [3, 0]], 4, probabilities_NE)
    torch.testing.assert_close(expert_load(routing), torch.tensor([3.0, 1.0, 1.0, 1.0]) / 6)
    assert aux_loss(routing).item() == pytest.approx(4 * (3 * 0.5 + 0.2 + 0.2 + 0.1) / 6)


def test_aux_loss_pushes_the_overused_expert_down():
    logits_NE = torch.zeros(8, 4, dtype=torch.float64)
    logits_NE[:, 1] = 0.5  # the second choice of every token
    logits_NE[:6, 2] = 1.0
    logits_NE[6:, 0] = 1.0
    logits_NE.requires_grad_()
    for top_k, loads in ((1, (2, 0, 6, 0)), (2, (2, 8, 6, 0))):
        assert (8 * top_k * expert_load(route(logits_NE, top_k))).tolist() == list(loads)
        (gradient_NE,) = torch.autograd.grad(aux_loss(route(logits_NE, top_k)), logits_NE)
        step_E = -gradient_NE.sum(0)
        assert step_E.argmin() == loads.index(max(loads)), "the most used expert loses most"
        assert step_E[3] > 0, "an expert that is not used gains"
        assert torch.autograd.gradcheck(lambda logits, k=top_k: aux_loss(route(logits, k)), logits_NE)


def test_training_on_the_aux_loss_alone_balances():
    layer, x_ND = make_layer(num_experts=4, top_k=2), torch.randn(256, 8)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = aux_loss(route(layer.router_logits(x_ND), layer.top_k))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.03 > 1.01 > losses[-1] > 0.99


def collapsed_on(expert, num_experts=4, tokens=6):
    certain_NE = F.one_hot(torch.full((tokens,), expert), num_experts).float()
    return chosen([[expert]] * tokens, num_experts, certain_NE)


def test_pooling_the_layers_hides_their_collapse():
    """Four layers, each on an expert of its own out of four: 1, the value at balance; layer by layer E."""
    apart = [collapsed_on(e) for e in range(4)]
    assert pooled_aux_loss(apart).item() == pytest.approx(1)
    assert [aux_loss(routing).item() for routing in apart] == [4.0] * 4
    assert pooled_aux_loss([collapsed_on(2)] * 4).item() == pytest.approx(4), "on the same expert it shows"
    one = route(torch.randn(30, 4), 2)
    torch.testing.assert_close(pooled_aux_loss([one]), aux_loss(one))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_pooled_is_that_of_transformers_over_k(top_k):
    """The convention k of the table: transformers counts each of the K choices as a whole token."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_LNE = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    theirs = load_balancing_loss_func(tuple(logits_LNE), num_experts=6, top_k=top_k)
    ours = pooled_aux_loss([route(logits_NE, top_k) for logits_NE in logits_LNE])
    torch.testing.assert_close(theirs / top_k, ours)
    even_NE = 1e-3 * torch.eye(6)  # all experts alike: the K best of token i are i and the first others
    assert load_balancing_loss_func((even_NE,), 6, top_k).item() == pytest.approx(top_k, rel=1e-2)


def test_sequence_balance_by_hand():
    """Two sequences, each on an expert of its own out of two: even together, collapsed each by itself."""
    certain_NE = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    routing = chosen([[0], [0], [1], [1]], 2, certain_NE)
    assert aux_loss(routing).item() == pytest.approx(1)
    assert sequence_aux_loss(routing, 2).item() == pytest.approx(2)
    assert sequence_aux_loss(chosen([[0], [1], [0], [1]], 2, certain_NE[[0, 2, 0, 2]]), 2).item() == pytest.approx(1)
    whole = route(torch.randn(12, 4), 2)
    torch.testing.assert_close(sequence_aux_loss(whole, 1), aux_loss(whole))
    parts = [aux_loss(route(part_NE, 2)) for part_NE in whole.logits_NE.split(4)]
    torch.testing.assert_close(sequence_aux_loss(whole, 3), torch.stack(parts).mean())
    with pytest.raises(ValueError, match="12 tokens are not 5 sequences"):
        sequence_aux_loss(whole, 5)


def test_balance_counts_what_was_asked_for():
    """Choices that a full expert turned away count; where tokens differ in their number of choices, those made."""
    wanted = route(torch.tensor([[4.0, 0], [4, 0], [0, 4], [4, 0]]), 1)
    limited = limit_capacity(wanted, 0.5)
    assert limited.dropped > 0
    for sequences in (1, 2, 4):
        torch.testing.assert_close(sequence_aux_loss(limited, sequences), sequence_aux_loss(wanted, sequences))
    torch.testing.assert_close(aux_loss(limited), aux_loss(wanted))
    torch.testing.assert_close(pooled_aux_loss([limited, wanted]), aux_loss(wanted))
    parts = [aux_loss(route(part_NE, 1)) for part_NE in wanted.logits_NE.split(1)]
    torch.testing.assert_close(sequence_aux_loss(wanted, 4), torch.stack(parts).mean())
    both = chosen([[0, 1], [0, 1]], 2, torch.tensor([[0.75, 0.25]]).expand(2, 2))
    varying = replace(both, kept_NK=torch.tensor([[True, False], [True, True]]))  # loads of 2/3 and 1/3
    assert sequence_aux_loss(varying, 1).item() == pytest.approx(2 * (2 / 3 * 0.75 + 1 / 3 * 0.25))
    nobody = replace(both, kept_NK=torch.zeros(2, 2, dtype=torch.bool), weights_NK=torch.zeros(2, 2))
    assert sequence_aux_loss(nobody, 2) == aux_loss(nobody) == importance_loss(nobody) == 0, "no choice, no imbalance"


def test_importance_by_hand():
    """Total weights (3, 1) have mean 2 and variance 1: squared variation 1/4."""
    uniform = chosen([[0], [0], [0], [1]], 2)
    assert importance_loss(uniform).item() == pytest.approx(1 / 4)
    assert importance_loss(collapsed_on(1)).item() == pytest.approx(3), "E - 1 at collapse"
    assert importance_loss(chosen([[0, 1], [2, 3]], 4)).item() == pytest.approx(0, abs=1e-12)
    weighted = replace(chosen([[0, 1]], 2), weights_NK=torch.tensor([[0.75, 0.25]]))
    assert importance_loss(weighted).item() == pytest.approx((0.25 / 0.5) ** 2), "weights, not choices"


def test_smooth_load_is_what_drawing_again_gives():
    """An expert's own noise is drawn again, the others' stays; how often is it then among the K best?"""
    layer = make_layer(torch.float64, noisy=True, num_experts=4, top_k=2)
    x_ND = torch.randn(3, 8, dtype=torch.float64)
    torch.manual_seed(3)
    routing = layer.route(x_ND)
    draws, load_E = 20_000, torch.zeros(4, dtype=torch.float64)
    for e in range(4):
        logits_SNE = routing.logits_NE.detach().repeat(draws, 1, 1)
        noise_SN = torch.randn(draws, 3, dtype=torch.float64) * routing.noise_std_NE[:, e].detach()
        logits_SNE[..., e] = routing.clean_logits_NE[:, e].detach() + noise_SN
        load_E[e] = (logits_SNE.topk(2).indices == e).any(-1).double().mean(0).sum()
    assert load_loss(routing).item() == pytest.approx(float(load_E.var(correction=0) / load_E.mean() ** 2), abs=0.01)


def test_gradient_of_the_smooth_load():
    layer = make_layer(torch.float64, d=4, noisy=True, num_experts=4, top_k=2)

    def function(router, noise):
        torch.manual_seed(1)
        weights = {"router.weight": router, "noise.weight": noise}
        return load_loss(torch.func.functional_call(layer, weights, (torch.ones(1, 1, 4, dtype=torch.float64),))[1])

    assert torch.autograd.gradcheck(function, (layer.router.weight, layer.noise.weight))
    few = make_layer(noisy=True, top_k=2, expert_dropout=0.9)  # leaves the two that are chosen
    load_loss(few.route(torch.randn(5, 8))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in (few.router.weight, few.noise.weight))
    everyone = make_layer(noisy=True, top_k=4).route(torch.randn(5, 8))
    assert load_loss(everyone) == 0, "all are chosen, whatever the noise"
    with pytest.raises(ValueError, match="needs a noisy router in training mode"):
        load_loss(layer.eval().route(torch.ones(1, 4, dtype=torch.float64)))


@pytest.mark.parametrize("balance", ["layer", "pooled", "sequence", "importance"])
def test_the_objective_takes_the_chosen_balance(balance):
    config = replace(make_config(balance=balance, aux_weight=0.3, router_std=1.0, noisy=True), n_layers=3)
    model, tokens_BT = DecoderLM(config), torch.randint(9, (2, 8))
    out = model(tokens_BT, tokens_BT)
    expected = {
        "layer": lambda: sum(map(aux_loss, out.routings)),
        "pooled": lambda: 3 * pooled_aux_loss(out.routings),
        "sequence": lambda: sum(sequence_aux_loss(routing, 2) for routing in out.routings),
        "importance": lambda: sum(importance_loss(r) + load_loss(r) for r in out.routings),
    }[balance]()
    torch.testing.assert_close(model.objective(out), out.loss + 0.3 * expected)


def test_z_loss_by_hand():
    logits_NE = torch.tensor([[2.0, 4.0, 2.0], [0.5, 0.25, 0.25]]).log()
    expected = (torch.tensor(8.0).log().square().item() + 0) / 2
    assert z_loss(route(logits_NE, 1)).item() == pytest.approx(expected)
    assert z_loss(route(10 + torch.zeros(1, 1), 1)).item() == pytest.approx(100)


def test_the_objective_weighs_the_losses():
    config = ModelConfig.simple(
        vocab_size=9, d_model=8, n_layers=3, n_heads=2, d_ff=12, seq_len=8,
        moe=MoEConfig(4, 2, layers=(0, 2), router_std=1.0, aux_weight=0.3, z_weight=0.7),
    )  # fmt: skip
    tokens_BT = torch.randint(9, (2, 8))
    model = DecoderLM(config)
    out = model(tokens_BT, tokens_BT)
    assert out.aux_losses_L.shape == out.z_losses_L.shape == (2,)
    expected = out.loss + 0.3 * sum(map(aux_loss, out.routings)) + 0.7 * sum(map(z_loss, out.routings))
    torch.testing.assert_close(model.objective(out), expected)
    dense = DecoderLM(replace(config, moe=None))
    out = dense(tokens_BT, tokens_BT)
    assert dense.objective(out) is out.loss
    assert out.aux_losses_L.shape == out.z_losses_L.shape == (0,)


def test_the_balance_loss_reaches_every_router():
    config = make_config(router_std=0.5)
    model = DecoderLM(replace(config, n_layers=2))
    out = model(torch.randint(9, (2, 8)))
    out.aux_losses_L.sum().backward()
    for block in model.blocks:
        assert block.ffn.router.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- the layers


def test_noise_is_for_training_only():
    layer, x_BTD = make_layer(noisy=True, num_experts=8), torch.randn(2, 8, 8)
    layer.eval()
    first, second = layer(x_BTD), layer(x_BTD)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].logits_NE, layer.router(x_BTD.flatten(0, 1))), "no noise in evaluation"
    layer.train()
    noisy = [layer(x_BTD)[1].logits_NE for _ in range(2)]
    assert not torch.equal(*noisy)
    torch.manual_seed(7)
    actual = layer.router_logits(x_BTD.flatten(0, 1))
    torch.manual_seed(7)
    x_ND = x_BTD.flatten(0, 1)
    expected = layer.router(x_ND) + torch.randn(16, 8) * F.softplus(layer.noise(x_ND))
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    assert layer.noise.weight.grad.abs().sum() > 0, "the size of the noise is learned"


def test_without_noise_training_repeats():
    layer, x_BTD = make_layer().train(), torch.randn(2, 8, 8)
    assert torch.equal(layer(x_BTD)[0], layer(x_BTD)[0])


def test_dense_and_moe_layers_together():
    config = ModelConfig.smol(
        vocab_size=9, d_model=8, n_layers=4, n_heads=2, d_ff=12, seq_len=8, moe=MoEConfig(4, 2, layers=(1, 3))
    )
    model = DecoderLM(config)
    assert [type(block.ffn) for block in model.blocks] == [FeedForward, MoELayer] * 2
    out = model(torch.randint(9, (2, 8)))
    assert len(out.routings) == 2
    assert out.routings[0].expert_ids_NK.shape == (16, 2)
    out.logits_BTV.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_top_1_renormalised_gives_the_router_no_gradient():
    """The weight is p/p = 1 whatever the router says; without renormalising it is p, and the router learns."""
    for renormalize, learns in ((True, False), (False, True)):
        layer = make_layer(torch.float64, top_k=1, renormalize=renormalize)
        layer(torch.randn(1, 9, 8, dtype=torch.float64))[0].square().sum().backward()
        assert (layer.router.weight.grad.abs().max() > 1e-6) == learns


def test_what_a_dense_model_lacks_is_said():
    config = ModelConfig.simple(vocab_size=9, d_model=8, n_layers=1, n_heads=2, d_ff=8, seq_len=4)
    with pytest.raises(ValueError, match="the configuration is dense"):
        MoELayer(config)
    model = DecoderLM(config)
    with pytest.raises(ValueError, match="call the model with targets_BT"):
        model.objective(model(torch.zeros(1, 4, dtype=torch.long)))
