"""Templates with a known probability: compiled once, run by a chooser that counts the surprisal of each choice."""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from .words import article, plural


class Choices:
    """Weighted texts to choose among; integer weights, so that a random number means the same entry everywhere."""

    __slots__ = ("cumulative", "texts", "total", "weights")

    def __init__(self, texts, weights=None):
        self.texts = list(texts)
        self.weights = [1] * len(self.texts) if weights is None else list(weights)
        self.cumulative = list(accumulate(self.weights))
        self.total = self.cumulative[-1]


class Chooser:
    """Goes through a document's choices; `surprisal` is the sum of -log p so far, in nats.

    `_choose(choices, used)` says which one and writes it, `say` writes what is already determined.
    """

    surprisal = 0.0

    def pick(self, choices: Choices) -> int:
        return self.pick_new(choices, ())

    def pick_new(self, choices: Choices, used: Sequence[int]) -> int:
        index = self._choose(choices, used)
        left = choices.total - sum(choices.weights[i] for i in used)
        self.surprisal += -math.log(choices.weights[index] / left)
        return index


class Writer(Chooser):
    """Writes one document by random choices; `text` is what was written."""

    def __init__(self, random_function):
        self._random = random_function
        self._parts = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def say(self, text: str) -> None:
        self._parts.append(text)

    def _choose(self, choices: Choices, used: Sequence[int]) -> int:
        for _ in range(8):
            index = bisect_right(choices.cumulative, self._random() * choices.total)
            if index not in used:
                break
        else:  # most of the weight is used up: choose among the rest directly
            place = self._random() * (choices.total - sum(choices.weights[i] for i in used))
            for index, weight in enumerate(choices.weights):
                place -= 0 if index in used else weight
                if place < 0:
                    break
        self._parts.append(choices.texts[index])
        return index


def siblings(groups) -> list[range]:
    """For the members of nested groups, numbered throughout: which members are in the same group as each."""
    result = []
    for group in groups:
        result += [range(len(result), len(result) + len(group))] * len(group)
    return result


_END = Choices(["\n", ""], [5, 1])


def write_lines(chooser, at_least: int, at_most: int, line: Callable) -> None:
    """Call `line` between at_least and at_most times, a line break between any two calls."""
    for n_written in range(1, at_most + 1):
        line()
        if n_written == at_most:
            return
        if n_written < at_least:
            chooser.say("\n")
        elif chooser.pick(_END) == 1:
            return


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
        {x=list}  {a x=list}         choose from a list of words.txt, write it, call it x; {x=list!y}: not what y was
        [one|two|3:three]            choose an alternative, here with odds 1, 1, 3
        [!flag 65]                   choose silently, with 65 %, whether the flag is set; [flag?yes|no] looks at it
        <part>                       a part written by a Python function
    """
    text = re.sub(r"\s*\n\s*([|\]])", r"\1", text.strip())
    text = re.sub(r"([|\[?])\s*\n\s*", r"\1", text)
    text = re.sub(r" ?¶ ?", "\n", re.sub(r"\s+", " ", text))
    tokens = re.findall(r"\[!\w+ \d+\]|\[\w+\?|\[|\||\]|\{[^{}]+\}|<\w+>|[^\[\]{}|<>]+", text)
    return _compile(tokens, 0)[0]


def _compile(tokens: list[str], start: int):
    program, position = [], start
    while position < len(tokens) and tokens[position] not in ("|", "]"):
        token = tokens[position]
        position += 1
        if token.startswith("[!"):
            flag, percent = token[2:-1].split()
            program.append(("decide", flag, Choices(["", ""], [100 - int(percent), int(percent)])))
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
    return ("pick", Choices(heads, weights), branches)


def _slot(text: str):
    prefix, _, name = text.rpartition(" ")
    if "=" not in name:
        return ("write", name, TEMPLATE_FORMS[prefix])
    name, source = name.split("=")
    source, _, other = source.partition("!")
    return ("draw", name, source, list(TEMPLATE_FORMS).index(prefix), other)


def _capital_article(phrase: str) -> str:
    phrase = article(phrase)
    return phrase[0].upper() + phrase[1:]


TEMPLATE_FORMS = {"": str, "a": article, "A": _capital_article, "s": plural}


def run_template(program, chooser, lists, variables, parts=None) -> None:
    """Write a compiled template.

    lists: each word list as `Choices`, once for each of TEMPLATE_FORMS. variables: filled with what was chosen.
    parts: the functions of <part>.
    """
    for kind, *step in program:
        if kind == "say":
            chooser.say(step[0])
        elif kind == "write":
            name, form = step
            chooser.say(form(variables[name]))
        elif kind == "draw":
            name, source, form, other = step
            written = lists[source][form]
            index = chooser.pick_new(written, (variables["#" + other],)) if other else chooser.pick(written)
            variables[name], variables["#" + name] = lists[source][0].texts[index], index
        elif kind == "pick":
            heads, branches = step
            run_template(branches[chooser.pick(heads)], chooser, lists, variables, parts)
        elif kind == "flag":
            flag, branches = step
            run_template(branches[0 if variables[flag] else 1], chooser, lists, variables, parts)
        elif kind == "decide":
            flag, odds = step
            variables[flag] = chooser.pick(odds) == 1
        else:
            parts[step[0]]()
