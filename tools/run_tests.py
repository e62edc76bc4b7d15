"""Everything that CI runs; `make test` starts it.

    python tools/run_tests.py [--only lint|library|notebooks|rounding]

Lint first, since it takes seconds. Then, side by side (each on one thread): the notebooks under nbval, once with an
empty cache and once with what that run has left; and the library's tests, followed by the core's with all kernels off,
and a part of both with arithmetic that rounds differently, as another CPU would. Ends with a table; exit status 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
CELL_TIMEOUT = 900  # seconds

# Makes an x86 processor add in other orders, as an older one does. (MKL_CBWR=COMPATIBLE, too, would slow the MoE's
# training step eightfold.)
OTHER_ROUNDING = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}
ROUNDED = ("03", "05")  # notebooks of that run: they train parent and MoE, and look at what the router has learned


def tier(stamps: list[dict], here: dict, wish: str | None) -> tuple[str, str]:
    """(nbval's option, why): strict where the saved outputs can be met to the last digit, lax elsewhere.

    stamps: the notebooks' `upcycling` metadata; here: `fingerprint.provenance()`; wish: UPCYCLING_STRICT, if set.
    Lax runs every cell too, and compares those tagged `nbval-check-output`.
    """
    if wish in ("0", "1"):
        return ("--nbval", "--nbval-lax")[wish == "0"], f"UPCYCLING_STRICT={wish}"
    if wish:
        raise ValueError(f"UPCYCLING_STRICT={wish} is neither 0 nor 1")
    for stamp in stamps:
        for key in ("platform", "torch", "arithmetic"):
            if stamp.get(key) != here[key]:
                return "--nbval-lax", f"outputs were saved with {key} {stamp.get(key)}, here it is {here[key]}"
    return "--nbval", "same platform, torch and arithmetic as where the outputs were saved"


def choose_tier() -> tuple[str, str]:
    import nbformat

    from fingerprint import provenance

    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    stamps = [nbformat.read(path, as_version=4).metadata.get("upcycling", {}) for path in paths]
    return tier(stamps, provenance(), os.environ.get("UPCYCLING_STRICT"))


def nbval(option: str, *names: str) -> list[str]:
    """The command that compares the notebooks whose names begin with one of `names`, or all."""
    paths = sorted(str(path) for name in names for path in (ROOT / "notebooks").glob(f"{name}*.ipynb"))
    return [
        *PYTEST,
        option,
        "--nbval-current-env",
        f"--nbval-cell-timeout={CELL_TIMEOUT}",
        f"--nbval-sanitize-with={ROOT / 'notebooks' / 'sanitize.cfg'}",
        "--durations=8",
        *(paths or ["notebooks"]),
    ]


def fingerprint(environment: dict[str, str]) -> str:
    """`arithmetic_fingerprint` as a process with these variables finds it."""
    code = "from fingerprint import arithmetic_fingerprint as f; print(f())"
    tools = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=tools, env=environment, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def other_rounding(environment: dict[str, str]) -> dict[str, str] | None:
    """`environment` with other arithmetic; None, and a line that says so, where the variables change nothing."""
    other, setting = environment | OTHER_ROUNDING, " ".join(f"{k}={v}" for k, v in OTHER_ROUNDING.items())
    here, there = fingerprint(environment), fingerprint(other)
    if here == there:
        print(f"other rounding: left out, because {setting} changes no digit on this machine ({here})", flush=True)
        return None
    print(f"other rounding: {setting}, because it changes this machine's digits ({here} to {there})", flush=True)
    return other


Command = tuple[str, list[str], dict[str, str]]  # name, command, environment


class Step:
    """A command that runs; its output goes to the terminal, or to a file that is shown at the end."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path | None = None):
        self.name, self.log, self.started, self.minutes = name, log, time.time(), None
        print(f"===== {name}" + (" (shown when the notebooks have finished)" if log else ""), flush=True)
        with log.open("wb") if log else contextlib.nullcontext() as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self) -> Step:
        self.process.wait()
        self.minutes = self.minutes or (time.time() - self.started) / 60
        return self

    def show(self) -> Step:
        if self.log:
            print(f"===== {self.name}\n{self.log.read_text(errors='replace').rstrip()}", flush=True)
        return self

    def result(self) -> str:
        return "ok" if self.process.returncode == 0 else "FAILED"


