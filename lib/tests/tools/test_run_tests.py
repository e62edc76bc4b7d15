"""Which tier the notebooks are compared in, and that nothing that fails is lost."""

import os
import sys
from pathlib import Path

import pytest

import fingerprint
import run_tests

HERE = {"platform": "Linux x86_64", "torch": "2.13.0", "arithmetic": "abc", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    "stamps, wish, option, reason",
    [
        ([HERE, {**HERE, "numpy": "2.5"}], None, "--nbval", "same platform"),
        ([HERE, {**HERE, "arithmetic": "def"}], None, "--nbval-lax", "arithmetic def, here it is abc"),
        ([{**HERE, "platform": "Darwin arm64"}], "", "--nbval-lax", "platform Darwin arm64"),
        ([{**HERE, "torch": "2.12.0"}], None, "--nbval-lax", "torch 2.12.0"),
        ([{}], None, "--nbval-lax", "platform None"),
        ([{}], "1", "--nbval", "UPCYCLING_STRICT=1"),
        ([HERE], "0", "--nbval-lax", "UPCYCLING_STRICT=0"),
    ],
)
def test_tier(stamps, wish, option, reason):
    chosen, why = run_tests.tier(stamps, HERE, wish)
    assert chosen == option and reason in why


def test_unknown_tier_is_refused():
    with pytest.raises(ValueError, match="UPCYCLING_STRICT=yes is neither 0 nor 1"):
        run_tests.tier([HERE], HERE, "yes")


NAMES = ["ruff check", "ruff format", "mypy", "notebooks, empty cache", "notebooks, warm cache"]
NAMES += ["library", "core, kernels off", "core, other rounding", "notebooks, other rounding"]


@pytest.fixture
def started(monkeypatch):
    """What it starts, replaced by a Python that prints its cache's folder and exits with 1 if `fails` names it."""
    steps, fails = [], set()

    class Step(run_tests.Step):
        def __init__(self, name, command, environment, log=None):
            cache = environment.get("UPCYCLING_ARTIFACTS", "none")
            steps.append((name, command, environment))
            super().__init__(
                name, [sys.executable, "-c", f"print({cache!r}); raise SystemExit({name in fails})"], environment, log
            )

    monkeypatch.setattr(run_tests, "Step", Step)
    monkeypatch.setattr(run_tests, "choose_tier", lambda: ("--nbval-lax", "a test"))
    monkeypatch.setattr(run_tests, "fingerprint", lambda environment: environment.get("ATEN_CPU_CAPABILITY", "none"))
    monkeypatch.setattr(sys, "argv", ["run_tests.py"])
    return steps, fails


def test_notebooks_run_cold_and_warm_and_defaults_only(started, monkeypatch, capfd):
    settings = {"UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER"}
    monkeypatch.delenv("UPCYCLING_KERNELS", raising=False)
    for name in (*settings, "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "x")
    assert run_tests.main() == 0
    steps = {name: environment for name, _, environment in started[0]}
    assert sorted(steps) == sorted(NAMES)
    cold, warm = (steps[f"notebooks, {cache} cache"]["UPCYCLING_ARTIFACTS"] for cache in ("empty", "warm"))
    assert cold == warm != steps["library"]["UPCYCLING_ARTIFACTS"]
    for environment in steps.values():
        assert environment["OMP_NUM_THREADS"] and not settings & set(environment)
        assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert [name for name in steps if steps[name].get("UPCYCLING_KERNELS") == "0"] == ["core, kernels off"]
    assert steps["library"]["UPCYCLING_ARTIFACTS"] in capfd.readouterr().out  # its output is shown at the end
    commands = [command for name, command, _ in started[0] if name.startswith("notebooks")]
    assert all("--nbval-lax" in command and "--nbval-current-env" in command for command in commands)


@pytest.mark.parametrize("name", NAMES)
def test_any_failure_fails_and_the_rest_still_runs(started, capfd, name):
    steps, fails = started
    fails.add(name)
    assert run_tests.main() == 1
    assert len(steps) == len(NAMES)
    assert capfd.readouterr().out.count("FAILED") == 1


def test_other_rounding_is_another_arithmetic_with_a_cache_of_its_own(started, capfd):
    assert run_tests.main() == 0
    steps = {name: (command, environment) for name, command, environment in started[0]}
    for name in NAMES:
        command, environment = steps[name]
        assert (environment.get("ONEDNN_MAX_CPU_ISA") == "AVX2") == name.endswith("other rounding")
    command, environment = steps["notebooks, other rounding"]
    assert "--nbval-lax" in command and all(Path(path).exists() for path in command if path.endswith(".ipynb"))
    assert sum(path.endswith(".ipynb") for path in command) == len(run_tests.ROUNDED)
    assert environment["UPCYCLING_ARTIFACTS"] != steps["notebooks, empty cache"][1]["UPCYCLING_ARTIFACTS"]
    assert "ATEN_CPU_CAPABILITY=default" in capfd.readouterr().out


def test_where_the_variables_change_nothing_it_is_left_out_and_said(started, monkeypatch, capfd):
    monkeypatch.setattr(run_tests, "fingerprint", lambda environment: "the same")
    assert run_tests.main() == 0
    assert not any(name.endswith("other rounding") for name, _, _ in started[0])
    assert "changes no digit on this machine (the same)" in capfd.readouterr().out


@pytest.mark.parametrize("only", ["lint", "library", "notebooks", "rounding"])
def test_one_part_alone(started, monkeypatch, only):
    monkeypatch.setattr(sys, "argv", ["run_tests.py", "--only", only])
    assert run_tests.main() == 0
    parts = {
        "lint": ("ruff", "mypy"),
        "library": ("library", "kernels off"),
        "notebooks": ("cache",),
        "rounding": ("other rounding",),
    }
    assert [name for name, _, _ in started[0]] == [name for name in NAMES if any(part in name for part in parts[only])]


def test_the_fingerprint_is_that_of_a_process_with_the_variables():
    assert run_tests.fingerprint(dict(os.environ)) == fingerprint.arithmetic_fingerprint()
