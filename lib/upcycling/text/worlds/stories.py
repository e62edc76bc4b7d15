"""Short children's stories about a world's characters; their grammar and plots are in data/stories.txt."""

import re

from .draw import Draw
from .grammar import TEMPLATE_FORMS, Choices, compile_template, render, run_template, siblings
from .words import HOBBIES, WORDS, read_sections

_PARTS = read_sections("stories.txt")
_HEROES = _PARTS["hero"].splitlines()
_FACTS = [line.split(" | ") for line in _PARTS["facts"].splitlines()]
_HE = {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"}
_SHE = {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"}
_PRONOUNS = {"boy": _HE, "Mr.": _HE, "girl": _SHE, "Mrs.": _SHE}
_FACTS_OF_OTHERS = (*_HE, "kind", "color", "toy", "food", "town", "pet", "petname", "hobby", "fear", "job")
_HERO_FORMS = Choices([""] * len(_HEROES))
_SAME_FACT = siblings(_FACTS)
_MORE_FACTS = Choices([" ", "\n"], [2, 3])


def _grammar() -> str:
    """The template of all stories: an opening, with talk in 65 % of them, and one of the plots with its ending."""
    plots = [text.split("\nmoral: ") for name, text in _PARTS.items() if name.startswith("plot: ")]
    told = [plot + _PARTS["ending"].replace("<moral>", moral) for plot, moral in plots]
    return (_PARTS["opening"] + "[!talk 65][" + "|".join(told) + "]").replace("<scene>", _PARTS["scene"])


class Stories:
    """A world's characters, each with its facts and a best friend; writes stories about them."""

    def __init__(self, draw: Draw, n_characters: int, towns: list[str]):
        n = n_characters
        girls, boys = draw.shuffled(WORDS["girl"])[: n // 2], draw.shuffled(WORDS["boy"])[: n - n // 2]
        names = draw.shuffled([(name, "girl") for name in girls] + [(name, "boy") for name in boys])
        self.characters = []
        for index, (name, kind) in enumerate(names):
            adult = draw.one_of(("Mr.", "Mrs."))
            self.characters.append({
                "h": name, "kind": kind, "trait": draw.one_of(WORDS["trait"]), "toy": draw.one_of(WORDS["thing"]),
                "color": draw.one_of(WORDS["color"]), "food": draw.one_of(WORDS["food"]),
                "home": draw.one_of(WORDS["home"]), "town": draw.one_of(towns),
                "pet": draw.one_of(WORDS["animal"][:24]), "petname": draw.one_of(WORDS["petname"]),
                "hobby": draw.one_of(HOBBIES)[2], "fear": draw.one_of(WORDS["fear"]), "job": draw.one_of(WORDS["job"]),
                "m": f"{adult} {draw.one_of(WORDS['surname'])}", "friend_index": (index + 1 + draw.below(n - 1)) % n,
                **_PRONOUNS[kind], **{f"m.{key}": pronoun for key, pronoun in _PRONOUNS[adult].items()},
            })  # fmt: skip
        for character in self.characters:
            character |= self._as("f", character["friend_index"])
        weights = draw.mention_weights(n)
        self.names = Choices([character["h"] for character in self.characters], weights)
        self._heroes = [
            Choices([render(form, character) for character in self.characters], weights)
            for form in map(compile_template, _HEROES)
        ]
        facts = [compile_template(form) for group in _FACTS for form in group]
        self._facts = [Choices([render(form, character) for form in facts]) for character in self.characters]
        lists = WORDS | {
            "quality": dict.fromkeys(WORDS["quality"] + WORDS["odd quality"]),
            "do": [base for base, _, _ in HOBBIES],
            "doing": [ing for _, _, ing in HOBBIES],
        }
        grammar = _grammar()
        # Each list in the forms that a template can ask for: as it is, with an article, and so on.
        self._lists = {
            name: [Choices(map(form, lists[name])) for form in TEMPLATE_FORMS.values()]
            for name in dict.fromkeys(re.findall(r"=(\w+)", grammar))
        }
        self._program = compile_template(grammar)

    def _as(self, letter: str, index: int) -> dict[str, str]:
        """What a template may say of another character than the hero."""
        character = self.characters[index]
        return {letter: character["h"]} | {f"{letter}.{key}": character[key] for key in _FACTS_OF_OTHERS}

    def write(self, chooser) -> None:
        """A short children's story about one of the characters."""
        variables = {}

        def hero():
            index = chooser.pick(self._heroes[chooser.pick(_HERO_FORMS)])
            variables.update(self.characters[index])
            variables["#hero"] = index

        def facts():
            used = []
            for n_told in range(1, 5):
                used += _SAME_FACT[chooser.pick_new(self._facts[variables["#hero"]], used)]
                if n_told == 1:
                    chooser.say(" ")
                elif n_told == 4:
                    chooser.say("\n")
                elif chooser.pick(_MORE_FACTS) == 1:
                    break

        def other():
            variables.update(
                self._as("n", chooser.pick_new(self.names, (variables["#hero"], variables["friend_index"])))
            )

        run_template(self._program, chooser, self._lists, variables, {"hero": hero, "facts": facts, "other": other})
