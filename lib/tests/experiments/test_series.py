"""The series' shared steps: made once, loaded after that, alike for whoever calls them."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SHORT, TINY

from upcycling.core.config import ModelConfig
from upcycling.core.model import DecoderLM
from upcycling.experiments.arms import Arm
from upcycling.experiments.presets import PRESETS
from upcycling.experiments.series import Series, artifacts_dir, load_series, new_model
from upcycling.text.corpus import entropy_floor, load_corpus
from upcycling.text.stream import TokenStream
from upcycling.text.tokenizer import train_tokenizer
from upcycling.text.worlds.world import WorldConfig
from upcycling.training.config import TrainConfig
from upcycling.training.evaluation import evaluate
from upcycling.training.loop import train
from upcycling.variants.moments import carry_moments

QUIET = dict(progress=False, verbose=False)


@pytest.fixture(autouse=True)
def _artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "artifacts"))
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def random_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def folders():
    return sorted(path.name for path in (artifacts_dir() / "runs").iterdir() if path.is_dir())


@pytest.fixture
def local_corpus(tmp_path):
    """A small corpus of one's own, with a validation split that is found by a hash of the text."""
    path = tmp_path / "my stories.jsonl"
    rows = [
        f"Story {i}. The cat number {i * 7 % 41} saw {i} birds and went home to {i * i % 97} mice." for i in range(300)
    ]
    path.write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_made_or_loaded_is_the_same():
    """In any order: the second series starts with the last step and finds, or makes, what it needs."""
    torch.manual_seed(0)
    start = random_state()
    made = load_series("tiny")
    parent, first = made.dense_parent(**QUIET)
    moe, second = made.moe(**QUIET)
    assert made.tokenizer.get_vocab_size() == 300
    assert random_state() == start, "making draws no random number of the caller's"
    assert not any(model.training for model in (parent, moe))

    loaded = load_series("tiny")
    again, result = loaded.moe(**QUIET)
    assert random_state() == start, "nor does loading"
    assert equal(weights_of(moe), weights_of(again))
    assert result.history == second.history, "even the seconds: nothing was trained again"
    assert (result.final_loss, result.best_loss) == (second.final_loss, second.best_loss)
    assert equal(weights_of(parent), weights_of(loaded.dense_parent(**QUIET)[0]))
    assert second.history[0]["val_loss"] == pytest.approx(first.final_loss, abs=1e-4), "upcycling is no jump"
    assert second.final_loss == pytest.approx(evaluate(again, loaded.validation_stream))
    assert [name.rsplit("-", 1)[0] for name in folders()] == ["dense-parent", "moe"]


def test_the_parents_memory():
    series = load_series("tiny")
    parent, _ = series.dense_parent(**QUIET)
    state = carry_moments(series.parent_checkpoint(), parent, parent)
    assert {int(values["step"]) for values in state.values()} == {series.preset.dense.steps}
    assert folders() == [series.parent_checkpoint().parent.name]


def test_any_order_gives_the_same(tmp_path, monkeypatch):
    parent_first = load_series("tiny")
    expected = weights_of(parent_first.dense_parent(**QUIET)[0]), weights_of(parent_first.moe(**QUIET)[0])
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "elsewhere"))
    moe_first = load_series("tiny")
    moe, parent = weights_of(moe_first.moe(**QUIET)[0]), weights_of(moe_first.dense_parent(**QUIET)[0])
    assert equal(moe, expected[1])
    assert equal(parent, expected[0])


def test_each_run_is_what_it_says():
    series = load_series("tiny")
    parent, first = series.dense_parent(**QUIET)
    control, second = series.dense_control(seed=5, steps=2, **QUIET)
    scratch, third = series.train_arm(Arm("scratch", TINY.moe, start="scratch"), 5, 2, **QUIET)
    assert [result.history[-1]["step"] for result in (first, second, third)] == [3, 2, 2]
    assert second.history[0]["val_loss"] == pytest.approx(first.final_loss), "the control goes on from the parent"
    assert control.config == parent.config == TINY.model
    assert scratch.config == replace(TINY.model, moe=TINY.moe)
    assert third.history[0]["val_loss"] == pytest.approx(np.log(300), abs=0.2), (
        "from scratch: nothing known at the start"
    )

    expected = new_model(TINY.model, 0)
    train(expected, series.train_stream, series.validation_stream, replace(TINY.dense, seed=0), **QUIET)
    assert equal(weights_of(parent), weights_of(expected))
    train(expected, series.train_stream, series.validation_stream, replace(TINY.sparse, seed=1005, steps=2), **QUIET)
    assert equal(weights_of(control), weights_of(expected)), "the parent of seed 0, on data of another order"


