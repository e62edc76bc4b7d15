"""Configurations: the published sizes, the accountants against the built model, and what is refused."""

import json
import math
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upcycling.core import moe as moe_module
from upcycling.core.config import ACTIVATIONS, NORMS, POSITIONS, ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.cost.parts import count_parameters, forward_flops
from upcycling.cost.references import REFERENCE
from upcycling.experiments.presets import PRESETS
from upcycling.training.config import TrainConfig

SIZES = dict(vocab_size=23, d_model=16, n_layers=2, n_heads=4, d_ff=12, seq_len=10)
NOISY = MoEConfig(num_experts=5, top_k=3, noisy=True, router_bias=True)
MOES = (None, MoEConfig(num_experts=4, top_k=2), NOISY, MoEConfig(num_experts=3, top_k=1, layers=(1,)))


def some_configs():
    """A sample of all combinations that holds each value of each field, and each family as it comes."""
    flags = [(False, True)] * 5
    everything = list(product(NORMS, POSITIONS, ACTIVATIONS, MOES, (None, 1, 2), *flags))
    for norm, position, activation, moe, kv, qkv_bias, out_bias, ffn_bias, head_bias, tie in random.Random(0).sample(
        everything, 100
    ):
        yield ModelConfig(
            **SIZES, norm=norm, position=position, activation=activation, moe=moe, n_kv_heads=kv, qkv_bias=qkv_bias,
            attention_out_bias=out_bias, ffn_bias=ffn_bias, head_bias=head_bias, tie_embeddings=tie,
        )  # fmt: skip
    for family, moe in product((ModelConfig.simple, ModelConfig.smol, ModelConfig.nano), MOES):
        yield family(**SIZES, moe=moe)


def on_meta(config):
    with torch.device("meta"):
        return DecoderLM(config)


# ------------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("simple-100m", 100_038_016, 100_038_016),
        ("simple-100m-moe", 371_640_312, 138_878_328),
        ("smol-119m", 119_355_392, 119_355_392),
        ("smol-119m-moe", 526_429_752, 177_548_856),
        ("simple-16m", 16_025_344, 16_025_344),
        ("nano", 10_795_520, 10_795_520),
        ("nano-moe", 54_992_576, 17_151_680),
        ("sparse-158m", 158_623_744, 70_543_360),
        ("smolmoe", 322_130_880, 162_878_400),
    ],
)
def test_published_sizes(name, total, active):
    count = count_parameters(REFERENCE[name])
    assert (count.total, count.active) == (total, active)
    assert f"{total:,}" in str(count)
    assert f"{active:,}" in str(count)


def test_published_sizes_that_are_rounded():
    small = count_parameters(REFERENCE["simple-16m-moe"])
    assert (round(small.total / 1e6, 2), round(small.active / 1e6, 2)) == (30.75, 18.14)
    assert count_parameters(REFERENCE["nano-moe-134m"]).total == 134_614_208

    sparse = count_parameters(REFERENCE["sparse-158m"])
    assert round(sparse.active / 1e6, 2) == 70.54
    assert sparse.active_without_embeddings == 44_680_704
    assert sparse.head == 50257 * 512
    assert round((sparse.active_without_embeddings - sparse.head) / 1e6, 2) == 18.95


@pytest.mark.parametrize("name", REFERENCE)
def test_the_built_reference_model_has_as_many(name):
    model = on_meta(REFERENCE[name])
    count = count_parameters(REFERENCE[name])
    assert model.num_parameters() == count.total
    assert model.num_parameters(active=True) == count.active


def test_the_count_is_that_of_the_built_model():
    for config in some_configs():
        count, model = count_parameters(config), on_meta(config)
        assert model.num_parameters() == count.total, config
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        expert = sum(size for name, size in sizes.items() if ".experts." in name)
        router = sum(size for name, size in sizes.items() if ".router." in name or ".noise." in name)
        share = config.moe.top_k / config.moe.num_experts if config.moe else 1
        assert count.active == count.total - expert + share * expert, config
        assert router == count.router * len(config.moe_layers), config
        if config.moe:
            assert expert == count.expert * config.moe.num_experts * len(config.moe_layers), config
        looked_up = sizes.get("position_embedding.weight", 0)
        looked_up += 0 if config.tie_embeddings else sizes["token_embedding.weight"]
        assert count.active_without_embeddings == count.active - looked_up, config
        assert count.head == sum(parameter.numel() for parameter in model.head.parameters()), config


