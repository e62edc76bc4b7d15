"""The framework beneath the families' rules: every field and every tensor is accounted for, by name."""

import pytest
import torch
from tiny_transformers import TINY

transformers = pytest.importorskip("transformers")

from upcycling.hf.families import FAMILIES  # noqa: E402
from upcycling.hf.families.base import Fields, Initialisation, MoEClass, Refusal, Rule, Target, kept  # noqa: E402
from upcycling.hf.families.classes import rows  # noqa: E402
from upcycling.hf.families.engine import build, configure, hub_shapes  # noqa: E402
from upcycling.hf.families.rules import MIXTRAL  # noqa: E402
from upcycling.hf.plan import plan  # noqa: E402

HOW = Initialisation(num_experts=3)
LAYER = "model.layers.{layer}."
DENSE = {"embed": (7, 4), "model.layers.0.up": (6, 4), "model.layers.1.up": (6, 4)}
SPARSE = {"embed": (7, 4)} | {
    f"model.layers.{i}.{name}": shape
    for i in (1, 0)
    for name, shape in {"experts.0.up": (6, 4), "experts.1.up": (6, 4), "experts.2.up": (6, 4), "gate": (3, 4)}.items()
}
TABLE = {LAYER + "experts.{expert}.up": Rule("expert", (LAYER + "up",)), LAYER + "gate": Rule("router")}


def target(table):
    return Target(MoEClass("SomeMoE", table))


def llama_fields(**changes):
    return Fields(transformers.LlamaConfig(**changes))


def test_each_target_names_its_sources_and_layers_stay_together():
    made = build(target(TABLE), DENSE, SPARSE, HOW)
    assert {tensor.name: tensor.shape for tensor in made} == SPARSE
    assert [tensor.layer for tensor in made] == [None] + [0] * 4 + [1] * 4
    by_name = {tensor.name: tensor for tensor in made}
    assert (by_name["embed"].kind, by_name["embed"].sources) == ("kept", ("embed",))
    assert by_name["model.layers.1.experts.2.up"].sources == ("model.layers.1.up",)
    assert (by_name["model.layers.0.gate"].kind, by_name["model.layers.0.gate"].sources) == ("router", ())


def test_a_tensor_without_a_place_or_a_source_is_named():
    with pytest.raises(ValueError, match=r"model.layers.0.norm of the dense model is used nowhere in SomeMoE \(1 such"):
        build(target(TABLE), {**DENSE, "model.layers.0.norm": (4,)}, SPARSE, HOW)
    with pytest.raises(ValueError, match=r"head of SomeMoE would be made from head, which the dense model does not"):
        build(target(TABLE), DENSE, {**SPARSE, "head": (7, 4)}, HOW)
    with pytest.raises(ValueError, match=r"model.layers.1.gate of SomeMoE would be made from model.layers.1.gone"):
        build(target({**TABLE, LAYER + "gate": kept(LAYER + "gone")}), DENSE, SPARSE, HOW)


def test_the_familys_table_comes_before_the_classs():
    made = build(Target(MoEClass("SomeMoE", TABLE), {LAYER + "gate": Rule("new", value=2.0)}), DENSE, SPARSE, HOW)
    gate = next(tensor for tensor in made if tensor.name == "model.layers.0.gate")
    assert torch.equal(gate.make(), torch.full((3, 4), 2.0))


def test_what_the_rules_make():
    up, gate = torch.randn(6, 4), torch.randn(6, 4)
    shapes = {"packed": (3, 12, 4), "one": (6, 4), "norm": (6, 4)}
    table = {
        "packed": Rule("experts", ("gate", "up"), rows),
        "one": Rule("expert", ("up",)),
        "norm": kept("gate", transform=lambda w: w + 1),
    }
    packed, one, norm = build(target(table), {"gate": (6, 4), "up": (6, 4)}, shapes, HOW)
    assert torch.equal(packed.make(gate, up), torch.cat([gate, up]).expand(3, 12, 4))
    assert torch.equal(one.make(up), up) and torch.equal(norm.make(gate), gate + 1)
    assert one.make(up, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"packed must have the shape \(3, 12, 4\), but gate, up gives \(3, 12, 5\)"):
        packed.make(torch.randn(6, 5), torch.randn(6, 5))


