"""Sparse activation of trained models: who computes, who learns, how even the load is, what memory it takes."""

from dataclasses import replace

import pytest
import torch
from tiny import SHORT, TINY, prepare

from upcycling import record_routing
from upcycling.core.config import MoEConfig
from upcycling.cost.account import flop_counter
from upcycling.cost.activations import activation_bytes
from upcycling.cost.parts import count_parameters
from upcycling.experiments.series import Series, new_model
from upcycling.routing.metrics import coefficient_of_variation, dead_experts, load_per_expert

E, K = 8, 2
LONGER = replace(SHORT, steps=60, batch_size=8, eval_every=0, log_every=60)
PRESET = replace(
    TINY,
    moe=MoEConfig(num_experts=E, top_k=K, aux_weight=0.1),
    dense=LONGER,
    sparse=replace(LONGER, steps=100, learning_rate=5e-3),
)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPCYCLING_ARTIFACTS", str(prepare(folder, PRESET)))
        yield Series(PRESET, PRESET.corpus)


@pytest.fixture(scope="module")
def trained(series):
    return series.moe(progress=False, verbose=False)[0].eval()


@pytest.fixture
def model(trained):
    """A copy of the trained model, whose weights a test may spoil."""
    copy = new_model(trained.config, seed=0).eval()
    copy.load_state_dict(trained.state_dict())
    return copy


@pytest.fixture
def batch(series):
    return series.validation_stream.random_windows(8, PRESET.model.seq_len, seed=0, step=0)


def moe_layers(model):
    return [model.blocks[layer].ffn for layer in model.config.moe_layers]


def test_the_model_has_learnt(series, trained, batch):
    with torch.no_grad():
        before = new_model(trained.config, seed=0).eval()(*batch).loss
        assert trained(*batch).loss < before - 0.5


# ------------------------------------------------------------------------------------------------------------ computing


@torch.no_grad()
def test_a_token_is_computed_by_its_experts_alone(model, batch):
    """All other experts are broken in every layer, and nobody notices; one of its own, and all is lost."""
    tokens_BT = batch[0][:1, :1]
    expected = model(tokens_BT)
    chosen_LK = [routing.expert_ids_NK[0].tolist() for routing in expected.routings]
    for layer, chosen_K in zip(moe_layers(model), chosen_LK, strict=True):
        assert len(set(chosen_K)) == K
        others = [e for e in range(E) if e not in chosen_K]
        for weight in layer.experts.parameters():
            weight[others] = torch.nan
    assert torch.equal(model(tokens_BT).logits_BTV, expected.logits_BTV)
    moe_layers(model)[-1].experts.w_up_EFD[chosen_LK[-1][-1]] = torch.nan
    assert model(tokens_BT).logits_BTV.isnan().all()


@torch.no_grad()
def test_in_a_batch_each_token_is_computed_by_its_experts_alone(model):
    layer = moe_layers(model)[0]
    x_BTD = torch.randn(1, 40, PRESET.model.d_model)
    expected_BTD, routing = layer(x_BTD)
    sound = {name: weight.clone() for name, weight in layer.experts.named_parameters()}
    for e in range(E):
        for weight in layer.experts.parameters():
            weight[e] = torch.nan
        y_BTD, _ = layer(x_BTD)
        users_N = (routing.expert_ids_NK == e).any(-1)
        assert 0 < users_N.sum() < 40
        assert torch.equal(y_BTD[0].isnan().all(-1), users_N)
        torch.testing.assert_close(y_BTD[0, ~users_N], expected_BTD[0, ~users_N])
        layer.experts.load_state_dict(sound)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 37])
def test_as_many_rows_are_computed_as_choices_were_made(model, tokens):
    layer, d, f = moe_layers(model)[0], PRESET.model.d_model, PRESET.model.d_ff
    with flop_counter() as counter:
        layer(torch.randn(1, tokens, d))
    of_choices = 2 * tokens * (K * 2 * d * f + d * E)  # K experts of two matrices, one router
    assert 0 <= counter.get_total_flops() - of_choices <= 2 * tokens * K * d, "adding up may be a product, too"


# ------------------------------------------------------------------------------------------------------------- learning


