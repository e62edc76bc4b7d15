"""AdamW's memory carried over: the dense run goes on bit for bit; experts get scaled copies, in their units' order."""

from dataclasses import replace

import pytest
import torch

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.initialisation import Drop, Noise
from upcycling.core.model import DecoderLM
from upcycling.core.shards import Granular
from upcycling.core.transfer import upcycle
from upcycling.text.stream import TokenStream
from upcycling.training.config import TrainConfig
from upcycling.training.loop import train
from upcycling.training.optim import optimizer_of
from upcycling.variants.moments import carry_moments

STREAM = TokenStream.from_ids(torch.randint(29, (600,), generator=torch.Generator().manual_seed(0)).tolist(), 29)
CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, schedule="constant", checkpoint_every=6, eval_every=0)
QUIET = dict(progress=False, verbose=False)


@pytest.fixture(scope="module", params=["smol", "simple"])
def run(request, tmp_path_factory):
    """A trained dense model and the folder of its run."""
    torch.manual_seed(0)
    family = getattr(ModelConfig, request.param)
    dense = DecoderLM(family(vocab_size=29, d_model=16, n_layers=2, n_heads=4, d_ff=24, seq_len=12))
    folder = tmp_path_factory.mktemp("dense")
    train(dense, STREAM, STREAM, CONFIG, directory=folder, **QUIET)
    return dense, folder / "latest.safetensors"


def copied(dense):
    twin = DecoderLM(dense.config)
    twin.load_state_dict(dense.state_dict())
    return twin


