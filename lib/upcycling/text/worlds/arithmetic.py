"""Arithmetic with its answers: one line a task, twelve to twenty of them."""

from .grammar import Choices, write_lines
from .words import WORDS, plural

_NUMBERS = {
    (low, high): Choices(map(str, range(low, high + 1))) for low, high in ((2, 9), (2, 12), (1, 20), (2, 99), (10, 99))
}
_UP_TO = {n: Choices(map(str, range(1, n + 1))) for n in range(1, 100)}
_EVEN_NUMBERS = Choices(str(2 * half) for half in range(1, 100))
_SIGNS = Choices([" + ", " - ", " * "], [3, 3, 2])
_SORT_ENDS = Choices(["", ""], [2, 1])
_WORD_PROBLEMS = Choices([" has ", " finds ", " buys "])
_COUNTABLES = Choices(plural(food) for food in WORDS["food"])
_STEPS = Choices([" gets ", " gives away ", " packs them in bags of "])


def number(chooser, low: int, high: int) -> int:
    """Write one of low..high."""
    return low + chooser.pick(_NUMBERS[low, high])


def _sum(chooser) -> None:
    a = number(chooser, 2, 99)
    sign = chooser.pick(_SIGNS)
    b = number(chooser, 2, 99) if sign < 2 else number(chooser, 2, 12)
    chooser.say(f" = {(a + b, a - b, a * b)[sign]}")


def _sorting(chooser) -> None:
    numbers = [number(chooser, 2, 99)]
    while True:
        chooser.say(", ")
        numbers.append(number(chooser, 2, 99))
        if len(numbers) >= 3 and (len(numbers) == 6 or chooser.pick(_SORT_ENDS) == 1):
            break
    chooser.say(": " + ", ".join(map(str, sorted(numbers))))


def _sequence(chooser) -> None:
    start = number(chooser, 1, 20)
    chooser.say(", ")
    difference = number(chooser, 1, 20) - start
    terms = [str(start + difference * i) for i in range(2, 7)]
    chooser.say(f", {terms[0]}, {terms[1]}: {', '.join(terms[2:])}")


def _twice(chooser) -> None:
    chooser.say(f" is {2 * number(chooser, 2, 99)}")


def _half(chooser) -> None:
    chooser.say(f" is {chooser.pick(_EVEN_NUMBERS) + 1}")


def _larger(chooser) -> None:
    a = number(chooser, 2, 99)
    chooser.say(" and ")
    chooser.say(f" is {max(a, number(chooser, 2, 99))}")


def _division(chooser) -> None:
    a = number(chooser, 10, 99)
    chooser.say(" by ")
    quotient, remainder = divmod(a, number(chooser, 2, 9))
    chooser.say(f": {quotient} remainder {remainder}")


# What a task begins with, its odds, and what writes the rest.
_TASKS = (
    ("", 8, _sum),
    ("Sort ", 3, _sorting),
    ("Continue ", 3, _sequence),
    ("Twice ", 1, _twice),
    ("Half of ", 1, _half),
    ("The larger of ", 2, _larger),
    ("Divide ", 2, _division),
)


class Arithmetic:
    """Sums, products, sorted lists, sequences, divisions, and word problems about a world's characters."""

    def __init__(self, names: Choices):
        self._names = names
        beginnings, odds, writers = zip(*_TASKS, ("", 4, self._word_problem))
        self._tasks, self._writers = Choices(beginnings, odds), writers

    def write(self, chooser) -> None:
        write_lines(chooser, 12, 20, lambda: self._writers[chooser.pick(self._tasks)](chooser))

    def _word_problem(self, chooser) -> None:
        name = self._names.texts[chooser.pick(self._names)]
        chooser.pick(_WORD_PROBLEMS)
        n = number(chooser, 10, 99)
        chooser.say(" ")
        chooser.pick(_COUNTABLES)
        chooser.say(f". {name}")
        step = chooser.pick(_STEPS)
        if step == 0:
            chooser.say(f" more. Now there are {n + number(chooser, 2, 99)}.")
        elif step == 1:
            chooser.say(f". Now there are {n - 1 - chooser.pick(_UP_TO[n - 1])}.")
        else:
            bags, left = divmod(n, number(chooser, 2, 9))
            chooser.say(f". That makes {bags} full bags and {left} left over.")
