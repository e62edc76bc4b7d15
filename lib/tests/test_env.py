"""requirements.txt, environment.yml and pyproject.toml agree; the pins agree with one another on every platform."""

import ast
import importlib.metadata as metadata
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from cells import COLAB_CELL
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from upcycling import environment
from upcycling.experiments.series import artifacts_dir

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


def test_colab_keeps_its_torch_within_the_bounds(project):
    """One pip line: the bounds of pyproject.toml, nothing replaced that they admit, and torchvision in step."""
    lines = COLAB_CELL.splitlines()
    guard = lines.index(next(line for line in lines if line.startswith("if ")))
    assert lines[guard].startswith('if "google.colab" in sys.modules:')
    assert all(line.startswith((" ", "import ")) or not line for line in lines[:guard] + lines[guard + 1 :])
    (install,) = [line.split("pip install ")[1] for line in lines if "pip install" in line]
    assert shlex.split(install) == ["-q", "-e", "/content/upcycling", "torchvision"]
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert not bounds["torch"].contains("2.14.0") and not bounds["torch"].contains("3.0")
    for name, version in {
        "ipython": "7.34.0",
        "ipywidgets": "7.7.1",
        "numpy": "2.0.2",
        "pandas": "2.2.2",
        "psutil": "5.9.5",
    }.items():
        assert bounds[name].contains(version), f"Colab's {name} {version} would be replaced under the running kernel"


def checkout(folder, name="upcycling"):
    (folder / "notebooks" / "results").mkdir(parents=True)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text().replace('"upcycling"', f'"{name}"', 1))
    return folder


def test_a_clone_keeps_what_its_own_notebooks_make(tmp_path, monkeypatch):
    """Whatever environment runs them: here the library itself lies in another checkout."""
    clone = checkout(tmp_path / "clone")
    monkeypatch.delenv("UPCYCLING_ARTIFACTS", raising=False)
    for folder in (clone, clone / "notebooks", clone / "notebooks" / "results"):
        monkeypatch.chdir(folder)
        assert environment.project_folder() == clone
        assert artifacts_dir() == clone / "artifacts"
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "elsewhere"))
    assert artifacts_dir() == tmp_path / "elsewhere"


def test_outside_a_checkout_the_working_folder_is_the_place(tmp_path, monkeypatch):
    monkeypatch.delenv("UPCYCLING_ARTIFACTS", raising=False)
    other_project = checkout(tmp_path / "other", name="another")
    for folder in (tmp_path, other_project, other_project / "notebooks"):
        monkeypatch.chdir(folder)
        assert artifacts_dir() == folder / "artifacts"


def imported(folder):
    """Top-level names that the modules of a folder import, those inside functions too -> one file that does."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: path for name in names}
    return found


def test_what_is_imported_is_declared(project):
    extras = project["optional-dependencies"]
    library = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    everything = library | {canonicalize_name(Requirement(line).name) for line in extras["dev"]}
    packages = metadata.packages_distributions()
    own = {"upcycling"} | {path.stem for place in ("tools", "lib/tests") for path in (ROOT / place).rglob("*.py")}
    for folder, declared in (
        (ROOT / "lib" / "upcycling", library),
        (ROOT / "tools", everything),
        (ROOT / "lib" / "tests", everything),
    ):
        own = {path.stem for place in ("lib", "tools", "lib/tests") for path in (ROOT / place).rglob("*.py")} | {
            "upcycling"
        }
        for name, path in imported(folder).items():
            if name in sys.stdlib_module_names or name in own:
                continue
            candidates = {canonicalize_name(package) for package in packages.get(name, [name])}
            assert candidates & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"


def test_import_costs_little_more_than_torch():
    """The big libraries are imported where they are used: `import upcycling` loads none of them."""
    code = (
        "import sys, upcycling; print(sorted({'transformers', 'datasets', 'accelerate', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
