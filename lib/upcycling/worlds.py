"""`worlds`: the embedded corpus, a seeded generator of labelled documents whose exact surprisal is known.

A `World` is a set of facts, drawn once from `WorldConfig.seed`: an invented country, an invented language, several
hundred story characters and a library of small functions. `generate` writes documents about it. A document is written
by a plain Python function against a small chooser, which has three methods:

    say(text)               write text that is already determined
    pick(table)             choose one entry of a weighted table and write its text
    pick_new(table, used)   the same, among the entries that are not in `used`

`Writer` chooses at random and adds up -log p of each choice. `derivations` drives the same functions the other way: it
tries every choice that agrees with a given text. Each text has exactly one derivation, so the sum is the text's exact
surprisal, in nats, for a reader who knows the world: no model can do better on average.

Reproducible to the byte everywhere: `random.Random.random` is the only source of randomness (Python guarantees its
sequence), weights are integers, and nothing depends on the order of a set or of a hash.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from . import words
from .stories import CHARACTER_FACTS, HERO_FORMS, STORY
from .words import article, plural

DOMAINS = ("stories", "arithmetic", "code", "geography", "dictionary")
MEAN_CHARACTERS = (820, 400, 420, 800, 620)  # of a document of each domain: turns shares of text into document odds


@dataclass(frozen=True)
class WorldConfig:
    """What a world holds and how often it is spoken of.

    seed: draws the facts; the documents have a seed of their own. n_towns, n_words, n_characters, n_functions: how many
    towns, dictionary words, named story characters and functions exist, each with its fixed facts. fact_zipf: the entry
    of rank r is mentioned in proportion to 1 / r ** fact_zipf; 0 mentions all equally often. shares: the share of the
    corpus's text for each of `DOMAINS`, in that order.
    """

    seed: int = 0
    n_towns: int = 400
    n_words: int = 600
    n_characters: int = 200
    n_functions: int = 150
    fact_zipf: float = 0.0
    shares: tuple[float, float, float, float, float] = (0.25, 0.1, 0.1, 0.3, 0.25)

    def __post_init__(self):
        limits = {
            "n_towns": (8, 20_000),
            "n_words": (50, len(DICTIONARY_WORDS)),
            "n_characters": (8, len(words.GIRLS) + len(words.BOYS)),
            "n_functions": (8, 2_000),
            "fact_zipf": (0, 4),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; choose {low}..{high}")
        if len(self.shares) != len(DOMAINS) or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shares={self.shares}: give one share >= 0 for each of {', '.join(DOMAINS)}, not all 0")


def _dictionary_words() -> tuple[tuple[str, str], ...]:
    """Every English word that can be in the dictionary, with its part of speech, each word once."""
    kinds = [
        ("n", words.THINGS + words.ANIMALS + words.FOODS + words.PLANTS + words.PLACES + words.JOBS + words.NATURE),
        ("n", words.HOUSE + words.PEOPLE + words.BODY + words.ABSTRACT),
        ("adj", words.COLORS + words.QUALITIES + words.TRAITS + words.OTHER_ADJECTIVES),
        ("v", tuple(base for base, _, _ in words.VERBS)),
    ]
    parts = {}
    for part, group in kinds:
        for word in group:
            parts.setdefault(word, part)
    return tuple(parts.items())


DICTIONARY_WORDS = _dictionary_words()


class Table:
    """A weighted choice among texts: integer weights, so that the same random number means the same entry everywhere."""

    __slots__ = ("costs", "cumulative", "texts", "total", "weights")

    def __init__(self, texts, weights=None):
        self.texts = list(texts)
        self.weights = [1] * len(self.texts) if weights is None else list(weights)
        self.cumulative = list(accumulate(self.weights))
        self.total = self.cumulative[-1]
        self.costs = [-math.log(weight / self.total) if weight else math.inf for weight in self.weights]


class Writer:
    """Writes one document by random choices: `text` is what was written, `surprisal` the sum of -log p, in nats."""

    __slots__ = ("_parts", "_random", "surprisal")

    def __init__(self, random_function):
        self._random = random_function
        self._parts = []
        self.surprisal = 0.0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def say(self, text: str) -> None:
        self._parts.append(text)

    def pick(self, table: Table) -> int:
        index = bisect_right(table.cumulative, self._random() * table.total)
        self.surprisal += table.costs[index]
        self._parts.append(table.texts[index])
        return index

    def pick_new(self, table: Table, used) -> int:
        while True:
            index = bisect_right(table.cumulative, self._random() * table.total)
            if index not in used:
                break
        self.surprisal += _cost_among_unused(table, index, used)
        self._parts.append(table.texts[index])
        return index


def _cost_among_unused(table: Table, index: int, used) -> float:
    return -math.log(table.weights[index] / (table.total - sum(table.weights[i] for i in used)))


class _Mismatch(Exception):
    """The choices made so far do not lead to the text."""


class _Reader:
    """Replays a list of choices against a text; where the list ends, takes the first fitting choice and notes the others."""

    def __init__(self, text: str, script: list[int]):
        self.text, self.position = text, 0
        self.script, self.made, self.alternatives = script, [], []
        self.surprisal = 0.0

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.position):
            raise _Mismatch
        self.position += len(text)

    def _choose(self, table: Table, used=()) -> int:
        step = len(self.made)
        if step < len(self.script):
            index = self.script[step]
        else:
            fitting = [
                i
                for i, option in enumerate(table.texts)
                if table.weights[i] and i not in used and self.text.startswith(option, self.position)
            ]
            if not fitting:
                raise _Mismatch
            index = fitting[0]
            self.alternatives += [[*self.made, other] for other in fitting[1:]]
        self.made.append(index)
        self.position += len(table.texts[index])
        return index

    def pick(self, table: Table) -> int:
        index = self._choose(table)
        self.surprisal += table.costs[index]
        return index

    def pick_new(self, table: Table, used) -> int:
        index = self._choose(table, used)
        self.surprisal += _cost_among_unused(table, index, used)
        return index


class World:
    """The facts that the documents are about, drawn once from `config.seed`, and the tables the writers choose from."""

    def __init__(self, config: WorldConfig | None = None):
        self.config = config = config or WorldConfig()
        self._random = random.Random(f"world {config.seed}").random
        self._taken = {word for word, _ in DICTIONARY_WORDS} | {name.lower() for name in words.GIRLS + words.BOYS}
        odds = [round(1e6 * share / length) for share, length in zip(config.shares, MEAN_CHARACTERS, strict=True)]
        self.domains = Table([""] * len(DOMAINS), odds)
        self._draw_geography()
        self._draw_dictionary()
        self._draw_characters()
        self._draw_functions()
        self.writers = (write_story, write_arithmetic, write_code, write_geography, write_dictionary)

    # Drawing facts.

    def _below(self, n: int) -> int:
        return int(self._random() * n)

    def _one_of(self, options):
        return options[self._below(len(options))]

    def _shuffled(self, items) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self._below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def _new_name(self, onsets, vowels, codas, syllables: tuple[int, int], endings=("",)) -> str:
        """A made-up lower-case word that nothing else in this world is called."""
        low, high = syllables
        while True:
            count = low + self._below(high - low + 1)
            name = "".join(self._one_of(onsets) + self._one_of(vowels) + self._one_of(codas) for _ in range(count))
            name += self._one_of(endings)
            if name not in self._taken and 3 < len(name) < 13:
                self._taken.add(name)
                return name

    def _mention_weights(self, n: int) -> list[int]:
        """Integer weights of n entries by rank; rounding keeps them equal on platforms whose `pow` differs in a last bit."""
        return [max(1, round(1e6 * (rank + 1) ** -self.config.fact_zipf)) for rank in range(n)]

    def _draw_geography(self):
        onsets, vowels, codas = (
            _split("b d f g h k l m n p r s t v w br dr gr kr st tr"),
            "aeiou",
            _split("l n r s t - - - -"),
        )
        endings = _split("by dal ford gard ham holm mar mere mouth nor stad ster ton vik wick")
        name = lambda syllables, ends=("",): self._new_name(onsets, vowels, codas, syllables, ends).title()  # noqa: E731
        self.country = name((2, 2), _split("ia or land"))
        n = self.config.n_towns
        towns = [name((1, 2), endings) for _ in range(n)]
        provinces = [name((2, 2), _split("ia en is")) for _ in range(max(3, min(24, n // 12)))]
        rivers = [name((1, 2), _split("e a o ")) for _ in range(max(4, min(96, n // 5)))]
        families = [name((1, 2), _split("sen ski man ber o er")) for _ in range(max(4, min(120, n // 4)))]
        products = self._shuffled(plural(noun) for noun in words.THINGS + words.FOODS if noun not in ("dice", "date"))
        circle = self._shuffled(range(n))
        successor = {town: circle[(i + 1) % n] for i, town in enumerate(circle)}
        self.towns = []
        for index, town in enumerate(towns):
            month = self._one_of(
                _split("January February March April May June July August September October November December")
            )
            self.towns.append({
                "town": town,
                "province": self._one_of(provinces),
                "river": self._one_of(rivers),
                "product": self._one_of(products),
                "next": towns[successor[index]],
                "next_index": successor[index],
                "distance": str(3 + self._below(95)),
                "founder": f"{self._one_of(words.GIRLS + words.BOYS)} {self._one_of(families)}",
                "year": str(1000 + self._below(900)),
                "landmark": f"{self._one_of(LANDMARK_ADJECTIVES)} {self._one_of(LANDMARKS)}",
                "festival": f"{self._one_of(words.FOODS)} festival",
                "month": month,
                "flag": article(f"{self._one_of(words.COLORS)} {self._one_of(words.ANIMALS)}"),
                "dish": f"{self._one_of(words.FOODS)} {self._one_of(_split('soup stew bread pie cheese salad jam porridge'))}",
                "mayor": f"{self._one_of(words.GIRLS + words.BOYS)} {self._one_of(families)}",
            })  # fmt: skip
        self.mentions = Table(towns, self._mention_weights(n))
        self._town_tables = {}
        self.geography_titles = Table([title.format(country=self.country) for title in GEOGRAPHY_TITLES])
        rows = lambda form: Table([form.format(**town) for town in self.towns], self._mention_weights(n))  # noqa: E731
        self.town_rows = [rows(" ; ".join(f"{{{column}}}" for column in columns)) for columns in GEOGRAPHY_COLUMNS]
        self.town_openings = [rows(form) for form in TOWN_OPENINGS]
        self.town_questions = [rows(form) for form in TOWN_QUESTIONS]

    def town_table(self, index: int) -> Table:
        """The sentences about one town; made when first needed."""
        if index not in self._town_tables:
            forms = [form for group in TOWN_SENTENCES for form in group]
            self._town_tables[index] = Table([form.format(**self.towns[index]) for form in forms])
        return self._town_tables[index]

    def _draw_dictionary(self):
        onsets, vowels, codas = (
            _split("b ch d f g h j k l m n p r s sh t th v y z"),
            "aeiou",
            _split("k l m n r s sh - - - - - - - - - - -"),
        )
        word = lambda syllables: self._new_name(onsets, vowels, codas, syllables)  # noqa: E731
        self.language = word((2, 2)).title() + "ish"
        classes = ("water", "fire", "stone", "bird", "wind", "root", "salt", "moon")
        suffixes = [word((1, 1))[:3] for _ in range(8)]
        chosen = sorted(self._shuffled(DICTIONARY_WORDS)[: self.config.n_words])
        adjectives = [english for english, part in chosen if part == "adj"]
        self.entries = []
        for english, part in chosen:
            foreign = word((2, 3))
            self.entries.append({
                "english": english, "part": part, "foreign": foreign, "class": self._one_of(classes),
                "form": foreign + self._one_of(suffixes), "form_name": {"n": "plural", "adj": "more", "v": "past"}[part],
            })  # fmt: skip
        by_english = {entry["english"]: entry for entry in self.entries}
        nouns = [entry for entry in self.entries if entry["part"] == "n"]
        for entry in self.entries:
            noun = entry if entry["part"] == "n" else self._one_of(nouns)
            adjective = entry if entry["part"] == "adj" else by_english[self._one_of(adjectives)]
            if entry["part"] == "v":
                entry["example"] = f"the {noun['english']} can {entry['english']}"
                entry["translated"] = f"{noun['foreign']} {entry['foreign']}"
            else:
                entry["example"] = f"the {adjective['english']} {noun['english']}"
                entry["translated"] = f"{noun['foreign']} {adjective['foreign']}"
        weights = self._mention_weights(len(self.entries))
        # Ranks are dealt at random: otherwise the words at the start of the alphabet would be the frequent ones.
        weights = self._shuffled(weights)
        self.and_word = word((1, 1))
        self.dictionary_titles = Table([title.format(language=self.language) for title in DICTIONARY_TITLES])
        self.dictionary_lines = [
            Table([form.format(**entry) for entry in self.entries], weights) for form in DICTIONARY_FORMS
        ]
        pick = lambda kind: [(e, w) for e, w in zip(self.entries, weights, strict=True) if e["part"] == kind]  # noqa: E731
        self.phrase_nouns, self.phrase_adjectives = pick("n"), pick("adj")
        self.noun_table = Table([e["english"] for e, _ in self.phrase_nouns], [w for _, w in self.phrase_nouns])
        self.adjective_table = Table(
            [e["english"] + " " for e, _ in self.phrase_adjectives], [w for _, w in self.phrase_adjectives]
        )

    def _draw_characters(self):
        girls, boys = self._shuffled(words.GIRLS), self._shuffled(words.BOYS)
        half = self.config.n_characters // 2
        names = [(name, "girl") for name in girls[:half]]
        names += [(name, "boy") for name in boys[: self.config.n_characters - len(names)]]
        names = self._shuffled(names)
        self.characters = []
        for index, (name, kind) in enumerate(names):
            base, _, ing = self._one_of(words.VERBS[: words.N_HOBBIES])
            facts = {
                "h": name, "kind": kind, "trait": self._one_of(words.TRAITS), "toy": self._one_of(words.THINGS),
                "color": self._one_of(words.COLORS), "food": self._one_of(words.FOODS), "home": self._one_of(words.HOMES),
                "pet": self._one_of(words.ANIMALS[:24]), "petname": self._one_of(words.PETS), "hobby": ing, "hobby0": base,
                "fear": self._one_of(words.FEARS), "job": self._one_of(words.JOBS),
                "town": self.towns[self._below(len(self.towns))]["town"],
                "friend_index": (index + 1 + self._below(len(names) - 1)) % len(names),
            }  # fmt: skip
            adult = self._below(2)
            facts["m"] = ("Mr. ", "Mrs. ")[adult] + self._one_of(words.SURNAMES)
            facts |= dict(zip(PRONOUNS, (HE, SHE)[kind == "girl"], strict=True))
            facts |= dict(zip((f"m.{key}" for key in PRONOUNS), (HE, SHE)[adult], strict=True))
            self.characters.append(facts)
        for character in self.characters:
            friend = self.characters[character["friend_index"]]
            character.update({"f": friend["h"]} | {f"f.{key}": friend[key] for key in CHARACTER_KEYS})
        weights = self._mention_weights(len(names))
        self.name_table = Table([name for name, _ in names], weights)
        self.hero_tables = [
            Table([render(compile_template(form), character) for character in self.characters], weights)
            for form in HERO_FORMS
        ]
        forms = [[compile_template(form) for form in group] for group in CHARACTER_FACTS]
        self.character_tables = [
            Table([render(form, character) for group in forms for form in group]) for character in self.characters
        ]
        self.tables = {
            "thing": words.THINGS, "find": words.FINDS, "animal": words.ANIMALS, "food": words.FOODS, "plant": words.STORY_PLANTS,
            "place": words.STORY_PLACES, "house": words.FURNITURE, "limb": words.LIMBS, "moved": words.MOVES,
            "job": words.JOBS, "color": words.COLORS,
            "quality": words.QUALITIES + words.STORY_QUALITIES, "good": words.GOOD_TRAITS, "beast": words.TRAITS, "glad": words.FEELINGS,
            "sad": words.SAD_FEELINGS, "adverb": words.ADVERBS, "weather": words.WEATHER, "weekday": words.WEEKDAYS,
            "material": words.MATERIALS, "game": words.GAMES, "sound": words.SOUNDS, "scenery": words.SCENERY,
            "chore": words.CHORES, "meal": words.MEALS, "exclamation": words.EXCLAMATIONS,
             "do": [verb[0] for verb in words.VERBS[: words.N_HOBBIES]],
            "did": [verb[1] for verb in words.VERBS[: words.N_HOBBIES]],
            "doing": [verb[2] for verb in words.VERBS[: words.N_HOBBIES]],
        }  # fmt: skip
        # Each as it is, with an article, with a capital article, and in the plural.
        self.tables = {
            key: tuple(Table(map(form, dict.fromkeys(texts))) for form in _FORMS) for key, texts in self.tables.items()
        }
        self.story = compile_template(STORY)

    def _draw_functions(self):
        verbs = _split("scale shift fold mix count pack trim join rank weigh score blend stack slice level pair")
        nouns = [thing for thing in words.THINGS if thing.isalpha()]
        self.functions, names = [], set()
        while len(self.functions) < self.config.n_functions:
            name = f"{self._one_of(verbs)}_{self._one_of(nouns)}"
            if name not in names:
                names.add(name)
                self.functions.append((name, *self._one_of(FUNCTION_FAMILIES)(self)))
        definitions = []
        for name, parameters, body, _, _ in self.functions:
            definitions.append(f"def {name}({parameters}):\n" + "".join(f"    {line}\n" for line in body.split("\n")))
        self.definitions = Table(definitions, self._mention_weights(len(definitions)))


def _split(text: str) -> list[str]:
    return ["" if part == "-" else part for part in text.split(" ")]


def render(program, variables) -> str:
    """The text of a template that makes no choices."""
    writer = Writer(None)
    run_template(program, writer, {}, dict(variables))
    return writer.text


# Templates. -----------------------------------------------------------------------------------------------------------


def compile_template(text: str):
    """Compile a template into a list of steps for `run_template`.

    The notation, in which any run of white space is one space and ¶ is a line break:
        {x}  {a x}  {A x}  {s x}     the variable x; with an indefinite article, a small or capital one; its plural
        {x=table}  {a x=table}       choose from a table of the world, write it, call it x; {x=table!y}: not what y was
        [one|two|3:three]            choose an alternative, here with odds 1, 1, 3
        [!flag 65]                   choose silently, with 65 %, whether the flag is set; [flag?if set|if not] looks at it
        <part>                       a part written by a Python function
    """
    text = re.sub(r"\s*\n\s*([|\]])", r"\1", text.strip())
    text = re.sub(r"([|\[?])\s*\n\s*", r"\1", text)
    text = re.sub(r" ?¶ ?", "\n", re.sub(r"\s+", " ", text))
    tokens = re.findall(r"\[!\w+ \d+\]|\[\w+\?|\[|\||\]|\{[^{}]+\}|<\w+>|[^\[\]{}|<>]+", text)
    program, end = _compile(tokens, 0)
    if end != len(tokens):
        raise ValueError(f"unbalanced brackets in template {text[:60]!r}")
    return program


def _compile(tokens: list[str], start: int):
    program, position = [], start
    while position < len(tokens) and tokens[position] not in ("|", "]"):
        token = tokens[position]
        position += 1
        if token.startswith("[!"):
            flag, percent = token[2:-1].split()
            program.append(("decide", Table(["", ""], [100 - int(percent), int(percent)]), flag))
        elif token[0] == "[":
            branches = []
            while tokens[position - 1] != "]":
                branch, position = _compile(tokens, position)
                branches.append(branch)
                position += 1
            program.append(("flag", token[1:-1], branches) if len(token) > 1 else _alternatives(branches))
        elif token[0] == "{":
            program.append(_slot(token[1:-1]))
        elif token[0] == "<":
            program.append(("call", token[1:-1]))
        else:
            program.append(("say", token))
    return program, position


def _alternatives(branches):
    weights = []
    for branch in branches:
        weight = re.match(r"\s*(\d+):", branch[0][1]) if branch and branch[0][0] == "say" else None
        weights.append(int(weight[1]) if weight else 1)
        if weight:
            branch[0] = ("say", branch[0][1][weight.end() :])
    # What an alternative begins with is written by the choice itself, so that a reader sees at once which one it was.
    heads = [branch.pop(0)[1] if branch and branch[0][0] == "say" else "" for branch in branches]
    return ("pick", Table(heads, weights), branches)


def _slot(text: str):
    form = {"a ": 1, "A ": 2, "s ": 3}.get(text[:2], 0)
    name = text[2:] if form else text
    if "=" in name:
        name, table = name.split("=")
        table, _, other = table.partition("!")
        return ("draw", name, table, form, other)
    if form:
        return ("form", name, form)
    return ("value", name)


def _capital_article(phrase: str) -> str:
    phrase = article(phrase)
    return phrase[0].upper() + phrase[1:]


_FORMS = (str, article, _capital_article, plural)


def run_template(program, chooser, tables, variables, parts=None) -> None:
    """Write a compiled template; `variables` is filled with what was chosen, `parts` holds the functions of <part>."""
    for step in program:
        kind = step[0]
        if kind == "say":
            chooser.say(step[1])
        elif kind == "value":
            chooser.say(variables[step[1]])
        elif kind == "pick":
            run_template(step[2][chooser.pick(step[1])], chooser, tables, variables, parts)
        elif kind == "draw":
            _, name, table, form, other = step
            plain = tables[table][0]
            drawn_from = tables[table][form]
            index = chooser.pick_new(drawn_from, (variables["#" + other],)) if other else chooser.pick(drawn_from)
            variables[name], variables["#" + name] = plain.texts[index], index
        elif kind == "form":
            chooser.say(_FORMS[step[2]](variables[step[1]]))
        elif kind == "flag":
            run_template(step[2][0 if variables[step[1]] else 1], chooser, tables, variables, parts)
        elif kind == "decide":
            variables[step[2]] = chooser.pick(step[1]) == 1
        else:
            parts[step[1]]()


# Stories. -------------------------------------------------------------------------------------------------------------

PRONOUNS = ("he", "He", "his", "His", "him")
HE, SHE = ("he", "He", "his", "His", "him"), ("she", "She", "her", "Her", "her")
CHARACTER_KEYS = (*PRONOUNS, "kind", "color", "toy", "food", "town", "pet", "petname", "hobby", "fear", "job")
_FACT_OF_CHARACTER_SENTENCE = [i for i, group in enumerate(CHARACTER_FACTS) for _ in group]
_HERO_FORMS = Table([""] * len(HERO_FORMS))
_MORE_FACTS = Table([" ", "\n"], [2, 3])


def write_story(chooser, world: World) -> None:
    """A short children's story about one of the world's characters."""
    variables = {}

    def hero():
        index = chooser.pick(world.hero_tables[chooser.pick(_HERO_FORMS)])
        variables.update(world.characters[index])
        variables["#hero"] = index

    def facts():
        table = world.character_tables[variables["#hero"]]
        used = []
        for n_told in range(1, 5):
            sentence = chooser.pick_new(table, used)
            fact = _FACT_OF_CHARACTER_SENTENCE[sentence]
            used += [i for i, other in enumerate(_FACT_OF_CHARACTER_SENTENCE) if other == fact]
            if n_told == 4:
                chooser.say("\n")
            elif n_told == 1:
                chooser.say(" ")
            elif chooser.pick(_MORE_FACTS) == 1:
                break

    def other():
        known = variables["#hero"], variables["friend_index"]
        newcomer = world.characters[chooser.pick_new(world.name_table, known)]
        variables.update({"n": newcomer["h"]} | {f"n.{key}": newcomer[key] for key in CHARACTER_KEYS})

    run_template(world.story, chooser, world.tables, variables, {"hero": hero, "facts": facts, "other": other})


# Geography. -----------------------------------------------------------------------------------------------------------

LANDMARK_ADJECTIVES = _split(
    "old white round tall leaning golden stone silent broken painted crooked red hanging hidden iron great"
)
LANDMARKS = _split(
    "tower bridge mill gate fountain market lighthouse clock garden wall library theater cave statue well"
)
LANDMARKS += _split("castle church harbor")
GEOGRAPHY_TITLES = (
    "A guide to {country}", "Towns of {country}", "A journey through {country}", "The road across {country}",
    "Tables of {country}", "The {country} almanac", "A quiz about {country}", "What do you know about {country}?",
)  # fmt: skip
TOWN_OPENINGS = ("{town} lies in the province of {province}.", "{town} is a town in {province}.")
TOWN_SENTENCES = (
    ("The river {river} flows through {town}.", "{town} stands on the river {river}."),
    ("{town} is known for its {product}.", "People in {town} make and sell {product}."),
    ("{town} was founded by {founder} in {year}.", "In {town} they remember {founder}, who founded it in {year}."),
    ("The sight of {town} is the {landmark}.", "Visitors of {town} go to see the {landmark}."),
    ("The {festival} of {town} is in {month}.", "Every {month}, {town} holds its {festival}."),
    ("The flag of {town} shows {flag}.", "On the flag of {town} there is {flag}."),
    ("In {town} they cook {dish}.", "The dish of {town} is {dish}."),
    ("The mayor of {town} is {mayor}.", "{town} has a mayor named {mayor}."),
    ("From {town} it is {distance} miles to {next}.", "The next town after {town} is {next}, {distance} miles away."),
)  # fmt: skip
TOWN_QUESTIONS = (
    "Where is {town}? In {province}.",
    "Which river flows through {town}? The {river}.",
    "What does {town} sell? It sells {product}.",
    "Who founded {town}? It was {founder}.",
    "When was {town} founded? In {year}.",
    "What can you see in {town}? The {landmark}.",
    "What is held in {town} in {month}? The {festival}.",
    "What is on the flag of {town}? It shows {flag}.",
    "What do they cook in {town}? They cook {dish}.",
    "Who is the mayor of {town}? It is {mayor}.",
    "Which town comes after {town}? It is {next}.",
)
GEOGRAPHY_COLUMNS = (
    ("town", "province", "river", "year"),
    ("town", "product", "dish", "landmark"),
    ("town", "founder", "year", "flag"),
    ("town", "mayor", "month", "festival"),
)
_GEOGRAPHY_HEADERS = Table([": " + ", ".join(columns) + "\n" for columns in GEOGRAPHY_COLUMNS])
_FACT_OF_SENTENCE = [i for i, group in enumerate(TOWN_SENTENCES) for _ in group]
_RIVER_SENTENCES = [i for i, fact in enumerate(_FACT_OF_SENTENCE) if fact == 0]
_MORE_SENTENCES = Table(["", ""], [4, 1])
_END = Table(["\n", ""], [5, 1])
_OPENING_FORMS = Table([""] * len(TOWN_OPENINGS))
_QUESTION_FORMS = Table([""] * len(TOWN_QUESTIONS))


def write_geography(chooser, world: World) -> None:
    """A guide, a journey, a table or a quiz about towns of the invented country."""
    style = chooser.pick(world.geography_titles) // 2
    (_write_guide, _write_journey, _write_table, _write_quiz)[style](chooser, world)


def _write_town(chooser, world: World, index: int, told=()) -> None:
    """Write four to eight sentences about a town, none of them among `told`."""
    table, used = world.town_table(index), list(told)
    for n_told in range(1, 9):
        chooser.say(" ")
        sentence = chooser.pick_new(table, used)
        used += [i for i, fact in enumerate(_FACT_OF_SENTENCE) if fact == _FACT_OF_SENTENCE[sentence]]
        if n_told >= 4 and (n_told == 8 or chooser.pick(_MORE_SENTENCES) == 1):
            break


def _write_guide(chooser, world: World) -> None:
    chooser.say(".")
    used = []
    for _ in range(3):
        chooser.say("\n")
        used.append(chooser.pick_new(world.town_openings[chooser.pick(_OPENING_FORMS)], used))
        _write_town(chooser, world, used[-1])


def _write_journey(chooser, world: World) -> None:
    chooser.say(". We start in ")
    index = chooser.pick(world.mentions)
    chooser.say(".")
    for _ in range(3):
        town = world.towns[index]
        chooser.say(f"\n{town['town']} lies in {town['province']} on the river {town['river']}.")
        _write_town(chooser, world, index, _RIVER_SENTENCES)
        index = town["next_index"]


def _write_table(chooser, world: World) -> None:
    table, used = world.town_rows[chooser.pick(_GEOGRAPHY_HEADERS)], []
    _write_lines(chooser, 10, 16, lambda: used.append(chooser.pick_new(table, used)))


def _write_quiz(chooser, world: World) -> None:
    chooser.say("\n")
    _write_lines(chooser, 10, 16, lambda: chooser.pick(world.town_questions[chooser.pick(_QUESTION_FORMS)]))


def _write_lines(chooser, at_least: int, at_most: int, line) -> None:
    """Call `line` between at_least and at_most times, a line break between any two calls."""
    for n_written in range(1, at_most + 1):
        line()
        if n_written == at_most:
            return
        if n_written < at_least:
            chooser.say("\n")
        elif chooser.pick(_END) == 1:
            return


# Dictionary. ----------------------------------------------------------------------------------------------------------

DICTIONARY_TITLES = (
    "English - {language}", "{language} - English", "A {language} dictionary", "{language} grammar",
    "{language} phrases", "Translate into {language}",
)  # fmt: skip
DICTIONARY_FORMS = (
    "{english} : {foreign}",
    "{foreign} = {english}",
    "{english} ({part}) : {foreign}, {form_name} {form}, class of {class}. {example} : {translated}",
    "{foreign}, {form_name} {form}, class of {class}",
)
_NEXT_LINE = Table(["\n", "\n\n"], [4, 1])
_NEXT_LINE_OR_END = Table(["\n", "\n\n", ""], [4, 1, 1])
_WITH_ADJECTIVE = Table(["", ""], [1, 2])
_PHRASE_JOINS = Table(["", " and "], [2, 1])


def write_dictionary(chooser, world: World) -> None:
    """A page of the dictionary, a word list, grammar notes, or phrases translated word by word."""
    style = chooser.pick(world.dictionary_titles)
    chooser.say("\n")
    if style < 4:
        _write_pages(chooser, world.dictionary_lines[style], (24, 24, 7, 14)[style])
    else:
        _write_lines(chooser, 12, 20, lambda: _write_phrase(chooser, world, " : " if style == 4 else "? "))


def _write_pages(chooser, table: Table, at_least: int) -> None:
    """Runs of neighbouring entries, in alphabetical order: the first entry of a run is chosen, the others follow."""
    index = chooser.pick(table)
    for n_written in range(1, 2 * at_least):
        end = chooser.pick(_NEXT_LINE if n_written < at_least else _NEXT_LINE_OR_END)
        if end == 2:
            break
        if end == 1:
            index = chooser.pick(table)
        else:
            index = (index + 1) % len(table.texts)
            chooser.say(table.texts[index])


def _write_phrase(chooser, world: World, separator: str) -> None:
    translation = _write_noun_phrase(chooser, world)
    if chooser.pick(_PHRASE_JOINS) == 1:
        translation += f" {world.and_word} " + _write_noun_phrase(chooser, world)
    chooser.say(separator + translation)


def _write_noun_phrase(chooser, world: World) -> str:
    """Write "the red lantern"; returns its translation, in which the adjective comes last."""
    chooser.say("the ")
    adjective = ""
    if chooser.pick(_WITH_ADJECTIVE) == 1:
        adjective = " " + world.phrase_adjectives[chooser.pick(world.adjective_table)][0]["foreign"]
    return world.phrase_nouns[chooser.pick(world.noun_table)][0]["foreign"] + adjective


# Arithmetic. ----------------------------------------------------------------------------------------------------------

_NUMBERS = {
    (low, high): Table(map(str, range(low, high + 1))) for low, high in ((2, 9), (2, 12), (1, 20), (2, 99), (10, 99))
}
_SIGNS = Table([" + ", " - ", " * "], [3, 3, 2])
_TASKS = Table([
    "", "Sort ", "Continue ", "Twice ", "Half of ", "The larger of ", "Divide ", "",
], [8, 3, 3, 1, 1, 2, 2, 4])  # fmt: skip
_MORE_NUMBERS = Table([", ", ": "], [3, 1])
_WORD_PROBLEMS = Table([" has ", " finds ", " buys "])
_STEPS = Table([" gets ", " gives away ", " packs them in bags of "])


def write_arithmetic(chooser, world: World) -> None:
    """Sums, products, sorted lists, sequences, divisions and word problems, with their answers."""
    _write_lines(chooser, 12, 20, lambda: _TASK_WRITERS[chooser.pick(_TASKS)](chooser, world))


def _number(chooser, low: int, high: int) -> int:
    return low + chooser.pick(_NUMBERS[low, high])


def _write_sum(chooser, world):
    a = _number(chooser, 2, 99)
    sign = chooser.pick(_SIGNS)
    b = _number(chooser, 2, 99) if sign < 2 else _number(chooser, 2, 12)
    chooser.say(f" = {(a + b, a - b, a * b)[sign]}")


def _write_sorting(chooser, world):
    numbers = [_number(chooser, 2, 99)]
    while True:
        chooser.say(", ")
        numbers.append(_number(chooser, 2, 99))
        if len(numbers) >= 3 and (len(numbers) == 6 or chooser.pick(_SORT_ENDS) == 1):
            break
    chooser.say(": " + ", ".join(map(str, sorted(numbers))))


_SORT_ENDS = Table(["", ""], [2, 1])


def _write_sequence(chooser, world):
    start = _number(chooser, 1, 20)
    chooser.say(", ")
    difference = _number(chooser, 1, 20) - start
    terms = [str(start + difference * i) for i in range(2, 7)]
    chooser.say(f", {terms[0]}, {terms[1]}: {', '.join(terms[2:])}")


def _write_twice(chooser, world):
    a = _number(chooser, 2, 99)
    chooser.say(f" is {2 * a}")


def _write_half(chooser, world):
    half = chooser.pick(_EVEN_NUMBERS) + 1
    chooser.say(f" is {half}")


_EVEN_NUMBERS = Table(str(2 * half) for half in range(1, 100))


def _write_larger(chooser, world):
    a = _number(chooser, 2, 99)
    chooser.say(" and ")
    b = _number(chooser, 2, 99)
    chooser.say(f" is {max(a, b)}")


def _write_division(chooser, world):
    a = _number(chooser, 10, 99)
    chooser.say(" by ")
    b = _number(chooser, 2, 9)
    chooser.say(f": {a // b} remainder {a % b}")


def _write_word_problem(chooser, world):
    name = world.characters[chooser.pick(world.name_table)]["h"]
    chooser.pick(_WORD_PROBLEMS)
    n = _number(chooser, 10, 99)
    chooser.say(" ")
    chooser.pick(_COUNTABLES)
    chooser.say(f". {name}")
    step = chooser.pick(_STEPS)
    if step == 0:
        m = _number(chooser, 2, 99)
        chooser.say(f" more. Now there are {n + m}.")
    elif step == 1:
        m = 1 + chooser.pick(_UP_TO[n - 1])
        chooser.say(f". Now there are {n - m}.")
    else:
        m = _number(chooser, 2, 9)
        chooser.say(f". That makes {n // m} full bags and {n % m} left over.")


_COUNTABLES = Table(plural(food) for food in words.FOODS)
_UP_TO = {n: Table(map(str, range(1, n + 1))) for n in range(1, 100)}
_TASK_WRITERS = (
    _write_sum, _write_sorting, _write_sequence, _write_twice, _write_half, _write_larger, _write_division,
    _write_word_problem,
)  # fmt: skip


# Code. ----------------------------------------------------------------------------------------------------------------

# A function of the library: parameters, body, what it computes, and which arguments its calls have ("n", "nn", "l", "s").


def _linear(world):
    a, b, x = 2 + world._below(18), 1 + world._below(40), world._one_of(_split("x n k value count amount"))
    if world._below(2):
        return x, f"return {a} * {x} + {b}", lambda n: a * n + b, "n"
    return x, f"return {b} - {a} * {x}", lambda n: b - a * n, "n"


def _two_arguments(world):
    a, b = 2 + world._below(9), 2 + world._below(9)
    x, y = world._one_of((("x", "y"), ("a", "b"), ("left", "right"), ("width", "height")))
    return f"{x}, {y}", f"return {a} * {x} + {b} * {y}", lambda n, m: a * n + b * m, "nn"


def _branch(world):
    limit, a, b, x = (
        3 + world._below(15),
        1 + world._below(30),
        2 + world._below(8),
        world._one_of(_split("x n size level")),
    )
    body = f"if {x} > {limit}:\n    return {x} - {a}\nreturn {b} * {x}"
    return x, body, lambda n: n - a if n > limit else b * n, "n"


def _loop(world):
    times, a, b = 2 + world._below(4), 1 + world._below(9), world._below(5)
    x, total = world._one_of(_split("x n start")), world._one_of(_split("total result out"))
    body = f"{total} = {x}\nfor i in range({times}):\n    {total} = {total} + {a} * i + {b}\nreturn {total}"
    return x, body, lambda n: n + sum(a * i + b for i in range(times)), "n"


def _remainder(world):
    a, b, x = 2 + world._below(9), 5 + world._below(30), world._one_of(_split("x n number key"))
    return x, f"return ({a} * {x}) % {b}", lambda n: a * n % b, "n"


def _map_list(world):
    a, b, xs = 2 + world._below(9), world._below(20), world._one_of(_split("xs values items numbers"))
    return xs, f"return [{a} * x + {b} for x in {xs}]", lambda ns: [a * n + b for n in ns], "l"


def _filter_list(world):
    a, b, xs = 5 + world._below(10), 1 + world._below(20), world._one_of(_split("xs values items numbers"))
    return xs, f"return [x + {b} for x in {xs} if x < {a}]", lambda ns: [n + b for n in ns if n < a], "l"


def _sum_list(world):
    a, b, xs = 2 + world._below(9), world._below(30), world._one_of(_split("xs values items numbers"))
    return xs, f"return {a} * sum({xs}) + {b}", lambda ns: a * sum(ns) + b, "l"


def _string(world):
    text, s = world._one_of(words.COLORS), world._one_of(_split("s word text name"))
    if world._below(2):
        return s, f'return {s} + "_{text}"', lambda w: w + "_" + text, "s"
    return s, f'return "{text} " + {s}[::-1]', lambda w: text + " " + w[::-1], "s"


FUNCTION_FAMILIES = (
    _linear, _two_arguments, _branch, _loop, _remainder, _map_list, _filter_list, _sum_list, _string,
)  # fmt: skip
_WORD_ARGUMENTS = Table(f'"{word}"' for word in words.ANIMALS if word.isalpha())
_NEXT_CALL = Table(["\nprint(", "\n\n"], [3, 2])
_NEXT_CALL_OR_END = Table(["\nprint(", "\n\n", ""], [3, 1, 1])
_NEXT_FUNCTION_OR_END = Table(["\n\n", ""])
_MORE_ITEMS = Table(["]", ", "])


def write_code(chooser, world: World) -> None:
    """Three to six functions of the world's library, each with one to three calls and what these print."""
    used = []
    for n_functions in range(1, 7):
        used.append(chooser.pick_new(world.definitions, used))
        chooser.say("\nprint(")
        for n_calls in range(1, 4):
            _write_call(chooser, world.functions[used[-1]])
            if n_calls < 3:
                following = chooser.pick(_NEXT_CALL if n_functions < 3 else _NEXT_CALL_OR_END)
                if following == 0:
                    continue
            elif n_functions < 3:
                following = 1
                chooser.say("\n\n")
            else:
                following = 1 + chooser.pick(_NEXT_FUNCTION_OR_END)
            break
        if following == 2:
            return


