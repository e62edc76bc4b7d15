"""The embedded corpus: reproducible to the byte, exact surprisal, correct content, the shape of real stories.

After a deliberate change of the generator or of its defaults, `python lib/tests/text/test_worlds.py` prints the
constants below anew and rewrites data/worlds_sample.jsonl.
"""

import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from upcycling.text.worlds.grammar import Choices, Chooser, Writer
from upcycling.text.worlds.world import DOMAINS, World, WorldConfig, generate

TEXTS_SHA256 = "e889e922a30325b262bfa110332abce3bcc4f40166b7fdcf5cc5ab6d3d1ebcf1"
SURPRISALS_SHA256 = "1ca9d9759aca1c9a287f13ba52a5a70d5b9094cd5a65c843243536603a7b118f"

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "data" / "worlds_sample.jsonl"
SAMPLE_DOCUMENTS = 160


def hashes_of(rows):
    texts = "\0".join(row["text"] for row in rows)
    surprisals = "\n".join(f"{row['surprisal']:.6f}" for row in rows)
    return tuple(hashlib.sha256(value.encode()).hexdigest() for value in (texts, surprisals))


def sample_lines(rows):
    return "".join(json.dumps(row | {"surprisal": round(row["surprisal"], 6)}) + "\n" for row in rows)


class Mismatch(Exception):
    """The choices made so far do not lead to the text."""


class Reader(Chooser):
    """Replays a script of choices against a text; past its end, takes the first one that fits and notes the others."""

    def __init__(self, text: str, script: list[int]):
        self.text, self.position = text, 0
        self.script, self.made, self.alternatives = script, [], []

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.position):
            raise Mismatch
        self.position += len(text)

    def _choose(self, choices: Choices, used) -> int:
        step = len(self.made)
        if step < len(self.script):
            index = self.script[step]
        else:
            fitting = [
                i
                for i, option in enumerate(choices.texts)
                if choices.weights[i] and i not in used and self.text.startswith(option, self.position)
            ]
            if not fitting:
                raise Mismatch
            index = fitting[0]
            self.alternatives += [[*self.made, other] for other in fitting[1:]]
        self.made.append(index)
        self.position += len(choices.texts[index])
        return index


def derivations(text: str, world: World) -> list[tuple[str, float]]:
    """Every way to generate `text`, as pairs (domain, surprisal in nats): exactly one for a genuine text, else none."""
    found, scripts = [], [[]]
    while scripts:
        reader = Reader(text, scripts.pop())
        try:
            domain = world.write(reader)
            if reader.position == len(text):
                found.append((domain, reader.surprisal))
        except Mismatch:
            pass
        scripts += reader.alternatives
    return found


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def rows(world):
    return list(generate(2_000, 0, world))


@pytest.fixture(scope="module")
def texts_of(rows):
    return {domain: [row["text"] for row in rows if row["domain"] == domain] for domain in DOMAINS}


@pytest.fixture(scope="module")
def stories(world):
    return [row["text"] for row in generate(10_000, 1, World(WorldConfig(shares=(1, 0, 0, 0, 0))))]


def test_the_default_corpus_is_the_same_everywhere(rows):
    assert hashes_of(rows) == (TEXTS_SHA256, SURPRISALS_SHA256)
    assert not any("\r" in row["text"] for row in rows)


def test_the_sample_file_is_the_start_of_the_default_corpus(rows):
    text = SAMPLE.read_text(encoding="utf-8")
    assert text == sample_lines(rows[:SAMPLE_DOCUMENTS])
    assert len(text.encode()) < 200_000


def test_hash_randomisation_changes_nothing(rows):
    code = "from upcycling.text.worlds.world import *\n"
    code += "print(*(hash('a'), [row['text'] for row in generate(60)]), sep='\\n')"
    outputs = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "lib")}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(result.stdout.split("\n", 1))
    assert outputs[0][0] != outputs[1][0]  # the seeds took effect
    assert outputs[0][1] == outputs[1][1] == f"{[row['text'] for row in rows[:60]]}\n"


