"""Texts to a packed file of tokens, beside the library's own encoding of the same texts to nothing."""

import tempfile
from itertools import chain

import numpy as np

from ..text.corpus import load_corpus
from ..text.stream import TokenStream
from ..text.tokenizer import bos_eos, train_tokenizer
from .measure import Bench, Comparison, compared

OURS, BATCH, FAST = "TokenStream.build, to disk", "tokenizers encode_batch", "encode_batch_fast, its floor"


def compare(bench: Bench) -> list[Comparison]:
    """A stream built from texts of the embedded corpus; that the ids are `encode_batch`'s is checked first."""
    rows = load_corpus("worlds", documents=1000 if bench.quick else 4000)["train"].select_columns(["text"])
    texts = rows["text"][:]
    tokenizer = train_tokenizer(texts, vocab_size=2048)

    def build(folder) -> TokenStream:
        return TokenStream.build(rows, tokenizer, folder, progress=False)

    def ours():
        with tempfile.TemporaryDirectory() as folder:  # in a folder where there is one, it would only be opened
            build(folder)

    with tempfile.TemporaryDirectory() as folder:
        begin, end = bos_eos(tokenizer)
        expected = ([begin, *encoding.ids, end] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
        if not np.array_equal(build(folder).tokens, np.fromiter(chain.from_iterable(expected), dtype=np.uint16)):
            raise RuntimeError("the stream's ids are not those of encode_batch")
    seconds = bench.times(
        {
            OURS: ours,
            BATCH: lambda: tokenizer.encode_batch(texts, add_special_tokens=False),
            FAST: lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        }
    )
    size = sum(len(text.encode()) for text in texts) / 1e6
    setting = f"{len(texts):,} documents, {size:.1f} MB, byte-level BPE of 2,048"
    return [
        compared("tokenizing", setting, seconds, OURS, BATCH, "speed", 1.0),
        compared("tokenizing", setting, seconds, OURS, FAST),
    ]
