"""Does this machine have what the notebooks need? Notebook 00 prints the answer.

Also here: what identifies the arithmetic of a machine (saved outputs are compared to the last digit only where it is
the same), and the cell that prepares Google Colab.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository, when the library is used from there
GIGABYTES_FREE = 1.0  # what one run of the series writes to artifacts/, with room to spare

# The first code cell of every notebook. Colab keeps its own torch: the library is installed without its dependencies,
# and those are named without versions, so that pip adds what is missing and replaces nothing.
COLAB_CELL = """\
import os
import sys

if "google.colab" in sys.modules:  # Google Colab: fetch the library, keep the torch that is there
    REPOSITORY = "https://github.com/..."  # the address of the repository that holds this notebook
    if not os.path.isdir("/content/upcycling"):
        !git clone -q --depth 1 {REPOSITORY} /content/upcycling
    !pip install -q accelerate datasets datasketch ipywidgets matplotlib
    !pip install -q safetensors tokenizers tqdm 'transformers>=5.23'
    !pip install -q --no-deps -e /content/upcycling
    sys.path.insert(0, "/content/upcycling/lib")
    os.chdir("/content/upcycling/notebooks")"""


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
        elif name != "torch":
            yield True, f"{name} {version}"
        else:
            yield _torch(version)


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


def check_environment(folder: str | os.PathLike = ROOT) -> EnvironmentReport:
    """Prints an `[OK]` line for each thing that the notebooks need; `[!!]` lines say what to do about the others.

    folder: where artifacts will be written; its free disk space is checked. `[--]` lines are remarks. Returns a report.
    """
    found = [(sys.version_info >= (3, 10), f"Python {platform.python_version()}")]
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


def arithmetic_fingerprint() -> str:
    """Twelve hexadecimal digits that are equal on machines whose float32 training steps agree to the last bit.

    Trains a tiny network (normalisation, attention, feed-forward) for a few steps on one thread and hashes the bits of
    its weights. CPUs choose different kernels, which round differently; a version number or a CPU's name does not tell.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = torch.randn(8, 96, 96)
            norm, qkv, out = nn.LayerNorm(96), nn.Linear(96, 288), nn.Linear(96, 96)
            ffn, head = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96), nn.SiLU()), nn.Linear(96, 2048)
            target = torch.randint(2048, (8 * 96,))
            parameters = [p for module in (norm, qkv, out, ffn, head) for p in module.parameters()]
            for _ in range(3):
                q, k, v = qkv(norm(x)).view(8, 96, 3, 4, 24).permute(2, 0, 3, 1, 4)
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(8, 96, 96)
                hidden = x + out(attended)
                loss = F.cross_entropy(head(hidden + ffn(F.rms_norm(hidden, (96,)))).flatten(0, 1), target)
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients):
                        parameter -= 0.1 * gradient / (gradient.square().mean().sqrt() + 1e-8)
    finally:
        torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


def provenance() -> dict[str, str]:
    """The versions and the arithmetic of this machine; stamped into a notebook's metadata when outputs are saved."""
    import torch

    names = ("numpy", "transformers", "datasets", "tokenizers", "accelerate")
    versions = {name: metadata.version(name) for name in names}
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "torch": torch.__version__,
        **versions,
        "arithmetic": arithmetic_fingerprint(),
    }