def test_seeds_draw_documents_and_facts_separately(world):
    first, other_documents = (next(generate(1, seed, world))["text"] for seed in (0, 1))
    assert first != other_documents
    other_facts = World(WorldConfig(seed=1))
    assert other_facts.geography.country != world.geography.country
    assert other_facts.geography.towns[0] != world.geography.towns[0]
    more_towns = World(WorldConfig(n_towns=500))
    assert len(more_towns.geography.towns) == 500
    assert more_towns.dictionary.lines[0].texts == world.dictionary.lines[0].texts


@pytest.mark.parametrize(
    "config",
    [
        WorldConfig(),
        WorldConfig(seed=3, n_towns=1500, n_words=1000, n_characters=241, n_functions=600, fact_zipf=1.1),
        WorldConfig(seed=4, n_towns=24, n_words=100, n_characters=8, n_functions=8, shares=(1, 1, 1, 1, 1)),
    ],
    ids=["default", "large and skewed", "small"],
)
def test_every_text_has_exactly_one_derivation_and_its_surprisal(config):
    world = World(config)
    left = dict.fromkeys(DOMAINS, 40)
    for row in generate(600, 7, world):
        if left[row["domain"]] == 0:
            continue
        left[row["domain"]] -= 1
        found = derivations(row["text"], world)
        assert len(found) == 1, row["text"]
        assert found[0][0] == row["domain"]
        assert found[0][1] == pytest.approx(row["surprisal"], abs=1e-9)
    assert max(left.values()) == 0


def test_a_changed_text_has_no_derivation(rows, world):
    choose = random.Random(0)
    for row in rows[:120]:
        text = row["text"]
        place = choose.randrange(len(text))
        for mutated in (text[:-1], text + "\n", text[:place] + "@" + text[place + 1 :], text[1:], text + text):
            assert derivations(mutated, world) == [], mutated


def test_a_wrong_fact_has_no_derivation(texts_of, world):
    text = next(text for text in texts_of["geography"] if "Who founded" in text)
    founder = re.search(r"Who founded \w+\? It was ([\w ]+)\.", text)[1]
    other = next(town["founder"] for town in world.geography.towns if town["founder"] != founder)
    assert derivations(text, world)
    assert not derivations(text.replace(founder, other), world)
    text = next(text for text in texts_of["arithmetic"] if re.search(r"= (\d+)\n", text))
    total = re.search(r"= (\d+)\n", text)
    wrong = text[: total.start(1)] + str(int(total[1]) + 1) + text[total.end(1) :]
    assert derivations(text, world)
    assert not derivations(wrong, world)


def test_the_costs_of_choices_are_minus_the_log_of_their_frequency():
    choices = Choices(["a", "b", "c", "d"], [50, 3, 2, 0])  # after an "a", most draws are rejected
    costs, counts, draw = {}, Counter(), random.Random(0).random
    for _ in range(20_000):
        writer = Writer(draw)
        first = writer.pick(choices)
        writer.pick_new(choices, [first])
        costs[writer.text] = writer.surprisal
        counts[writer.text] += 1
    assert sorted(costs) == ["".join(pair) for pair in itertools.permutations("abc", 2)]
    chances = {text: math.exp(-cost) for text, cost in costs.items()}
    assert sum(chances.values()) == pytest.approx(1)
    for text, count in counts.items():
        assert count / 20_000 == pytest.approx(chances[text], abs=0.015)


def test_shares_are_shares_of_text(rows):
    tokens = dict.fromkeys(DOMAINS, 0.0)
    for row in rows:  # with the same characters per token in all domains, shares agree only roughly
        tokens[row["domain"]] += len(row["text"])
    for domain, share in zip(DOMAINS, WorldConfig().shares):
        assert tokens[domain] / sum(tokens.values()) == pytest.approx(share, abs=0.08)
    only_code = WorldConfig(shares=(0, 0, 1, 0, 0))
    assert {row["domain"] for row in generate(20, 0, only_code)} == {"code"}


