"""What is particular to single families; their logits, fields and weights are compared in test_pretrained."""

from pathlib import Path

import pytest
import torch
from real_models import difference
from tiny_transformers import make_config, make_dense

transformers = pytest.importorskip("transformers")

from upcycling.hf.families import FAMILIES, REFUSED, more, rules  # noqa: E402
from upcycling.hf.families.more import halves_to_paired, paired_to_halves  # noqa: E402
from upcycling.hf.plan import plan  # noqa: E402
from upcycling.hf.upcycle_pretrained import upcycle_pretrained  # noqa: E402


@torch.no_grad()
def logits(model, length=24):
    ids_BT = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids_BT, use_cache=False).logits


def test_sorting_pairs_into_halves_and_back():
    rows = torch.arange(12.0)  # two heads of 6: pairs (0,1) (2,3) (4,5)
    assert paired_to_halves(rows, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    matrix = torch.randn(12, 5)
    assert torch.equal(paired_to_halves(matrix, 6)[:, 2], paired_to_halves(matrix[:, 2], 6))
    assert torch.equal(halves_to_paired(paired_to_halves(matrix, 6), 6), matrix)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_class_computes_is_refused_with_a_reason_and_an_alternative(kind):
    refusal = plan(transformers.AutoConfig.for_model(kind))
    reason, nearest = REFUSED[kind]
    assert (refusal.target, refusal.reason, refusal.nearest) == (None, reason, nearest)
    assert str(refusal).count("\n") == (nearest is not None) and reason in str(refusal)
    assert (nearest is None) == ("already" in reason)  # an MoE needs no alternative
    assert kind not in FAMILIES


UNGATED = [kind for kind, (reason, _) in REFUSED.items() if reason.startswith("its FFN has no gate")]
NEEDED = {"gpt_neo": dict(attention_types=[[["global"], 1]]), "nemotron": dict(num_key_value_heads=4)}


@pytest.mark.parametrize("kind", UNGATED)
def test_ffns_said_to_have_no_gate_have_none(kind):
    small = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=32, **NEEDED.get(kind, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **small))
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and name.endswith("weight")]
    matrices = [name for name in names if any(part in name for part in (".mlp.", ".fc", ".ffn."))]
    assert len(matrices) == 2 and not any("gate" in name for name in matrices), matrices


def test_only_nemotron_h_has_experts_without_a_gate():
    """The reason given for GPT-2 and its kin, read in the source of the installed transformers."""
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    assert {file.parent.name for file in sources if "has_gate=False" in file.read_text("utf-8")} == {"nemotron_h"}


@pytest.mark.parametrize(
    "kind, variant, changes, reason",
    [
        ("phi3", 2, dict(sliding_window=6), "sliding_window=6"),
        ("gemma", 0, dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        ("gemma", 0, dict(attention_bias=True), "attention_bias=True"),
        ("gemma4_text", 0, dict(rms_norm_eps=1e-3), "rms_norm_eps=0.001"),
        ("gemma4_text", 1, dict(use_double_wide_mlp=True), "use_double_wide_mlp"),
        ("cohere", 0, dict(use_qk_norm=True), "use_qk_norm=True"),
        ("ernie4_5", 0, dict(use_bias=True), "use_bias=True"),
        ("seed_oss", 0, dict(attention_out_bias=True), "attention_out_bias=True"),
        ("helium", 0, dict(mlp_bias=True), "mlp_bias=True"),
        ("cohere2", 0, dict(rotary_pct=0.5), "rotary_pct=0.5"),
        ("lfm2", 0, dict(block_use_swiglu=False), "block_use_swiglu=False"),
    ],
)
def test_what_a_family_cannot_keep_is_named(kind, variant, changes, reason):
    refusal = plan(make_config(kind, variant, **changes))
    assert refusal.target is None and reason in refusal.reason


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("cohere2", dict(rotary_pct=1.0, use_parallel_block=True, cache_implementation="hybrid", layer_switch=4)),
        ("lfm2", dict(block_use_swiglu=True, conv_dim=32, num_heads=4, block_norm_eps=1e-5)),
        ("qwen3_5_text", dict(attn_output_gate=True, full_attention_interval=2, mtp_num_hidden_layers=1)),
    ],
)
def test_fields_of_hub_files_that_no_class_reads(kind, fields):
    assert plan(make_config(kind, **fields)).target


# ------------------------------------------------------------------------------------------------ single families' own


def test_phi3_on_both_sides_of_the_switch_of_angles():
    dense = make_dense("phi3", 1)
    assert dense.config.original_max_position_embeddings == 8
    moe = upcycle_pretrained(dense, 4, 2)
    for length in (8, 24):
        assert difference(logits(dense, length), logits(moe, length)) <= 1e-5
    assert "Longer than 8 tokens" in str(plan(dense.config)) and "Longer than" not in str(plan(make_config("phi3")))


