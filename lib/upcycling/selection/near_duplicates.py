"""Documents that are nearly equal, found by MinHash."""

import operator
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from .rows import Rows, _texts

SHINGLE = 5  # words
PERMUTATIONS = 64  # of a MinHash: the standard error of a similarity of 0.8 is 0.05


class _Unique:
    """Which documents are not nearly the same as one added before, by datasketch's MinHash and its LSH index."""

    def __init__(self, rows: Rows, column: str, threshold: float):
        from datasketch import MinHashLSH

        self.rows, self.column, self.threshold = rows, column, threshold
        # Few false negatives: what the index finds is compared again, so that false positives cost only time.
        self.index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self.prepared: dict[int, Any] = {}  # the MinHash of each
        self.added: dict[int, np.ndarray] = {}

    def prepare(self, numbers: Iterable[int]) -> None:
        """Read and hash the texts of these rows, in one pass."""
        from datasketch import MinHash

        wanted = sorted(number for number in numbers if number not in self.prepared)
        texts = _texts(self.rows, self.column, wanted)
        hashes = MinHash.generator(map(_shingles, texts), num_perm=PERMUTATIONS, hashfunc=operator.index)
        self.prepared.update(zip(wanted, hashes))

    def add(self, number: int) -> bool:
        """Add the document unless it is a near-duplicate; returns whether it was added."""
        minhash = self.prepared.pop(number)
        for other in self.index.query(minhash):
            if (self.added[other] == minhash.hashvalues).mean() >= self.threshold:
                return False
        self.index.insert(number, minhash, check_duplication=False)
        self.added[number] = minhash.hashvalues
        return True


def _shingles(text: str) -> list[int]:
    """A 32-bit hash of each run of 5 words (of a shorter text: of all its words), in lower case."""
    words = np.array([zlib.crc32(word) for word in text.lower().encode("utf-8", "surrogatepass").split()], np.uint32)
    if len(words) < SHINGLE:
        words = np.append(words, np.zeros(SHINGLE - len(words), np.uint32))
    runs = len(words) - SHINGLE + 1
    hashes = np.zeros(runs, np.uint32)
    for i in range(SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + words[i : i + runs]  # FNV's prime; uint32 wraps around
    return hashes.tolist()
