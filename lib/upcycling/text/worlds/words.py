"""The data files of this folder, the word lists in them, and the little English grammar that templates need."""

import json
import re
from importlib.resources import files


def _read(name: str) -> str:
    return files(__package__).joinpath("data", name).read_text(encoding="utf-8")


def read_json(name: str):
    """What a JSON file of `data/` holds."""
    return json.loads(_read(name))


def read_sections(name: str) -> dict[str, str]:
    """The parts of a text file of `data/`: "== title" begins one; lines that begin with "#" are comments."""
    text = re.sub(r"^#.*\n", "", _read(name), flags=re.MULTILINE)
    _, *parts = re.split(r"^== (.+)\n", text, flags=re.MULTILINE)
    return {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}


def split(text: str) -> list[str]:
    """Words between spaces; "-" stands for nothing."""
    return ["" if part == "-" else part for part in text.split(" ")]


# Each list's words in the order written, each word once.
WORDS = {
    name: tuple(dict.fromkeys(word.strip() for word in text.replace("\n", " ").split(",")))
    for name, text in read_sections("words.txt").items()
}
HOBBIES, VERBS = ([tuple(verb.split("/")) for verb in WORDS[name]] for name in ("hobby", "verb"))  # base, past, -ing
_IRREGULAR_PLURALS = dict(pair.split("/") for pair in WORDS["irregular plural"])


def plural(noun: str) -> str:
    """The plural of an English noun of the word lists."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    return noun + "s"


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by the first letter's sound."""
    vowel_sound = phrase.startswith(("hour", "honest")) or (
        phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "uku"))
    )
    return ("an " if vowel_sound else "a ") + phrase