def test_a_dense_run_goes_on_bit_for_bit(run):
    dense, latest = run
    whole = copied(dense)
    # the run as it would have gone on: AdamW with the checkpoint's state, by hand
    optimizer = optimizer_of(whole, CONFIG, torch.device("cpu"))
    parameters = dict(whole.named_parameters())
    for name, state in carry_moments(latest, dense, dense).items():
        optimizer.state[parameters[name]] = {key: value.clone() for key, value in state.items()}
    assert len(optimizer.state) == len(parameters)
    assert all(state["step"] == 6 and state["exp_avg"].abs().sum() > 0 for state in optimizer.state.values())
    for step in range(3):
        whole.train()
        tokens_BT, targets_BT = STREAM.random_windows(4, 12, seed=9, step=step)
        whole(tokens_BT, targets_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    config = replace(CONFIG, steps=3, seed=9)
    carried, fresh = copied(dense), copied(dense)
    train(carried, STREAM, STREAM, config, optimizer_state=carry_moments(latest, dense, carried), **QUIET)
    train(fresh, STREAM, STREAM, config, **QUIET)
    for ours, theirs, new in zip(carried.parameters(), whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, new)


def check_experts(dense, moe, state, old, a, w, scale=1.0, units=None):
    """Compare layer 1's moments with the dense ones: a*w*s and a*w^2*s^2, and s only on the inner side."""
    experts = moe.blocks[1].ffn.experts
    for e in range(experts.w_up_EFD.shape[0]):
        index = slice(None) if units is None else units(e)
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            inner = a * w**power * scale**power * old["blocks.1.ffn.up.weight"][key][index]
            outer = a * w**power * old["blocks.1.ffn.down.weight"][key][:, index]
            torch.testing.assert_close(state["blocks.1.ffn.experts.w_up_EFD"][key][e], inner)
            torch.testing.assert_close(state["blocks.1.ffn.experts.w_down_EDF"][key][e], outer)
            if dense.config.ffn_bias:
                bias = a * w**power * old["blocks.1.ffn.down.bias"][key]
                torch.testing.assert_close(state["blocks.1.ffn.experts.b_down_ED"][key][e], bias)


def test_experts_get_scaled_copies(run):
    dense, latest = run
    old = carry_moments(latest, dense, dense)
    moe = upcycle(dense, MoEConfig(num_experts=8, top_k=2, layers=(1,)))
    state = carry_moments(latest, dense, moe)
    check_experts(dense, moe, state, old, a=2 / 8, w=1 / 2)
    assert set(dict(moe.named_parameters())) - set(state) == {"blocks.1.ffn.router.weight"}
    assert all(state[name]["step"] == 6 for name in state)
    assert all(state[name][key].shape == p.shape for name, p in moe.named_parameters() if name in state
               for key in ("exp_avg", "exp_avg_sq"))  # fmt: skip
    for name in ("blocks.0.ffn.up.weight", "blocks.1.attention.q.weight", "token_embedding.weight"):
        assert torch.equal(state[name]["exp_avg"], old[name]["exp_avg"])
    bare = upcycle(dense, MoEConfig(num_experts=8, top_k=2, renormalize=False))
    check_experts(dense, bare, carry_moments(latest, dense, bare), old, a=2 / 8, w=1 / 8)
    fine = upcycle(dense, MoEConfig(num_experts=8, top_k=4, expert_d_ff=12), init="granular")
    check_experts(dense, fine, carry_moments(latest, dense, fine), old, a=4 / 8, w=1 / 4, scale=2.0,
                  units=lambda e: slice(12 * (e % 2), 12 * (e % 2) + 12))  # fmt: skip


def test_moments_follow_their_units(run):
    dense, latest = run
    old = carry_moments(latest, dense, dense)["blocks.0.ffn.up.weight"]
    moe = upcycle(dense, MoEConfig(num_experts=4), init="permute")
    new = carry_moments(latest, dense, moe)["blocks.0.ffn.experts.w_up_EFD"]
    for e, row in ((0, 0), (3, 7)):
        weight = moe.blocks[0].ffn.experts.w_up_EFD[e, row]
        unit = int((dense.blocks[0].ffn.up.weight == weight).all(1).nonzero())
        torch.testing.assert_close(new["exp_avg"][e, row], old["exp_avg"][unit] / 4)
    for init in (Drop(0.5), Noise()):
        moe = upcycle(dense, MoEConfig(num_experts=4), init=init)
        new = carry_moments(latest, dense, moe)["blocks.0.ffn.experts.w_up_EFD"]
        redrawn_EF = (moe.blocks[0].ffn.experts.w_up_EFD != dense.blocks[0].ffn.up.weight).any(2)
        assert torch.equal((new["exp_avg"] == 0).all(2), redrawn_EF)
        torch.testing.assert_close(new["exp_avg_sq"], (old["exp_avg_sq"] / 8).expand(4, -1, -1))
    shared = upcycle(dense, MoEConfig(num_experts=4, shared_experts=1))
    new = carry_moments(latest, dense, shared)["blocks.0.ffn.shared.w_up_EFD"]
    torch.testing.assert_close(new["exp_avg"][0], old["exp_avg"] / 2, msg="a shared copy has half the output")


def test_gradients_are_as_large_as_the_scale_says():
    """Averaged over routers, an expert's squared gradient on separate batches is about a w^2 of the dense FFN's."""
    torch.manual_seed(0)
    dense = DecoderLM(ModelConfig.smol(vocab_size=29, d_model=16, n_layers=2, n_heads=4, d_ff=24, seq_len=12))

    def mean_square(model, get):
        total = 0.0
        for step in range(40):
            tokens_BT, targets_BT = STREAM.random_windows(16, 12, seed=1, step=step)
            model.zero_grad()
            model(tokens_BT, targets_BT).loss.backward()
            total += get(model).grad.square().mean().item()
        return total

    expected = mean_square(dense, lambda m: m.blocks[1].ffn.down.weight)
    moe = upcycle(dense, MoEConfig(num_experts=8, top_k=2, router_std=0.5))
    ours = mean_square(moe, lambda m: m.blocks[1].ffn.experts.w_down_EDF)
    assert 1 / 64 < ours / expected < 2 / 8, "between all signal, (a w)^2, and four times all noise, a w^2"


def test_what_cannot_be_carried(run, tmp_path):
    dense, latest = run
    rooted = upcycle(dense, MoEConfig(num_experts=8, top_k=4, expert_d_ff=12), init=Granular(scale="cube_root"))
    with pytest.raises(ValueError, match="the experts are 12 units wide, the dense FFN 24"):
        carry_moments(latest, dense, rooted)
    other = DecoderLM(replace(dense.config, d_ff=12))
    with pytest.raises(ValueError, match="they belong to another model"):
        carry_moments(latest, other, other)
    with pytest.raises(FileNotFoundError):
        carry_moments(tmp_path / "none.safetensors", dense, dense)
    train(twin := copied(dense), STREAM, STREAM, replace(CONFIG, optimizer="adafactor"), directory=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="has no AdamW moments"):
        carry_moments(tmp_path / "latest.safetensors", twin, twin)


def test_what_train_refuses(run, tmp_path):
    dense, latest = run
    state, moe = carry_moments(latest, dense, dense), upcycle(dense, MoEConfig(num_experts=4))
    with pytest.raises(ValueError, match=r"optimizer_state names 'blocks\.0\.ffn"):
        train(moe, STREAM, STREAM, CONFIG, optimizer_state=state, **QUIET)
    wrong = {name: {key: value[..., :5] if value.ndim else value for key, value in values.items()}
             for name, values in state.items()}  # fmt: skip
    with pytest.raises(ValueError, match="has shape"):
        train(copied(dense), STREAM, STREAM, CONFIG, optimizer_state=wrong, **QUIET)
    with pytest.raises(ValueError, match="optimizer_state is AdamW's, but optimizer='adafactor'"):
        train(copied(dense), STREAM, STREAM, replace(CONFIG, optimizer="adafactor"), optimizer_state=state, **QUIET)
    train(copied(dense), STREAM, STREAM, CONFIG, directory=tmp_path, optimizer_state=state, **QUIET)
    with pytest.raises(ValueError, match=r"belongs to another run: data\.optimizer_state"):
        train(copied(dense), STREAM, STREAM, CONFIG, directory=tmp_path, **QUIET)
