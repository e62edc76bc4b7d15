"""Which tier the notebooks are compared in, and that nothing that fails is lost."""

import sys

import pytest

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
    monkeypatch.setattr(sys, "argv", ["run_tests.py"])
    return steps, fails


def test_notebooks_run_cold_and_warm_and_defaults_only(started, monkeypatch, capfd):
    settings = {"UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER"}
    for name in (*settings, "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "x")
    assert run_tests.main() == 0
    steps = {name: environment for name, _, environment in started[0]}
    names = ["ruff check", "ruff format", "library", "notebooks, empty cache", "notebooks, warm cache"]
    assert list(steps) == names
    cold, warm = (steps[f"notebooks, {cache} cache"]["UPCYCLING_ARTIFACTS"] for cache in ("empty", "warm"))
    assert cold == warm != steps["library"]["UPCYCLING_ARTIFACTS"]
    for environment in steps.values():
        assert environment["OMP_NUM_THREADS"] and not settings & set(environment)
        assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert steps["library"]["UPCYCLING_ARTIFACTS"] in capfd.readouterr().out  # its output is shown at the end
    commands = [command for name, command, _ in started[0] if name.startswith("notebooks")]
    assert all("--nbval-lax" in command and "--nbval-current-env" in command for command in commands)


@pytest.mark.parametrize("name", ["ruff check", "library", "notebooks, empty cache", "notebooks, warm cache"])
def test_any_failure_fails_and_the_rest_still_runs(started, capfd, name):
    steps, fails = started
    fails.add(name)
    assert run_tests.main() == 1
    assert len(steps) == 5
    assert capfd.readouterr().out.count("FAILED") == 1
