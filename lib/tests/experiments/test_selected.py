"""The study of selections: its arithmetic by hand, and a whole one on a tiny preset."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from upcycling.cli import main
from upcycling.experiments import selected
from upcycling.experiments.results import paired, values, verdict
from upcycling.experiments.selected import REFERENCE, Choice, budget_of, choose, study, summarize, table
from upcycling.experiments.series import Series
from upcycling.selection.choose import documents_read
from upcycling.show import plot_selected
from upcycling.training.config import TrainConfig

SHORT = TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, eval_every=2)
TINY = replace(tiny.TINY, model=replace(tiny.TINY.model, seq_len=128), dense=SHORT, sparse=SHORT)
ARMS = (
    Choice("random"),
    Choice("highest count entropy", "count_entropy"),
    Choice("dense control, random", dense=True),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("artifacts"), TINY)


@pytest.fixture
def series(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(shutil.copytree(prepared, tmp_path / "artifacts")))
    return Series(TINY, "worlds")


def row(arm, seed, loss, **domains):
    return {"arm": arm, "seed": seed, "val_loss": loss, "per_domain": domains, "documents": 10, "tokens": 100}


RESULT = {
    "setting": {"budget": 100, "updates": 5},
    "parent_loss": 2.0,
    "rows": [
        row("random", 0, 1.0, code=3.0),
        row("random", 1, 1.2, code=3.5),
        row("chosen", 1, 1.1, code=3.8),
        row("chosen", 0, 0.8, code=3.2),
    ],
}


def test_differences_are_paired_by_seed():
    assert values(RESULT, "chosen") == {1: 1.1, 0: 0.8}

    def less_random(result, *measure):
        return paired(values(result, "chosen", *measure), values(result, REFERENCE, *measure))

    mean, spread = less_random(RESULT)
    assert (mean, spread) == (pytest.approx(-0.15), pytest.approx(0.05 * math.sqrt(2)))
    assert less_random(RESULT, "code") == (pytest.approx(0.25), pytest.approx(0.05 * math.sqrt(2)))
    assert math.isnan(less_random({"rows": RESULT["rows"][::3]})[1])  # one seed has no spread
    summary = {line["arm"]: line for line in summarize(RESULT)}
    assert summary["chosen"]["loss"] == (pytest.approx(0.95), pytest.approx(0.15 * math.sqrt(2)))
    assert "-0.1500" in table(RESULT) and "+0.2500 ± 0.0707" in table(RESULT)


def test_the_verdict_needs_two_spreads():
    assert verdict((-0.21, 0.1)) == "better" and verdict((0.21, 0.1)) == "worse"
    assert verdict((-0.19, 0.1)) == verdict((0.0, 0.0)) == verdict((0.5, float("nan"))) == "not told apart"


def test_the_budget_is_read_about_once(series):
    tokens, updates = budget_of(series, 0.5)
    assert tokens == len(series.train_stream) // 2
    assert 0 <= updates * 4 * 128 - tokens < 4 * 128
    with pytest.raises(ValueError, match="fraction=2"):
        budget_of(series, 2)


def test_a_study_reads_what_was_selected_and_goes_on_where_it_stopped(series, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    study(series, [0], ARMS, fraction=0.2, out=out, progress=False)
    monkeypatch.setattr(selected, "documents_read", lambda *_: pytest.fail("a run that is in the file is made again"))
    study(series, [0], ARMS, fraction=0.2, out=out, progress=False)
    monkeypatch.setattr(selected, "documents_read", documents_read)
    result = study(series, [0, 1], ARMS, fraction=0.2, out=out, progress=False)

    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert [(r["arm"], r["seed"]) for r in result["rows"]] == [(arm.name, seed) for seed in (0, 1) for arm in ARMS]
    rows = {(r["arm"], r["seed"]): r for r in result["rows"]}
    random, entropy, dense = (rows[arm.name, 0] for arm in ARMS)
    lengths = series.train_stream.document_lengths
    for r in rows.values():
        assert 0 < r["documents_read"] <= r["documents"] == sum(r["chosen_by_stratum"])
        assert sum(r["tokens_by_domain"].values()) == r["tokens"]
        assert r["tokens"] <= result["setting"]["budget"] < r["tokens"] + lengths.max()
        assert r["history"][0][1] == pytest.approx(result["parent_loss"], abs=1e-4)  # all start from the parent
        assert r["history"][-1] == [result["setting"]["updates"], r["val_loss"]]
    assert random["chosen_by_stratum"] != rows["random", 1]["chosen_by_stratum"]  # the seed draws
    assert entropy["chosen_by_stratum"] == rows[ARMS[1].name, 1]["chosen_by_stratum"]
    assert dense["chosen_by_stratum"] == random["chosen_by_stratum"] and "balance" not in dense
    assert 0 < random["balance"] <= 1
    assert {random["val_loss"], entropy["val_loss"], dense["val_loss"]} == {r["val_loss"] for r in result["rows"][:3]}
    assert random["val_loss"] != entropy["val_loss"]

    figure = plot_selected(result)
    assert [axes.get_title() for axes in figure.axes] == ["all", *random["per_domain"]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [arm.name for arm in ARMS[1:]]


def test_an_unselected_document_in_the_stream_stops_the_run(series):
    budget, updates = budget_of(series, 0.2)
    selection = choose(series, ARMS[0], budget, 0)
    stream = selection.stream(series.corpus["train"], series.tokenizer, selected.artifacts_dir(), progress=False)
    lying = SimpleNamespace(indices=selection.indices + 1, stream=lambda *_, **__: stream)
    with pytest.raises(AssertionError, match="not selected"):
        selected.run(series, ARMS[0], lying, 0, updates)


def test_the_command_writes_and_prints(series, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("upcycling.experiments.series.load_series", lambda *_: series)
    monkeypatch.setattr(selected, "CHOICES", ARMS[:2])
    assert main(["select", "--seeds", "0", "--fraction", "0.2", "--out", str(tmp_path / "r.json")]) == 0
    assert "highest count entropy" in capsys.readouterr().out and (tmp_path / "r.json").exists()
    assert main(["select", "--fraction", "3"]) == 2 and "'--fraction': 3 is no fraction" in capsys.readouterr().err
