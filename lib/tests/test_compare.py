"""The comparison's arithmetic by hand, and a whole one on a tiny preset."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from upcycling import compare as compare_module
from upcycling.compare import (
    BUDGETS,
    Ratios,
    main,
    margin,
    measure_ratios,
    setting,
    summarize,
    table,
    updates_per_budget,
)
from upcycling.config import PRESETS, ModelConfig, MoEConfig, Preset, TrainConfig, forward_flops
from upcycling.series import load_series

SHORT = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, eval_every=2, log_every=1)
TINY = Preset(
    name="tiny",
    corpus="worlds",
    documents=120,
    tokenizer="train",
    model=ModelConfig.simple(vocab_size=300, d_model=16, n_layers=2, n_heads=2, d_ff=16, seq_len=32),
    moe=MoEConfig(num_experts=4, top_k=2),
    dense=SHORT,
    sparse=replace(SHORT, steps=4),
)


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "artifacts"))
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # an arm sets it to 1, in a process of its own but for these tests


def synthetic(losses, floor=0.5):
    """losses: (arm, budget) -> one validation loss per seed."""
    rows = [
        dict(arm=arm, budget=budget, seed=seed, val_loss=loss, updates=100 + len(arm))
        for (arm, budget), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return dict(rows=rows, floor=floor)


RESULT = synthetic(
    {
        ("dense control", "tokens"): [1.0, 1.2, 1.1],
        ("upcycled MoE", "tokens"): [0.75, 0.8, 0.7],
        ("dense control", "FLOPs"): [0.9, 0.9, 0.9],
        ("upcycled MoE", "FLOPs"): [0.75, 0.8, 0.7],
        ("upcycled MoE", "seconds"): [0.75],
    }
)


def test_updates_per_budget():
    preset = replace(TINY, dense=replace(SHORT, steps=100), sparse=replace(SHORT, steps=200))
    series = replace(load_series("tiny"), preset=preset)
    assert updates_per_budget(series, Ratios(flops=1.25, seconds=1.6)) == {
        ("dense control", "tokens"): 200,
        ("dense control", "FLOPs"): 250,
        ("dense control", "seconds"): 320,
        ("upcycled MoE", "tokens"): 200,
        ("upcycled MoE", "FLOPs"): 200,
        ("upcycled MoE", "seconds"): 200,
        ("MoE from scratch", "tokens"): 300,
        ("MoE from scratch", "FLOPs"): 280,  # 100 / 1.25 for the parent's share
        ("MoE from scratch", "seconds"): 262,  # 62.5 rounds to the even 62
    }


def test_summarize():
    rows = {(row["arm"], row["budget"]): row for row in summarize(RESULT)}
    assert len(rows) == 5
    dense = rows["dense control", "tokens"]
    assert dense["mean"] == pytest.approx(1.1)
    assert dense["spread"] == pytest.approx(0.1)  # sample standard deviation
    assert dense["updates"] == 113
    assert rows["dense control", "FLOPs"]["spread"] == 0
    assert rows["upcycled MoE", "tokens"]["mean"] == pytest.approx(0.75)
    one = rows["upcycled MoE", "seconds"]["spread"]
    assert one != one, "one seed has no spread"
    assert [row["budget"] for row in summarize(RESULT)] == ["tokens", "tokens", "FLOPs", "FLOPs", "seconds"]


def test_margin():
    assert margin(RESULT, "tokens") == pytest.approx((0.35, 0.1))
    assert margin(RESULT, "FLOPs") == pytest.approx((0.15, 0.05))
    worse = synthetic({("dense control", "tokens"): [1.0, 1.0], ("upcycled MoE", "tokens"): [1.2, 1.2]})
    assert margin(worse, "tokens") == pytest.approx((-0.2, 0)), "negative where the MoE loses"


def test_table():
    header, first, *others = table(RESULT).splitlines()
    assert header.split("  ")[0].strip() == "equal"
    assert first.split() == ["tokens", "dense", "control", "113", "1.100", "0.1000", "0.600"]
    assert len(others) == 4
    assert len({len(line) for line in (header, first, *others)}) == 1, "columns stand below each other"
    assert table(RESULT | dict(floor=None)).splitlines()[1].split()[-1] == "0.1000", "no gap to an unknown floor"


def test_ratios_are_measured_and_counted():
    series = load_series("tiny")
    ratios = measure_ratios(series, rounds=3)
    moe = replace(TINY.model, moe=TINY.moe)
    assert ratios.flops == round(forward_flops(moe) / forward_flops(TINY.model), 3)
    assert 1 < ratios.flops < 2
    assert ratios.seconds > 0.5


def test_the_setting_changes_with_what_the_result_depends_on(monkeypatch):
    series = load_series("tiny")
    here = setting(series)
    assert json.loads(json.dumps(here)) == here
    assert setting(load_series("tiny")) == here
    for changes in (
        dict(dense=replace(SHORT, learning_rate=1.0)),
        dict(sparse=replace(SHORT, steps=9)),
        dict(moe=MoEConfig(num_experts=4, top_k=1)),
        dict(model=replace(TINY.model, d_ff=8)),
        dict(documents=130),
    ):
        monkeypatch.setitem(PRESETS, "tiny", replace(TINY, **changes))
        assert setting(load_series("tiny")) != here, changes
    other_seed = replace(TINY, dense=replace(SHORT, seed=9), sparse=replace(TINY.sparse, seed=9))
    monkeypatch.setitem(PRESETS, "tiny", other_seed)
    assert setting(load_series("tiny")) == here, "seeds are the arms' own"


class Inline:
    """A process pool without processes: they would know nothing of the tiny preset."""

    def __init__(self, workers, mp_context=None):
        assert mp_context.get_start_method() == "spawn", "a fork of a process with threads may hang"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


def test_a_whole_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_module, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(compare_module, "measure_ratios", lambda series: Ratios(1.25, 1.5))
    out = tmp_path / "results" / "arms.json"
    assert main(["--preset", "tiny", "--seeds", "0", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [path.name for path in out.parent.iterdir()] == ["arms.json"], "no temporary file is left"
    printed = capsys.readouterr().out
    assert table(result) in printed

    rows = result["rows"]
    assert len({(row["arm"], row["budget"], row["seed"]) for row in rows}) == len(rows) == 3 * 3 * 2
    series = load_series("tiny")
    assert result["floor"] == pytest.approx(series.floor.overall)
    assert result["setting"] == setting(series)
    assert (result["corpus"], result["seeds"]) == ("worlds", [0, 1])
    for row in rows:
        assert row["updates"] == updates_per_budget(series, Ratios(1.25, 1.5))[row["arm"], row["budget"]]
        assert row["history"][0][0] == 0
        assert row["history"][-1] == [row["updates"], row["val_loss"]]
        assert row["per_domain"].keys() == series.floor.by_domain.keys()
        assert all(value > result["floor"] / 2 for value in row["per_domain"].values())
        if row["arm"] == "dense control":
            assert "max_load" not in row
        else:
            assert len(row["max_load"]) == len(row["dead_experts"]) == 2
            assert all(1 <= load <= 4 for load in row["max_load"])
    by_seed = {row["seed"]: row["val_loss"] for row in rows if row["arm"] == "upcycled MoE"}
    assert by_seed[0] != by_seed[1]
    expected = series.moe(1, progress=False, verbose=False)[1].final_loss
    assert by_seed[1] == expected, "and taken from the runs that are kept"
    losses = [row["val_loss"] for row in rows if (row["arm"], row["budget"]) == ("dense control", "seconds")]
    assert margin(result, "seconds")[1] >= statistics.stdev(losses)


def test_without_the_arm_from_scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(compare_module, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(compare_module, "measure_ratios", lambda series: Ratios(1.0, 1.0))
    result = compare_module.compare("tiny", "worlds", [0], scratch=False)
    assert {row["arm"] for row in result["rows"]} == {"dense control", "upcycled MoE"}
    assert {row["budget"] for row in result["rows"]} == set(BUDGETS)
    runs = [path for path in (tmp_path / "artifacts" / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 3, "parent, control, MoE: equal numbers of updates are one run"


def test_a_failed_write_leaves_the_old_result(monkeypatch, tmp_path):
    out = tmp_path / "arms.json"
    out.write_text("old")
    monkeypatch.setattr(compare_module, "compare", lambda *_: RESULT | dict(bad={1, 2}))
    with pytest.raises(TypeError):
        main(["--preset", "tiny", "--out", str(out)])
    assert out.read_text() == "old"
