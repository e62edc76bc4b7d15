"""The study's arithmetic by hand, and a whole one on a tiny preset."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from upcycling.cli import main
from upcycling.experiments import knockouts
from upcycling.experiments.knockouts import main_experts, summarize, table
from upcycling.experiments.presets import PRESETS
from upcycling.experiments.series import load_series
from upcycling.routing.intervention import domain_losses, intervene
from upcycling.routing.metrics import domain_specialization

TINY = replace(tiny.TINY, documents=600, moe=replace(tiny.TINY.moe, router_std=1.0))
QUIET = dict(progress=False, verbose=False)


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "artifacts"))
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_main_experts():
    """The expert that sets a domain apart, not the one that everybody uses."""
    share_LCE = torch.tensor([[[0.9, 0.1, 0.6], [0.9, 0.4, 0.0], [0.8, 0.3, 0.1]], [[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    assert main_experts(share_LCE).tolist() == [[2, 1, 1], [1, 0, 2]]


def synthetic_seed(seed, scale):
    """Two layers, three experts, two domains."""
    return {
        "seed": seed,
        "domains": ["a", "b"],
        "main_experts": [[0, 2], [1, 1]],
        "cost": (scale * np.arange(12.0).reshape(2, 3, 2)).tolist(),
        "cost_together": [[10.0 * scale, 1.0], [2.0, 20.0 * scale]],
        "cost_random_together": [[1.0, 2.0], [3.0, 6.0]],
        "divergence": [0.5, 0.3],
        "divergence_shuffled": {"mean": [0.1, 0.1], "spread": [0.1, 0.01]},
        "chance_spreads": 3.0,
        "training": {"divergence": [[0.1, 0.25], [0.2, 0.2], [0.4, 0.35]]},
        "worst": [
            dict(layer=1, expert=2, domain="b", delta=0.25, margin=0.125, error=0.025, spreads=5.0),
            dict(layer=0, expert=1, domain="a", delta=0.2, margin=0.1, error=0.05, spreads=2.0),
        ],
    }


def test_summary_by_hand():
    result = {"seeds": [synthetic_seed(0, 1.0), synthetic_seed(7, 3.0)]}
    a, b = summarize(result)
    assert (a["domain"], b["domain"]) == ("a", "b")
    assert a["own"] == pytest.approx((20.0, 200**0.5))
    assert b["own"] == pytest.approx((40.0, 800**0.5))
    assert a["other"] == pytest.approx((2.0, 0.0)) and b["other"] == pytest.approx((1.0, 0.0))
    assert a["random"] == pytest.approx((2.0, 0.0)) and b["random"] == pytest.approx((4.0, 0.0))
    # expert 0 of layer 0 and 1 of layer 1 serve a: cells 0 and 8; 2 and 1 serve b: cells 5 and 9
    assert a["own_alone"] == pytest.approx((8.0, 32**0.5))
    assert b["own_alone"][0] == pytest.approx(2 * (5 + 9) / 2)
    assert a["random_alone"][0] == pytest.approx(2 * 5.0) and b["random_alone"][0] == pytest.approx(2 * 6.0)
    text = table(result)
    assert "seed 7: domains differ by 0.500 0.300 bits" in text and "4.0 20.0 spreads above chance" in text
    assert "on the probe 0.100 0.250 before any update (the experts are copies), 0.400 0.350 at the end" in text
    assert "1 of 2 experts serve one domain more than chance allows (3.0 spreads): b 1" in text
    assert "without expert 2 of layer 1 b loses 0.2500 nats, 0.1250 ± 0.0250 more" in text
    assert "expert 1 of layer 0" not in text
    (one,) = [row for row in summarize({"seeds": [synthetic_seed(0, 1.0)]}) if row["domain"] == "a"]
    assert one["own"][0] == 10.0 and np.isnan(one["own"][1])


def test_a_whole_study(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "knockout.json"
    arguments = ["knockouts", "--preset", "tiny", "--windows", "4", "--out", str(out), "--seeds"]
    assert main([*arguments, "1"]) == 0
    text = out.read_text(encoding="utf-8")
    assert "what removal costs" in capsys.readouterr().out
    result = json.loads(text)
    (one,) = result["seeds"]
    series = load_series("tiny")
    windows, (model, training) = series.domain_windows(4), series.moe(1, **QUIET)
    assert one["domains"] == [*windows] and one["layers"] == [0, 1] and one["val_loss"] == training.final_loss
    assert one["tokens"] == [int((targets_BT != -100).sum()) for _, targets_BT in windows.values()]
    base = domain_losses(model, windows)
    assert one["base_loss"] == pytest.approx([*base.values()], abs=1e-5)

    name, (tokens_BT, targets_BT) = [*windows.items()][2]
    real_N, routing = (targets_BT != -100).flatten(), model(tokens_BT).routings[1]
    share_E = domain_specialization(routing.expert_ids_NK[real_N], torch.zeros(int(real_N.sum()), dtype=torch.long), 4)
    assert one["share"][1][2] == pytest.approx(share_E[0].tolist(), abs=1e-5)
    with intervene(model, remove={1: [3]}):
        assert one["cost"][1][3][2] == pytest.approx(domain_losses(model, windows)[name] - base[name], abs=1e-5)
    own = {layer: [one["main_experts"][layer][2]] for layer in (0, 1)}
    with intervene(model, remove=own):
        assert one["cost_together"][2] == pytest.approx(
            [loss - base[name] for name, loss in domain_losses(model, windows).items()], abs=1e-5
        )
    assert np.shape(one["cost_random_together"]) == (knockouts.RANDOM_DRAWS, len(windows))
    assert one["training"]["steps"] == [0, 1, 2, 4]
    assert np.shape(one["training"]["divergence"]) == (4, 2)
    assert len(one["worst"]) == 8 and one["chance_spreads"] > 0
    assert not any(name.suffix == ".tmp" for name in out.parent.iterdir())

    def refuse(*_):
        raise AssertionError("studied again")

    monkeypatch.setattr(knockouts, "study", refuse)
    assert main([*arguments, "1"]) == 0
    with pytest.raises(AssertionError, match="studied again"):
        main([*arguments, "1", "2"])
    with pytest.raises(AssertionError, match="studied again"):
        main(["knockouts", "--preset", "tiny", "--windows", "3", "--out", str(out), "--seeds", "1"])
    assert json.loads(out.read_text(encoding="utf-8"))["seeds"] == result["seeds"], "kept until something is added"


def test_no_domains(tmp_path, capsys):
    corpus = tmp_path / "plain.jsonl"
    rows = [f"Story {i}: the cat saw {i * 7 % 41} birds and {i * i % 97} mice." for i in range(300)]
    corpus.write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows), encoding="utf-8")
    assert main(["knockouts", "--preset", "tiny", "--corpus", str(corpus)]) == 1
    assert "corpus 'plain' has no domains to compare" in capsys.readouterr().err
