"""Everything that CI runs; `make test` starts it.

    python tools/run_tests.py [--only lint|library|notebooks]

Lint first, since it takes a second. Then, side by side (each on one thread): the library's tests, and the notebooks
under nbval, once with an empty cache and once with what that run has left. Ends with a table; exit status 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
CELL_TIMEOUT = 900  # seconds


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


def nbval(option: str) -> list[str]:
    return [
        *PYTEST,
        option,
        "--nbval-current-env",
        f"--nbval-cell-timeout={CELL_TIMEOUT}",
        f"--nbval-sanitize-with={ROOT / 'notebooks' / 'sanitize.cfg'}",
        "--durations=8",
        "notebooks",
    ]


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
        end = time.time()
        if self.log:
            end = self.log.stat().st_mtime  # it may have ended long ago
            print(f"===== {self.name}\n{self.log.read_text(errors='replace').rstrip()}", flush=True)
        self.minutes = (end - self.started) / 60
        return self

    def result(self) -> str:
        return "ok" if self.process.returncode == 0 else "FAILED"


def run_steps(only: str | None, scratch: Path) -> list[Step]:
    """The finished steps. scratch: an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER"):
        if environment.pop(name, None):
            print(f"{name} is ignored: the tests compare what the default settings give")
    steps, library = [], None
    if only in (None, "lint"):
        ruff = [sys.executable, "-m", "ruff"]
        steps.append(Step("ruff check", [*ruff, "check", "."], environment).wait())
        steps.append(Step("ruff format", [*ruff, "format", "--check", "."], environment).wait())
    if only in (None, "library"):
        cached = dict(environment, UPCYCLING_ARTIFACTS=str(scratch / "library"))
        # beside the notebooks: to a file, or the two outputs would mix
        log = scratch / "library.txt" if only is None else None
        library = Step("library", [*PYTEST, "--durations=15", "lib/tests"], cached, log)
    try:
        if only in (None, "notebooks"):
            option, reason = choose_tier()
            print(f"notebooks: {option.strip('-')}, because {reason}", flush=True)
            cached = dict(environment, UPCYCLING_ARTIFACTS=str(scratch / "notebooks"))
            for cache in ("empty", "warm"):
                steps.append(Step(f"notebooks, {cache} cache", nbval(option), cached).wait())
        if library:
            steps.append(library.wait())
    finally:
        if library:
            library.process.terminate()  # only after an interruption is it still there
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("lint", "library", "notebooks"), help="one part instead of everything")
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