def test_gemma_1_unties_its_head_because_only_the_embedding_is_scaled():
    moe = upcycle_pretrained(make_dense("gemma"), 4, 2)
    assert not moe.config.tie_word_embeddings
    ratio = moe.model.embed_tokens.weight / moe.lm_head.weight
    assert torch.allclose(ratio, torch.full_like(ratio, 32**0.5))


def test_gemma_4_experts_carry_half_and_copy_the_dense_ffn():
    dense = make_dense("gemma4_text")
    layer = upcycle_pretrained(dense, 4, 2).model.layers[0]
    mlp = dense.model.layers[0].mlp
    assert torch.equal(layer.experts.gate_up_proj[3], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert torch.equal(layer.pre_feedforward_layernorm_2.weight, layer.pre_feedforward_layernorm.weight)
    for norm in (layer.post_feedforward_layernorm_1, layer.post_feedforward_layernorm_2):
        assert torch.equal(norm.weight, torch.full_like(norm.weight, 0.5))


def test_gemma_4_norms_twice_so_equality_ends_where_rms_norm_eps_counts():
    """Dense: y / sqrt(mean y² + ε); two norms: y / sqrt(mean y² + ε (mean y² + ε)). Small outputs show it."""
    errors = []
    for eps in (1e-6, 1e-8):
        dense = make_dense("gemma4_text", rms_norm_eps=eps).double()  # other rounding out of the way
        moe = upcycle_pretrained(dense, 4, 2)
        moe.set_experts_implementation("eager")  # the grouped product has no float64
        errors.append(difference(logits(dense), logits(moe)))
    assert errors[1] < 0.5 * errors[0] < 2e-5  # what is left is the norms' own float32


@pytest.mark.parametrize("kind", ["qwen3_5_text", "seed_oss", "hunyuan_v1_dense"])
def test_a_shared_expert_starts_silent_but_learns(kind):
    moe = upcycle_pretrained(make_dense(kind), 4, 2)
    shared = next(module for name, module in moe.model.layers[0].mlp.named_children() if "shared" in name)
    assert not shared.down_proj.weight.any()
    ids_BT = torch.arange(12)[None]
    moe(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert shared.down_proj.weight.grad.any()


def test_smollm3_routed_experts_add_to_the_dense_ffn_and_learn():
    moe = upcycle_pretrained(make_dense("smollm3"), 4, 2)
    ids_BT = torch.arange(12)[None]
    moe(input_ids=ids_BT, labels=ids_BT).loss.backward()
    experts = moe.model.layers[0].feed_forward.experts
    assert not experts.down_proj.any() and experts.gate_up_proj.any() and experts.down_proj.grad.any()


def test_cohere_rotates_everywhere_and_up_to_its_context_only():
    moe_plan = plan(make_config("cohere"))
    assert moe_plan.exact_up_to == moe_plan.config.sliding_window == 64
    assert moe_plan.config.layer_types == ["sliding_attention"] * 2
    assert plan(make_config("cohere2")).exact_up_to is None


def test_some_layers_of_cohere2_may_stay_dense():
    dense = make_dense("cohere2")
    for layers in ([0], [1]):
        moe = upcycle_pretrained(dense, 4, 2, layers=layers)
        assert [hasattr(layer.mlp, "experts") for layer in moe.model.layers] == [i in layers for i in range(2)]
        assert difference(logits(dense), logits(moe)) <= 1e-5


def test_lfm2_is_as_equal_as_its_routers_scores_are_large():
    """Lfm2Moe divides by (sum of sigmoid scores + 1e-6): the error is 1e-6 over the sum, by definition of the class."""
    dense = make_dense("lfm2")
    expected = logits(dense)
    assert difference(expected, logits(upcycle_pretrained(dense, 4, 2))) <= 1e-5


def test_glm4_moe_needs_two_experts():
    assert "cannot run with 1 expert" in plan(make_config("seed_oss"), 1, 1).reason
    dense = make_dense("seed_oss")
    assert difference(logits(dense), logits(upcycle_pretrained(dense, 2, 1))) <= 1e-5
    assert plan(make_config("ernie4_5"), 1, 1).target


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_bfloat16_the_moe_differs_as_little_as_rounding_does(kind):
    dense = make_dense(kind)
    exact = logits(dense)
    dense = dense.to(torch.bfloat16)
    moe = upcycle_pretrained(dense, 4, 2)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16} == {moe.dtype}
    rounding = difference(exact, logits(dense).float())
    assert difference(logits(dense).float(), logits(moe).float()) <= 3 * rounding


def test_what_is_a_familys_own_belongs_to_a_row_and_stands_once():
    assert not set(rules.OWN) & set(more.OWN)
    assert {*rules.OWN, *more.OWN} <= set(rules.ROWS) == set(FAMILIES)
    with pytest.raises(AssertionError, match="cary is no step"):
        rules.take_steps(None, {"cary": ["*"]})
