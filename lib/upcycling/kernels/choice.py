"""Whether a kernel is taken on this machine: tried once, measured once, and never taken where it is not faster.

What is faster differs between processors: a product that halves the time on one costs a third more on another. So each
kernel brings a race, a few milliseconds of work done by it and by torch's own functions in turn, and is taken if it
needs at most 1 / FASTER_BY of their time. The answer is kept in a file of the user's cache folder, so that a machine
measures once and computes the same from then on. UPCYCLING_KERNELS=0 takes none.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import write_text
from .private import log, uncompiled

ON = os.environ.get("UPCYCLING_KERNELS", "1") != "0"
FASTER_BY = 1.05
ROUNDS = 5
_taken: dict[str, bool] = {}  # what this process knows

Work = Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """`race` returns (the kernel's work, the same work by torch's functions); raising means that it cannot run here."""

    name: str
    race: Callable[[], tuple[Work, Work]]

    def taken(self) -> bool:
        """Whether it is faster here; the first call of a machine measures, the first of a process reads the file."""
        known = _taken.get(self.name)
        return ON and (_decide(self) if known is None else known)


@uncompiled
def _decide(kernel: Kernel) -> bool:
    key, record = _key(), _read()
    answers = record.get(key, {})
    if isinstance(answers, dict) and isinstance(answers.get(kernel.name), bool):
        _taken[kernel.name] = answers[kernel.name]
        return _taken[kernel.name]
    try:
        with torch.random.fork_rng(devices=[]):
            ratio = _ratio(*kernel.race())
        log.info("%s: %.2f times as fast as torch's own here", kernel.name, ratio)
        _taken[kernel.name] = ratio >= FASTER_BY
    except Exception as error:
        log.warning("kernel %s is not used: it does not run here (%r)", kernel.name, error)
        _taken[kernel.name] = False
        return False  # and not written down: another release of torch may run it
    try:
        record = _read()
        known = record.get(key)
        record[key] = (known if isinstance(known, dict) else {}) | {kernel.name: _taken[kernel.name]}
        write_text(_file(), json.dumps(record, indent=1) + "\n")
    except OSError:
        log.info("what was measured cannot be kept in %s; the next process measures again", _file())
    return _taken[kernel.name]


def _ratio(ours: Work, theirs: Work) -> float:
    """How many times as fast `ours` is: the shortest of several runs each, in turn, which other work disturbs least."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf"), float("inf")]
    for number in range(ROUNDS + 1):
        for side, work in enumerate((ours, theirs)):
            start = clock()
            work()
            if number:  # the first run sets things up
                best[side] = min(best[side], clock() - start)
    return best[1] / best[0]


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "upcycling" / "kernels.json"


def _read() -> dict:
    try:
        record = json.loads(_file().read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _key() -> str:
    """What the answer depends on: processor, torch, threads."""
    return f"{_processor()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():  # elsewhere platform.processor() names it
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        wanted = (fields.get(name) for name in ("vendor_id", "cpu family", "model", "model name"))
        name = " ".join(filter(None, wanted)) or name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