def test_fact_zipf_skews_how_often_facts_are_mentioned():
    def share_of_first_tenth(zipf):
        world = World(WorldConfig(fact_zipf=zipf, shares=(0, 0, 0, 1, 0)))
        seen = Counter(re.findall(r"\w+", " ".join(row["text"] for row in generate(300, 0, world))))
        counts = [seen[town["town"]] for town in world.geography.towns]
        return sum(counts[: len(counts) // 10]) / sum(counts)

    assert 0.07 < share_of_first_tenth(0.0) < 0.14
    assert share_of_first_tenth(1.0) > 0.3


def test_no_document_occurs_twice(rows, world):
    assert len({row["text"] for row in rows}) == len(rows) == 2_000
    # Where texts do repeat, the repeats are dropped, and a corpus that does not exist is refused.
    tiny = WorldConfig(shares=(0, 0, 0, 1, 0), n_towns=24)
    assert len({row["text"] for row in generate(3_000, 0, tiny)}) == 3_000


def test_documents_are_neither_short_nor_long(texts_of):
    for domain, texts in texts_of.items():
        lengths = [len(text.split()) for text in texts]
        assert min(lengths) >= 25 and max(lengths) <= 300, (domain, min(lengths), max(lengths))
        assert 60 <= sum(lengths) / len(lengths) <= 200, domain


def test_stories_have_the_shape_of_real_ones(stories):
    n = len(stories)
    assert 150 <= sum(len(story.split()) for story in stories) / n <= 180
    assert 3.0 <= sum(story.count("\n") for story in stories) / n <= 3.6
    assert 0.59 <= sum(story.startswith("Once upon a time") for story in stories) / n <= 0.63
    assert 0.63 <= sum('"' in story for story in stories) / n <= 0.67
    types = {word for story in stories for word in re.findall(r"[a-z]+(?:['-][a-z]+)*", story.lower())}
    assert len(types) >= 2_500
    assert all(story.count('"') % 2 == 0 for story in stories)
    assert not any(re.search(r"[{}\[\]|<>]|  | \.|\.\.|\n ", story) for story in stories)
    assert not any(re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", story) for story in stories)


def test_a_storys_hero_and_facts_stay_the_same(stories, world):
    toys = {}
    for story in stories:
        hero = re.search(r"\b(?:named|called) (\w+)", story)[1]
        assert hero in story.split("\n")[-1] or "they all" in story.split("\n")[-1]
        if toy := re.search(r"favorite thing was an? ([a-z -]+)\.", story.split("\n")[0]):
            toys.setdefault(hero, set()).add(toy[1])
    assert len(toys) > 0.75 * world.config.n_characters
    assert all(len(found) == 1 for found in toys.values())


def test_arithmetic_is_right(texts_of):
    n_checked = 0
    for line in itertools.chain.from_iterable(text.split("\n") for text in texts_of["arithmetic"]):
        if match := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", line):
            a, b = int(match[1]), int(match[3])
            assert {"+": a + b, "-": a - b, "*": a * b}[match[2]] == int(match[4])
        elif match := re.fullmatch(r"Sort ([\d, ]+): ([\d, ]+)", line):
            assert sorted(map(int, match[1].split(", "))) == list(map(int, match[2].split(", ")))
        elif match := re.fullmatch(r"Divide (\d+) by (\d+): (\d+) remainder (\d+)", line):
            assert divmod(int(match[1]), int(match[2])) == (int(match[3]), int(match[4]))
        elif match := re.fullmatch(r"Continue ([-\d, ]+): ([-\d, ]+)", line):
            terms = [int(term) for group in match.groups() for term in group.split(", ")]
            assert len({b - a for a, b in itertools.pairwise(terms)}) == 1
        elif match := re.fullmatch(r"(\w+) \w+ (\d+) [\w ]+\. \1 gets (\d+) more\. Now there are (\d+)\.", line):
            assert int(match[2]) + int(match[3]) == int(match[4])
        else:
            continue
        n_checked += 1
    assert n_checked > 1_500


def test_code_prints_what_its_comments_say(texts_of):
    for text in texts_of["code"]:
        printed = []
        exec(text, {"print": printed.append})
        assert [str(value) for value in printed] == re.findall(r"\)  # (.*)", text)
        assert 3 <= len(printed) <= 18


def test_a_town_or_word_has_the_same_facts_in_every_document(texts_of, world):
    rivers, translations = {}, {}
    for text in texts_of["geography"]:
        for town, river in re.findall(r"river flows through (\w+)\? The (\w+)\.", text):
            rivers.setdefault(town, set()).add(river)
        for river, town in re.findall(r"The river (\w+) flows through (\w+)\.", text):
            rivers.setdefault(town, set()).add(river)
    for text in texts_of["dictionary"]:
        for english, foreign in re.findall(r"^([a-z -]+) : (\w+)$", text, re.MULTILINE):
            if not english.startswith("the "):
                translations.setdefault(english, set()).add(foreign)
        for foreign, english in re.findall(r"^(\w+) = ([a-z -]+)$", text, re.MULTILINE):
            translations.setdefault(english, set()).add(foreign)
    assert len(rivers) > 0.9 * world.config.n_towns and len(translations) > 0.9 * world.config.n_words
    assert all(len(found) == 1 for found in [*rivers.values(), *translations.values()])


def test_metadata_has_cosmopedias_values_and_leaves_texts_alone(rows):
    assert {row["audience"] for row in rows} == {
        "general", "college_students", "young_children", "grade_school_students", "researchers", "high_school_studnets",
        "college_studnets", "middle_school_students",
    }  # fmt: skip
    assert {row["format"] for row in rows} <= {
        "blogpost", "textbook_academic_tone", "educational_piece", "story_reddit", "story_children",
        "story_life_lessons", "wikihow", "textbook_narrative_tone", "textbook_narrative", "story_morality",
        "story_forums", "e-learning_module", "textbook_academic", "scientific_article",
    }  # fmt: skip
    assert {row["seed_data"] for row in rows} == {
        "web_samples_v1", "web_samples_v2", "ultrachat", "openhermes2.5", "auto_math_text", "stanford",
        "wikihow_original", "openstax", "khanacademy",
    }  # fmt: skip
    real = ROOT.parent / "shared" / "data" / "cosmopedia100k_statistics.txt"
    if real.exists():
        values = set(re.findall(r"^  ([\w.-]+): \d", real.read_text(encoding="utf-8"), re.MULTILINE))
        assert {row[column] for row in rows for column in ("audience", "format", "seed_data")} <= values


def test_a_million_tokens_take_less_than_15_seconds(rows):
    start = time.process_time()
    n_characters = sum(len(row["text"]) for row in generate(4_500, 2))
    assert n_characters > 3_000_000  # a 2,048-token BPE has 2.75 characters per token, so this is over 1M tokens
    assert time.process_time() - start < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_towns": 1}, r"n_towns=1 is out of range; choose 24\.\."),
        ({"n_words": 100_000}, r"n_words=100000 is out of range; choose 100\.\."),
        ({"n_characters": 500}, r"n_characters=500 is out of range"),
        ({"fact_zipf": -1}, r"fact_zipf=-1 is out of range"),
        ({"shares": (1, 0)}, r"shares=\(1, 0\): give one share >= 0 for each of stories"),
        ({"shares": (0, 0, 0, 0, 0)}, r"not all 0"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**arguments)


def test_impossible_corpora_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="neither may be negative"):
        next(generate(10, seed=-1))
    monkeypatch.setattr(World, "write", lambda world, chooser: chooser.say("always the same") or "code")
    with pytest.raises(ValueError, match="fewer than 100 different documents"):
        list(generate(100))


if __name__ == "__main__":
    rows = list(generate(2_000))
    print('TEXTS_SHA256 = "{}"\nSURPRISALS_SHA256 = "{}"'.format(*hashes_of(rows)))
    SAMPLE.write_text(sample_lines(rows[:SAMPLE_DOCUMENTS]), encoding="utf-8", newline="\n")