def _write_call(chooser, function) -> None:
    name, _, _, compute, kind = function
    chooser.say(name + "(")
    if kind == "s":
        argument = chooser.pick(_WORD_ARGUMENTS)
        result = compute(_WORD_ARGUMENTS.texts[argument][1:-1])
    elif kind == "l":
        chooser.say("[")
        numbers = [_number(chooser, 1, 20)]
        while len(numbers) < 5 and chooser.pick(_MORE_ITEMS) == 1:
            numbers.append(_number(chooser, 1, 20))
        if len(numbers) == 5:
            chooser.say("]")
        result = compute(numbers)
    else:
        n = _number(chooser, 1, 20)
        if kind == "nn":
            chooser.say(", ")
            result = compute(n, _number(chooser, 1, 20))
        else:
            result = compute(n)
    chooser.say(f"))  # {result}")


# Documents. -----------------------------------------------------------------------------------------------------------


def _write_document(chooser, world: World) -> str:
    """Write one document; returns its domain."""
    domain = chooser.pick(world.domains)
    world.writers[domain](chooser, world)
    return DOMAINS[domain]


def derivations(text: str, world: World) -> list[tuple[str, float]]:
    """Every way in which the generator can write `text`: a list of (domain, surprisal in nats); exactly one if it is genuine."""
    found, scripts = [], [[]]
    while scripts:
        reader = _Reader(text, scripts.pop())
        try:
            domain = _write_document(reader, world)
            if reader.position == len(text):
                found.append((domain, reader.surprisal))
        except _Mismatch:
            pass
        scripts += reader.alternatives
    return found


