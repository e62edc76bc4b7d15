"""The command line: `python -m upcycling VERB …`, and how it fails.

`options` reads what was typed, `models` and `studies` hold the verbs, one function each: what it takes is its
signature, what it does lies in the module that it imports when it runs, so that help comes at once. No computing here.

Exit status: 0 done, 1 it could not be done (one sentence on stderr says why), 2 the command was not understood.
"""

import os
import sys
import warnings
from difflib import get_close_matches

import typer

from . import models, studies  # noqa: F401 (they register their verbs)
from .options import app, with_commas

VERBS = tuple(command.name for command in app.registered_commands)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = with_commas(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] not in (*VERBS, "-h", "--help"):  # the first spelling had no verb
        if (near := get_close_matches(arguments[0], VERBS, 1, 0.75)) and not os.path.exists(arguments[0]):
            return _not_understood(f"there is no verb {arguments[0]!r}; {near[0]} is one", "python -m upcycling")
        arguments = ["convert", *arguments]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what they would say is for those who write models
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
    if not arguments:
        return _not_understood("a verb is missing", "python -m upcycling")
    try:
        return typer.main.get_command(app).main(arguments, prog_name="python -m upcycling", standalone_mode=False) or 0
    except typer.BadParameter.__base__ as error:  # all that typer says about what was typed
        message = error.format_message().rstrip(".")
        return _not_understood(message[0].lower() + message[1:], error.ctx.command_path)


def _not_understood(message: str, command: str) -> int:
    print(f"error: {message} ({command} --help shows what it takes)", file=sys.stderr)
    return 2


def run(verb: str) -> None:
    """The program `python -m upcycling VERB`, for modules that were commands of their own."""
    sys.exit(main([verb, *sys.argv[1:]]))
