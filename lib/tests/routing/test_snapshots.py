"""Snapshots against a model routed by hand, and training with and without them bit by bit."""

import numpy as np
import pytest
import torch

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.routing.metrics import domain_specialization, router_saturation
from upcycling.routing.snapshots import RoutingSnapshots
from upcycling.text.stream import TokenStream
from upcycling.training.config import TrainConfig
from upcycling.training.loop import train

QUIET = dict(progress=False, verbose=False)


def make_stream(length=600, seed=0):
    return TokenStream.from_ids(np.random.default_rng(seed).integers(1, 3, length).cumsum() % 29, 29)


def make_moe(**changes):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, top_k=2, noisy=True)
    sizes = dict(vocab_size=29, d_model=16, n_layers=3, n_heads=2, d_ff=16, seq_len=12)
    return DecoderLM(ModelConfig.simple(**sizes, dropout=0.1, **dict(moe=moe) | changes))


def config(**changes):
    return TrainConfig(**dict(steps=9, batch_size=4, learning_rate=1e-2, eval_every=5, log_every=2) | changes)


def probe():
    return torch.randint(0, 29, (3, 8), generator=torch.Generator().manual_seed(1))


def run(model, settings=None, **options):
    return train(model, make_stream(), make_stream(200, seed=1), settings or config(), **QUIET | options)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def equal(a, b):
    fields = ("steps", "expert_ids", "weights", "probabilities", "tokens", "sequence", "labels")
    return (a.layers, a.domains) == (b.layers, b.domains) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in fields
    )


def test_training_goes_on_as_if_they_were_not_there(tmp_path):
    """With dropout and a noisy router, so that one random number more or a mode left behind would show."""
    plain, watched = make_moe(), make_moe()
    expected = run(plain)
    result = run(watched, callbacks=[snapshots := RoutingSnapshots(probe(), tmp_path / "s.safetensors", every=4)])
    assert same(weights(plain), weights(watched))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in expected.history]
    assert snapshots.steps.tolist() == [0, 1, 2, 4, 5, 8, 9], "powers of two, each 4th, evaluations, the last"


def test_what_is_kept(tmp_path):
    path, model = tmp_path / "run" / "s.safetensors", make_moe()
    snapshots = RoutingSnapshots(probe(), path, every=3, labels=["b", "a", "b"])
    run(model, callbacks=[snapshots])
    assert model(probe()).routings, "the last snapshot is of the trained model"
    loaded = RoutingSnapshots.load(path)
    assert equal(loaded, snapshots) and len(loaded) == len(snapshots) == 7
    assert loaded.every == 3 and path.stat().st_size < 20_000
    for i, routing in enumerate(model(probe()).routings):
        assert torch.equal(loaded.expert_ids[-1, i], routing.expert_ids_NK)
        assert torch.allclose(loaded.probabilities[-1, i], routing.probabilities_NE, atol=1e-3)
        assert torch.allclose(loaded.weights[-1, i], routing.weights_NK, atol=1e-3)
    assert loaded.expert_ids.dtype == torch.int64 and loaded.probabilities.dtype == torch.float32
    assert loaded.expert_ids.shape == (7, 3, 24, 2) and loaded.probabilities.shape == (7, 3, 24, 4)
    assert loaded.layers == (0, 1, 2)
    assert torch.equal(loaded.tokens.view(3, 8), probe())
    assert loaded.sequence.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert loaded.domains == ("b", "a") and loaded.labels.tolist() == [0] * 8 + [1] * 8 + [0] * 8
    assert [path.name for path in path.parent.iterdir()] == ["s.safetensors"]


def test_the_metrics_take_them():
    snapshots = RoutingSnapshots(probe(), labels=["a", "b", "b"])
    model = make_moe()
    run(model, callbacks=[snapshots])
    assert domain_specialization(snapshots.expert_ids[-1], snapshots.labels, 4).shape == (3, 2, 4)
    saturation = [router_saturation(ids, snapshots.expert_ids[-1]).mean() for ids in snapshots.expert_ids]
    assert saturation[-1] == 1 > saturation[0]
    trace = snapshots.trace(0)
    assert torch.equal(trace.expert_ids, snapshots.expert_ids[0]) and trace.layers == (0, 1, 2)
    assert torch.allclose(trace.logits.softmax(-1), snapshots.probabilities[0], atol=1e-3)
    assert trace.position.tolist() == [*range(8)] * 3 and torch.equal(trace.sequence, snapshots.sequence)


def test_a_killed_run_goes_on(tmp_path):
    """What stands in the file beyond the checkpoint is replaced, what stands before it is kept."""
    settings, path = config(checkpoint_every=3), tmp_path / "s.safetensors"
    whole = RoutingSnapshots(probe(), every=4)
    run(make_moe(), settings, callbacks=[whole])

    def kill(step, model, row):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_moe(), settings, directory=tmp_path, callbacks=[RoutingSnapshots(probe(), path, every=4), kill])
    killed = RoutingSnapshots.load(path)
    assert killed.steps.tolist() == [0, 1, 2, 4, 5]
    killed._kept["expert_ids"][-2:] = 0  # so that one sees whether they are made again
    killed(5, make_moe())
    resumed = RoutingSnapshots(probe(), path, every=4)
    assert resumed.steps.tolist() == [0, 1, 2, 4, 5]
    run(make_moe(), settings, directory=tmp_path, callbacks=[resumed])
    assert equal(resumed, whole) and equal(RoutingSnapshots.load(path), whole)

    unlike = RoutingSnapshots(probe()[:2], path, every=4)
    assert len(unlike) == 0, "another probe starts over"


def test_a_snapshot_by_hand_leaves_the_mode_alone():
    model, snapshots = make_moe().train(), RoutingSnapshots(probe())
    state = torch.get_rng_state()
    snapshots(0, model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not snapshots.probabilities.requires_grad, "no graph is kept"
    assert torch.equal(snapshots.expert_ids[0, 1], model.eval()(probe()).routings[1].expert_ids_NK)
    model.train()
    assert not torch.equal(model(probe()).routings[1].expert_ids_NK, snapshots.expert_ids[0, 1]), "noise in training"


def test_some_layers_only():
    snapshots = RoutingSnapshots(probe())
    snapshots(0, make_moe(moe=MoEConfig(num_experts=4, layers=(2,))))
    assert snapshots.layers == (2,) and snapshots.expert_ids.shape[:2] == (1, 1)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="every=0 is no number of updates"):
        RoutingSnapshots(probe(), every=0)
    with pytest.raises(ValueError, match="2 labels for 3 windows"):
        RoutingSnapshots(probe(), labels=["a", "b"])
    with pytest.raises(ValueError, match="the model is dense"):
        RoutingSnapshots(probe())(0, make_moe(moe=None))
    with pytest.raises(FileNotFoundError):
        RoutingSnapshots.load(tmp_path / "none.safetensors")
    run(make_moe(), config(steps=1), directory=tmp_path)
    with pytest.raises(ValueError, match="holds no routing snapshots"):
        RoutingSnapshots.load(tmp_path / "latest.safetensors")
