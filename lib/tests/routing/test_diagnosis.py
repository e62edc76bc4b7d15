"""The load report's alarm, the evaluation of a whole stream, and why a router gets no gradient."""

import math
from types import SimpleNamespace

import pytest
import torch

from upcycling import DecoderLM, ModelConfig, MoEConfig, TokenStream, evaluate, load_report, upcycle
from upcycling.core.balance import aux_loss
from upcycling.routing.gradient import diagnose_router
from upcycling.routing.load import evaluate_routing
from upcycling.routing.record import record_routing

V = 40


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return DecoderLM(ModelConfig.smol(vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=8)).eval()


@pytest.fixture(scope="module")
def batch():
    tokens_BT = torch.randint(0, V, (6, 9), generator=torch.Generator().manual_seed(0))
    return tokens_BT[:, :-1], tokens_BT[:, 1:]


def moe_of(dense, num_experts=4, top_k=2, noise=0.0, **options):
    model = upcycle(dense, MoEConfig(num_experts, top_k, **options), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for weight in block.ffn.experts.parameters():
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------- load, layer by layer


def collapsed_on_different_experts(num_layers=4, num_tokens=100):
    return torch.arange(num_layers)[:, None, None].expand(num_layers, num_tokens, 1)


def test_layers_each_collapsed_on_another_expert_look_perfect_pooled_and_raise_the_alarm():
    report = load_report(collapsed_on_different_experts(), 4)
    rows = {row["layer"]: row for row in report.rows()}
    assert rows["pooled"]["max/mean"] == 1.0 and rows["pooled"]["B"] == pytest.approx(1.0)
    assert rows["2"]["max/mean"] == 4.0 and rows["2"]["dead"] == 3 and rows["2"]["busiest"] == 2
    assert report.collapsed_layers == (0, 1, 2, 3)
    assert "layers 0, 1, 2, 3 collapsed (down to 1.0 effective experts of 4)" in report.alarm
    assert "hides it" in report.alarm
    for rendered in (str(report), report._repr_html_()):
        assert report.alarm in rendered and "pooled" in rendered and "100 tokens, top-1 of 4 experts" in rendered


def test_the_alarm_names_only_the_layers_that_collapsed_by_their_own_numbers():
    generator = torch.Generator().manual_seed(0)
    even_NK = torch.rand(400, 8, generator=generator).topk(2, dim=-1).indices
    stuck_NK = torch.tensor([[3, 5]]).expand(400, 2)
    trace = SimpleNamespace(
        weights=torch.ones(1),
        probabilities=torch.ones(1),
        expert_ids=torch.stack([even_NK, stuck_NK, even_NK]),
        layers=(1, 3, 5),
        num_experts=8,
    )
    report = load_report(trace)
    assert report.layers == (1, 3, 5) and report.collapsed_layers == (3,)
    assert "layer 3 collapsed" in report.alarm
    report = load_report(torch.stack([even_NK, even_NK]), 8)
    assert report.alarm is None and "ALARM" not in str(report) + report._repr_html_()


@pytest.mark.parametrize(("experts_in_use", "collapsed"), [(8, ()), (4, ()), (3, (0,)), (2, (0,))])
def test_a_layer_has_collapsed_in_the_lowest_quarter_between_k_and_all_experts(experts_in_use, collapsed):
    turns_N = torch.arange(960)  # each expert in use equally often; the border is 2 + (8 - 2) / 4 = 3.5 experts
    ids_LNK = torch.stack([turns_N, turns_N + 1], dim=-1)[None] % experts_in_use
    assert load_report(ids_LNK, 8).collapsed_layers == collapsed


def test_a_collapse_that_the_pooled_load_shows_is_not_called_hidden():
    report = load_report(torch.tensor([[[3, 5]]]).expand(3, 400, 2), 8)
    assert report.collapsed_layers == (0, 1, 2) and "shows it, too" in report.alarm


def test_no_alarm_where_nothing_can_be_said():
    report = load_report(torch.zeros(2, 1, 1, dtype=torch.long), 8)  # one token
    assert report.alarm is None and "too few tokens to judge: give at least 80" in str(report)
    everyone = torch.arange(3).expand(2, 50, 3)  # k = E: nothing to choose
    assert load_report(everyone, 3).alarm is None
    assert load_report(torch.zeros(1, 50, 1, dtype=torch.long), 1).alarm is None  # one expert


def test_load_report_wants_all_layers_and_the_number_of_experts():
    with pytest.raises(ValueError, match=r"give \(L, N, K\) and E"):
        load_report(torch.zeros(5, 2, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="num_experts is None"):
        load_report(torch.zeros(1, 5, 2, dtype=torch.long))


def test_a_diverged_model_has_no_load():
    sizes = dict(vocab_size=20, d_model=16, n_layers=1, n_heads=2, d_ff=8, seq_len=8)
    model = DecoderLM(ModelConfig.smol(**sizes, moe=MoEConfig(4, 2)))
    torch.nn.init.constant_(model.token_embedding.weight, float("nan"))
    with record_routing(model) as trace:
        model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="the model has diverged"):
        load_report(trace)


# -------------------------------------------------------------------------------------------- a whole validation set


def test_evaluation_counts_every_target_once_whatever_the_batches(dense):
    model = moe_of(dense, router_std=1.0)
    stream = TokenStream.from_ids(torch.randint(0, V, (101,), generator=torch.Generator().manual_seed(2)).numpy(), V)
    model.train()
    small, large = (evaluate_routing(model, stream, batch_size=size, beta=0.5) for size in (2, 32))
    assert model.training
    assert small.load.num_tokens == large.load.num_tokens == 100  # 101 ids; the last window's filling is not counted
    assert large.cross_entropy == pytest.approx(evaluate(model, stream), rel=1e-6)
    assert small.cross_entropy == pytest.approx(large.cross_entropy, rel=1e-5)
    for name in ("aux_loss_L", "balance_L"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-4, atol=1e-6)
    assert large.balance == pytest.approx(float(large.balance_L.mean()))
    assert large.perplexity == pytest.approx(math.exp(large.cross_entropy))
    assert large.balanced_perplexity == pytest.approx(large.perplexity * math.exp(0.5 * (1 - large.balance)))
    assert "balanced perplexity (beta 0.5)" in str(large) and "pooled" in str(large)


def test_evaluation_agrees_with_one_forward_pass_over_everything(dense):
    model = moe_of(dense, router_std=1.0)
    ids = torch.randint(0, V, (49,), generator=torch.Generator().manual_seed(3))  # 48 targets: no filling
    found = evaluate_routing(model, TokenStream.from_ids(ids.numpy(), V))
    with torch.no_grad():
        out = model(ids[:-1].view(6, 8), ids[1:].view(6, 8))
    assert found.cross_entropy == pytest.approx(out.loss.item(), rel=1e-5)
    torch.testing.assert_close(found.aux_loss_L.float(), torch.stack([aux_loss(r) for r in out.routings]))


def test_evaluation_of_a_collapsed_model_pays_in_balanced_perplexity(dense):
    stream = TokenStream.from_ids(list(range(V)) * 5, V)
    spread, zero = (evaluate_routing(moe_of(dense, router_std=std), stream) for std in (1.0, 0.0))
    assert spread.cross_entropy == pytest.approx(zero.cross_entropy, rel=1e-5)  # copies: the same function
    assert zero.balance == pytest.approx(math.log(2) / math.log(4))
    assert zero.balanced_perplexity == pytest.approx(zero.perplexity * math.exp(0.5))
    assert zero.balanced_perplexity > spread.balanced_perplexity
    assert zero.load.collapsed_layers == (0, 1)


def test_evaluation_of_a_dense_model_is_refused(dense):
    with pytest.raises(ValueError, match="dense"):
        evaluate_routing(dense, TokenStream.from_ids(range(V), V))


# --------------------------------------------------------------------------------------------- the router's gradient


@pytest.mark.parametrize(
    ("options", "can_learn", "sentence"),
    [
        ({}, False, "experts are identical and the weights renormalised"),
        ({"noise": 0.1}, True, "the loss reaches the router"),
        ({"router_std": 0.0}, False, "goes to the same 2 of 4 experts"),
        ({"top_k": 1, "noise": 0.1}, False, "top-1 with renormalised weights"),
        ({"top_k": 1, "noise": 0.1, "renormalize": False}, True, "the loss reaches the router"),
        ({"renormalize": False}, True, "experts are identical and the weights not renormalised"),
        ({"top_k": 1, "num_experts": 1}, False, "only one expert"),
    ],
    ids=["copies", "noise", "zero router", "top-1", "Switch", "copies, not renormalised", "one expert"],
)
def test_the_diagnosis_says_why(dense, batch, options, can_learn, sentence):
    diagnosis = diagnose_router(moe_of(dense, **options), *batch)
    assert diagnosis.can_learn is can_learn
    assert all(sentence in layer.finding for layer in diagnosis.layers)
    assert len(diagnosis.findings) == 1 and diagnosis.findings[0].startswith("layers 0, 1: ")
    assert sentence in str(diagnosis) and sentence in diagnosis._repr_html_()


def test_the_gradient_is_that_of_the_cross_entropy_alone_and_nothing_is_changed(dense, batch):
    model = moe_of(dense, noise=0.5, aux_weight=10.0)
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    diagnosis = diagnose_router(model, *batch)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.eval()
    model(*batch).loss.backward()
    for block, found in zip(model.blocks, diagnosis.layers):
        experts = torch.cat([weight.grad.flatten() for weight in block.ffn.experts.parameters()])
        assert found.router_gradient == pytest.approx(float(block.ffn.router.weight.grad.norm()), rel=1e-4)
        assert found.expert_gradient == pytest.approx(float(experts.norm()), rel=1e-4)
        assert not (found.tied or found.experts_identical or found.frozen) and found.constant_weight_sum


def test_it_works_where_gradients_are_switched_off(dense, batch):
    with torch.no_grad():
        assert diagnose_router(moe_of(dense, noise=0.5), *batch).can_learn


def test_findings_are_told_apart_by_layer(dense, batch):
    model = moe_of(dense, noise=0.5)
    with torch.no_grad():
        model.blocks[1].ffn.router.weight.fill_(0.3)  # equal rows, not zero
    model.blocks[0].ffn.router.weight.requires_grad_(False)
    first, second = diagnose_router(model, *batch).layers
    assert first.frozen and "frozen" in first.finding and first.silent
    assert second.tied and second.experts_used == 2 and not first.tied


def test_identical_functions_with_different_weights_are_suspected(dense, batch):
    model = moe_of(dense)
    with torch.no_grad():
        for block in model.blocks:  # hidden units of each expert in another order: other weights, the same function
            for e in range(4):
                order = torch.randperm(24, generator=torch.Generator().manual_seed(e))
                for weight_EFD in (block.ffn.experts.w_up_EFD, block.ffn.experts.w_gate_EFD):
                    weight_EFD[e] = weight_EFD[e][order]
                block.ffn.experts.w_down_EDF[e] = block.ffn.experts.w_down_EDF[e][:, order]
    diagnosis = diagnose_router(model, *batch)
    assert not diagnosis.can_learn and not diagnosis.layers[0].experts_identical
    assert "do they compute the same?" in diagnosis.findings[0]


@pytest.mark.parametrize(
    ("name", "fields", "can_learn"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}, True),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "norm_topk_prob": True},
            False,
        ),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 8}, True),
    ],
)
def test_transformers_models_are_diagnosed_too(name, fields, can_learn, batch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    diagnosis = diagnose_router(model, *batch)
    assert diagnosis.can_learn is can_learn
    assert [layer.layer for layer in diagnosis.layers] == [0, 1]
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if ".experts." in parameter_name:
                weight[:] = weight[:1].clone()
    assert all(layer.experts_identical and layer.silent for layer in diagnose_router(model, *batch).layers)


def test_a_dense_model_has_no_router_to_diagnose(dense, batch):
    with pytest.raises(ValueError, match="no MoE layer"):
        diagnose_router(dense, *batch)