class Beside(threading.Thread):
    """Commands that run one after the other beside the notebooks, each with its output in a file."""

    def __init__(self, commands: list[Command], scratch: Path):
        super().__init__(daemon=True)
        self.commands, self.scratch, self.steps, self.stopped = commands, scratch, [], False
        self.start()

    def run(self) -> None:
        for name, command, environment in self.commands:
            if self.stopped:
                return
            self.steps.append(Step(name, command, environment, self.scratch / f"{name}.txt"))
            self.steps[-1].wait()

    def finished(self) -> list[Step]:
        """All its steps, when the last one has ended; shows what they wrote."""
        self.join()
        return [step.show() for step in self.steps]

    def stop(self) -> None:
        """Ends what still runs, after an interruption."""
        self.stopped = True
        for step in self.steps:
            step.process.terminate()


def beside(only: str | None, environment: dict[str, str], scratch: Path) -> list[Command]:
    """What runs beside the notebooks, in order, with artifacts of its own."""
    commands = []

    def add(name: str, command: list[str], environment: dict[str, str], cache: str) -> None:
        commands.append((name, command, dict(environment, UPCYCLING_ARTIFACTS=str(scratch / cache))))

    if only in (None, "library"):
        add("library", [*PYTEST, "-p", "no:nbval", "--durations=15", "lib/tests"], environment, "library")
        plain = dict(environment, UPCYCLING_KERNELS="0")
        folders = [f"lib/tests/{folder}" for folder in ("core", "training", "decoding")]
        add("core, kernels off", [*PYTEST, "-m", "not slow", *folders], plain, "plain")
    if only in (None, "rounding") and (other := other_rounding(environment)):
        add("core, other rounding", [*PYTEST, "-m", "not slow", "lib/tests/core"], other, "rounding")
        add("notebooks, other rounding", nbval("--nbval-lax", *ROUNDED), other, "rounding")
    return commands


def run_steps(only: str | None, scratch: Path) -> list[Step]:
    """The finished steps. scratch: an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER"):
        if environment.pop(name, None):
            print(f"{name} is ignored: the tests compare what the default settings give")
    steps = []
    if only in (None, "lint"):
        ruff = [sys.executable, "-m", "ruff"]
        steps.append(Step("ruff check", [*ruff, "check", "."], environment).wait())
        steps.append(Step("ruff format", [*ruff, "format", "--check", "."], environment).wait())
        steps.append(Step("mypy", [sys.executable, "-m", "mypy"], environment).wait())
    commands = beside(only, environment, scratch)
    if only:  # nothing runs beside: straight to the terminal
        steps += [Step(*command).wait() for command in commands]
        commands = []
    lane = Beside(commands, scratch)
    try:
        if only in (None, "notebooks"):
            option, reason = choose_tier()
            print(f"notebooks: {option.strip('-')}, because {reason}", flush=True)
            cached = dict(environment, UPCYCLING_ARTIFACTS=str(scratch / "notebooks"))
            for cache in ("empty", "warm"):
                steps.append(Step(f"notebooks, {cache} cache", nbval(option), cached).wait())
        steps += lane.finished()
    finally:
        lane.stop()
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("lint", "library", "notebooks", "rounding")
    parser.add_argument("--only", choices=parts, help="one part instead of everything")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        steps = run_steps(options.only, Path(scratch))
    print(f"\n{'part':26}  minutes  result\n{'-' * 26}  -------  ------")
    for step in steps:
        print(f"{step.name:26}  {step.minutes:7.1f}  {step.result()}")
    print(f"{'all':26}  {(time.monotonic() - started) / 60:7.1f}")
    return int(any(step.process.returncode for step in steps))


if __name__ == "__main__":
    sys.exit(main())
