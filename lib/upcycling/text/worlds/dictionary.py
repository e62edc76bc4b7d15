"""The dictionary of an invented language, word lists, grammar notes and phrases; line forms in data/dictionary.json."""

from .draw import Draw
from .grammar import Choices, write_lines
from .words import HOBBIES, VERBS, WORDS, read_json, split

_DATA = read_json("dictionary.json")
_LINES = list(zip(_DATA["lines"], (24, 24, 7, 14), strict=True))  # a line's form, and at least how many of them
_NEXT_LINE = Choices(["\n", "\n\n"], [4, 1])
_NEXT_LINE_OR_END = Choices(["\n", "\n\n", ""], [4, 1, 1])
_WITH_ADJECTIVE = Choices(["", ""], [1, 2])
_PHRASE_JOINS = Choices(["", " and "], [2, 1])


def _entries() -> tuple[tuple[str, str], ...]:
    """Every English word that can be in the dictionary, with its part of speech, each word once."""
    base_forms = {name: tuple(base for base, _, _ in verbs) for name, verbs in (("hobby", HOBBIES), ("verb", VERBS))}
    lists, parts = WORDS | base_forms, {}
    for part, names in _DATA["words"].items():
        for word in (word for name in split(names) for word in lists[name]):
            parts.setdefault(word, part)
    return tuple(parts.items())


DICTIONARY_WORDS = _entries()


class Dictionary:
    """An invented language: its name and its words, each with a translation, a second form and an example."""

    def __init__(self, draw: Draw, n_words: int):
        sounds, classes = _DATA["sounds"], split(_DATA["word_classes"])
        self.language = draw.new_name(sounds, 2, 2).title() + "ish"
        self._and = f" {draw.new_name(sounds, 1, 1)} "
        suffixes = [draw.new_name(sounds, 1, 1)[:3] for _ in range(8)]
        entries = []
        for english, part in sorted(draw.shuffled(DICTIONARY_WORDS)[:n_words]):
            foreign = draw.new_name(sounds, 2, 3)
            entries.append({
                "english": english, "part": part, "foreign": foreign, "class": draw.one_of(classes),
                "form": foreign + draw.one_of(suffixes), "form_name": _DATA["form_names"][part],
            })  # fmt: skip
        nouns = [entry for entry in entries if entry["part"] == "n"]
        adjectives = [entry for entry in entries if entry["part"] == "adj"]
        for entry in entries:
            noun = entry if entry["part"] == "n" else draw.one_of(nouns)
            if entry["part"] == "v":
                other, example = entry, f"the {noun['english']} can {entry['english']}"
            else:
                other = entry if entry["part"] == "adj" else draw.one_of(adjectives)
                example = f"the {other['english']} {noun['english']}"
            entry |= {"example": example, "translated": f"{noun['foreign']} {other['foreign']}"}
        # Ranks are dealt at random: otherwise the frequent words would be those at the start of the alphabet.
        weights = draw.shuffled(draw.mention_weights(len(entries)))
        self._titles = Choices([title.format(language=self.language) for title in _DATA["titles"]])
        self.lines = [Choices([form.format(**entry) for entry in entries], weights) for form, _ in _LINES]

        def english_and_foreign(part, ending):
            rows = [(entry, weight) for entry, weight in zip(entries, weights, strict=True) if entry["part"] == part]
            english = Choices([entry["english"] + ending for entry, _ in rows], [weight for _, weight in rows])
            return english, [entry["foreign"] for entry, _ in rows]

        self._nouns, self._adjectives = english_and_foreign("n", ""), english_and_foreign("adj", " ")

    def write(self, chooser) -> None:
        """A page of the dictionary, a word list, grammar notes, or phrases translated word by word."""
        style = chooser.pick(self._titles)
        chooser.say("\n")
        if style < len(_LINES):
            self._pages(chooser, self.lines[style], _LINES[style][1])
        else:
            separator = " : " if style == len(_LINES) else "? "
            write_lines(chooser, 12, 20, lambda: self._phrase(chooser, separator))

    def _pages(self, chooser, lines: Choices, at_least: int) -> None:
        """Runs of neighbouring entries, in alphabetical order: the first of a run is chosen, the others follow."""
        index = chooser.pick(lines)
        for n_written in range(1, 2 * at_least):
            end = chooser.pick(_NEXT_LINE if n_written < at_least else _NEXT_LINE_OR_END)
            if end == 2:
                break
            if end == 1:
                index = chooser.pick(lines)
            else:
                index = (index + 1) % len(lines.texts)
                chooser.say(lines.texts[index])

    def _phrase(self, chooser, separator: str) -> None:
        translation = self._noun_phrase(chooser)
        if chooser.pick(_PHRASE_JOINS) == 1:
            translation += self._and + self._noun_phrase(chooser)
        chooser.say(separator + translation)

    def _noun_phrase(self, chooser) -> str:
        """Write "the red lantern"; returns its translation, in which the adjective comes last."""
        chooser.say("the ")
        adjective = ""
        if chooser.pick(_WITH_ADJECTIVE) == 1:
            english, foreign = self._adjectives
            adjective = " " + foreign[chooser.pick(english)]
        english, foreign = self._nouns
        return foreign[chooser.pick(english)] + adjective