def test_the_routing_is_kept_while_the_moe_is_trained():
    """Evaluations after 0, 2 and 4 updates, and 1 among the first; on the same probe whenever it is asked for."""
    series = load_series("tiny")
    tokens_BT, domains = series.probe()
    assert tokens_BT.shape[1] == 32 and len(domains) == len(tokens_BT)
    assert set(domains) <= series.domain_streams().keys() and len(set(domains)) > 1
    assert all(torch.equal(a, b) for a, b in zip(series.probe()[0], load_series("tiny").probe()[0]))
    for name in set(domains):
        text = " ".join(map(str, series.domain_streams()[name].tokens))
        mine = [" ".join(map(str, row.tolist())) for row, domain in zip(tokens_BT, domains) if domain == name]
        assert len(mine) == 4 and all(row in text for row in mine), "windows of that domain"

    moe, _ = series.moe(seed=1, **QUIET)
    (folder,) = (artifacts_dir() / "runs").glob("moe-*/")
    written = (folder / "snapshots.safetensors").stat().st_mtime_ns
    snapshots = load_series("tiny").moe_snapshots(seed=1, **QUIET)
    assert (folder / "snapshots.safetensors").stat().st_mtime_ns == written, "loaded, not trained again"
    assert snapshots.steps.tolist() == [0, 1, 2, 4]
    assert torch.equal(snapshots.probe_BT, tokens_BT)
    assert torch.equal(snapshots.expert_ids[-1, 1], moe(tokens_BT).routings[1].expert_ids_NK)
    assert not torch.equal(series.moe_snapshots(seed=0, **QUIET).expert_ids, snapshots.expert_ids)


def test_a_run_from_before_there_were_snapshots():
    series, seen = load_series("tiny"), []
    moe, result = series.moe(callbacks=[lambda step, model, row: seen.append(step)], **QUIET)
    assert seen == [0, 2, 4], "other callbacks are called, too"
    (folder,) = (artifacts_dir() / "runs").glob("moe-*/")
    (folder / "snapshots.safetensors").unlink()
    snapshots = series.moe_snapshots(**QUIET)
    assert snapshots.steps.tolist() == [0, 1, 2, 4]
    again, second = series.moe(**QUIET)
    assert equal(weights_of(moe), weights_of(again))
    assert second.final_loss == result.final_loss


def test_another_setting_is_another_run(monkeypatch):
    weights, names = [], []
    for preset, seed in (
        (TINY, 0),
        (TINY, 1),
        (replace(TINY, dense=replace(SHORT, learning_rate=2e-2)), 0),
        (replace(TINY, model=replace(TINY.model, d_ff=24)), 0),
        (replace(TINY, documents=130), 0),
    ):
        monkeypatch.setitem(PRESETS, "tiny", preset)
        weights.append(weights_of(load_series("tiny").dense_parent(seed, **QUIET)[0]))
        names.append(folders())
    assert [len(each) for each in names] == [1, 2, 3, 4, 5]
    assert all(not equal(weights[0], other) for other in weights[1:])


def test_the_run_depends_on_the_weights_it_starts_from():
    """Two MoEs of one configuration but different routers do not share a folder."""
    series = load_series("tiny")
    for seed in (0, 1):
        series.trained(new_model(replace(TINY.model, moe=TINY.moe), seed), SHORT, "moe", **QUIET)
    assert len(folders()) == 2


def test_a_local_corpus(local_corpus, monkeypatch):
    monkeypatch.setenv("UPCYCLING_CORPUS", str(local_corpus))
    monkeypatch.setenv("UPCYCLING_PRESET", "tiny")
    series = load_series()
    assert (series.preset, series.name) == (TINY, "my stories")
    assert len(series.corpus["train"]) + len(series.corpus["validation"]) == 300
    assert series.floor is None
    assert series.domain_streams() == {}
    assert series.moe_snapshots(**QUIET).domains == ("validation",)
    _, result = series.moe(**QUIET)
    assert np.isfinite(result.final_loss)