def test_noise_is_drawn_for_each_tensor_from_its_name_and_the_seed():
    up = torch.randn(6, 4)

    def made(seed, name):
        tensors = build(target(TABLE), DENSE, SPARSE, Initialisation(3, init="noise", noise=0.5, seed=seed))
        return next(tensor for tensor in tensors if tensor.name == name).make(up)

    first = made(0, "model.layers.0.experts.0.up")
    assert torch.equal(first, made(0, "model.layers.0.experts.0.up"))
    for seed, name in [(1, "0.experts.0"), (0, "0.experts.1"), (0, "1.experts.0")]:
        assert not torch.equal(first, made(seed, f"model.layers.{name}.up"))


def test_fields_are_counted():
    fields = llama_fields(attention_dropout=0.5)
    fields.carry("rms_norm_eps", "no_such_field")
    fields.replace("intermediate_size", "elsewhere", moe_intermediate_size=fields["intermediate_size"])
    fields.require("mlp_bias", False, because="reasons")
    assert fields.target["rms_norm_eps"] == 1e-6 and "no_such_field" not in fields.account
    assert fields.target["moe_intermediate_size"] == 11008 and "intermediate_size" not in fields.target
    with pytest.raises(Refusal, match=r"attention_dropout=0.5 is not known for LlamaConfig"):
        fields.finish()
    fields.drop("attention_dropout", because="of the test")
    fields.finish()
    assert set(fields.account) == set(fields.values)
    assert fields.account["num_attention_heads"] == "left out: at its default"
    with pytest.raises(
        Refusal, match=r"mlp_bias=True cannot be kept, only False can: reasons; nearest alternative: another"
    ):
        llama_fields(mlp_bias=True).require("mlp_bias", False, because="reasons", nearest="another")


def test_carried_values_are_copies():
    config = transformers.LlamaConfig()
    fields = Fields(config)
    fields.rope()
    fields.target["rope_parameters"]["rope_theta"] = 1.0
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_a_rule_that_sets_what_the_class_does_not_have_is_a_bug():
    def rule(fields):
        fields.drop(*fields.values, because="of the test")
        fields.target.update(qkv_bias=True)
        return Target(MIXTRAL)

    with pytest.raises(AssertionError, match="qkv_bias, which MixtralConfig does not have"):
        configure(transformers.LlamaConfig(), rule, num_experts=2, top_k=1, layers=tuple(range(32)))


def test_tied_tensors_appear_once():
    small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    shapes, tied = hub_shapes(transformers.LlamaConfig(**small, tie_word_embeddings=True), "LlamaForCausalLM")
    assert "lm_head.weight" not in shapes and tied == {"lm_head.weight": "model.embed_tokens.weight"}
    shapes, tied = hub_shapes(transformers.LlamaConfig(**small), "LlamaForCausalLM")
    assert shapes["lm_head.weight"] == (8, 8) and not tied


def test_every_family_has_a_tiny_configuration():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("experts_of", [1, 64])
def test_a_large_model_is_planned_without_its_weights(experts_of):
    """Llama-3-70B's shape: no memory, a second or two."""
    config = dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    sizes = plan(config, experts_of, 1).sizes
    ffn = 80 * 3 * 8192 * 28672
    assert sizes.dense == 70_553_706_496
    assert sizes.moe == sizes.dense + (experts_of - 1) * ffn + 80 * experts_of * 8192
    assert sizes.active == sizes.moe - (experts_of - 1) * ffn
    assert sizes.bytes == 2 * sizes.moe
