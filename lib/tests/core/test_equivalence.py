"""The checks pass where they should, fail where they should, and say why."""

from dataclasses import replace

import pytest
import torch

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.equivalence import (
    TOLERANCE,
    CausalityReport,
    EquivalenceReport,
    check_causality,
    check_equivalence,
)
from upcycling.core.model import DecoderLM
from upcycling.core.transfer import upcycle

SIZES = dict(vocab_size=29, d_model=16, n_layers=3, n_heads=4, d_ff=24, seq_len=16)
MOE = MoEConfig(num_experts=4, top_k=2, router_std=1.0)
FAMILIES = dict(simple=ModelConfig.simple, smol=ModelConfig.smol, nano=ModelConfig.nano)


def make_model(config, std=0.3):
    torch.manual_seed(0)
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def make_dense(**changes):
    return make_model(ModelConfig.simple(**SIZES, **changes))


def with_config(model, **changes):
    """The same weights under another configuration."""
    other = DecoderLM(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


TOKENS_BT = torch.randint(29, (3, 16), generator=torch.Generator().manual_seed(0))

# ---------------------------------------------------------------------------------------------------------- equivalence


def largest_logit(model):
    with torch.no_grad():
        return max(1.0, float(model(TOKENS_BT).logits_BTV.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_an_upcycled_model_passes(family, dtype, rounding):
    dense = make_model(FAMILIES[family](**SIZES)).to(dtype)
    moe = upcycle(dense, replace(MOE, layers=(0, 2)))
    report = check_equivalence(dense, moe, TOKENS_BT)
    assert report.passed
    assert report.reasons == []
    assert report.dtype == dtype
    assert report.tolerance == pytest.approx(rounding * largest_logit(dense))
    assert report.max_abs_diff <= rounding * largest_logit(dense) and largest_logit(dense) > 2
    assert (len(report.per_sequence), len(report.per_layer)) == (3, 3)
    assert report.per_layer[0] <= rounding * largest_logit(dense)
    assert report.weight_sums.keys() == {0, 2}
    assert all(low == pytest.approx(1) == high for low, high in report.weight_sums.values())
    assert str(report).startswith("same function: max |logit difference|")
    assert "weight sum 0: 1.0000..1.0000  2: 1.0000..1.0000" in str(report)
    shown = report._repr_html_()
    assert f"tolerance {report.tolerance:.1e}" in shown and "<td>after layer 1</td>" in shown
    assert shown.count("1.0000 to 1.0000") == 2, "of layers 0 and 2, which hold experts"


def test_exactly_the_tolerance_is_within_it():
    assert EquivalenceReport(torch.float32, 2.0**-17, [0.0, 2.0**-17], [0.0], {}).passed
    assert not EquivalenceReport(torch.float32, 2.0**-17, [0.0, 2.0**-16], [0.0], {}).passed
    assert CausalityReport(2.0**-17, 2.0**-17, []).passed and not CausalityReport(2.0**-16, 2.0**-17, [(0, 1)]).passed


def test_the_tolerances_are_those_that_are_promised():
    assert (TOLERANCE[torch.float64], TOLERANCE[torch.float32]) == (1e-12, 1e-5)
    assert (TOLERANCE[torch.float16], TOLERANCE[torch.bfloat16]) == (0.02, 0.15)
    small = DecoderLM(ModelConfig.nano(**SIZES)).double().eval()  # the logits of a fresh model are far below 1
    assert largest_logit(small) == 1
    assert check_equivalence(small, small, TOKENS_BT).tolerance == check_causality(small, TOKENS_BT).tolerance == 1e-12


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("times", [0.3, 3.0])
def test_a_deviation_of_three_tolerances_is_found(dtype, rounding, times):
    """3e-12 in float64 and 3e-5 in float32, of the largest logit, are another function; a third of 1e-12 is not."""
    dense = make_model(ModelConfig.nano(**SIZES)).to(dtype)
    moe = upcycle(dense, MOE)
    with torch.no_grad():
        moe.head.bias[5] += times * rounding * largest_logit(dense)
    report = check_equivalence(dense, moe, TOKENS_BT)
    assert report.passed == (times < 1)
    assert report.max_abs_diff == pytest.approx(times * rounding * largest_logit(dense), rel=0.3)

    class Peeking(DecoderLM):
        def forward(self, tokens_BT, targets_BT=None, cache=None):
            out = super().forward(tokens_BT)
            seen_BT = 2.0 * (tokens_BT.roll(-1, 1) % 2) - 1  # whether the next token's id is odd
            return replace(out, logits_BTV=out.logits_BTV + times * rounding * scale * seen_BT[..., None])

    peeking, scale = Peeking(dense.config).to(dtype).eval(), largest_logit(dense) / 2
    peeking.load_state_dict(dense.state_dict())
    assert check_causality(peeking, TOKENS_BT).passed == (times < 1)


def test_the_difference_is_reported_where_it_is():
    dense = make_dense()
    moe = upcycle(dense, MOE)
    assert check_equivalence(dense, dense, TOKENS_BT).max_abs_diff == 0
    only = torch.zeros(3, 16, dtype=torch.long)
    only[1, 5] = 7
    with torch.no_grad():
        moe.head.weight = torch.nn.Parameter(moe.head.weight.clone())  # untied
        moe.token_embedding.weight[7, 0] += 1  # not all: a norm takes out what all share
    report = check_equivalence(dense, moe, only)
    assert not report.passed
    assert report.per_sequence[0] < 1e-5 > report.per_sequence[2]
    assert report.max_abs_diff == report.per_sequence[1] > 0.1
    expected = (moe(only).logits_BTV - dense(only).logits_BTV).abs().max().item()
    assert report.max_abs_diff == pytest.approx(expected, abs=1e-6)


def test_without_renormalising_it_fails_and_the_sums_are_the_reason():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dense = make_dense().to(dtype)
        moe = upcycle(dense, replace(MOE, renormalize=False, layers=(1,)))
        report = check_equivalence(dense, moe, TOKENS_BT, tolerance=1e-3)
        assert not report.passed
        routing = moe(TOKENS_BT).routings[0]
        sums = routing.weights_NK.sum(-1)
        assert report.weight_sums[1] == pytest.approx((sums.min().item(), sums.max().item()))
        assert len(report.reasons) == 1, dtype
        assert report.reasons[0].startswith(
            f"layer 1: a token's combine weights sum to {sums.min():.3f}..{sums.max():.3f}"
        )
        assert "renormalise the top-k weights" in report.reasons[0]
        assert report.per_layer[0] == 0 < report.per_layer[1], "the layer before it is unchanged"
        assert f"because: {report.reasons[0]}" in str(report)
        assert str(report).startswith("NOT the same function")


def test_the_predicted_sum_explains_the_output():
    """With identical experts, an FFN whose weights sum to s gives s times the dense FFN's output."""
    dense = make_dense().double()
    moe = upcycle(dense, replace(MOE, renormalize=False, router_std=0))
    x_BTD = torch.randn(1, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(moe.blocks[0].ffn(x_BTD)[0], 0.5 * dense.blocks[0].ffn(x_BTD))
    assert check_equivalence(dense, moe, TOKENS_BT).weight_sums[0] == pytest.approx((0.5, 0.5))


def test_a_changed_norm_is_named():
    dense = make_dense()
    moe = upcycle(dense, MOE)
    with torch.no_grad():
        moe.blocks[1].ffn_norm.weight[3] += 0.5
    report = check_equivalence(dense, moe, TOKENS_BT)
    assert len(report.reasons) == 1
    assert report.reasons[0].startswith("blocks.1.ffn_norm.weight is not the dense model's")
    assert report.per_layer[0] < 1e-4 < report.per_layer[1]


def test_an_expert_that_is_no_copy_is_named_with_its_layer():
    dense = make_dense()
    moe = upcycle(dense, MOE)
    used = moe(TOKENS_BT).routings[2].expert_ids_NK[0, 0]
    with torch.no_grad():
        moe.blocks[2].ffn.experts.b_down_ED[used, 0] += 1
    report = check_equivalence(dense, moe, TOKENS_BT)
    assert report.reasons == ["layer 2: experts.b_down_ED is not a copy of the dense FFN in every expert"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(causal=False), "causal=True in the dense model, False in the other"),
        (dict(activation="relu"), "activation='gelu' in the dense model, 'relu' in the other"),
        (dict(norm_eps=0.5), "norm_eps=1e-05 in the dense model, 0.5 in the other"),
        (dict(n_heads=2), "n_heads=4 in the dense model, 2 in the other"),
    ],
)
def test_settings_that_are_not_in_the_weights_are_named(changes, reason):
    dense = make_dense()
    report = check_equivalence(dense, with_config(upcycle(dense, MOE), **changes), TOKENS_BT)
    assert not report.passed
    assert report.reasons == [reason]


def test_another_rotary_base_is_named():
    dense = make_model(ModelConfig.smol(**SIZES))
    report = check_equivalence(dense, with_config(upcycle(dense, MOE), rope_theta=10.0), TOKENS_BT)
    assert report.reasons == ["rope_theta=10000.0 in the dense model, 10.0 in the other"]


def test_bfloat16_judged_as_float32_is_rounding():
    dense = make_dense().bfloat16()
    moe = upcycle(dense, MOE)
    assert check_equivalence(dense, moe, TOKENS_BT).passed
    report = check_equivalence(dense, moe, TOKENS_BT, tolerance=1e-5)
    assert not report.passed
    assert len(report.reasons) == 1
    assert "this is rounding: a tolerance of 1.0e-05 is too strict for bfloat16" in report.reasons[0]


def test_nan_never_passes():
    dense = make_dense()
    moe = upcycle(dense, MOE)
    only = torch.zeros(3, 16, dtype=torch.long)
    only[1, 5] = 7
    with torch.no_grad():
        moe.head.weight = torch.nn.Parameter(moe.head.weight.clone())  # untied: only sequences with token 7 see it
        moe.token_embedding.weight[7] = torch.nan
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        report = check_equivalence(dense, moe, only[order])
        assert not report.passed
        assert report.max_abs_diff != report.max_abs_diff
        assert "NOT the same function" in str(report)


def test_what_cannot_be_compared():
    dense = make_dense()
    for name, value in (("vocab_size", 31), ("n_layers", 2), ("d_model", 32), ("d_ff", 12)):
        with pytest.raises(ValueError, match=f"different shapes.*{value}"):
            check_equivalence(dense, make_model(replace(dense.config, **{name: value})), TOKENS_BT)
    with pytest.raises(ValueError, match="the first model has 4 experts; give the dense model first"):
        check_equivalence(upcycle(dense, MOE), dense, TOKENS_BT)


def test_models_are_left_as_they_were():
    dense = make_model(ModelConfig.simple(**SIZES, dropout=0.5))
    moe = upcycle(dense, replace(MOE, noisy=True)).train()
    assert check_equivalence(dense.train(), moe, TOKENS_BT).passed, "compared without dropout and noise"
    check_causality(moe, TOKENS_BT)
    for model in (dense, moe):
        assert model.training
        assert all(block.training and not block._forward_hooks for block in model.blocks)


# ------------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_a_causal_model_passes(family, moe):
    report = check_causality(make_model(FAMILIES[family](**SIZES, moe=moe)), TOKENS_BT)
    assert report.passed
    assert report.leaks == []
    assert str(report).startswith("causal: ")


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_a_missing_mask_is_found_and_placed(moe):
    report = check_causality(make_dense(causal=False, moe=moe), TOKENS_BT)
    assert not report.passed
    altered = sorted({cut for _, cut in report.leaks})
    assert altered == [3, 6, 10, 13], "fifths of 16 tokens"
    assert {(position, 3) for position in range(3)} <= set(report.leaks), "every position before the change moves"
    assert all(position < cut for position, cut in report.leaks)
    assert "NOT causal: altering the tokens from position 3 on changed the logits at position 0" in str(report)


def test_a_leak_of_one_token_is_placed():
    """Logits of each position take the next token into account, and nothing beyond it."""
    dense = make_dense()

    class Peeking(DecoderLM):
        def forward(self, tokens_BT, targets_BT=None, cache=None):
            out = super().forward(tokens_BT)
            return replace(out, logits_BTV=out.logits_BTV + tokens_BT.roll(-1, 1)[..., None])

    peeking = Peeking(dense.config).eval()
    peeking.load_state_dict(dense.state_dict())
    assert check_causality(peeking, TOKENS_BT).leaks == [(2, 3), (5, 6), (9, 10), (12, 13)]


def test_a_model_of_nan_is_not_called_causal():
    model = make_dense()
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    report = check_causality(model, TOKENS_BT)
    assert not report.passed
    assert "NOT causal" in str(report)


def test_causality_needs_something_to_alter():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        check_causality(make_dense(), TOKENS_BT[:, :1])
    assert check_causality(make_dense(), TOKENS_BT[:, :2]).passed
    assert not check_causality(make_dense(causal=False), TOKENS_BT[:, :2]).passed
    two = make_model(ModelConfig.simple(**SIZES | dict(vocab_size=2), causal=False))  # the one other token
    assert not check_causality(two, TOKENS_BT % 2).passed
    with pytest.raises(ValueError, match="nothing to alter"):
        check_causality(make_model(ModelConfig.simple(**SIZES | dict(vocab_size=1))), torch.zeros(1, 4).long())
