"""Scores mean what they say, quotas add up, a selection is what its settings promise, and training reads it."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from real_models import TINY_LLAMA
from tokenizers import Tokenizer, models, pre_tokenizers

from upcycling import MoEConfig, TrainConfig, load_corpus
from upcycling.core.config import ModelConfig
from upcycling.core.transfer import upcycle
from upcycling.experiments.series import new_model
from upcycling.selection import choose as selection, near_duplicates, quotas as quotas_module, scores
from upcycling.selection.choose import STRATA, Selection, documents_read, select
from upcycling.selection.quotas import quotas
from upcycling.selection.scores import SCORES, length_correlation, score_documents
from upcycling.text import corpus
from upcycling.text.stream import TokenStream
from upcycling.text.tokenizer import encode_documents, load_tokenizer, train_tokenizer
from upcycling.training.loop import train

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def rows():
    return load_corpus("worlds", documents=400, validation_fraction=0.1)["train"]


@pytest.fixture(scope="module")
def tokenizer(rows):
    return train_tokenizer(rows["text"], vocab_size=400)


@pytest.fixture(scope="module")
def dense():
    return new_model(ModelConfig.simple(vocab_size=400, d_model=16, n_layers=1, n_heads=2, d_ff=32, seq_len=32), 0)


@pytest.fixture(scope="module")
def moe(dense):
    model = upcycle(dense, MoEConfig(num_experts=4, top_k=2), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def scored(rows, tokenizer, *args, **options):
    return score_documents(rows, tokenizer, *args, progress=False, **options)


def words_tokenizer(bos="<s>", eos="</s>"):
    """One token a word, so that scores can be counted by hand; without `bos` as in GPT-2."""
    special = [token for token in (bos, eos) if token]
    vocabulary = {word: i for i, word in enumerate([*special, *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def table_rows(sizes, columns=("group",)):
    """Rows of strata with these sizes, mixed, with texts that have nothing in common."""
    groups = [name for name, size in sizes.items() for _ in range(size)]
    np.random.default_rng(0).shuffle(groups)
    return [{"text": f"text number {i} " + f"w{i} " * 5, columns[0]: group} for i, group in enumerate(groups)]


# ---------------------------------------------------------------------------------------------------------- scores


def test_every_score_says_what_it_is():
    assert list(SCORES) == ["count_entropy", "normalized_entropy", "cross_entropy", "excess"]
    for function in SCORES.values():
        assert "Known bias" in function.__doc__ and re.search(r"(19|20)\d\d", function.__doc__)


def test_entropies_counted_by_hand():
    texts = ["a b a b", "a a a a", "a", "a b c d", "a a b c"]
    rows = [{"text": text} for text in texts]
    found = scored(rows, words_tokenizer(), "count_entropy")
    expected = [math.log(2), 0, 0, math.log(4), 1.5 * math.log(2)]
    assert found == pytest.approx(expected)
    assert scored(rows, words_tokenizer(bos=None, eos="<|endoftext|>"), "count_entropy") == pytest.approx(expected)
    assert scored(rows, words_tokenizer(), "normalized_entropy") == pytest.approx([0.5, 0, 0, 1, 0.75])


def test_windowed_entropy_is_the_mean_over_windows():
    ids = np.random.default_rng(0).integers(0, 30, 150)
    starts = [0, 32, 64, 86]
    expected = np.mean([scores.count_entropy([ids[s : s + 64]])[0] for s in starts]) / math.log(64)
    assert scores.normalized_entropy([ids])[0] == pytest.approx(expected)


def test_count_entropy_measures_length_and_the_normalized_one_does_not():
    """The same source, texts of 70 to 1,000 tokens: nothing differs but how long they are."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 2001)
    lengths = rng.integers(70, 1000, 300)
    documents = [rng.choice(2000, size=n, p=p / p.sum()) for n in lengths]
    assert length_correlation(scores.count_entropy(documents), lengths) > 0.8
    over_log_n = scores.count_entropy(documents) / np.log(lengths)
    assert length_correlation(over_log_n, lengths) < -0.5  # the usual remedy turns the bias around
    assert abs(length_correlation(scores.normalized_entropy(documents), lengths)) < 0.15


