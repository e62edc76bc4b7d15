"""Python functions of a world's library, with calls and what they print; the families are in data/code.json."""

from .arithmetic import number
from .draw import Draw
from .grammar import Choices
from .words import WORDS, read_json, split

_DATA = read_json("code.json")
_WORD_ARGUMENTS = Choices(f'"{word}"' for word in WORDS["animal"] if word.isalpha())
_NEXT_CALL = Choices(["\nprint(", "\n\n"], [3, 2])
_NEXT_CALL_OR_END = Choices(["\nprint(", "\n\n", ""], [3, 1, 1])
_NEXT_FUNCTION_OR_END = Choices(["\n\n", ""])
_MORE_ITEMS = Choices(["]", ", "])


def _define(draw: Draw, name: str, family: dict) -> str:
    """The text of a function of one family: its numbers, names and body are drawn in the order of the family's draws.

    A pair of numbers says from where on and how many to choose from; a list, the words; a text, the word list.
    """
    values = {"body": family.get("body")}
    for key, options in family["draws"].items():
        if isinstance(options, str):
            options = WORDS[options]
        if key == "body":
            values[key] = draw.one_of(options)
        elif isinstance(options[0], int):
            values[key] = options[0] + draw.below(options[1])
        else:
            values |= zip(key.split(), draw.one_of(options).split(), strict=True)
    body = values["body"].format(**values).replace("\n", "\n    ")
    return f"def {name}({family['parameters'].format(**values)}):\n    {body}\n"


class Code:
    """The functions of a world's library; what a call prints is computed by the function's own text."""

    def __init__(self, draw: Draw, n_functions: int):
        names = [f"{verb}_{thing}" for verb in split(_DATA["verbs"]) for thing in WORDS["thing"] if thing.isalpha()]
        self._functions, definitions = [], []
        for name in draw.shuffled(names)[:n_functions]:
            family = draw.one_of(_DATA["families"])
            definitions.append(_define(draw, name, family))
            namespace = {"__builtins__": {"range": range, "sum": sum}}
            exec(definitions[-1], namespace)  # the text comes from the library's own data
            self._functions.append((name, family["arguments"], namespace[name]))
        self._definitions = Choices(definitions, draw.mention_weights(len(definitions)))

    def write(self, chooser) -> None:
        """Three to six functions of the library, each with one to three calls and what these print."""
        used = []
        for n_functions in range(1, 7):
            used.append(chooser.pick_new(self._definitions, used))
            chooser.say("\nprint(")
            for n_calls in range(1, 4):
                _write_call(chooser, *self._functions[used[-1]])
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


def _write_call(chooser, name: str, kind: str, function) -> None:
    """kind of its arguments: "n" and "nn" one or two numbers, "l" a list, "s" a word."""
    chooser.say(name + "(")
    if kind == "s":
        arguments = [_WORD_ARGUMENTS.texts[chooser.pick(_WORD_ARGUMENTS)][1:-1]]
    elif kind == "l":
        chooser.say("[")
        numbers = [number(chooser, 1, 20)]
        while len(numbers) < 5 and chooser.pick(_MORE_ITEMS) == 1:
            numbers.append(number(chooser, 1, 20))
        if len(numbers) == 5:
            chooser.say("]")
        arguments = [numbers]
    else:
        arguments = [number(chooser, 1, 20)]
        if kind == "nn":
            chooser.say(", ")
            arguments.append(number(chooser, 1, 20))
    chooser.say(f"))  # {function(*arguments)}")
