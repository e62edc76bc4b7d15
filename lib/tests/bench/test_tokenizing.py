"""Building a token stream: nothing is lost by encoding ahead, memory stays flat, and the bench compares equal ids."""

import subprocess
import sys
import threading

import pytest

from upcycling.bench import tokenizing
from upcycling.bench.measure import Bench
from upcycling.text import stream_files, tokenizer as tok
from upcycling.text.stream_files import one_ahead


def test_one_ahead_is_in_order_and_only_one_ahead():
    made = []

    def double(item):
        assert threading.current_thread() is not threading.main_thread()
        made.append(item)
        return 2 * item

    results = one_ahead(double, iter(range(5)))
    for number, result in enumerate(results):
        assert result == 2 * number
        assert len(made) <= number + 2
    assert made == list(range(5))
    assert list(one_ahead(double, [])) == []


def test_an_error_ahead_is_raised_when_its_turn_comes():
    results = one_ahead(lambda item: 1 // item, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


GROWTH = """
import resource, sys
from datasets import Dataset
from upcycling import TokenStream, train_tokenizer

texts = [f"{i} " + "the quick brown fox jumps over the lazy dog, " * 20 for i in range(1000 * int(sys.argv[2]))]
rows, tokenizer = Dataset.from_dict({"text": texts}), train_tokenizer(texts[:100], 300)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
TokenStream.build(rows, tokenizer, sys.argv[1], progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_of_the_whole_process_does_not_grow_with_the_texts(tmp_path):
    """Encodings live outside of what Python traces."""

    def growth(thousands):
        arguments = [sys.executable, "-c", GROWTH, str(tmp_path / str(thousands)), str(thousands)]
        return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)

    small, large = growth(3), growth(9)
    assert large < small + 50, f"{small} MiB more for 3,000 documents, {large} for 9,000"


def test_the_bench_compares_the_same_ids(monkeypatch):
    def few(name, documents):
        return load(name, documents=30)

    load = tokenizing.load_corpus
    monkeypatch.setattr(tokenizing, "load_corpus", few)
    monkeypatch.setattr(tokenizing, "train_tokenizer", lambda texts, vocab_size: tok.train_tokenizer(texts, 300))
    against_batch, against_floor = tokenizing.compare(Bench(rounds=2))
    assert (against_batch.peer, against_batch.goal, against_batch.measure) == (tokenizing.BATCH, 1.0, "speed")
    assert against_floor.peer == tokenizing.FAST and against_floor.ratio > 0
    framed = tok.framed
    monkeypatch.setattr(stream_files, "framed", lambda *arguments: [ids[::-1] for ids in framed(*arguments)])
    with pytest.raises(RuntimeError, match="not those of encode_batch"):
        tokenizing.compare(Bench(rounds=2))