def test_flops_are_those_that_torch_counts(monkeypatch):
    """On the defining expert loop, which computes only products that the counter knows.

    Torch's counter sees nothing of the fused attention kernel of a CPU (it counts 0 for it), hence the plain one.
    """
    monkeypatch.setattr(moe_module, "experts_sorted", moe_module.experts_loop)
    for config in (ModelConfig.simple, ModelConfig.smol, ModelConfig.nano):
        for moe, kv, tokens in zip(MOES, (None, 2, None, 1), (10, 3, 10, 7), strict=True):
            model = DecoderLM(config(**SIZES, moe=moe, n_kv_heads=kv)).train()  # noise is computed in training only
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(torch.zeros(1, tokens, dtype=torch.long))
            assert forward_flops(model.config, tokens) == counter.get_total_flops(), (model.config, tokens)
            head = 2 * 10 * 23 * 16
            assert forward_flops(model.config) - forward_flops(model.config, head=False) == head


def test_a_training_step_costs_three_forward_passes():
    model = DecoderLM(ModelConfig.simple(**SIZES))
    tokens_BT = torch.zeros(1, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens_BT, tokens_BT).loss.backward()
    assert counter.get_total_flops() == 3 * forward_flops(model.config)


def test_flops_of_the_sparse_reference():
    config = REFERENCE["sparse-158m"]
    assert round(forward_flops(config, 128) / 1e9, 2) == 11.63
    assert round(forward_flops(config, 128, head=False) / 1e9, 2) == 5.05
    assert round((forward_flops(config, 128) - forward_flops(config, 128, head=False)) / 1e9, 2) == 6.59


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(top_k=9), "top_k=9 but there are 8 experts; choose 1..8"),
        (dict(top_k=0), "top_k=0 but there are 8 experts; choose 1..8"),
        (dict(num_experts=0), "num_experts=0 is too small; choose at least 1"),
        (dict(router_std=-1.0), "router_std=-1.0 is too small; choose at least 0"),
        (dict(aux_weight=math.nan), "aux_weight=nan is too small; choose at least 0"),
        (dict(z_weight=-0.1), "z_weight=-0.1 is too small; choose at least 0"),
    ],
)
def test_experts_that_cannot_be(values, message):
    with pytest.raises(ValueError) as error:
        MoEConfig(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(norm="batchnorm"), "norm='batchnorm' is unknown; choose one of 'layernorm', 'rmsnorm'"),
        (dict(position="alibi"), "position='alibi' is unknown; choose one of 'learned', 'rope', 'none'"),
        (dict(activation="silu"), "activation='silu' is unknown; choose one of 'gelu', 'gelu_tanh', 'relu', 'swiglu'"),
        (dict(vocab_size=0), "vocab_size=0 is too small; choose at least 1"),
        (dict(n_layers=0), "n_layers=0 is too small; choose at least 1"),
        (dict(n_heads=0), "n_heads=0 is too small; choose at least 1"),
        (dict(n_kv_heads=0), "n_kv_heads=0 is too small; choose at least 1"),
        (dict(n_kv_heads=-2), "n_kv_heads=-2 is too small; choose at least 1"),
        (dict(seq_len=-3), "seq_len=-3 is too small; choose at least 1"),
        (dict(dropout=1.0), "dropout=1.0 is not a probability below 1; choose 0 <= dropout < 1"),
        (dict(dropout=-0.1), "dropout=-0.1 is not a probability below 1; choose 0 <= dropout < 1"),
        (dict(d_model=18), "d_model=18 is not a multiple of n_heads=4; change one of them"),
        (dict(n_kv_heads=3), "n_heads=4 is not a multiple of n_kv_heads=3"),
        (dict(d_model=12, position="rope"), "rope turns pairs, but a head has 3 dimensions; make it even"),
        (dict(moe=MoEConfig(layers=(0, 2))), "moe.layers names layer 2, but layers run from 0 to 1"),
        (dict(moe=MoEConfig(layers=(-1,))), "moe.layers names layer -1, but layers run from 0 to 1"),
    ],
)
def test_models_that_cannot_be(values, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**SIZES | values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(steps=0), "steps=0 is too small; choose at least 1"),
        (dict(batch_size=0), "batch_size=0 is too small; choose at least 1"),
        (dict(accumulation=0), "accumulation=0 is too small; choose at least 1"),
        (dict(optimizer="lion"), "optimizer='lion' is unknown; choose one of 'adamw', 'adafactor'"),
        (dict(precision="fp8"), "precision='fp8' is unknown; choose one of 'fp32', 'bf16', 'fp16'"),
        (dict(learning_rate=0.0), "learning_rate=0.0 does not train; choose a number above 0"),
        (dict(learning_rate=math.nan), "learning_rate=nan does not train; choose a number above 0"),
        (dict(warmup_steps=-1), "warmup_steps=-1 is too small; choose at least 0"),
        (dict(grad_clip=-1.0), "grad_clip=-1.0 is too small; choose at least 0"),
    ],
)
def test_runs_that_cannot_be(values, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**dict(steps=1) | values)
    assert str(error.value) == message
    with pytest.raises(ValueError, match="schedule='step' is unknown"):
        TrainConfig(steps=1, schedule="step")


