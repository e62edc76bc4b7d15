"""A wheel of the library, installed away from any checkout: its data files come along, its artifacts go elsewhere."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "lib" / "upcycling"
RECIPE = """
from pathlib import Path
import torch
import upcycling
from upcycling import ModelConfig, DecoderLM, MoEConfig, load_corpus, record_routing, save_report, upcycle
from upcycling.experiments.series import artifacts_dir

assert Path(upcycling.__file__).is_relative_to(INSTALLED), upcycling.__file__
texts = load_corpus("worlds", documents=60, cache_dir=artifacts_dir() / "corpus")["train"]["text"]
model = upcycle(DecoderLM(ModelConfig.smol(vocab_size=128, d_model=32, n_layers=2, n_heads=2, d_ff=64, seq_len=32)),
                MoEConfig(num_experts=4, top_k=2), seed=0)
with record_routing(model) as trace:
    model(torch.tensor([[ord(letter) % 128 for letter in texts[0][:32]]]))
print(save_report(trace, artifacts_dir() / "report.html").resolve())
"""


def run(*command, folder, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UPCYCLING_", "PYTHON"))}
    result = subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy (setuptools leaves a build folder beside its source), without pip: uv leaves it out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(LIBRARY, source / "lib" / "upcycling", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run(sys.executable, "-c", build, folder=source)
    return next(out.glob("*.whl"))


def test_data_files_are_of_kinds_that_a_wheel_takes():
    """The same without building one: a file beside the modules is of a kind that pyproject.toml names."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    kinds = setup["package-data"]["*"]
    for path in LIBRARY.rglob("*"):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            package = next(folder for folder in path.parents if (folder / "__init__.py").exists())
            name = path.relative_to(package).as_posix()
            assert any(fnmatchcase(name, kind) for kind in kinds), f"a wheel takes {kinds}, not {path}"


@pytest.mark.slow
def test_the_wheel_holds_what_the_library_is_made_of(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("upcycling/")}
    files = (path.relative_to(LIBRARY.parent) for path in LIBRARY.rglob("*") if path.is_file())
    assert held == {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert "upcycling/py.typed" in held and "upcycling/text/worlds/data/words.txt" in held


@pytest.mark.slow
def test_the_installed_library_loads_its_corpus_and_saves_a_report(wheel, tmp_path):
    installed, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)  # what installing a wheel of Python alone comes to
    code = f"INSTALLED = {str(installed)!r}\n{RECIPE}"
    report = run(sys.executable, "-c", code, folder=work, PYTHONPATH=str(installed)).splitlines()[-1]
    assert Path(report) == (work / "artifacts" / "report.html").resolve()
    page = Path(report).read_text(encoding="utf-8")
    assert "<style>:root {" in page and '<script>"use strict";' in page
    assert sorted(path.name for path in work.iterdir()) == ["artifacts"]
    assert not list(installed.rglob("artifacts"))
