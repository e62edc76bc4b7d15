"""The bench case of generation: what it compares, and that it notices when the texts differ."""

import pytest
import torch

from upcycling.bench import generation as case
from upcycling.bench.measure import Bench
from upcycling.core.config import ModelConfig
from upcycling.cost.parts import count_parameters

TINY = ModelConfig.smol(vocab_size=61, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=16)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(case, "SHAPES", {"tiny": (TINY, 2.0), "left out": (None, 1.6)})
    monkeypatch.setattr(case, "NEW", 6)


def test_dense_and_moe_beside_transformers_and_the_floor(tiny):
    state = torch.random.get_rng_state()
    results = case.compare(Bench(rounds=3, quick=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [(c.peer, c.measure, c.goal) for c in results] == [
        (case.THEIRS, "speed", 2.0),
        (case.FLOOR, "time", None),
    ] * 2
    for c, kind in zip(results, ("dense", "dense", "MoE, 8 experts top-2", "MoE, 8 experts top-2"), strict=True):
        assert c.setting.startswith(f"tiny {kind}, batch 1, 6 tokens after 8") and c.ratio > 0


@pytest.mark.parametrize("moe", [None, case.EXPERTS])
def test_active_megabytes(tiny, moe):
    config = case.replace(TINY, moe=moe)
    _, megabytes = case.candidates(config, "cpu")
    assert megabytes * 1e6 == pytest.approx(4 * count_parameters(config).active)


def test_different_texts_are_noticed(tiny, monkeypatch):
    monkeypatch.setattr(case, "generate", lambda model, prompt_BT, new: torch.zeros(1, 14, dtype=torch.long))
    with pytest.raises(RuntimeError, match="different texts"):
        case.candidates(TINY, "cpu")