def test_length_correlation_is_spearmans():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    scores, lengths = rng.integers(0, 9, 50).astype(float), rng.integers(0, 9, 50)
    scores[3] = np.nan
    kept = np.isfinite(scores)
    assert length_correlation(scores, lengths) == pytest.approx(scipy.spearmanr(scores[kept], lengths[kept])[0])
    assert math.isnan(length_correlation([1.0, 1.0], [1, 2]))
    with pytest.raises(ValueError, match="3 scores for 2 lengths"):
        length_correlation([1, 2, 3], [1, 2])


def by_hand(model, ids, context):
    """The dumb way: one window at a time, one token at a time."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            piece = torch.tensor(ids[start : start + context + 1])
            output = model(piece[None, :-1])
            logits_TV = getattr(output, "logits_BTV", None) if hasattr(output, "logits_BTV") else output.logits
            losses += F.cross_entropy(logits_TV[0], piece[1:], reduction="none").tolist()
    assert len(losses) == len(ids) - 1  # every token but the first
    return np.mean(losses)


def test_cross_entropy_counts_every_token_of_long_documents(rows, tokenizer, dense):
    few = rows.select(range(20))
    ids = encode_documents(tokenizer, few["text"])
    assert min(map(len, ids)) > 33, "the documents must be longer than the context"
    found = scored(few, tokenizer, "cross_entropy", model=dense, batch_size=5)
    assert found == pytest.approx([by_hand(dense, each, 32) for each in ids], abs=1e-5)
    shorter = scored(few, tokenizer, "cross_entropy", model=dense, seq_len=10)
    assert shorter == pytest.approx([by_hand(dense, each, 10) for each in ids], abs=1e-5)


def test_excess_is_dense_minus_moe(rows, tokenizer, dense, moe):
    few = rows.select(range(10))
    losses = [scored(few, tokenizer, model=model) for model in (dense, moe)]
    assert np.ptp(losses[0] - losses[1]) > 0.01
    assert scored(few, tokenizer, "excess", model=dense, moe=moe) == pytest.approx(losses[0] - losses[1], abs=1e-6)


def test_a_transformers_model_and_tokenizer():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA).eval()
    theirs, ours = AutoTokenizer.from_pretrained(TINY_LLAMA), load_tokenizer(TINY_LLAMA)
    good = "Once upon a time, there was a little girl named Lily. One day, she went to the park with her mother."
    rows = [{"text": good}, {"text": " ".join(reversed(good.split()))}, {"text": good * 9}]
    before = theirs.backend_tokenizer.to_str()
    scores = scored(rows, theirs, "cross_entropy", model=model, seq_len=40)
    assert theirs.backend_tokenizer.to_str() == before, "the caller's tokenizer was changed"
    ids = encode_documents(ours, [row["text"] for row in rows])
    assert scores == pytest.approx([by_hand(model, each, 40) for each in ids], abs=1e-4)
    assert scores[0] < scores[1] - 1


def test_texts_without_tokens_have_no_score(dense, tokenizer):
    rows = [{"text": ""}, {"text": "town"}, {"text": ""}]
    for score in ("count_entropy", "normalized_entropy", "cross_entropy"):
        found = scored(rows, tokenizer, score, model=dense)
        assert np.isnan(found[[0, 2]]).all() and np.isfinite(found[1])
    assert len(scored([], tokenizer, "count_entropy")) == 0
    chosen = select(rows, found, budget=1, strata=(), order="random", near_duplicates=None)
    assert chosen.indices.tolist() == [1]
    assert (chosen.table[0]["documents"], chosen.table[0]["available"]) == (3, 1)


def test_all_kinds_of_rows_give_the_same(rows, tokenizer):
    expected = scored(rows, tokenizer, "count_entropy")
    chosen = select(rows, expected, budget=50).indices
    stream = rows.to_iterable_dataset()
    for kind in (stream, stream.select_columns(["text", *STRATA]), rows.to_list(), rows.with_format("torch")):
        assert np.array_equal(scored(kind, tokenizer, "count_entropy"), expected)
        assert np.array_equal(select(kind, expected, budget=50).indices, chosen)
    once = scored((row for row in rows), tokenizer, "count_entropy")
    assert np.array_equal(once, expected)
    read_once = select((row for row in rows), expected, budget=50, near_duplicates=None)
    assert np.array_equal(read_once.indices, select(rows, expected, budget=50, near_duplicates=None).indices)


def test_an_unknown_stream_without_column_names(rows, tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows.to_list()))
    assert stream.column_names is None
    assert np.array_equal(scored(stream, tokenizer, "count_entropy"), scored(rows, tokenizer, "count_entropy"))
    with pytest.raises(ValueError, match="no column 'topic'; the columns are text, domain"):
        select(stream, None, budget=3, order="random", strata=("topic",))


def test_scoring_reads_a_stream_as_it_goes(monkeypatch):
    read = 0

    def endless_rows():
        nonlocal read
        while True:
            read += 1
            yield {"text": "a b c"}

    class Enough(Exception):
        pass

    def stop(documents):
        raise Enough

    monkeypatch.setitem(SCORES, "count_entropy", stop)
    with pytest.raises(Enough):
        scored(endless_rows(), words_tokenizer(), "count_entropy")
    assert read <= 2000


# ---------------------------------------------------------------------------------------------------------- quotas

SIZES = st.lists(st.integers(0, 10**12) | st.integers(0, 5), max_size=30)


@given(sizes=SIZES, budget=st.integers(0, 10**13), allocation=st.sampled_from(quotas_module.ALLOCATIONS))
@settings(max_examples=300, deadline=None)
def test_quotas_add_up_for_any_stratum_sizes(sizes, budget, allocation):
    sizes = dict(enumerate(sizes))
    found = quotas(sizes, budget, allocation)
    assert list(found) == list(sizes)
    assert sum(found.values()) == min(budget, sum(sizes.values()))
    assert all(type(found[s]) is int and 0 <= found[s] <= sizes[s] for s in sizes)


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_quotas_keep_to_their_weights(sizes, data):
    budget = data.draw(st.integers(1, sum(sizes)))
    for allocation, weigh in (("proportional", float), ("uniform", lambda n: 1.0), ("sqrt", math.sqrt)):
        found = quotas(dict(enumerate(sizes)), budget, allocation)
        open_strata = [s for s, size in enumerate(sizes) if found[s] < size]
        for s in open_strata:  # no stratum has more per weight than one that could have taken it, beyond rounding
            for t in range(len(sizes)):
                assert (found[t] - 1) / weigh(sizes[t]) <= (found[s] + 1) / weigh(sizes[s]) + 1e-9


def test_quotas_by_example():
    sizes = {"a": 100, "b": 9, "c": 4, "d": 0}
    assert quotas(sizes, 20) == {"a": 18, "b": 1, "c": 1, "d": 0}
    assert quotas(sizes, 20, "uniform") == {"a": 8, "b": 8, "c": 4, "d": 0}
    assert quotas(sizes, 15, "sqrt") == {"a": 10, "b": 3, "c": 2, "d": 0}
    assert quotas(sizes, 1000) == sizes
    assert quotas({"a": 3, "b": 3, "c": 3}, 2, "uniform") == {"a": 1, "b": 1, "c": 0}
    assert quotas({}, 5) == {}
    with pytest.raises(ValueError, match="'even' is unknown; choose one of proportional, uniform, sqrt"):
        quotas(sizes, 5, "even")
    with pytest.raises(ValueError, match="must not be negative"):
        quotas({"a": -1}, 5)


# --------------------------------------------------------------------------------------------------------- selection


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    data=st.data(),
    allocation=st.sampled_from(quotas_module.ALLOCATIONS),
    order=st.sampled_from(selection.ORDERS),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_a_selection_is_what_its_settings_promise(sizes, data, allocation, order, seed):
    rows = table_rows({f"g{i}": size for i, size in enumerate(sizes)})
    scores = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))  # many ties
    budget = data.draw(st.integers(1, len(rows)))
    options = dict(budget=budget, strata="group", allocation=allocation, order=order, seed=seed, near_duplicates=None)
    found = select(rows, scores, **options)
    assert np.array_equal(found.indices, select(rows, scores, **options).indices)
    assert np.array_equal(found.indices, np.unique(found.indices)) and len(found) == budget
    of_group = {row["group"]: row for row in found.table}
    assert {name: row["quota"] for name, row in of_group.items()} == quotas(
        {f"g{i}": size for i, size in enumerate(sizes)}, budget, allocation
    )
    for name, row in of_group.items():
        members = [i for i, r in enumerate(rows) if r["group"] == name]
        mine = [i for i in members if i in found.indices]
        rest = [i for i in members if i not in found.indices]
        assert len(mine) == row["chosen"] == row["quota"] and len(members) == row["documents"]
        if mine:
            assert row["mean_score"] == pytest.approx(np.mean([scores[i] for i in mine]))
        if mine and rest and order != "random":
            values = np.array(scores, float)
            far = {"highest": -values, "lowest": values, "middle": abs(values - np.median(values[members]))}[order]
            assert far[mine].max() <= far[rest].min()


def test_the_seed_breaks_ties_and_nothing_else():
    rows = table_rows({"a": 30, "b": 10})
    ties = [select(rows, [1.0] * 40, budget=10, strata="group", seed=seed).indices.tolist() for seed in range(4)]
    assert len({tuple(each) for each in ties}) == 4
    distinct = np.random.default_rng(0).permutation(40)
    found = [select(rows, distinct, budget=10, strata="group", seed=seed).indices.tolist() for seed in range(3)]
    assert found[0] == found[1] == found[2]
    shuffled = [select(rows, None, budget=10, strata="group", order="random", seed=seed) for seed in (0, 0, 1)]
    assert shuffled[0].indices.tolist() == shuffled[1].indices.tolist() != shuffled[2].indices.tolist()
    assert shuffled[0].table[0]["mean_score"] is None


@given(
    sizes=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    data=st.data(),
    allocation=st.sampled_from(quotas_module.ALLOCATIONS),
)
@settings(max_examples=80, deadline=None)
def test_a_budget_of_tokens_is_never_exceeded_and_nearly_spent(sizes, data, allocation):
    rows = table_rows({f"g{i}": size for i, size in enumerate(sizes)})
    lengths = np.array(data.draw(st.lists(st.integers(1, 60), min_size=len(rows), max_size=len(rows))))
    scores = np.random.default_rng(0).permutation(len(rows))
    budget = data.draw(st.integers(1, int(lengths.sum())))
    options = dict(unit="tokens", tokens_per_document=lengths, strata="group", allocation=allocation)
    found = select(rows, scores, budget=budget, near_duplicates=None, **options)
    assert found.tokens == lengths[found.indices].sum() <= budget
    assert found.shortfall == budget - found.tokens
    assert sum(row["quota"] for row in found.table) == budget
    for row in found.table:
        members = sorted((i for i, r in enumerate(rows) if r["group"] == row["group"]), key=lambda i: -scores[i])
        assert set(members[: row["chosen"]]) <= set(found.indices), "a longer document must not be skipped"
        assert lengths[members[: row["chosen"]]].sum() == row["tokens"] <= row["quota"] + 60
        if row["chosen"] < len(members):
            assert lengths[members[row["chosen"]]] > found.shortfall


def test_a_short_stratum_gives_way_to_the_others():
    rows = table_rows({"a": 50, "b": 50, "c": 3})
    found = select(rows, range(103), budget=30, strata=["group"], allocation="uniform")
    assert [(row["group"], row["quota"], row["chosen"]) for row in found.table] == [
        ("a", 14, 14), ("b", 13, 13), ("c", 3, 3),
    ]  # fmt: skip


def test_a_budget_larger_than_the_corpus_takes_all_and_says_so():
    rows = table_rows({"a": 5, "b": 2})
    with pytest.warns(UserWarning, match=r"budget=100 is more than the corpus has \(7 documents\): all of it is taken"):
        found = select(rows, range(7), budget=100, strata="group")
    assert found.indices.tolist() == list(range(7)) and found.shortfall == 93
    assert "93 documents not spent" in str(found)


def test_none_is_a_stratum_of_its_own_and_empty_strata_stay_in_the_table():
    rows = table_rows({None: 4, "a": 4, "b": 4})
    scores = [np.nan if row["group"] == "b" else 1.0 for row in rows]
    found = select(rows, scores, budget=4, strata="group")
    assert [(row["group"], row["available"], row["quota"], row["chosen"]) for row in found.table] == [
        (None, 4, 2, 2), ("a", 4, 2, 2), ("b", 0, 0, 0),
    ]  # fmt: skip


WORDS = [f"word{i}" for i in range(500)]


def family_rows(families=40, copies=3, edits=0, length=240):
    """`copies` of each of many unrelated texts, the copies with so many words exchanged."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(families):
        text = rng.choice(WORDS, length)
        for copy in range(copies):
            mine = text.copy()
            if copy:
                mine[rng.choice(length, edits, replace=False)] = "changed"
            rows.append({"text": " ".join(mine), "group": "ab"[len(rows) % 2]})
    return rows


