"""What a verb is, and how the values of its options are read: a bad one is told in a clause that names the remedy."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable

import typer

app = typer.Typer(
    help="Upcycle dense language models into Mixtures-of-Experts, train them on, and study what happens.",
    epilog="Options and examples of a verb: python -m upcycling VERB --help. Without a verb, MODEL OUT is convert. "
    "Exit status: 0 done, 1 it could not be done, 2 not understood.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
_LISTS = ("--seeds", "--budgets")


def verb(name: str, examples: str, resumes: bool = False) -> Callable:
    """Make a function the verb `name`: its docstring is the help, and what it cannot do becomes a sentence."""

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

        return app.command(name, epilog=f"\b\nexamples:{examples.rstrip()}")(run)

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


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(choices)}")
        return text

    return read


def some_of(*choices: str) -> Callable[[str], list[str]]:
    return lambda text: [one_of(*choices)(part) for part in text.split(",")]


def whole(minimum: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no whole number") from None
        if minimum is not None and number < minimum:
            raise typer.BadParameter(f"{number} is too small; give at least {minimum}")
        return number

    return read


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f"{text!r} is no finite number")
    return number


def between(low: float, high: float, what: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = finite(text)
        if not low <= number <= high:
            raise typer.BadParameter(f"{text} is no {what}")
        return number

    return read


def numbers(what: str, example: str) -> Callable[[str], list[int]]:
    def read(text: str) -> list[int]:
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise typer.BadParameter(f"{text} is no list of {what} such as {example}") from None

    return read


def layers(text: str) -> str | list[int]:
    """ "all", "even", "odd" or a list of indices."""
    if text in ("all", "even", "odd"):
        return text
    indices = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)  # no model has 10,000 layers
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise typer.BadParameter(f"{text!r} is none of all, even, odd, or indices such as 0,2,4-7")
        indices += range(first, last + 1)
    return indices
