"""Upcycling: the experts are copies, nothing else changes, and the outputs stay what they were."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from upcycling.core.config import ACTIVATIONS, ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM, FeedForward
from upcycling.core.transfer import upcycle

SIZES = dict(vocab_size=29, d_model=16, n_layers=2, n_heads=4, d_ff=24, seq_len=12)
FAMILIES = dict(simple=ModelConfig.simple, smol=ModelConfig.smol, nano=ModelConfig.nano)


def distance(out, expected):
    """The largest difference of the logits, relative to the largest logit where that exceeds 1."""
    return ((out.logits_BTV - expected.logits_BTV).abs().max() / expected.logits_BTV.abs().max().clamp(min=1)).item()


def make_dense(config, seed=0):
    """A dense model of which every weight, norm and bias is random."""
    torch.manual_seed(seed)
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_outputs_stay(family, dtype, tolerance):
    dense = make_dense(FAMILIES[family](**SIZES)).to(dtype)
    tokens_BT = torch.randint(29, (4, 12))
    with torch.no_grad():
        expected = dense(tokens_BT)
        assert expected.logits_BTV.std() > 0.5
        for std, top_k, noisy in product((0, 0.02, 1.0), (1, 2, 4, 8), (False, True)):
            moe = upcycle(dense, MoEConfig(num_experts=8, top_k=top_k, router_std=std, noisy=noisy))
            out = moe(tokens_BT)
            assert distance(out, expected) <= tolerance, (std, top_k)
            assert out.logits_BTV.dtype == dtype
            assert len(out.routings) == 2


def test_without_renormalising_they_do_not():
    dense = make_dense(ModelConfig.simple(**SIZES))
    tokens_BT = torch.randint(29, (4, 12))
    moe = upcycle(dense, MoEConfig(num_experts=8, top_k=2, renormalize=False))
    assert distance(moe(tokens_BT), dense(tokens_BT)) > 0.1
    everyone = upcycle(dense, MoEConfig(num_experts=8, top_k=8, renormalize=False))  # all of them sum to 1 anyway
    assert distance(everyone(tokens_BT), dense(tokens_BT)) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_expert_is_a_copy(activation, bias):
    dense = make_dense(ModelConfig.simple(**SIZES, activation=activation, ffn_bias=bias))
    moe = upcycle(dense, MoEConfig(num_experts=3, top_k=2))
    for old, new in zip(dense.blocks, moe.blocks, strict=True):
        gates = [("gate", "gate")] if activation == "swiglu" else []
        for ours, theirs in [("up", "up"), ("down", "down"), *gates]:
            linear = getattr(old.ffn, ours)
            stacked = getattr(new.ffn.experts, f"w_{theirs}_EDF" if ours == "down" else f"w_{theirs}_EFD")
            biases = getattr(new.ffn.experts, f"b_{theirs}_ED" if ours == "down" else f"b_{theirs}_EF")
            for e in range(3):
                assert torch.equal(stacked[e], linear.weight)
                if bias:
                    assert torch.equal(biases[e], linear.bias)
            assert (biases is None) != bias
        assert new.ffn.experts.w_up_EFD.data_ptr() != old.ffn.up.weight.data_ptr()
    outside = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    assert len(outside) > 10
    assert all(torch.equal(value, moe.state_dict()[name]) for name, value in outside.items())


def test_a_subset_of_layers():
    dense = make_dense(ModelConfig.smol(**SIZES | dict(n_layers=4)))
    moe = upcycle(dense, MoEConfig(num_experts=4, top_k=2, layers=(1, 3)))
    for layer in (0, 2):
        assert isinstance(moe.blocks[layer].ffn, FeedForward)
        assert torch.equal(moe.blocks[layer].ffn.gate.weight, dense.blocks[layer].ffn.gate.weight)
    tokens_BT = torch.randint(29, (2, 12))
    out = moe(tokens_BT)
    assert len(out.routings) == 2
    assert distance(out, dense(tokens_BT)) < 1e-5


def test_the_router_is_drawn_as_asked():
    dense = make_dense(ModelConfig.simple(**SIZES | dict(d_model=64, d_ff=8, n_layers=3)))
    for std in (0.02, 1.0):
        moe = upcycle(dense, MoEConfig(num_experts=64, top_k=2, router_std=std, router_bias=True, noisy=True))
        weights = torch.stack([block.ffn.router.weight for block in moe.blocks])
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        assert not torch.equal(weights[0], weights[1])
        assert all((block.ffn.router.bias == 0).all() for block in moe.blocks)
        assert moe.blocks[0].ffn.noise.weight.std().item() == pytest.approx(std, rel=0.1)
    zero = upcycle(dense, MoEConfig(num_experts=64, router_std=0))
    assert all((block.ffn.router.weight == 0).all() for block in zero.blocks)


def test_the_seed_decides_the_router_alone():
    small = make_dense(ModelConfig.simple(**SIZES))
    large = make_dense(ModelConfig.simple(**SIZES | dict(d_ff=48, vocab_size=31)), seed=5)

    def routers(dense, **options):
        moe = upcycle(dense, MoEConfig(num_experts=4, top_k=2), **options)
        return torch.stack([block.ffn.router.weight for block in moe.blocks])

    assert torch.equal(routers(small, seed=3), routers(small, seed=3))
    assert torch.equal(routers(small), routers(small, seed=0))
    assert not torch.equal(routers(small, seed=3), routers(small, seed=4))
    assert torch.equal(routers(small, seed=3), routers(large, seed=3)), "whatever else the model holds"


def test_the_dense_model_and_the_random_state_are_left_alone():
    dense = make_dense(ModelConfig.nano(**SIZES))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    moe = upcycle(dense, MoEConfig(num_experts=4, top_k=2), seed=11)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1.0)
    assert dense.config.moe is None
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_dtype_mode_and_checkpointing_are_kept():
    for dtype, training in product((torch.float64, torch.bfloat16), (True, False)):
        dense = make_dense(ModelConfig.simple(**SIZES)).to(dtype).train(training)
        dense.gradient_checkpointing = training
        moe = upcycle(dense, MoEConfig(num_experts=2, top_k=1))
        assert {parameter.dtype for parameter in moe.parameters()} == {dtype}
        assert moe.training == moe.blocks[1].ffn.training == training
        assert moe.gradient_checkpointing == training
        assert all(parameter.requires_grad for parameter in moe.parameters())


def test_a_tied_head_stays_tied():
    for tied in (True, False):
        moe = upcycle(make_dense(ModelConfig.smol(**SIZES, tie_embeddings=tied)), MoEConfig(num_experts=2, top_k=1))
        assert (moe.head.weight is moe.token_embedding.weight) == tied


def test_what_cannot_be_upcycled():
    dense = make_dense(ModelConfig.simple(**SIZES))
    moe = upcycle(dense, MoEConfig(num_experts=4, top_k=2))
    with pytest.raises(ValueError, match="the model has 4 experts already; upcycle takes a dense model"):
        upcycle(moe, MoEConfig())
    with pytest.raises(ValueError, match="init='spread' is unknown; choose one of 'copy'"):
        upcycle(dense, MoEConfig(), init="spread")
    with pytest.raises(ValueError, match=r"moe\.layers names layer 2, but layers run from 0 to 1"):
        upcycle(dense, MoEConfig(layers=(2,)))


def test_a_zero_router_uses_the_same_experts_for_ever():
    """Ties send every token to one pair; the router's gradient is exactly 0 and the pair's stay equal."""
    dense = make_dense(ModelConfig.simple(**SIZES))
    moe = upcycle(dense, MoEConfig(num_experts=8, top_k=2, router_std=0, aux_weight=0)).train()
    optimizer, tokens_BT = torch.optim.AdamW(moe.parameters(), lr=1e-2), torch.randint(29, (4, 12))
    for _ in range(3):
        out = moe(tokens_BT, tokens_BT.roll(-1, 1))
        optimizer.zero_grad()
        moe.objective(out).backward()
        optimizer.step()
    for routing, block in zip(out.routings, moe.blocks, strict=True):
        (pair,) = {tuple(ids) for ids in routing.expert_ids_NK.tolist()}
        assert (block.ffn.router.weight.grad == 0).all()
        assert (block.ffn.router.weight == 0).all()
        first, second = (block.ffn.experts.w_up_EFD[e] for e in pair)
        assert torch.equal(first, second), "bitwise equal"
        assert not torch.equal(first, dense.blocks[0].ffn.up.weight), "although they have learned"


def test_a_random_router_breaks_the_symmetry():
    dense = make_dense(ModelConfig.simple(**SIZES))
    moe = upcycle(dense, replace(MoEConfig(num_experts=4, top_k=2), router_std=0.02)).train()
    optimizer, tokens_BT = torch.optim.AdamW(moe.parameters(), lr=1e-2), torch.randint(29, (8, 12))
    for _ in range(3):
        optimizer.zero_grad()
        moe.objective(moe(tokens_BT, tokens_BT.roll(-1, 1))).backward()
        optimizer.step()
    for block in moe.blocks:
        assert block.ffn.router.weight.grad.abs().max() > 0
        weights_EFD = block.ffn.experts.w_up_EFD
        assert all(not torch.equal(weights_EFD[0], weights_EFD[e]) for e in range(1, 4))
