"""Everything that CI runs; `make test` starts it.

    python lib/tests/run_all.py [--only lint|library|notebooks]

Lint first, since it takes a second. Then, side by side (each on one thread): the library's tests, and the notebooks under
nbval, once with an empty cache and once with what that run has left. Ends with a table; exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
CELL_TIMEOUT = 900  # seconds


def tier(stamps: list[dict], here: dict, wish: str | None) -> tuple[str, str]:
    """(nbval's option, why): strict where the saved outputs can be met to the last digit, lax elsewhere.

    stamps: the notebooks' `upcycling` metadata; here: `environment.provenance()`; wish: UPCYCLING_STRICT, "0", "1" or None.
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

    from upcycling.environment import provenance

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
    """A command with its output in a file, so that two may run at once and be read one after the other."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.started = name, time.monotonic()
        self.output = tempfile.TemporaryFile("w+b")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT
        )
        self.minutes = None

    def finished(self) -> bool:
        if self.process.poll() is None:
            return False
        if self.minutes is None:
            self.minutes = (time.monotonic() - self.started) / 60
            self.output.seek(0)
            text = self.output.read().decode(errors="replace").rstrip()
            print(
                f"\n===== {self.name} =====\n{text}\n{self.name}: {self.result()}, {self.minutes:.1f} min", flush=True
            )
        return True

    def result(self) -> str:
        return "ok" if self.process.returncode == 0 else "FAILED"

    def wait(self) -> Step:
        self.process.wait()
        self.finished()
        return self


def run_steps(only: str | None) -> list[Step]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS"):
        if environment.pop(name, None):
            print(f"{name} is ignored: the tests compare what the default settings give")
    steps = []
    if only in (None, "lint"):
        ruff = [sys.executable, "-m", "ruff"]
        steps.append(Step("ruff check", [*ruff, "check", "."], environment).wait())
        steps.append(Step("ruff format", [*ruff, "format", "--check", "."], environment).wait())
    library = None
    with tempfile.TemporaryDirectory() as artifacts:
        try:
            if only in (None, "library"):
                print("library tests started", flush=True)
                library = Step("library", [*PYTEST, "--durations=15", "lib/tests"], environment)
            if only in (None, "notebooks"):
                option, reason = choose_tier()
                print(f"notebooks: {option.strip('-')}, because {reason}", flush=True)
                cached = dict(environment, UPCYCLING_ARTIFACTS=artifacts)
                for cache in ("empty cache", "warm cache"):
                    print(f"notebooks, {cache}: started", flush=True)
                    steps.append(Step(f"notebooks, {cache}", nbval(option), cached))
                    while not steps[-1].finished():
                        if library is not None:
                            library.finished()
                        time.sleep(0.5)
        except BaseException:
            for step in [*steps, *([library] if library else [])]:
                if step.process.poll() is None:
                    step.process.terminate()
            raise
        if library is not None:
            steps.append(library.wait())
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("lint", "library", "notebooks"), help="one part instead of everything")
    started = time.monotonic()
    steps = run_steps(parser.parse_args().only)
    print(f"\n{'part':26}  minutes  result\n{'-' * 26}  -------  ------")
    for step in steps:
        print(f"{step.name:26}  {step.minutes:7.1f}  {step.result()}")
    print(f"{'all':26}  {(time.monotonic() - started) / 60:7.1f}")
    return int(any(step.process.returncode for step in steps))


if __name__ == "__main__":
    sys.exit(main())
