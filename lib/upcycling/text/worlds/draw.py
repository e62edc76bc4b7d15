"""The dice of a world: what its facts are drawn with."""

import random
from collections.abc import Iterable, Sequence

from .words import split


class Draw:
    """Draws one part of a world's facts; each part has its own dice: more towns do not change the dictionary.

    seed: a text. taken: the names that are given already, shared by a world's parts and added to. fact_zipf: the skew
    of `mention_weights`.
    """

    def __init__(self, seed: str, taken: set[str], fact_zipf: float):
        self._random = random.Random(seed).random
        self._taken = taken
        self._fact_zipf = fact_zipf

    def below(self, n: int) -> int:
        """One of 0..n-1."""
        return int(self._random() * n)

    def one_of(self, options: Sequence):
        return options[self.below(len(options))]

    def shuffled(self, items: Iterable) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def new_name(self, sounds: Sequence[str], low: int, high: int, endings: str = "-") -> str:
        """A made-up lower-case word of low..high syllables that nothing else in this world is called."""
        sounds, endings = [split(sound) for sound in sounds], split(endings)
        while True:
            count = low + self.below(high - low + 1)
            name = "".join(self.one_of(sound) for _ in range(count) for sound in sounds) + self.one_of(endings)
            if name not in self._taken and 3 < len(name) < 13:
                self._taken.add(name)
                return name

    def mention_weights(self, n: int) -> list[int]:
        """Integer weights of n entries by rank; rounded, so that they are equal where `pow` differs in a last bit."""
        return [max(1, round(1e6 * (rank + 1) ** -self._fact_zipf)) for rank in range(n)]