def test_a_relative_path_is_relative_to_here_or_to_the_repository(local_corpus, monkeypatch, tmp_path):
    monkeypatch.chdir(local_corpus.parent)
    assert len(load_series("tiny", f"./{local_corpus.name}").corpus["train"]) > 200
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "upcycling"\n')
    assert len(load_series("tiny", local_corpus.name).corpus["train"]) > 200
    with pytest.raises(FileNotFoundError, match="nowhere"):
        _ = load_series("tiny", "./nowhere.txt").corpus


def test_the_tokenizer_is_trained_on_the_training_split_alone(local_corpus):
    series = load_series("tiny", str(local_corpus))
    assert series.tokenizer.get_vocab_size() == 300
    (folder,) = artifacts_dir().glob("tokenizer-*/")
    assert (folder / "tokenizer.json").exists()
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert load_series("tiny", str(local_corpus)).tokenizer.to_str() == series.tokenizer.to_str()
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before, "loaded, not trained again"
    expected = train_tokenizer(series.corpus["train"]["text"], 300)
    assert series.tokenizer.to_str() == expected.to_str()


def test_another_tokenizer_by_name_or_folder(local_corpus, monkeypatch):
    trained = load_series("tiny", str(local_corpus))
    _ = trained.tokenizer
    (folder,) = artifacts_dir().glob("tokenizer-*/")
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, tokenizer=str(folder)))
    assert load_series("tiny", str(local_corpus)).tokenizer.to_str() == trained.tokenizer.to_str()
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, tokenizer="no/such"))
    monkeypatch.setenv("UPCYCLING_TOKENIZER", str(folder))
    assert load_series("tiny", str(local_corpus)).tokenizer.to_str() == trained.tokenizer.to_str()


def test_domains_and_floor():
    series = load_series("tiny")
    rows, streams = series.corpus["validation"], series.domain_streams()
    assert streams.keys() == set(rows["domain"]) == series.floor.by_domain.keys()
    assert sum(len(stream) for stream in streams.values()) == len(series.validation_stream)
    assert series.floor == entropy_floor(rows, series.validation_stream.document_lengths)


def test_presets_by_name(monkeypatch):
    assert load_series("tiny") == Series(TINY, "worlds")
    assert load_series() == Series(PRESETS["quick"], "worlds")
    monkeypatch.setenv("UPCYCLING_PRESET", "laptop")
    assert load_series().preset is PRESETS["laptop"]
    assert load_series("tiny", "tinystories").corpus_name == "tinystories"
    for name in ("huge", "QUICK"):
        with pytest.raises(ValueError, match=f"UPCYCLING_PRESET='{name}' is unknown; choose one of quick, laptop, gpu"):
            load_series(name)


def test_new_model():
    state = torch.get_rng_state()
    a, b, c = (new_model(TINY.model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(weights_of(a), weights_of(b))
    assert not equal(weights_of(a), weights_of(c))
    torch.manual_seed(3)
    assert equal(weights_of(a), weights_of(DecoderLM(TINY.model)))


def test_a_model_that_memorised_stays_above_the_floor(tmp_path):
    """Many epochs over a few documents: whatever it knows by heart, on others it cannot beat their entropy."""
    smallest = WorldConfig(n_towns=24, n_words=100, n_characters=8, n_functions=8)
    corpus = load_corpus("worlds", documents=60, validation_fraction=0.5, world=smallest)
    tokenizer = train_tokenizer(corpus["train"]["text"], 800)
    few, rows = corpus["train"].select(range(6)), corpus["validation"]
    learned, validation = (TokenStream.build(split, tokenizer, tmp_path, progress=False) for split in (few, rows))
    sizes = dict(vocab_size=800, d_model=128, n_layers=2, n_heads=4, d_ff=256, seq_len=64)
    config = TrainConfig(
        steps=150, batch_size=8, learning_rate=5e-3, schedule="constant", warmup_steps=10, eval_every=50, log_every=25
    )  # fmt: skip
    model = new_model(ModelConfig.smol(**sizes), seed=0)
    result = train(model, learned, validation, config, **QUIET)

    assert result.history[-1]["tokens"] > 20 * len(learned)
    assert result.history[-1]["loss"] < 1 < 4 < result.final_loss, "memorised"
    floor = entropy_floor(rows, validation.document_lengths)
    assert 0 < floor.overall < result.best_loss
    assert len(floor.by_domain) == 5
    for domain, least in floor.by_domain.items():
        own = rows.select([i for i, name in enumerate(rows["domain"]) if name == domain])
        assert 0 < least < evaluate(model, TokenStream.build(own, tokenizer, tmp_path, progress=False)), domain