@pytest.mark.parametrize("edits", [0, 1], ids=["copies", "one word of 240 changed"])
def test_near_duplicates_are_passed_over_and_replaced(edits):
    rows = family_rows(edits=edits)
    scores = np.random.default_rng(1).random(len(rows))
    found = select(rows, scores, budget=30, strata="group", allocation="uniform")
    assert len(found) == 30
    families = found.indices // 3
    assert len(set(families)) == 30
    with_copies = select(rows, scores, budget=30, strata="group", near_duplicates=None)
    assert len(set(with_copies.indices // 3)) < 30
    everything = select(rows, scores, budget=120, strata="group")
    assert len(everything) == 40 and sum(row["duplicates"] for row in everything.table) == 80
    assert everything.shortfall == 80


def test_similar_texts_below_the_threshold_stay():
    rows = family_rows(edits=11)  # each changed word spoils 5 of 236 shingles: a similarity of 0.62 to the original
    assert len(select(rows, range(120), budget=120, strata="group")) == 120
    assert len(select(rows, range(120), budget=120, strata="group", near_duplicates=0.1)) < 60


def test_a_stratum_that_runs_out_of_different_texts_is_refilled():
    rows = [{"text": "the same text in every row of this group", "group": "a"}] * 20 + table_rows({"b": 20})
    found = select(rows, range(40), budget=20, strata="group", allocation="uniform")
    assert [(row["group"], row["chosen"]) for row in found.table] == [("a", 1), ("b", 19)]
    assert found.table[0]["duplicates"] == 19


def test_short_texts_and_case():
    texts = ["One two", "one TWO", "one", "one two three", ""]
    rows = [{"text": text} for text in texts]
    found = select(rows, [5, 4, 3, 2, 1], budget=4, strata=())
    assert found.indices.tolist() == [0, 2, 3, 4]


def test_a_stream_is_read_a_few_times_and_only_candidates_are_hashed(monkeypatch):
    passes, hashed = 0, 0
    rows = family_rows(families=400, copies=2)

    def read():
        nonlocal passes
        passes += 1
        yield from rows

    shingles = near_duplicates._shingles

    def counting(text):
        nonlocal hashed
        hashed += 1
        return shingles(text)

    monkeypatch.setattr(near_duplicates, "_shingles", counting)
    stream = datasets.IterableDataset.from_generator(read)
    scores = np.random.default_rng(0).random(800)
    found = select(stream, scores, budget=100, strata="group")
    assert found.indices.tolist() == select(rows, scores, budget=100, strata="group").indices.tolist()
    assert len(set(found.indices // 2)) == 100
    assert passes <= 4 and hashed <= 2 * 200


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strata": ("audience", "topic")}, ValueError, "no column 'topic'; the columns are text, domain"),
        ({"column": "body"}, ValueError, "no column 'body'; the columns are text, domain"),
        ({"scores": [1.0, 2.0]}, ValueError, r"scores has shape \(2,\), but there are 10 documents"),
        ({"scores": [np.nan] * 10}, ValueError, "no document has a finite score"),
        ({"scores": None}, ValueError, "order='highest' needs scores"),
        ({"budget": 0}, ValueError, "budget=0 documents: nothing could be chosen"),
        ({"budget": 2.5}, ValueError, "budget=2.5 is not a whole number"),
        ({"unit": "bytes"}, ValueError, "unit='bytes' is unknown; choose one of documents, tokens"),
        ({"unit": "tokens"}, ValueError, "unit='tokens' needs tokens_per_document"),
        ({"tokens_per_document": [3]}, ValueError, r"tokens_per_document has shape \(1,\)"),
        ({"tokens_per_document": [0.5] * 10}, ValueError, "must be whole numbers"),
        ({"order": "best"}, ValueError, "order='best' is unknown; choose one of highest, lowest, middle, random"),
        ({"allocation": "even"}, ValueError, "allocation='even' is unknown"),
        ({"near_duplicates": 80}, ValueError, "near_duplicates=80: give a similarity above 0"),
        ({"rows": []}, ValueError, "rows are empty"),
        ({"rows": iter([])}, TypeError, "rows can be read only once"),
        ({"rows": ["one", "two"]}, TypeError, "row 0 is str, not a dict"),
        ({"rows": "a dictionary of splits"}, ValueError, "rows has splits, train: give one of them"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_select_refuses(rows, change, error, message):
    ten = rows.select(range(10))
    if change.get("rows") == "a dictionary of splits":
        change = {"rows": datasets.DatasetDict({"train": ten})}
    options = dict(rows=ten, scores=np.arange(10.0), budget=3) | change
    with pytest.raises(error, match=message):
        select(options.pop("rows"), options.pop("scores"), **options)


@pytest.mark.parametrize("wrong", [None, 7, ["a"]])
def test_rows_without_a_text(wrong):
    rows = table_rows({"a": 10})
    rows[6]["text"] = wrong
    name = type(wrong).__name__
    with pytest.raises(TypeError, match=f"document 6 is {name}, not str"):
        select(rows, range(10), budget=10, strata="group")
    with pytest.raises(TypeError, match=f"document 6 is {name}, not str"):
        scored(rows, words_tokenizer(), "count_entropy")
    assert len(select(rows, range(10), budget=10, strata="group", near_duplicates=None)) == 10  # reads no text


def test_what_scoring_refuses(rows, tokenizer, dense):
    with pytest.raises(ValueError, match="score='entropy' is unknown; choose one of count_entropy, normalized_entropy"):
        scored(rows, tokenizer, "entropy")
    with pytest.raises(ValueError, match="score='cross_entropy' needs model="):
        scored(rows, tokenizer)
    with pytest.raises(ValueError, match="score='excess' needs moe="):
        scored(rows, tokenizer, "excess", model=dense)
    with pytest.raises(ValueError, match="no column 'body'; the columns are text"):
        scored(rows, tokenizer, "count_entropy", column="body")
    with pytest.raises(ValueError, match=r"the model's ids are 0\.\.399"):
        scored(rows, train_tokenizer(rows["text"], vocab_size=600), model=dense)


def test_a_selection_is_saved_and_shown(rows, tmp_path):
    lengths = [len(text.split()) for text in rows["text"]]
    found = select(rows, lengths, budget=5000, unit="tokens", tokens_per_document=lengths, allocation="sqrt")
    found.save(tmp_path / "selection.json")
    again = Selection.load(tmp_path / "selection.json")
    assert np.array_equal(again.indices, found.indices) and again.indices.dtype == np.int64
    assert (again.table, again.settings) == (found.table, found.settings)
    text = str(found)
    assert f"{len(found)} of 360 documents, {found.tokens:,} tokens; budget 5,000 tokens, sqrt over" in text
    largest = max(found.table, key=lambda row: row["documents"])
    assert re.search(
        rf"{largest['audience']} +{largest['format']} +{largest['seed_data']} +{largest['documents']} ", text
    )
    assert len(text.splitlines()) == 23 and f"and {len(found.table) - 20} more" in text
    marked = select([{"text": "a", "group": "<b>"}], [1.0], budget=1, strata="group")
    assert "<td>&lt;b&gt;</td>" in marked._repr_html_() and repr(marked).startswith("Selection(1 of 1 documents")
    (tmp_path / "other.json").write_text(json.dumps({"indices": [1]}))
    with pytest.raises(ValueError, match=r"is not a selection that Selection\.save wrote"):
        Selection.load(tmp_path / "other.json")


# ----------------------------------------------------------------------------------------------- what training reads


class Recorded:
    """A stream that remembers every window it gave away."""

    def __init__(self, stream):
        self.stream, self.windows = stream, []

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def random_windows(self, *args, **kwargs):
        windows = self.stream.random_windows(*args, **kwargs)
        self.windows.append(torch.cat([windows[0], windows[1][:, -1:]], 1).numpy())
        return windows


def texts_in(windows, tokenizer):
    """What the windows hold of each document: pieces between its beginning and its end, as strings of token ids."""
    begin, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    pieces = set()
    for row in np.concatenate(windows):
        cuts = [0, *(np.flatnonzero(row == end) + 1), len(row)]
        pieces |= {tuple(row[a:b]) for a, b in pairwise(cuts) if any(id not in (begin, end) for id in row[a:b])}
    return pieces


def contains(ids, piece):
    text, part = " " + " ".join(map(str, ids)) + " ", " " + " ".join(map(str, piece)) + " "
    return part in text


@pytest.fixture(scope="module")
def chosen(rows):
    return select(rows, [len(text) for text in rows["text"]], budget=12, order="lowest", near_duplicates=None)


def test_the_loader_yields_exactly_the_selected_ids(rows, tokenizer, chosen, tmp_path):
    stream = chosen.stream(rows, tokenizer, tmp_path, progress=False)
    assert stream.document_ids.tolist() == chosen.indices.tolist()
    config = TrainConfig(steps=60, batch_size=4, accumulation=2, seed=3)
    assert documents_read(stream, config, 32) == set(chosen.indices)
    # the ids are not only claimed: what the stream holds of each document is the text of the row of that number
    ends = np.cumsum(stream.document_lengths)
    for number, start, end in zip(stream.document_ids, ends - stream.document_lengths, ends):
        assert stream.tokens[start:end].tolist() == encode_documents(tokenizer, [rows[int(number)]["text"]])[0]


def test_training_reads_the_selected_documents_and_no_others(rows, tokenizer, chosen, dense, tmp_path):
    """The windows that `train` was given, looked at as tokens: each piece is of a document that is said to be read."""
    config = TrainConfig(steps=3, batch_size=2, accumulation=2, seed=5, eval_every=0)
    validation = TokenStream.from_ids(range(40), 400)
    model = new_model(dense.config, 1)
    for stream, among in (
        (chosen.stream(rows, tokenizer, tmp_path, progress=False), set(chosen.indices)),
        (TokenStream.build(rows, tokenizer, tmp_path, progress=False), set(range(len(rows)))),
    ):
        recorded = Recorded(stream)
        train(model, recorded, validation, config, progress=False, verbose=False)
        read = documents_read(stream, config, 32)
        assert read <= among and len(recorded.windows) == 3
        documents = {i: encode_documents(tokenizer, [rows[int(i)]["text"]])[0] for i in read}
        pieces = texts_in(recorded.windows, tokenizer)
        assert all(any(contains(ids, piece) for ids in documents.values()) for piece in pieces)
        for ids in documents.values():  # and no document is said to be read that gave nothing
            assert any(contains(ids, piece) for piece in pieces) or ids[0] in np.concatenate(recorded.windows)[:, -1]


def test_the_trap_of_a_selection_that_training_never_reads(rows, tokenizer, chosen, tmp_path):
    everything = TokenStream.build(rows, tokenizer, tmp_path, progress=False)  # the bug: not chosen.stream(…)
    config = TrainConfig(steps=20, batch_size=4)
    assert not documents_read(everything, config, 32) <= set(chosen.indices)
    assert documents_read(chosen.stream(rows, tokenizer, tmp_path, progress=False), config, 32) <= set(chosen.indices)


def test_documents_of_a_selection_from_any_rows(rows, tokenizer, chosen, tmp_path):
    expected = [rows[int(i)]["text"] for i in chosen.indices]
    for kind in (rows, rows.to_iterable_dataset(), rows.to_list()):
        assert list(chosen.documents(kind)["text"]) == expected
        stream = chosen.stream(kind, tokenizer, tmp_path, progress=False)
        assert stream.document_ids.tolist() == chosen.indices.tolist()
    with pytest.raises(ValueError, match="rows are 20, but the selection was made from 360"):
        chosen.documents(rows.select(range(20)))
    with pytest.raises(ValueError, match="rows are 20, but the selection was made from 360"):
        chosen.documents(rows.select(range(20)).to_iterable_dataset())


# ---------------------------------------------------------------------------------------------------- the corpora


def statistics():
    """{column: {value: share}} of the real Cosmopedia-100k."""
    text = (DATA / "cosmopedia100k_statistics.txt").read_text()
    names = {"Format": "format", "Audience": "audience", "Seed Data": "seed_data"}
    parts = re.findall(r"(\w[\w ]*) Distribution:\n((?:  .+\n?)+)", text)
    return {
        names[name]: {value: int(count) / 100_000 for value, count in re.findall(r"  (\S+): (\d+)", lines)}
        for name, lines in parts
    }


@pytest.mark.skipif(not (DATA / "cosmopedia100k_statistics.txt").exists(), reason="the statistics are not here")
def test_the_embedded_corpus_is_skewed_like_the_real_one():
    rows = load_corpus("worlds", documents=3000)["train"]
    for column, real in statistics().items():
        counts = Counter(rows[column])
        assert set(counts) <= set(real)
        ours = {value: counts[value] / len(rows) for value in real}
        assert sum(abs(ours[value] - real[value]) for value in real) / 2 < 0.13, column  # total variation
        assert max(ours, key=ours.get) == max(real, key=real.get)
        common = [value for value in real if real[value] > 0.03]
        assert all(real[value] / 2 < ours[value] < real[value] * 2 for value in common), column


def test_cosmopedias_columns_are_selected_by(monkeypatch):
    """A stand-in with the real columns; select needs nothing but a token budget in the column that is there."""
    count = 60
    real = {
        "prompt": [f"Write about {i}" for i in range(count)],
        "text_token_length": list(range(50, 50 + count)),
        "text": [f"A text about {i}. " + f"x{i} " * 6 for i in range(count)],
        "seed_data": [["stanford", "ultrachat"][i % 2] for i in range(count)],
        "format": [["blogpost", "wikihow", "textbook_academic"][i % 3] for i in range(count)],
        "audience": ["general"] * count,
    }
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(real)})
    monkeypatch.setattr(datasets, "load_dataset", lambda repository, cache_dir: splits)
    monkeypatch.setattr(corpus, "_is_cached", lambda *_: True)
    rows = load_corpus("cosmopedia-100k")["train"]
    assert rows.column_names == list(real)
    lengths = rows["text_token_length"]
    found = select(rows, lengths, budget=1000, unit="tokens", tokens_per_document=lengths)
    assert len(found.table) == 6 and 900 < found.tokens <= 1000


@pytest.mark.slow
def test_choosing_from_a_hundred_thousand_rows_keeps_no_texts_in_memory(tmp_path):
    """Rows of Cosmopedia's shape, 4 kB of text each, 2 % near-duplicates, in a process of its own.

    Few and long words: counting costs time for each allocation, so for each word, and the bytes are the same.
    Counted is what is allocated (Python, NumPy, Arrow), not the resident set: that holds as many pages of the mapped
    data file as the machine likes to keep.
    """
    code = f"""
import json, tracemalloc
import datasets, numpy as np, pyarrow
from upcycling import select

datasets.disable_progress_bars()
words = np.array([20 * f"{{i:05d}}" for i in range(20_000)], dtype=object)

def rows():
    rng, last = np.random.default_rng(0), None
    for i in range(100_000):
        copy = i % 50 == 49
        text = last + " again" if copy else " ".join(words[rng.integers(0, 20_000, int(rng.normal(40, 7)))])
        last = text
        a, f, s = rng.integers(0, [8, 14, 9]) * rng.integers(0, 2, 3)
        yield {{"prompt": text[:300], "text_token_length": len(text) // 5, "text": text,
               "audience": f"a{{a}}", "format": f"f{{f}}", "seed_data": f"s{{s}}"}}

data = datasets.Dataset.from_generator(rows, cache_dir={str(tmp_path)!r})
scores = np.random.default_rng(1).random(100_000)
scores[48::50] = scores[49::50] = 2.0  # the copies' families come first, so that all of them have to be found
tracemalloc.start()
chosen = select(data, scores, budget=20_000)
allocated = tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory()
tracemalloc.stop()
chosen.save({str(tmp_path / "chosen.json")!r})
np.save({str(tmp_path / "scores.npy")!r}, scores)
np.save({str(tmp_path / "strata.npy")!r}, [" ".join(each) for each in zip(*(data[c] for c in data.column_names[3:]))])
print(json.dumps([allocated, data.data.nbytes]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allocated, data_bytes = json.loads(run.stdout.splitlines()[-1])
    chosen, scores = Selection.load(tmp_path / "chosen.json"), np.load(tmp_path / "scores.npy")
    assert len(chosen) == 20_000 and sum(row["quota"] for row in chosen.table) == 20_000
    twins = Counter(chosen.indices[np.isin(chosen.indices % 50, (48, 49))] // 50)
    assert max(twins.values()) == 1 and len(twins) > 1900
    assert sum(row["duplicates"] for row in chosen.table) > 1900
    strata, taken = np.load(tmp_path / "strata.npy"), np.isin(np.arange(100_000), chosen.indices)
    alone = ~np.isin(np.arange(100_000) % 50, (48, 49))
    for stratum in np.unique(strata):
        mine = alone & (strata == stratum)
        assert scores[mine & taken].min(initial=1) >= scores[mine & ~taken].max(initial=0)
    assert data_bytes > 400e6 and allocated < 140e6, f"{allocated / 1e6:.0f} of {data_bytes / 1e6:.0f} MB"
