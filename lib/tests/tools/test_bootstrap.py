"""The set-up: when it installs, which torch it takes, what it says when it cannot. Nothing is installed here."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """bootstrap.py as a module, in a folder of its own that has this project's requirements."""
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    environment = tmp_path / ".venv"
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "ENV", environment)
    monkeypatch.setattr(module, "PYTHON", environment / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", environment / "setup.json")
    monkeypatch.setattr(module, "UNFINISHED", environment / "setup-unfinished")
    for name in ("UPCYCLING_TORCH", "PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "prepare_browser", lambda: None)
    return module


@pytest.fixture
def installs(bootstrap, monkeypatch):
    """The arguments of every installation that a set-up asks for; all of them succeed, and the Python is this one."""
    asked = []

    def make_venv(uv):
        bootstrap.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        if not bootstrap.PYTHON.exists():
            bootstrap.PYTHON.symlink_to(sys.executable)

    def install(installer, arguments):
        asked.append([str(argument) for argument in arguments])
        return True, ""

    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "install", install)
    real = subprocess.run

    def run(command, **options):
        if "-c" in command or "pip" in command:  # the closing check, and pip's settings
            return subprocess.CompletedProcess(command, 0, b"", b"")
        return real(command, **options)

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    return asked


def pinned_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith("torch=="))


posix = pytest.mark.skipif(os.name == "nt", reason="makes a symbolic link")


@posix
def test_second_set_up_installs_nothing(bootstrap, installs):
    assert bootstrap.set_up() is True
    assert any("-r" in arguments for arguments in installs) and any("-e" in arguments for arguments in installs)
    installs.clear()
    assert bootstrap.set_up() is False
    assert installs == []


@posix
@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml", "python", "root", "environment"])
def test_a_change_installs_again(bootstrap, installs, changed):
    bootstrap.set_up()
    installs.clear()
    if changed == "requirements.txt":
        path = bootstrap.ROOT / changed
        path.write_text(path.read_text() + "another==1.0\n")
    elif changed == "pyproject.toml":
        path = bootstrap.ROOT / changed
        path.write_text(path.read_text().replace('"tqdm>=', '"another>=1",\n    "tqdm>='))
    elif changed == "environment":
        bootstrap.PYTHON.unlink()  # what an upgrade of the system's Python does
    else:
        stamp = json.loads(bootstrap.STAMP.read_text())
        bootstrap.STAMP.write_text(json.dumps({**stamp, changed: "another"}))
    assert bootstrap.set_up() is True
    assert installs


@posix
def test_other_settings_of_the_project_install_nothing(bootstrap, installs):
    bootstrap.set_up()
    path = bootstrap.ROOT / "pyproject.toml"
    path.write_text(path.read_text().replace("line-length = 120", "line-length = 119"))
    assert bootstrap.set_up() is False


@posix
def test_interrupted_set_up_is_done_again(bootstrap, installs, monkeypatch):
    def interrupted(installer, arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "install", interrupted)
        assert bootstrap.main(["setup"]) == 130
    assert bootstrap.UNFINISHED.exists() and not bootstrap.STAMP.exists()
    assert bootstrap.set_up() is True
    assert bootstrap.STAMP.exists() and not bootstrap.UNFINISHED.exists()


def test_half_made_environment_is_replaced(bootstrap, monkeypatch):
    """Killed while files were copied: what is there is not trusted."""
    made = []
    monkeypatch.setattr("venv.create", lambda *arguments, **options: made.append(options["clear"]))
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.write_text("")
    bootstrap.UNFINISHED.touch()
    bootstrap.make_venv("uv")
    assert made == [True]


@posix
def test_a_working_environment_is_kept(bootstrap, monkeypatch):
    monkeypatch.setattr("venv.create", lambda *arguments, **options: pytest.fail("was made anew"))
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.symlink_to(sys.executable)
    bootstrap.make_venv("uv")


