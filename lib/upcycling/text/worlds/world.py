"""A world, drawn once from its seed, and the documents about it: `generate`."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from .arithmetic import Arithmetic
from .code import Code
from .dictionary import DICTIONARY_WORDS, Dictionary
from .draw import Draw
from .geography import Geography
from .grammar import Choices, Writer
from .stories import Stories
from .words import WORDS, read_json

DOMAINS = ("stories", "arithmetic", "code", "geography", "dictionary")
MEAN_TOKENS = (299, 205, 211, 266, 279)  # of a document of each domain (2,048-token BPE): from shares to odds
# Cosmopedia's own values of its columns (the misspelt ones too), with odds per domain.
_METADATA = {
    domain: {column: Choices(odds.keys(), odds.values()) for column, odds in columns.items()}
    for domain, columns in read_json("metadata.json").items()
}


@dataclass(frozen=True)
class WorldConfig:
    """What a world holds and how often it is spoken of.

    seed: draws the facts; the documents have a seed of their own. n_towns, n_words, n_characters, n_functions: how many
    towns, dictionary words, named story characters and functions exist, each with its fixed facts. fact_zipf: the entry
    of rank r is mentioned in proportion to 1 / r ** fact_zipf; 0 mentions all equally often. shares: about the share
    of the corpus's tokens for each of `DOMAINS`, in that order.
    """

    seed: int = 0
    n_towns: int = 150
    n_words: int = 300
    n_characters: int = 100
    n_functions: int = 50
    fact_zipf: float = 0.0
    shares: tuple[float, float, float, float, float] = (0.15, 0.08, 0.12, 0.35, 0.3)

    def __post_init__(self):
        limits = {
            "n_towns": (24, 20_000),
            "n_words": (100, len(DICTIONARY_WORDS)),
            "n_characters": (8, len(WORDS["girl"]) + len(WORDS["boy"])),
            "n_functions": (8, 2_000),
            "fact_zipf": (0, 4),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; choose {low}..{high}")
        if len(self.shares) != len(DOMAINS) or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shares={self.shares}: give one share >= 0 for each of {', '.join(DOMAINS)}, not all 0")


class World:
    """The facts that the documents are about, drawn once from `config.seed`: one part for each domain."""

    def __init__(self, config: WorldConfig | None = None):
        self.config = config = config or WorldConfig()
        taken = {word for word, _ in DICTIONARY_WORDS} | {name.lower() for name in WORDS["girl"] + WORDS["boy"]}

        def draw(part: str) -> Draw:
            return Draw(f"world {config.seed} _draw_{part}", taken, config.fact_zipf)

        self.geography = Geography(draw("geography"), config.n_towns)
        self.dictionary = Dictionary(draw("dictionary"), config.n_words)
        towns = [town["town"] for town in self.geography.towns]
        self.stories = Stories(draw("characters"), config.n_characters, towns)
        self.code = Code(draw("functions"), config.n_functions)
        self.arithmetic = Arithmetic(self.stories.names)
        odds = [round(1e6 * share / tokens) for share, tokens in zip(config.shares, MEAN_TOKENS, strict=True)]
        self._domains = Choices([""] * len(DOMAINS), odds)

    def write(self, chooser) -> str:
        """Write one document; returns its domain."""
        domain = DOMAINS[chooser.pick(self._domains)]
        getattr(self, domain).write(chooser)
        return domain


def generate(documents: int, seed: int = 0, world: World | WorldConfig | None = None) -> Iterator[dict]:
    """Yield `documents` different documents about `world`, as rows of a dataset.

    Columns: text; domain, one of `DOMAINS`; surprisal, -log p(text, domain) in nats, exact; audience, format and
    seed_data, Cosmopedia's columns, which depend on nothing but the domain. A text that was written before is dropped.
    Raises ValueError for a negative seed or number of documents.
    """
    if documents < 0 or seed < 0:
        raise ValueError(f"documents={documents}, seed={seed}: neither may be negative")
    if not isinstance(world, World):
        world = World(world)
    choose_text = random.Random(f"documents {seed}").random
    choose_metadata = random.Random(f"metadata {seed}").random
    seen, repeats = set(), 0  # 16 bytes a document, so that a large corpus needs little memory
    while len(seen) < documents:
        writer = Writer(choose_text)
        domain = world.write(writer)
        text = writer.text
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            repeats += 1
            if repeats > 100 + 10 * documents:
                raise ValueError(f"{world.config} has fewer than {documents} different documents; ask for fewer")
            continue
        seen.add(digest)
        metadata = Writer(choose_metadata)
        columns = {column: choices.texts[metadata.pick(choices)] for column, choices in _METADATA[domain].items()}
        yield {"text": text, "domain": domain, "surprisal": writer.surprisal, **columns}
