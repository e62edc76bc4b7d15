"""Does this machine have what the notebooks need, and where do they keep what they make?"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIGABYTES_FREE = 1.0  # what one run of the series writes to artifacts/, with room to spare

# Packages that others bring along; check_environment names them only where something is wrong with them.
_BROUGHT_ALONG = {"filelock", "huggingface_hub", "ipython", "packaging", "pandas", "pillow", "psutil", "typer"}


def project_folder() -> Path:
    """The checkout of this project that the working folder lies in; where there is none, the working folder itself.

    Stored results and `artifacts/` are looked for there: a clone's notebooks use that clone's, whichever checkout's
    environment runs them, and an installed library never writes beside its own modules.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        project, named = folder / "pyproject.toml", rb'^name = "upcycling"\s*$'
        if (folder / "notebooks").is_dir() and project.is_file() and re.search(named, project.read_bytes(), re.M):
            return folder
    return here


@dataclass(frozen=True)
class EnvironmentReport:
    """The lines that `check_environment` printed; `ok` is False when something that the notebooks need is missing."""

    lines: tuple[str, ...]
    ok: bool


def _packages():
    """(ok, text) for this library's dependencies, from the installed package's own metadata."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("upcycling") or []]
    except metadata.PackageNotFoundError:
        yield False, "upcycling is not installed: run `make setup` (without make: python bootstrap.py setup)"
        return
    for requirement in requirements:
        if requirement.marker is not None:  # belongs to an extra
            continue
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield False, f"{name} is missing: run `make setup` (without make: python bootstrap.py setup)"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield (
                False,
                f"{name} {version} is not {requirement.specifier}: run `make setup`, or pip install '{requirement}'",
            )
        elif name == "torch":
            yield _torch(version)
        elif name not in _BROUGHT_ALONG:
            yield True, f"{name} {version}"


def _torch(version: str):
    try:
        import torch
    except Exception as error:
        return False, f"torch {version} does not load ({str(error).splitlines()[0]}): remove .venv and run `make setup`"
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    if torch.cuda.is_available():
        device = f"GPU {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    elif torch.backends.mps.is_available():
        device = "CPU and Apple GPU"
    else:
        device = "CPU"
    return True, f"torch {torch.__version__} ({device}, {threads})"


def _notes():
    """Things that are worth knowing but that do not keep the notebooks from working."""
    try:
        import torch
    except Exception:
        return
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield "an NVIDIA driver is here but this torch does not use it: UPCYCLING_TORCH=cuda make setup"
    if torch.get_num_threads() != 1:
        yield "more than one thread: last digits will differ from the saved ones; set OMP_NUM_THREADS=1 before starting"
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ and "google.colab" not in sys.modules:
        yield "this is the system's Python, not the project's .venv: start with `make lab` or choose .venv as kernel"


def check_environment(folder: str | os.PathLike | None = None) -> EnvironmentReport:
    """Prints an `[OK]` line for each thing that the notebooks need; `[!!]` lines say what to do about the others.

    folder: where artifacts will be written (default: `project_folder()`); its free disk space is checked. `[--]` lines
    are remarks. Returns a report.
    """
    folder = folder or project_folder()
    found = [(sys.version_info >= (3, 11), f"Python {platform.python_version()}")]
    if not found[0][0]:
        found = [(False, f"Python {platform.python_version()} is too old: install 3.11 or newer and run `make setup`")]
    found += _packages()
    free = shutil.disk_usage(folder).free / 1e9
    if free >= GIGABYTES_FREE:
        found.append((True, f"{free:.0f} GB of disk free"))
    else:
        found.append((False, f"{free:.1f} GB of disk free, {GIGABYTES_FREE:.0f} GB are needed: make room in {folder}"))
    lines = [f"[{'OK' if ok else '!!'}] {text}" for ok, text in found] + [f"[--] {text}" for text in _notes()]
    ok = all(ok for ok, _ in found)
    print("\n".join([*lines, f"environment ok: {ok}"]))
    return EnvironmentReport(tuple(lines), ok)