@posix
@pytest.mark.parametrize(
    "output, sentence, starts_over",
    [
        ("Collecting torch\nNewConnectionError: Temporary failure in name resolution", "go online once", False),
        ("Installing collected packages\nOSError: [Errno 28] No space left on device", "the disk is full", True),
        ("ERROR: No matching distribution found for torch==2.13.0", "no file for this computer: ERROR", False),
        ("Installing collected packages\nsomething else", "the installer's last lines are above", True),
    ],
)
def test_failed_installation_is_explained(bootstrap, installs, monkeypatch, capsys, output, sentence, starts_over):
    monkeypatch.setattr(bootstrap, "install", lambda installer, arguments: (False, output))
    assert bootstrap.main(["setup"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("set-up stopped: ") and sentence in last
    assert bootstrap.UNFINISHED.exists() is starts_over and not bootstrap.STAMP.exists()


@posix
def test_disk_space_is_looked_at_first(bootstrap, installs, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "GIGABYTES_NEEDED", dict.fromkeys(("cpu", "cuda", "default"), 10**9))
    assert bootstrap.main(["setup"]) == 1
    assert "GB of disk are needed" in capsys.readouterr().err and installs == []
    assert not bootstrap.UNFINISHED.exists()


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 10, 0), (3, 15, 0)])
def test_unsuitable_python_is_named(bootstrap, version):
    with pytest.raises(bootstrap.SetupError, match=rf"Python 3\.11 to 3\.14 is needed, .* is 3\.{version[1]}"):
        bootstrap.check_python(version)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 2)])
def test_suitable_python(bootstrap, version):
    bootstrap.check_python(version)


def test_missing_venv_module_is_explained(bootstrap, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(bootstrap.SetupError, match="apt-get install python3-venv"):
        bootstrap.make_venv(None)


def test_old_pythons_can_read_the_file_and_complain():
    """Python 3.6 must get as far as the sentence about its age."""
    ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_only_the_standard_library_is_imported():
    tree = ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


# platform, GPU, a place for wheels in pip's settings, UPCYCLING_TORCH -> kind, index
TORCH = [
    ("linux", False, False, None, "cpu", "cpu"),
    ("linux", True, False, None, "cuda", None),
    ("linux", False, True, None, "default", None),
    ("linux", True, True, None, "cuda", None),
    ("linux", True, True, "cpu", "cpu", "cpu"),
    ("linux", False, False, "cuda", "cuda", None),
    ("linux", False, False, "default", "default", None),
    ("darwin", False, False, None, "default", None),
    ("win32", False, False, None, "cpu", None),
    ("win32", True, False, None, "cuda", "cu130"),
    ("win32", True, False, "cpu", "cpu", None),
]


@pytest.mark.parametrize("platform, gpu, find_links, choice, kind, index", TORCH)
def test_choice_of_torch(bootstrap, platform, gpu, find_links, choice, kind, index):
    assert bootstrap.choose_torch(choice, platform, gpu, find_links)[:2] == (kind, index)


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="the CPU index is for Linux")
def test_cpu_build_comes_first_and_alone(bootstrap, installs):
    bootstrap.set_up()
    first, second = installs[:2]
    assert f"torch=={pinned_torch()}+cpu" in first and "--no-deps" in first
    assert first[first.index("--index-url") + 1].endswith("/cpu")
    assert "--index-url" not in second and "-r" in second
    assert json.loads(bootstrap.STAMP.read_text())["torch"] == "cpu"


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="the CPU index is for Linux")
def test_unreachable_cpu_index_is_no_failure(bootstrap, installs, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "install", lambda installer, arguments: ("--index-url" not in arguments, ""))
    assert bootstrap.set_up() is True
    assert "taking the usual build" in capsys.readouterr().out
    assert json.loads(bootstrap.STAMP.read_text())["torch"] == "default"
    assert bootstrap.set_up() is False


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do the two builds share a version number")
def test_gpu_owner_gets_cuda(bootstrap, installs, monkeypatch):
    """`===` takes the version as text: no 2.13.0+cpu from a folder or from an earlier set-up stands in for it."""
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    bootstrap.set_up()
    assert f"torch==={pinned_torch()}" in installs[0]


@posix
def test_wish_holds_until_there_is_another(bootstrap, installs, monkeypatch):
    bootstrap.set_up()
    monkeypatch.setenv("UPCYCLING_TORCH", "default")
    assert bootstrap.set_up() is True
    assert bootstrap.set_up() is False
    monkeypatch.delenv("UPCYCLING_TORCH")
    assert bootstrap.set_up() is False


def test_unknown_wish_is_refused(bootstrap, monkeypatch, capsys):
    monkeypatch.setenv("UPCYCLING_TORCH", "gpu")
    assert bootstrap.main(["setup"]) == 1
    assert "UPCYCLING_TORCH=gpu is none of cpu, cuda, default" in capsys.readouterr().err


@posix
@pytest.mark.parametrize(
    "script, found", [("echo 'GPU 0: NVIDIA H200'", True), ("exit 9", False), ("echo none", False)]
)
def test_gpu_is_found_by_asking_the_driver(tmp_path, monkeypatch, script, found):
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert module.has_nvidia_gpu() is found


