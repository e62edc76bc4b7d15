"""Text to token ids, token ids to batches: a byte-level BPE, and a packed stream of tokens on disk.

A document in a stream is `bos + ids + eos`; documents follow each other without padding. Special tokens mark where a
document begins and ends, and only that: a text that happens to contain `<|im_end|>` is encoded as ordinary characters.
Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import IGNORE

UNKNOWN, START, END = SPECIAL_TOKENS = ("<|unknown|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2

# (bos, eos) of the vocabularies we meet: ours and SmolLM's, Llama's, GPT-2's.
_BOS_EOS = ((START, END), ("<s>", "</s>"), (None, "<|endoftext|>"))

# A batch ends at whichever comes first. It bounds the memory of an encoding (tens of bytes a character) and what a
# kill can cost (a fraction of a second's work).
_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1_000_000

# ------------------------------------------------------------------------------------------------------ tokenizers


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens on `texts`, read once and in batches; same texts, same tokenizer.

    Pass the training split only. Any Unicode text survives `decode(encode(text))`, because the 256 bytes are tokens.
    Raises ValueError if `vocab_size` leaves no room for merges, or if the texts do not yield that many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256 + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens, 256 bytes and at least one "
            f"merge need {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} cannot be reached: these texts yield only {tokenizer.get_vocab_size()} tokens; "
            "give more text or choose a smaller vocab_size"
        )
    return _for_plain_text(tokenizer)


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer from a folder, from a `tokenizer.json`, or by its name on the Hugging Face hub ("gpt2").

    A hub tokenizer that is already in the local cache needs no network. Raises FileNotFoundError if nothing is found
    under that name, ValueError if the file is not a tokenizer.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.json)", str(name_or_path)):
        path = _from_hub(str(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: save one there with save_tokenizer, or load 'gpt2'")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library reads ({error})") from None
    return _for_plain_text(tokenizer)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository = "openai-community/gpt2" if name == "gpt2" else name
    try:
        with contextlib.suppress(OSError):  # not in the local cache
            return Path(hf_hub_download(repository, "tokenizer.json", local_files_only=True))
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder or file {name!r} here, and its tokenizer.json did not come from the Hugging Face hub "
            f"({type(error).__name__}); connect once so that it is cached, or pass a folder that holds tokenizer.json"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, from which `AutoTokenizer.from_pretrained(folder)` gives
    the same ids as `tokenizer`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bos_id, eos_id = bos_eos(tokenizer)
    eos = tokenizer.id_to_token(eos_id)
    unknown = UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else eos
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos if bos_id is None else tokenizer.id_to_token(bos_id),
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": unknown,  # ours never occurs in a text; a collator that masks pads then leaves eos alone
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special strings in a text are text, as in encode_documents
    }
    _write_atomically(folder / "tokenizer.json", _for_plain_text(tokenizer).to_str(pretty=True))
    _write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def bos_eos(tokenizer: Tokenizer) -> tuple[int | None, int]:
    """The ids that begin and end a document; GPT-2 has no beginning, hence (None, id of `<|endoftext|>`).

    Raises ValueError if the vocabulary has none of the pairs known here.
    """
    for bos, eos in _BOS_EOS:
        bos_id = None if bos is None else tokenizer.token_to_id(bos)
        eos_id = tokenizer.token_to_id(eos)
        if eos_id is not None and (bos is None or bos_id is not None):
            return bos_id, eos_id
    known = ", ".join(f"{bos or 'nothing'}…{eos}" for bos, eos in _BOS_EOS)
    raise ValueError(f"the tokenizer has no tokens that begin and end a document; known pairs: {known}")


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids `bos + ids + eos` of each text, as they stand in a stream; no text can produce a special token.

    (The tokenizer is switched to `encode_special_tokens`, and truncation and padding are switched off.)
    """
    return _framed(tokenizer, _encode(tokenizer, list(texts)))


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list:
    return _for_plain_text(tokenizer).encode_batch_fast(texts, add_special_tokens=False)


