"""A token stream's files: tokenized once, checked, and mapped into memory."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..files import write_text
from .tokenizer import encode_plain, for_plain_text, framed, in_batches


def build_files(dataset, tokenizer: Tokenizer, directory: Path, column: str, progress: bool):
    """What `TokenStream.build` does: (tokens, document_lengths, vocab_size, key), the arrays mapped into memory."""
    from filelock import FileLock

    if column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r}; the columns are {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the split has no documents; a token stream needs at least one")
    dataset = dataset.with_format(None).select_columns([column])
    tokenizer = for_plain_text(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    files = _Files(directory, _content_key(tokenizer, _texts(dataset, column)))
    with FileLock(files.lock):
        record = files.usable_record(len(dataset), tokenizer.get_vocab_size())
        if record["done"] < len(dataset):
            try:
                record = _tokenize(dataset, tokenizer, column, files, record, progress)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"cannot write the token stream ({error.strerror}); what is done is kept: make room and run this "
                    "again",
                    str(files.tokens),
                ) from error
    tokens = np.memmap(files.tokens, dtype=record["dtype"], mode="r", shape=(record["tokens"],))
    lengths = np.load(files.lengths, mmap_mode="r", allow_pickle=False)
    return tokens, lengths, record["vocab_size"], files.key


class _Files:
    """The files of one stream. The record is the truth: bytes beyond what it counts do not exist."""

    def __init__(self, directory: Path, key: str):
        self.key = key
        endings = ("bin", "lengths.npy", "json", "lock")
        self.tokens, self.lengths, self.record, self.lock = (directory / f"tokens-{key}.{end}" for end in endings)

    def usable_record(self, documents: int, vocab_size: int) -> dict:
        """The record on disk if the files bear it out, else that of an empty stream; cuts off what is not recorded."""
        empty = {"documents": documents, "done": 0, "tokens": 0, "vocab_size": vocab_size}
        empty["dtype"] = id_dtype(vocab_size)
        if not self.record.exists():
            return empty
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if record["done"] == 0:
                return empty
            sizes = self.tokens.stat().st_size, self.lengths.stat().st_size
            expected = _sizes(record)
            finished = record["done"] == documents
            fits = record == {**empty, "done": record["done"], "tokens": record["tokens"]}
            # An unfinished build may have written more than it recorded, a finished one may not.
            fits = fits and (sizes == expected if finished else sizes[0] >= expected[0] and sizes[1] >= expected[1])
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            warnings.warn(f"{self.tokens} does not fit its record {self.record.name}; building it again", stacklevel=4)
            return empty
        return record


def _tokenize(dataset, tokenizer: Tokenizer, column: str, files: _Files, record: dict, progress: bool) -> dict:
    from tqdm.auto import tqdm

    with open(files.tokens, "ab") as tokens_file, open(files.lengths, "ab") as lengths_file:
        if record["done"] == 0:
            _write_record(files, record)  # before the old contents go, so that no record ever promises too much
            lengths_file.truncate(0)
            header = {"descr": "<i8", "fortran_order": False, "shape": (record["documents"],)}
            np.lib.format.write_array_header_1_0(lengths_file, header)
        else:
            lengths_file.truncate(_sizes(record)[1])
        tokens_file.truncate(_sizes(record)[0])
        options = {"desc": "tokenizing", "unit": "doc", "disable": not progress}
        with tqdm(total=record["documents"], initial=record["done"], **options) as bar:
            batches = in_batches(_texts(dataset, column, record["done"]))
            for encodings in one_ahead(lambda batch: encode_plain(tokenizer, batch), batches):
                documents = framed(tokenizer, encodings)
                del encodings  # a hundred bytes a token
                lengths = np.fromiter(map(len, documents), dtype="<i8", count=len(documents))
                ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum())
                check_ids(ids, record["vocab_size"])
                for file, array in ((tokens_file, ids.astype(record["dtype"])), (lengths_file, lengths)):
                    file.write(array.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                record = {**record, "done": record["done"] + len(documents), "tokens": record["tokens"] + len(ids)}
                _write_record(files, record)
                bar.update(len(documents))
    return record


def one_ahead(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item in order; while one is in use, a thread makes the next.

    Encoding runs on all cores and without Python's lock, what follows it on one: so neither waits for the other.
    """
    with ThreadPoolExecutor(1) as thread:
        for before, _ in pairwise(chain((thread.submit(function, item) for item in items), [None])):
            yield before.result()


def _write_record(files: _Files, record: dict) -> None:
    write_text(files.record, json.dumps(record) + "\n")


def _sizes(record: dict) -> tuple[int, int]:
    """Bytes of the two files for what the record counts; numpy pads the header of an array file to 128 bytes."""
    return record["tokens"] * np.dtype(record["dtype"]).itemsize, 128 + record["done"] * 8


def _texts(dataset, column: str, start: int = 0) -> Iterator[str]:
    for begin in range(start, len(dataset), 256):
        yield from dataset[begin : begin + 256][column]


def _content_key(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in chain([[tokenizer.to_str()]], in_batches(texts)):
        for text in batch:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] and ["a", "bc"] differ
            digest.update(data)
    return digest.hexdigest()


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary 0..{vocab_size - 1}: the ids come from "
            "another tokenizer, or vocab_size is wrong"
        )
