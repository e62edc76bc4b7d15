"""Token ids to batches: a packed stream of tokens on disk, and the windows that are drawn from it.

A document in a stream is `bos + ids + eos`; documents follow each other without padding. Special tokens mark where a
document begins and ends, and only that: a text that happens to contain `<|im_end|>` is encoded as ordinary characters.
Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ..checks import IGNORE, _at_least
from .stream_files import build_files, check_ids, id_dtype


@dataclass(eq=False, repr=False)
class TokenStream:
    """All documents of a split, one after the other, as token ids in a memory-mapped file.

    `tokens` are the ids (uint16 where the vocabulary allows, else uint32), `document_lengths` the tokens of each
    document with its bos and eos, `vocab_size` is V, `key` names the content (tokenizer and texts). `document_ids` are
    the documents' numbers among the rows that they were taken from (default: 0, 1, 2, …).
    """

    tokens: np.ndarray
    document_lengths: np.ndarray
    vocab_size: int
    key: str
    document_ids: np.ndarray | None = None

    def __post_init__(self):
        count = len(self.document_lengths)
        self.document_ids = np.arange(count) if self.document_ids is None else self.document_ids
        if len(self.document_ids) != count:
            raise ValueError(f"{len(self.document_ids)} ids for {count} documents; give one for each")

    @classmethod
    def from_ids(cls, ids: Sequence[int], vocab_size: int) -> TokenStream:
        """A stream in memory of one document, for toys and tests; raises ValueError for an id outside 0..V-1."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be a non-empty list of integers, not shape {ids.shape} of {ids.dtype}")
        check_ids(ids, vocab_size)
        tokens = ids.astype(id_dtype(vocab_size))
        key = hashlib.blake2b(f"{vocab_size}:".encode() + tokens.tobytes(), digest_size=16).hexdigest()
        return cls(tokens, np.array([len(tokens)], dtype="<i8"), vocab_size, key)

    @classmethod
    def build(
        cls, dataset, tokenizer: Tokenizer, directory, *, column: str = "text", progress: bool = True
    ) -> TokenStream:
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
        return cls(*build_files(dataset, tokenizer, Path(directory), column, progress))

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
        windows = torch.from_numpy(self.tokens[starts_B[:, None] + np.arange(seq_len + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def random_document_ids(self, batch_size: int, seq_len: int, *, seed: int, step: int) -> np.ndarray:
        """The ids, sorted, of the documents that `random_windows` of the same arguments shows, targets included."""
        starts_B, ends = self._random_starts(batch_size, seq_len, seed, step), np.cumsum(self.document_lengths)
        first_B, last_B = (np.searchsorted(ends, at_B, side="right") for at_B in (starts_B, starts_B + seq_len))
        return np.unique(np.concatenate([self.document_ids[a : b + 1] for a, b in zip(first_B, last_B)]))

    def _random_starts(self, batch_size: int, seq_len: int, seed: int, step: int) -> np.ndarray:
        _at_least(1, batch_size=batch_size, seq_len=seq_len)
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
        _at_least(1, batch_size=batch_size, seq_len=seq_len)
        if len(self) < 2:
            raise ValueError(f"the stream has {len(self)} token; evaluation needs at least 2, a token and its target")
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