def _framed(tokenizer: Tokenizer, encodings: Iterable) -> list[list[int]]:
    bos_id, eos_id = bos_eos(tokenizer)
    before = [] if bos_id is None else [bos_id]
    return [before + encoding.ids + [eos_id] for encoding in encodings]


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids `bos + ids + eos` of one text; see `encode_documents`."""
    return encode_documents(tokenizer, [text])[0]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids that a continuation of `text` starts from: what precedes a document in a stream, and no end.

    That is `bos`, or, where there is none (GPT-2), the `eos` of the document before.
    """
    bos_id, eos_id = bos_eos(tokenizer)
    ids = _for_plain_text(tokenizer).encode(text, add_special_tokens=False).ids
    return [eos_id if bos_id is None else bos_id] + ids


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes that one token of `texts` stands for on average; bos and eos are not counted."""
    tokenizer = _for_plain_text(tokenizer)
    size = tokens = 0
    for batch in _batches(texts):
        size += sum(len(text.encode()) for text in batch)
        tokens += sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
    if tokens == 0:
        raise ValueError("bytes_per_token needs at least one text that is not empty")
    return size / tokens


def _for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    # None of the three survives in, or is wanted from, a tokenizer.json: special strings in a text would become
    # special tokens, and a truncation that a model's authors left in the file would cut documents silently.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise TypeError("texts is one str; pass a list of them, or the text column of a data set")
    batch, characters = [], 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is {type(text).__name__}, not str; pass the text column of a data set")
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------- token stream


class TokenStream:
    """All documents of a split, one after the other, as token ids in a memory-mapped file.

    `tokens` are the ids (uint16 where the vocabulary allows, else uint32), `document_lengths` the tokens of each
    document with its bos and eos, `vocab_size` is V, `key` names the content (tokenizer and texts). `document_ids` are
    the documents' numbers among the rows that they were taken from (default: 0, 1, 2, …).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        document_lengths: np.ndarray,
        vocab_size: int,
        key: str,
        document_ids: np.ndarray | None = None,
    ):
        self.tokens = tokens
        self.document_lengths = document_lengths
        self.vocab_size = vocab_size
        self.key = key
        self.document_ids = np.arange(len(document_lengths)) if document_ids is None else document_ids
        if len(self.document_ids) != len(document_lengths):
            raise ValueError(f"{len(self.document_ids)} ids for {len(document_lengths)} documents; give one for each")

    @classmethod
    def from_ids(cls, ids: Sequence[int], vocab_size: int) -> TokenStream:
        """A stream in memory of one document, for toys and tests; raises ValueError for an id outside 0..V-1."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be a non-empty list of integers, not shape {ids.shape} of {ids.dtype}")
        _check_ids(ids, vocab_size)
        tokens = ids.astype(_dtype(vocab_size))
        key = hashlib.blake2b(f"{vocab_size}:".encode() + tokens.tobytes(), digest_size=16).hexdigest()
        return cls(tokens, np.array([len(tokens)], dtype="<i8"), vocab_size, key)

    @classmethod
    def build(cls, dataset, tokenizer: Tokenizer, directory, *, column: str = "text", progress: bool = True):
        """Tokenize one split (a `datasets.Dataset`) into `directory`, or open the stream that is already there.

        Three files: `tokens-KEY.bin`, `tokens-KEY.lengths.npy`, and the record `tokens-KEY.json`, which is replaced
        after each batch and alone says how much of the other two counts. A build that was killed therefore goes on
        where the last record stands and ends in the same bytes; files that do not fit their record are built again.
        KEY hashes the texts themselves, not `dataset._fingerprint`: fingerprints differ between runs and machines
        for the same generated rows, and hashing costs about a second a gigabyte. Two processes that build the same
        stream wait for each other. Memory holds one batch, whatever the size of the corpus.

        Raises ValueError for a missing column, a split without documents, or a row that is not a text, and OSError
        if the disk is full (what is recorded stays, and the next call goes on from there).
        """
        from filelock import FileLock

        if column not in dataset.column_names:
            raise ValueError(f"there is no column {column!r}; the columns are {', '.join(dataset.column_names)}")
        if len(dataset) == 0:
            raise ValueError("the split has no documents; a token stream needs at least one")
        dataset = dataset.with_format(None).select_columns([column])
        tokenizer = _for_plain_text(tokenizer)
        directory = Path(directory)
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
                        f"cannot write the token stream ({error.strerror}); what is done is kept: make room and run "
                        "this again",
                        str(files.tokens),
                    ) from error
        tokens = np.memmap(files.tokens, dtype=record["dtype"], mode="r", shape=(record["tokens"],))
        lengths = np.load(files.lengths, mmap_mode="r", allow_pickle=False)
        return cls(tokens, lengths, record["vocab_size"], files.key)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenStream({len(self):,} tokens, {len(self.document_lengths):,} documents, V={self.vocab_size:,})"

    def random_windows(
        self, batch_size: int, seq_len: int, *, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`batch_size` windows at uniformly drawn positions: (tokens_BT, targets_BT), int64, targets one ahead.

        A pure function of the stream, `seed` and `step`, so a resumed run draws what the first would have drawn.
        Raises ValueError if the stream is shorter than one window with its targets, `seq_len + 1` tokens.
        """
        starts_B = self._random_starts(batch_size, seq_len, seed, step)
        return _tokens_and_targets(self.tokens[starts_B[:, None] + np.arange(seq_len + 1)])

    def random_document_ids(self, batch_size: int, seq_len: int, *, seed: int, step: int) -> np.ndarray:
        """The ids, sorted, of the documents that `random_windows` of the same arguments shows, targets included."""
        starts_B = self._random_starts(batch_size, seq_len, seed, step)
        return np.unique(np.concatenate([self.documents_at(start, start + seq_len + 1) for start in starts_B]))

    def documents_at(self, start: int, stop: int) -> np.ndarray:
        """The ids of the documents that have tokens at the positions start..stop-1 of the stream."""
        first = np.searchsorted(self._ends, start, side="right")
        last = np.searchsorted(self._ends, stop - 1, side="right")
        return self.document_ids[first : last + 1]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.document_lengths)

    def _random_starts(self, batch_size: int, seq_len: int, seed: int, step: int) -> np.ndarray:
        _check_sizes(batch_size, seq_len)
        if len(self) < seq_len + 1:
            raise ValueError(
                f"the stream has {len(self)} tokens, but one window with its targets needs seq_len + 1 = "
                f"{seq_len + 1}: give more text or choose a smaller seq_len"
            )
        return np.random.default_rng((seed, step)).integers(0, len(self) - seq_len, size=batch_size)

    def windows(self, batch_size: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive windows (tokens_BT, targets_BT) in which each token but the first is a target exactly once.

        The last batch may have fewer rows; its last window is filled up with token 0 and target -100. Raises
        ValueError if the stream has no target (fewer than two tokens).
        """
        _check_sizes(batch_size, seq_len)
        if len(self) < 2:
            raise ValueError(f"the stream has {len(self)} token; evaluation needs at least 2, a token and its target")
        return self._windows(batch_size, seq_len)

    def _windows(self, batch_size: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        per_batch = batch_size * seq_len
        for start in range(0, len(self) - 1, per_batch):
            piece = torch.from_numpy(self.tokens[start : start + per_batch + 1].astype(np.int64))
            count = len(piece) - 1
            rows = -(-count // seq_len)
            tokens_N = torch.zeros(rows * seq_len, dtype=torch.int64)
            targets_N = torch.full_like(tokens_N, IGNORE)
            tokens_N[:count] = piece[:-1]
            targets_N[:count] = piece[1:]
            yield tokens_N.view(rows, seq_len), targets_N.view(rows, seq_len)


def padded_batch(
    documents: Sequence[Sequence[int]], pad_id: int, length: int | None = None, *, mask_padding: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """One document a row, filled up with `pad_id`: (tokens_BT, targets_BT), T = `length` or the longest document.

    Targets are one ahead; behind a document's last token they are -100, so that the loss is a mean over real tokens.
    `mask_padding=False` is the trap of notebook 01: pads become targets, easy ones, and lower the reported loss.
    Raises ValueError if there is no document, or one longer than `length`.
    """
    if len(documents) == 0:
        raise ValueError("a batch needs at least one document")
    longest = max(map(len, documents))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a document has {longest} tokens but length={length}: cut the document or raise length")
    tokens_BT = torch.full((len(documents), length), pad_id, dtype=torch.int64)
    targets_BT = torch.full((len(documents), length), IGNORE if mask_padding else pad_id, dtype=torch.int64)
    for row, ids in enumerate(documents):
        ids = torch.from_numpy(np.array(ids, dtype=np.int64))  # a copy: slices of a stream are read-only
        tokens_BT[row, : len(ids)] = ids
        targets_BT[row, : max(len(ids) - 1, 0)] = ids[1:]
    return tokens_BT, targets_BT


# ------------------------------------------------------------------------------------------------ building on disk


class _Files:
    """The files of one stream. The record is the truth: bytes beyond what it counts do not exist."""

    def __init__(self, directory: Path, key: str):
        self.key = key
        self.tokens = directory / f"tokens-{key}.bin"
        self.lengths = directory / f"tokens-{key}.lengths.npy"
        self.record = directory / f"tokens-{key}.json"
        self.lock = directory / f"tokens-{key}.lock"

    def usable_record(self, documents: int, vocab_size: int) -> dict:
        """The record on disk if the files bear it out, else that of an empty stream; cuts off what is not recorded."""
        empty = {"documents": documents, "done": 0, "tokens": 0, "vocab_size": vocab_size, "dtype": _dtype(vocab_size)}
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
            warnings.warn(f"{self.tokens} does not fit its record {self.record.name}; building it again", stacklevel=3)
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
        bar = tqdm(
            total=record["documents"], initial=record["done"], desc="tokenizing", unit="doc", disable=not progress
        )
        with bar:
            batches = _batches(_texts(dataset, column, record["done"]))
            for encodings in _one_ahead(lambda batch: _encode(tokenizer, batch), batches):
                documents = _framed(tokenizer, encodings)
                del encodings  # a hundred bytes a token
                lengths = np.fromiter(map(len, documents), dtype="<i8", count=len(documents))
                ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum())
                _check_ids(ids, record["vocab_size"])
                for file, array in ((tokens_file, ids.astype(record["dtype"])), (lengths_file, lengths)):
                    file.write(array.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                record = {**record, "done": record["done"] + len(documents), "tokens": record["tokens"] + len(ids)}
                _write_record(files, record)
                bar.update(len(documents))
    return record


def _one_ahead(function: Callable, items: Iterable) -> Iterator:
    """function(item) of each item in order; while one is in use, a thread makes the next.

    Encoding runs on all cores and without Python's lock, what follows it on one: so neither waits for the other.
    """
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            coming = thread.submit(function, item)
            if before is not None:
                yield before.result()
            before = coming
        if before is not None:
            yield before.result()


def _write_record(files: _Files, record: dict) -> None:
    _write_atomically(files.record, json.dumps(record) + "\n")


def _sizes(record: dict) -> tuple[int, int]:
    """Bytes of the two files for what the record counts; numpy pads the header of an array file to 128 bytes."""
    return record["tokens"] * np.dtype(record["dtype"]).itemsize, 128 + record["done"] * 8


def _texts(dataset, column: str, start: int = 0) -> Iterator[str]:
    for begin in range(start, len(dataset), 256):
        yield from dataset[begin : begin + 256][column]


def _content_key(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for batch in chain([[tokenizer.to_str()]], _batches(texts)):
        for text in batch:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))  # so that ["ab", "c"] and ["a", "bc"] differ
            digest.update(data)
    return digest.hexdigest()


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary 0..{vocab_size - 1}: the ids come from "
            "another tokenizer, or vocab_size is wrong"
        )


def _check_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must both be at least 1")


def _tokens_and_targets(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