def gradients(model, loss):
    """A gradient for each of the model's weights, zeros where nothing arrives."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}


@pytest.mark.parametrize("with_balance", [False, True])
def test_one_token_teaches_its_experts_and_no_other(model, batch, with_balance):
    output = model(batch[0][:1, :1], batch[1][:1, :1])
    gradient = gradients(model, model.objective(output) if with_balance else output.loss)
    for layer, routing in zip(model.config.moe_layers, output.routings, strict=True):
        of_experts = [g for name, g in gradient.items() if name.startswith(f"blocks.{layer}.ffn.experts.")]
        assert len(of_experts) == 4, "two matrices, two biases"
        for g in of_experts:
            learns_E = g.flatten(1).abs().sum(1) > 0
            assert learns_E.nonzero().flatten().tolist() == sorted(routing.expert_ids_NK[0].tolist())


@pytest.mark.parametrize("with_balance", [False, True])
def test_the_gradient_reaches_the_router_of_every_layer(model, batch, with_balance):
    output = model(*batch)
    gradient = gradients(model, model.objective(output) if with_balance else output.loss)
    for layer in model.config.moe_layers:
        reached_E = gradient[f"blocks.{layer}.ffn.router.weight"].norm(dim=1)
        assert (reached_E > 1e-6).all(), f"layer {layer}: {reached_E.tolist()}"


def test_the_balance_loss_alone_reaches_the_routers_and_no_expert(model, batch):
    gradient = gradients(model, model(*batch).aux_losses_L.sum())
    for layer in model.config.moe_layers:
        assert gradient[f"blocks.{layer}.ffn.router.weight"].norm() > 1e-6
    last = model.config.moe_layers[-1]
    assert all(not g.any() for name, g in gradient.items() if name.startswith(f"blocks.{last}.ffn.experts."))


def test_a_renormalised_top_1_router_learns_from_the_balance_loss_alone(model, batch):
    """Its only weight is 1, whatever it says: the mistake that these tests are there to see."""
    for layer in moe_layers(model):
        layer.top_k = 1
    gradient = gradients(model, model(*batch).loss)
    assert all(gradient[f"blocks.{i}.ffn.router.weight"].norm() < 1e-6 for i in model.config.moe_layers)
    gradient = gradients(model, model.objective(model(*batch)))
    assert all(gradient[f"blocks.{i}.ffn.router.weight"].norm() > 1e-6 for i in model.config.moe_layers)


# ----------------------------------------------------------------------------------------------------------------- load


@torch.no_grad()
def loads(model, tokens_BT):
    with record_routing(model) as trace:
        model(tokens_BT)
    return load_per_expert(trace.expert_ids, E)


def test_no_expert_is_dead_and_the_load_is_nearly_even(trained, batch):
    load_LE = loads(trained, batch[0])
    assert not dead_experts(load_LE).any()
    assert (coefficient_of_variation(load_LE) < 0.7).all(), "all on two of eight would be 1.73"
    assert torch.allclose(load_LE.sum(-1), torch.ones(2, dtype=torch.float64))


def test_without_a_balance_loss_the_load_is_less_even(series, trained, batch):
    config = replace(PRESET, moe=replace(PRESET.moe, aux_weight=0.0))
    unbalanced = Series(config, config.corpus).moe(progress=False, verbose=False)[0].eval()
    variation_L = coefficient_of_variation(loads(unbalanced, batch[0]))
    assert (variation_L > 1.5 * coefficient_of_variation(loads(trained, batch[0]))).all()


def test_a_collapsed_router_is_what_the_numbers_say(model, batch):
    collapsed = moe_layers(model)[1]
    with torch.no_grad():
        collapsed.router.weight.zero_()  # all experts equally probable: every token takes the first two
    load_LE = loads(model, batch[0])
    variation_L = coefficient_of_variation(load_LE)
    assert variation_L[1] == pytest.approx((E / K - 1) ** 0.5)
    assert dead_experts(load_LE).sum(-1).tolist() == [0, E - K]
    assert variation_L[0] < 0.7


# --------------------------------------------------------------------------------------------------------------- memory


def test_activations_grow_with_the_batch_and_weights_do_not(trained):
    bytes_of = {batch: activation_bytes(trained, batch, 32) for batch in (1, 2, 4, 16)}
    one_more = bytes_of[2] - bytes_of[1]
    assert bytes_of[4] - bytes_of[2] == 2 * one_more
    assert bytes_of[16] - bytes_of[4] == 12 * one_more
    assert one_more <= bytes_of[1] < 1.1 * one_more, "hardly anything is shared by the samples"
    assert sum(p.numel() for p in trained.parameters()) == count_parameters(trained.config).total


def test_more_experts_cost_weights_and_not_activations(trained):
    def sizes(experts):
        config = replace(trained.config, moe=replace(trained.config.moe, num_experts=experts))
        model = new_model(config, seed=0)
        per_sample = activation_bytes(model, 2, 32) - activation_bytes(model, 1, 32)
        return per_sample, sum(p.nbytes for p in model.parameters())

    (few, few_weights), (many, many_weights) = sizes(E), sizes(4 * E)
    assert many_weights > 2 * few_weights
    score = 32 * 3 * E * 4 * len(trained.config.moe_layers)  # bytes of the scores of the experts that were added
    assert 0 < many - few <= 4 * score, "only what the router computes for each of them"


# -------------------------------------------------------------------------------------------------------------- picture


def test_a_picture_of_the_routing_is_saved(trained, batch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    from upcycling.show import plot_layer_loads

    def picture(load_LE, name):
        figure = plot_layer_loads(load_LE, trained.config.moe_layers, vmax=E / K)
        figure.savefig(tmp_path / name)
        plt.close(figure)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        return plt.imread(tmp_path / name)[..., :3]

    load_LE = loads(trained, batch[0])
    shown, even = picture(load_LE, "routing.png"), picture(torch.full_like(load_LE, 1 / E), "even.png")
    height, width, _ = shown.shape
    assert min(height, width) > 100
    inked = (shown < 0.95).any(-1)
    assert 0.1 < inked.mean() < 0.95, "neither blank nor black"
    assert len({tuple(pixel) for pixel in (shown[::3, ::3].reshape(-1, 3) * 32).astype(int).tolist()}) > 20
    assert shown.shape == even.shape and (shown != even).any(-1).mean() > 0.05, "the loads are in the picture"