# Cosmopedia's own values (the misspelt ones too), with odds per domain.
_METADATA = {
    "stories": (
        {"young_children": 60, "general": 30, "grade_school_students": 10},
        {"story_children": 30, "story_reddit": 25, "story_life_lessons": 24, "story_morality": 11, "story_forums": 10},
        {"ultrachat": 55, "openhermes2.5": 45},
    ),
    "arithmetic": (
        {"college_students": 40, "grade_school_students": 30, "high_school_studnets": 15, "middle_school_students": 10,
         "college_studnets": 5},
        {"educational_piece": 60, "textbook_academic_tone": 35, "textbook_academic": 5},
        {"auto_math_text": 80, "khanacademy": 12, "openstax": 8},
    ),
    "code": (
        {"general": 45, "college_students": 50, "researchers": 5},
        {"blogpost": 40, "textbook_academic_tone": 30, "wikihow": 25, "scientific_article": 5},
        {"web_samples_v2": 60, "stanford": 25, "wikihow_original": 15},
    ),
    "geography": (
        {"general": 70, "college_students": 28, "researchers": 2},
        {"blogpost": 60, "textbook_academic_tone": 30, "textbook_narrative_tone": 10},
        {"web_samples_v1": 55, "web_samples_v2": 45},
    ),
    "dictionary": (
        {"general": 60, "college_students": 35, "researchers": 5},
        {"textbook_academic_tone": 50, "blogpost": 40, "textbook_narrative": 7, "e-learning_module": 3},
        {"web_samples_v1": 60, "web_samples_v2": 35, "stanford": 5},
    ),
}  # fmt: skip
_METADATA_TABLES = {
    domain: tuple(Table(odds.keys(), odds.values()) for odds in columns) for domain, columns in _METADATA.items()
}


def generate(documents: int, seed: int = 0, world: "World | WorldConfig | None" = None) -> Iterator[dict]:
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
    seen, written, repeats = set(), 0, 0
    while written < documents:
        writer = Writer(choose_text)
        domain = _write_document(writer, world)
        text = writer.text
        if text in seen:
            repeats += 1
            if repeats > 100 + 10 * documents:
                raise ValueError(f"{world.config} has fewer than {documents} different documents; ask for fewer")
            continue
        seen.add(text)
        written += 1
        metadata = Writer(choose_metadata)
        audience, form, seed_data = (table.texts[metadata.pick(table)] for table in _METADATA_TABLES[domain])
        yield {
            "text": text, "domain": domain, "surprisal": writer.surprisal,
            "audience": audience, "format": form, "seed_data": seed_data,
        }  # fmt: skip
