"""requirements.txt, environment.yml and pyproject.toml agree; the pins agree with one another on every platform."""

import importlib.metadata as metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from upcycling import environment

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def read_pins(lines):
    """name -> (version, marker) of requirement lines that must all be exact."""
    pins = {}
    for line in lines:
        if not line.strip() or line.startswith(("#", "-e ")):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"not an exact pin: {line}"
        name = canonicalize_name(requirement.name)
        assert name not in pins, f"pinned twice: {name}"
        pins[name] = (specifier.version, requirement.marker)
    return pins


@pytest.fixture(scope="module")
def pins():
    return read_pins((ROOT / "requirements.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_users_get_the_same_pins(pins):
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert [line for line in conda["dependencies"] if isinstance(line, str)] == ["python=3.11", "pip"]
    lines = conda["dependencies"][-1]["pip"]
    assert "-e ." in lines
    assert read_pins(lines) == pins


def test_ranges_admit_the_pins(pins, project):
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is in pyproject.toml and not in requirements.txt"
        assert requirement.specifier.contains(pins[name][0]), f"{line} does not admit {pins[name][0]}"


def test_torch_range_is_bounded(project):
    """An open range takes whatever is newest, with a CUDA of its own, and no file that a machine has already."""
    (torch,) = [Requirement(line) for line in project["dependencies"] if Requirement(line).name == "torch"]
    assert {specifier.operator for specifier in torch.specifier} == {">=", "<"}


def test_installed_packages_are_the_pinned_ones(pins):
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not the project's own .venv")
    for name, (version, marker) in pins.items():
        if marker is None or marker.evaluate():
            assert metadata.version(name).split("+")[0] == version, name


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform["sys_platform"])
@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_complete_and_consistent(pins, project, platform, python):
    """Walks the requirements of the installed packages as that platform's pip would."""
    here = {**default_environment(), **platform, "python_version": python, "python_full_version": f"{python}.2"}
    todo = [("this project", Requirement(line)) for line in project["dependencies"]]
    todo += [("this project", Requirement(line)) for line in project["optional-dependencies"]["dev"]]
    seen = set()
    while todo:
        parent, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{parent} needs {requirement}, which is not pinned"
        version, marker = pins[name]
        assert marker is None or marker.evaluate(here), f"{parent} needs {requirement} on {platform['sys_platform']}"
        assert requirement.specifier.contains(version, prereleases=True), f"{parent} needs {requirement}, not {version}"
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            assert marker is not None, f"{name} is not installed"
            continue
        wanted = SpecifierSet(package.metadata.get("Requires-Python") or "")
        assert wanted.contains(f"{python}.2"), f"{name} {version} needs Python {wanted}, and Debian 12 has 3.11.2"
        for line in package.requires or []:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({**here, "extra": extra}) for extra in extras):
                todo.append((name, child))
    assert len(seen) > 50


def test_the_check_says_ok_here(capsys):
    report = environment.check_environment()
    lines = capsys.readouterr().out.splitlines()
    assert report.ok and lines[-1] == "environment ok: True"
    assert tuple(lines[:-1]) == report.lines
    assert any(line.startswith("[OK] torch 2.") for line in lines)
    assert not any(line.startswith("[!!]") for line in lines)


def test_the_check_says_what_to_do(monkeypatch, capsys):
    real = metadata.version

    def version(name):
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "accelerate" else real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    monkeypatch.setattr(environment, "GIGABYTES_FREE", 1e9)
    report = environment.check_environment()
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[!!]")]
    assert not report.ok and len(problems) == 3
    assert "datasets is missing: run `make setup`" in problems[1]
    assert "accelerate 1.0 is not" in problems[0] and "run `make setup`" in problems[0]
    assert "make room in" in problems[2]


def test_the_check_without_the_library(monkeypatch, capsys):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "requires", requires)
    assert not environment.check_environment().ok
    assert "[!!] upcycling is not installed: run `make setup`" in capsys.readouterr().out


def test_fingerprint_repeats_and_leaves_random_numbers_alone():
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = environment.arithmetic_fingerprint()
    assert torch.equal(torch.rand(3), expected)
    assert environment.arithmetic_fingerprint() == first


@pytest.mark.skipif(sys.platform != "linux", reason="other builds of torch have one kernel only")
def test_fingerprint_sees_another_cpu():
    code = "from upcycling.environment import arithmetic_fingerprint as f; print(f())"
    env = dict(os.environ, ATEN_CPU_CAPABILITY="default")
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != environment.arithmetic_fingerprint()


def test_colab_keeps_its_torch(project):
    """The library comes without dependencies; those that are named are ours but for torch and the numpy it has."""
    lines = environment.COLAB_CELL.splitlines()
    guard = lines.index(next(line for line in lines if line.startswith("if ")))
    assert lines[guard].startswith('if "google.colab" in sys.modules:')
    assert all(line.startswith((" ", "import ")) or not line for line in lines[:guard] + lines[guard + 1 :])
    installs = [line.split("pip install -q ")[1] for line in lines if "pip install" in line]
    *named, library = installs
    assert library.startswith("--no-deps -e")
    ours = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    named = {requirement.name: requirement for requirement in map(Requirement, shlex.split(" ".join(named)))}
    assert set(named) == set(ours) - {"torch", "numpy"}
    for name, requirement in named.items():  # an older one that Colab has is replaced where ours would not do
        assert set(map(str, requirement.specifier)) <= set(map(str, ours[name].specifier)), name
    assert ">=" in str(named["transformers"].specifier), "router classes and tensor names are those of release 5"


def test_import_costs_little_more_than_torch():
    """The big libraries are imported where they are used: `import upcycling` loads none of them."""
    code = (
        "import sys, upcycling; print(sorted({'transformers', 'datasets', 'accelerate', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