def test_environment_of_what_is_started(bootstrap):
    result = bootstrap.child_environment({"PYTHONDONTWRITEBYTECODE": "1", "PIP_FIND_LINKS": "/wheels", "A": "b"})
    assert result == {"PIP_FIND_LINKS": "/wheels", "UV_FIND_LINKS": "/wheels", "A": "b", "OMP_NUM_THREADS": "1"}
    assert bootstrap.child_environment({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


@posix
@pytest.mark.parametrize("name", ["lab", "run", "test", "bench", "notebooks"])
def test_commands_run_in_the_environment(bootstrap, installs, monkeypatch, name):
    called = []
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command, env: called.append(command) or 3)
    assert bootstrap.main([name, "--extra"]) == 3
    assert called[0][0] == str(bootstrap.PYTHON) and called[0][-1] == "--extra"
    target = called[0][1:3]
    assert target[0] == "-m" or Path(target[0]).exists()
    if target[0] == "-m":
        assert importlib.util.find_spec(target[1]) is not None


def test_unknown_command_explains_itself(bootstrap, capsys):
    assert bootstrap.main(["rnu"]) == 2
    assert "python bootstrap.py run" in capsys.readouterr().err


def test_makefile_is_thin(bootstrap):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert set(targets) == set(bootstrap.COMMANDS)
    assert [line for line in text.splitlines() if line.startswith("\t")] == ["\t@$(PYTHON) bootstrap.py $@ $(ARGS)"]


@pytest.fixture
def browsers(bootstrap, tmp_path, monkeypatch):
    """No browser anywhere; `commands` are what was started to get one, `works` names the one that brings chromium."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = tmp_path / "bin"
    here.mkdir()
    state = types.SimpleNamespace(module=module, commands=[], works=None, chromium=here / "chromium")

    def run(command, **options):
        state.commands.append(command)
        if state.works and state.works in command:
            program(state.chromium, "exit 0")
        status = 0 if Path(command[0]).name == "chromium" and "broken" not in state.chromium.read_text() else 1
        return subprocess.CompletedProcess(command, status, b"first line\nE: no network\n", b"")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "BROWSER_FILES", ())
    monkeypatch.setattr(module.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.delenv("CHROMIUM", raising=False)
    program(here / "apt-get", "exit 0")
    return state


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def asked(state, word):
    return [command for command in state.commands if word in command]


@posix
def test_browser_that_is_there_is_taken(browsers):
    program(browsers.chromium, "exit 0")
    assert browsers.module.prepare_browser() == str(browsers.chromium)
    assert not asked(browsers, "install")


@posix
def test_named_browser_comes_first_and_must_exist(browsers, tmp_path, monkeypatch):
    program(browsers.chromium, "exit 0")
    other = tmp_path / "other"
    monkeypatch.setenv("CHROMIUM", str(other))
    with pytest.raises(browsers.module.SetupError, match=r"CHROMIUM=.*other does not exist"):
        browsers.module.prepare_browser()
    program(other, "exit 0")
    assert browsers.module.prepare_browser() == str(other)


@posix
def test_root_gets_debians_browser(browsers, capsys):
    browsers.works = "fonts-liberation"
    assert browsers.module.prepare_browser() == str(browsers.chromium)
    assert asked(browsers, "update") and not asked(browsers, "playwright")


@posix
def test_who_cannot_use_apt_gets_playwrights(browsers, monkeypatch):
    monkeypatch.setattr(browsers.module.os, "geteuid", lambda: 1000)
    browsers.works = "playwright"
    assert browsers.module.prepare_browser() == str(browsers.chromium)
    assert not asked(browsers, "apt-get")


@posix
def test_something_that_is_no_browser_is_not_taken(browsers, capsys):
    program(browsers.chromium, "exit 1  # broken")
    assert browsers.module.prepare_browser() is None
    assert asked(browsers, "fonts-liberation") and asked(browsers, "playwright")


@posix
def test_no_browser_says_what_is_skipped_and_why(browsers, capsys):
    assert browsers.module.prepare_browser() is None
    said = capsys.readouterr().out
    assert "test_browser.py) will be skipped" in said and "playwright install chromium: E: no network" in said


@posix
@pytest.mark.parametrize(
    "arguments, prepared",
    [([], True), (["--only", "library"], True), (["--only", "lint"], False), (["--only", "notebooks"], False)],
)
def test_browser_is_prepared_for_the_tests_that_need_it(bootstrap, installs, monkeypatch, arguments, prepared):
    environments = []
    monkeypatch.setattr(bootstrap, "prepare_browser", lambda: "/a/browser")
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command, env: environments.append(env) or 0)
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert bootstrap.main(["test", *arguments]) == 0
    assert environments[0].get("CHROMIUM") == ("/a/browser" if prepared else None)
