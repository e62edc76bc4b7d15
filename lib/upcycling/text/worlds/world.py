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

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import words
from .grammar import (
    TEMPLATE_FORMS,
    Table,
    Writer,
    _Mismatch,
    _Reader,
    _split,
    compile_template,
    render,
    run_template,
    siblings,
)
from .stories import CHARACTER_FACTS, HERO_FORMS, STORY
from .words import article, plural

DOMAINS = ("stories", "arithmetic", "code", "geography", "dictionary")
MEAN_TOKENS = (299, 205, 211, 266, 279)  # of a document of each domain (2,048-token BPE): from shares to odds


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


class World:
    """The facts that the documents are about, drawn once from `config.seed`, and the tables the writers choose from."""

    def __init__(self, config: WorldConfig | None = None):
        self.config = config or WorldConfig()
        self._taken = {word for word, _ in DICTIONARY_WORDS} | {name.lower() for name in words.GIRLS + words.BOYS}
        odds = [round(1e6 * share / tokens) for share, tokens in zip(self.config.shares, MEAN_TOKENS, strict=True)]
        self.domains = Table([""] * len(DOMAINS), odds)
        for draw in (self._draw_geography, self._draw_dictionary, self._draw_characters, self._draw_functions):
            # A generator of its own for each part: more towns do not change the dictionary.
            self._random = random.Random(f"world {self.config.seed} {draw.__name__}").random
            draw()

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

    def _new_name(self, sounds, syllables: tuple[int, int], endings=("",)) -> str:
        """A made-up lower-case word that nothing else in this world is called."""
        low, high = syllables
        while True:
            count = low + self._below(high - low + 1)
            name = "".join(self._one_of(sound) for _ in range(count) for sound in sounds) + self._one_of(endings)
            if name not in self._taken and 3 < len(name) < 13:
                self._taken.add(name)
                return name

    def _mention_weights(self, n: int) -> list[int]:
        """Integer weights of n entries by rank; rounded, so that they are equal where `pow` differs in a last bit."""
        return [max(1, round(1e6 * (rank + 1) ** -self.config.fact_zipf)) for rank in range(n)]

    def _draw_geography(self):
        n = self.config.n_towns
        self.country = self._new_name(PLACE_SOUNDS, (2, 2), ("ia", "or", "land")).title()
        towns = [self._new_name(PLACE_SOUNDS, (1, 2), TOWN_ENDINGS).title() for _ in range(n)]

        def names(count, syllables, endings):
            return [self._new_name(PLACE_SOUNDS, syllables, endings).title() for _ in range(count)]

        provinces = names(max(3, min(24, n // 12)), (2, 2), ("ia", "en", "is"))
        rivers = names(max(4, min(96, n // 5)), (1, 2), ("e", "a", "o", ""))
        families = names(max(4, min(120, n // 4)), (1, 2), ("sen", "ski", "man", "ber", "o", "er"))
        products = [plural(noun) for noun in words.THINGS + words.FOODS]
        circle = self._shuffled(range(n))
        successor = {town: circle[(i + 1) % n] for i, town in enumerate(circle)}
        self.towns = [
            {
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
                "month": self._one_of(MONTHS),
                "flag": article(f"{self._one_of(words.COLORS)} {self._one_of(words.ANIMALS)}"),
                "dish": f"{self._one_of(words.FOODS)} {self._one_of(DISHES)}",
                "mayor": f"{self._one_of(words.GIRLS + words.BOYS)} {self._one_of(families)}",
            }
            for index, town in enumerate(towns)
        ]
        weights = self._mention_weights(n)

        def one_line_each(form):
            return Table([form.format(**town) for town in self.towns], weights)

        self.geography_titles = Table([title.format(country=self.country) for title in GEOGRAPHY_TITLES])
        self.town_names = one_line_each("{town}")
        self.town_openings = [one_line_each(form) for form in TOWN_OPENINGS]
        self.town_questions = [one_line_each(form) for form in TOWN_QUESTIONS]
        self.town_rows = [
            one_line_each(" ; ".join(f"{{{column}}}" for column in columns)) for columns in GEOGRAPHY_COLUMNS
        ]
        self._town_sentences = {}

    def town_sentences(self, index: int) -> Table:
        """The sentences about one town; made when first needed."""
        if index not in self._town_sentences:
            forms = [form for group in TOWN_SENTENCES for form in group]
            self._town_sentences[index] = Table([form.format(**self.towns[index]) for form in forms])
        return self._town_sentences[index]

    def _draw_dictionary(self):
        self.language = self._new_name(LANGUAGE_SOUNDS, (2, 2)).title() + "ish"
        self.and_word = self._new_name(LANGUAGE_SOUNDS, (1, 1))
        suffixes = [self._new_name(LANGUAGE_SOUNDS, (1, 1))[:3] for _ in range(8)]
        chosen = sorted(self._shuffled(DICTIONARY_WORDS)[: self.config.n_words])
        entries = []
        for english, part in chosen:
            foreign = self._new_name(LANGUAGE_SOUNDS, (2, 3))
            entries.append({
                "english": english, "part": part, "foreign": foreign, "class": self._one_of(WORD_CLASSES),
                "form": foreign + self._one_of(suffixes), "form_name": FORM_NAMES[part],
            })  # fmt: skip
        nouns = [entry for entry in entries if entry["part"] == "n"]
        adjectives = [entry for entry in entries if entry["part"] == "adj"]
        for entry in entries:
            noun = entry if entry["part"] == "n" else self._one_of(nouns)
            if entry["part"] == "v":
                entry["example"] = f"the {noun['english']} can {entry['english']}"
                entry["translated"] = f"{noun['foreign']} {entry['foreign']}"
            else:
                adjective = entry if entry["part"] == "adj" else self._one_of(adjectives)
                entry["example"] = f"the {adjective['english']} {noun['english']}"
                entry["translated"] = f"{noun['foreign']} {adjective['foreign']}"
        # Ranks are dealt at random: otherwise the frequent words would be those at the start of the alphabet.
        weights = self._shuffled(self._mention_weights(len(entries)))
        self.dictionary_titles = Table([title.format(language=self.language) for title in DICTIONARY_TITLES])
        self.dictionary_lines = [
            Table([form.format(**entry) for entry in entries], weights) for form in DICTIONARY_FORMS
        ]

        def english_and_foreign(part, form):
            rows = [(entry, weight) for entry, weight in zip(entries, weights, strict=True) if entry["part"] == part]
            table = Table([form.format(entry["english"]) for entry, _ in rows], [weight for _, weight in rows])
            return table, [entry["foreign"] for entry, _ in rows]

        self.nouns, self.adjectives = english_and_foreign("n", "{}"), english_and_foreign("adj", "{} ")

    def _draw_characters(self):
        n = self.config.n_characters
        girls, boys = self._shuffled(words.GIRLS)[: n // 2], self._shuffled(words.BOYS)[: n - n // 2]
        names = self._shuffled([(name, "girl") for name in girls] + [(name, "boy") for name in boys])
        hobbies = words.VERBS[: words.N_HOBBIES]
        self.characters = []
        for index, (name, kind) in enumerate(names):
            adult = self._one_of(("Mr.", "Mrs."))
            self.characters.append({
                "h": name, "kind": kind, "trait": self._one_of(words.TRAITS), "toy": self._one_of(words.THINGS),
                "color": self._one_of(words.COLORS), "food": self._one_of(words.FOODS),
                "home": self._one_of(words.HOMES), "town": self._one_of(self.towns)["town"],
                "pet": self._one_of(words.ANIMALS[:24]), "petname": self._one_of(words.PETS),
                "hobby": self._one_of(hobbies)[2], "fear": self._one_of(words.FEARS), "job": self._one_of(words.JOBS),
                "m": f"{adult} {self._one_of(words.SURNAMES)}",
                "friend_index": (index + 1 + self._below(n - 1)) % n,
                **PRONOUNS[kind], **{f"m.{key}": pronoun for key, pronoun in PRONOUNS[adult].items()},
            })  # fmt: skip
        for character in self.characters:
            friend = self.characters[character["friend_index"]]
            character |= {"f": friend["h"]} | {f"f.{key}": friend[key] for key in OTHERS_KEYS}
        weights = self._mention_weights(n)

        def one_line_each(form):
            program = compile_template(form)
            return Table([render(program, character) for character in self.characters], weights)

        self.names = one_line_each("{h}")
        self.heroes = [one_line_each(form) for form in HERO_FORMS]
        facts = [compile_template(form) for group in CHARACTER_FACTS for form in group]
        self.character_facts = [Table([render(form, character) for form in facts]) for character in self.characters]
        lists = {
            "thing": words.THINGS, "find": words.FINDS, "animal": words.ANIMALS, "food": words.FOODS,
            "meal": words.MEALS, "plant": words.STORY_PLANTS, "place": words.STORY_PLACES, "house": words.FURNITURE,
            "limb": words.LIMBS, "job": words.JOBS, "color": words.COLORS, "material": words.MATERIALS,
            "quality": words.QUALITIES + words.STORY_QUALITIES, "good": words.GOOD_TRAITS, "beast": words.TRAITS,
            "glad": words.FEELINGS, "sad": words.SAD_FEELINGS, "adverb": words.ADVERBS, "weather": words.WEATHER,
            "weekday": words.WEEKDAYS, "game": words.GAMES, "sound": words.SOUNDS, "scenery": words.SCENERY,
            "chore": words.CHORES, "exclamation": words.EXCLAMATIONS, "moved": words.MOVES,
            "do": [base for base, _, _ in hobbies], "doing": [ing for _, _, ing in hobbies],
        }  # fmt: skip
        # Each in the forms that a template can ask for: as it is, with an article, and so on.
        self.tables = {
            key: [Table(map(form, dict.fromkeys(texts))) for form in TEMPLATE_FORMS.values()]
            for key, texts in lists.items()
        }
        self.story = compile_template(STORY)

    def _draw_functions(self):
        names = [f"{verb}_{thing}" for verb in FUNCTION_VERBS for thing in words.THINGS if thing.isalpha()]
        names = self._shuffled(names)[: self.config.n_functions]
        self.functions = [(name, *self._one_of(FUNCTION_FAMILIES)(self)) for name in names]
        definitions = []
        for name, parameters, body, _, _ in self.functions:
            definitions.append(f"def {name}({parameters}):\n" + "".join(f"    {line}\n" for line in body.split("\n")))
        self.definitions = Table(definitions, self._mention_weights(len(definitions)))


# Stories. -------------------------------------------------------------------------------------------------------------

_HE = {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"}
_SHE = {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"}
PRONOUNS = {"boy": _HE, "Mr.": _HE, "girl": _SHE, "Mrs.": _SHE}
OTHERS_KEYS = (*_HE, "kind", "color", "toy", "food", "town", "pet", "petname", "hobby", "fear", "job")
_SIBLINGS = siblings(CHARACTER_FACTS)
_HERO_FORMS = Table([""] * len(HERO_FORMS))
_MORE_FACTS = Table([" ", "\n"], [2, 3])


def write_story(chooser, world: World) -> None:
    """A short children's story about one of the world's characters."""
    variables = {}

    def hero():
        index = chooser.pick(world.heroes[chooser.pick(_HERO_FORMS)])
        variables.update(world.characters[index])
        variables["#hero"] = index

    def facts():
        used = []
        for n_told in range(1, 5):
            used += _SIBLINGS[chooser.pick_new(world.character_facts[variables["#hero"]], used)]
            if n_told == 1:
                chooser.say(" ")
            elif n_told == 4:
                chooser.say("\n")
            elif chooser.pick(_MORE_FACTS) == 1:
                break

    def other():
        known = variables["#hero"], variables["friend_index"]
        newcomer = world.characters[chooser.pick_new(world.names, known)]
        variables.update({"n": newcomer["h"]} | {f"n.{key}": newcomer[key] for key in OTHERS_KEYS})

    run_template(world.story, chooser, world.tables, variables, {"hero": hero, "facts": facts, "other": other})


# Geography. -----------------------------------------------------------------------------------------------------------

PLACE_SOUNDS = (_split("b d f g h k l m n p r s t v w br dr gr kr st tr"), "aeiou", _split("l n r s t - - - -"))
TOWN_ENDINGS = _split("by dal ford gard ham holm mar mere mouth nor stad ster ton vik wick")
MONTHS = _split("January February March April May June July August September October November December")
DISHES = _split("soup stew bread pie cheese salad jam porridge")
LANDMARK_ADJECTIVES = _split(
    "old white round tall leaning golden stone silent broken painted crooked red hanging hidden iron great"
)
LANDMARKS = _split(
    "tower bridge mill gate fountain market lighthouse clock garden wall library theater cave statue well castle church"
)
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
_SAME_FACT = siblings(TOWN_SENTENCES)
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
    used = list(told)
    for n_told in range(1, 9):
        chooser.say(" ")
        used += _SAME_FACT[chooser.pick_new(world.town_sentences(index), used)]
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
    index = chooser.pick(world.town_names)
    chooser.say(".")
    for _ in range(3):
        chooser.say("\n{town} lies in {province} on the river {river}.".format(**world.towns[index]))
        _write_town(chooser, world, index, told=_SAME_FACT[0])
        index = world.towns[index]["next_index"]


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

LANGUAGE_SOUNDS = (
    _split("b ch d f g h j k l m n p r s sh t th v y z"), "aeiou", _split("k l m n r s sh - - - - - - - - - - -"),
)  # fmt: skip
WORD_CLASSES = _split("water fire stone bird wind root salt moon")
FORM_NAMES = {"n": "plural", "adj": "more", "v": "past"}
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
        table, foreign = world.adjectives
        adjective = " " + foreign[chooser.pick(table)]
    table, foreign = world.nouns
    return foreign[chooser.pick(table)] + adjective


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
    name = world.characters[chooser.pick(world.names)]["h"]
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

# A function of the library: its parameters, its body, what it computes, and the kind of its arguments: "n" and "nn" one
# or two numbers, "l" a list, "s" a word.


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
    limit, a, b = 3 + world._below(15), 1 + world._below(30), 2 + world._below(8)
    x = world._one_of(_split("x n size level"))
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


FUNCTION_VERBS = _split("scale shift fold mix count pack trim join rank weigh score blend stack slice level pair")
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


_WRITERS = (write_story, write_arithmetic, write_code, write_geography, write_dictionary)


def _write_document(chooser, world: World) -> str:
    """Write one document; returns its domain."""
    domain = chooser.pick(world.domains)
    _WRITERS[domain](chooser, world)
    return DOMAINS[domain]


def derivations(text: str, world: World) -> list[tuple[str, float]]:
    """Every way to generate `text`, as pairs (domain, surprisal in nats): exactly one for a genuine text, else none."""
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
    seen, written, repeats = set(), 0, 0  # 16 bytes a document, so that a large corpus needs little memory
    while written < documents:
        writer = Writer(choose_text)
        domain = _write_document(writer, world)
        text = writer.text
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            repeats += 1
            if repeats > 100 + 10 * documents:
                raise ValueError(f"{world.config} has fewer than {documents} different documents; ask for fewer")
            continue
        seen.add(digest)
        written += 1
        metadata = Writer(choose_metadata)
        audience, form, seed_data = (table.texts[metadata.pick(table)] for table in _METADATA_TABLES[domain])
        yield {
            "text": text, "domain": domain, "surprisal": writer.surprisal,
            "audience": audience, "format": form, "seed_data": seed_data,
        }  # fmt: skip
