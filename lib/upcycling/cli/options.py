"""What a verb is, and how the values of its options are read: a bad one is told in a clause that names the remedy."""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable
from importlib.resources import files
from itertools import chain
from typing import Any

import typer

app = typer.Typer(
    help="Upcycle dense language models into Mixtures-of-Experts, train them on, and study what happens.",
    epilog="Options and examples of a verb: python -m upcycling VERB --help. Without a verb, MODEL OUT is convert. "
    "Exit status: 0 done, 1 it could not be done, 2 not understood.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
_LISTS = ("--seeds", "--budgets")


def verb(name: str, resumes: bool = False) -> Callable:
    """Make a function the verb `name`: its docstring is the help, and what it cannot do becomes a sentence.

    Examples for the end of the help lie in data/NAME.txt.
    """
    examples = files(__package__).joinpath(f"data/{name}.txt").read_text(encoding="utf-8").rstrip()

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **options) -> int:
            try:
                return function(*args, **options) or 0
            except (OSError, ValueError, RuntimeError) as error:
                from ..hf.sources import on_one_line

                print(f"error: {on_one_line(' '.join(str(error).split()))}", file=sys.stderr)
            except KeyboardInterrupt:
                print("interrupted; the same command continues" if resumes else "interrupted", file=sys.stderr)
            return 1

        return app.command(name, epilog=f"\b\nexamples:\n{examples}")(run)

    return register


def option(default, read: Callable, metavar: str, help: str, name: str | None = None, env: str | None = None):
    """An option whose value `read` makes of the text; `name` where it is not called as the parameter is."""
    names = [name] if name else []
    return typer.Option(default, *names, parser=read, metavar=metavar, help=help, envvar=env, show_envvar=True)


def flag(name: str, help: str):
    return typer.Option(False, name, help=help)


def argument(metavar: str, help: str, default=...):
    return typer.Argument(default, metavar=metavar, help=help)


def with_commas(arguments: Iterable[str]) -> list[str]:
    """The arguments, with `--seeds 0 1 2`, as these commands once read it, made `--seeds 0,1,2`."""
    found, values = [], None
    for argument in arguments:
        if argument.startswith("-"):
            values = 0 if argument in _LISTS else None
        elif values is not None:
            values += 1
        if values is not None and values > 1:
            found[-1] += f",{argument}"
        else:
            found.append(argument)
    return found


# -------------------------------------------------------------------------------------------------- values of options


def reader(make: Callable[[str], Any], complaint: str, fits: Callable[[Any], bool] = lambda value: True) -> Callable:
    """A function that makes a value of a text; `complaint` says what is wrong with one that gives none."""

    def read(text: str) -> Any:
        try:
            if fits(value := make(text)):
                return value
        except ValueError:
            pass
        raise typer.BadParameter(complaint.format(text))

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    return reader(str, f"{{!r}} is none of {', '.join(choices)}", choices.__contains__)


def some_of(*choices: str) -> Callable[[str], list[str]]:
    return lambda text: [one_of(*choices)(part) for part in text.split(",")]


def whole(minimum: float = -math.inf) -> Callable[[str], int]:
    number = reader(int, "{!r} is no whole number")
    return reader(number, f"{{}} is too small; give at least {minimum}", lambda value: value >= minimum)


finite = reader(float, "{!r} is no finite number", math.isfinite)


def between(low: float, high: float, what: str) -> Callable[[str], float]:
    return reader(finite, f"{{}} is no {what}", lambda number: low <= number <= high)


def numbers(what: str, example: str) -> Callable[[str], list[int]]:
    return reader(lambda text: [*map(int, text.split(","))], f"{{}} is no list of {what} such as {example}")


def _layers(text: str) -> str | list[int]:
    """ "all", "even", "odd" or a list of indices."""
    if text in ("all", "even", "odd"):
        return text
    parts = [re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) if part else () for part in parts]  # below 10,000
    return [*chain.from_iterable(ranges)] if all(ranges) else []


layers = reader(_layers, "{!r} is none of all, even, odd, or indices such as 0,2,4-7", bool)