# ------------------------------------------------------------------------------------------------------- plain data


def test_configurations_survive_json():
    for config in (*some_configs(), *REFERENCE.values(), *(preset.model for preset in PRESETS.values())):
        again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)
    values = ModelConfig.simple(**SIZES, moe=NOISY).to_dict()
    ModelConfig.from_dict(values)
    assert values == ModelConfig.simple(**SIZES, moe=NOISY).to_dict(), "from_dict changed what it was given"


def test_an_unknown_field_is_named():
    values = ModelConfig.simple(**SIZES, moe=NOISY).to_dict()
    with pytest.raises(ValueError, match="ModelConfig has no field colour; was it saved by another version"):
        ModelConfig.from_dict(values | dict(colour="red"))
    with pytest.raises(ValueError, match="MoEConfig has no field colour; was it saved by another version"):
        ModelConfig.from_dict(values | dict(moe=values["moe"] | dict(colour="red")))


def test_moe_layers():
    config = ModelConfig.simple(**SIZES | dict(n_layers=4))
    assert config.moe_layers == ()
    assert replace(config, moe=MoEConfig()).moe_layers == (0, 1, 2, 3)
    assert replace(config, moe=MoEConfig(layers=[3, 1, 3])).moe_layers == (1, 3)
    assert replace(config, moe=MoEConfig(layers=())).moe_layers == ()


def test_families():
    simple, smol, nano = (f(**SIZES) for f in (ModelConfig.simple, ModelConfig.smol, ModelConfig.nano))
    assert (simple.norm, simple.position, simple.activation, simple.tie_embeddings) == (
        "layernorm", "learned", "gelu", True,
    )  # fmt: skip
    assert (smol.norm, smol.position, smol.activation, smol.qkv_bias, smol.ffn_bias) == (
        "rmsnorm", "rope", "swiglu", False, False,
    )  # fmt: skip
    assert (nano.norm, nano.activation, nano.tie_embeddings, nano.head_bias) == ("layernorm", "relu", False, True)
    assert ModelConfig.smol(**SIZES, position="none").position == "none", "a family's default can be changed"


def test_presets_are_the_earlier_experiment_done_right():
    for name, reference in (("gpu", "simple-100m"), ("gpu-smol", "smol-119m")):
        preset = PRESETS[name]
        assert replace(preset.model, seq_len=512) == REFERENCE[reference]
        assert replace(preset.model, seq_len=512, moe=preset.moe) == REFERENCE[f"{reference}-moe"]
        assert (preset.dense.steps, preset.sparse.steps) == (1000, 1000)
        assert preset.dense.batch_size * preset.dense.accumulation * preset.model.seq_len == 2048
    assert all(name == preset.name for name, preset in PRESETS.items())
