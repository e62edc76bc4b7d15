"""`from upcycling import …`: the public names, for a program, an editor, a type checker and a reader."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

import upcycling

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "lib"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", README, re.S)
LONG = "compare(arms"  # the one recipe that trains for half an hour


def run(code: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(LIBRARY), "UPCYCLING_ARTIFACTS": str(folder / "artifacts")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ---------------------------------------------------------------------------------------------------------- a program


def test_the_import_loads_nothing_but_the_standard_library(tmp_path):
    code = (
        "import sys; before = set(sys.modules); import upcycling;"
        "new = {m.split('.')[0] for m in sys.modules} - before;"
        "print(sorted(new - sys.stdlib_module_names)); print([m for m in sys.modules if m.startswith('upcycling.')])"
    )
    assert run(code, tmp_path).split("\n")[:2] == ["['upcycling']", "[]"]


@pytest.mark.parametrize("name", upcycling.__all__)
def test_each_name_is_there(name):
    value = getattr(upcycling, name)
    assert getattr(value, "__name__", name) == name
    assert name in dir(upcycling)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(upcycling, "trian")
    with pytest.raises(ImportError, match="cannot import name 'trian' from 'upcycling'"):
        exec("from upcycling import trian")


# --------------------------------------------------------------------------------------- an editor and a type checker


@pytest.mark.parametrize("name", ["train", "upcycle", "generate", "convert", "TrainConfig"])
def test_an_editor_shows_the_signature(name):
    """jedi is what JupyterLab asks; it reads the files and runs nothing."""
    here = dict(project=jedi.Project(LIBRARY), environment=jedi.InterpreterEnvironment())
    (shown,) = jedi.Script(f"from upcycling import {name}\n{name}(", **here).get_signatures()
    assert [parameter.name for parameter in shown.params] == list(
        inspect.signature(getattr(upcycling, name)).parameters
    )


def test_an_editor_completes_the_names():
    here = dict(project=jedi.Project(LIBRARY), environment=jedi.InterpreterEnvironment())
    found = {completion.name for completion in jedi.Script("import upcycling\nupcycling.", **here).complete()}
    assert set(upcycling.__all__) <= found


def test_a_type_checker_knows_each_name(tmp_path):
    file = tmp_path / "seen.py"
    lines = [f"reveal_type(upcycling.{name})" for name in upcycling.__all__]
    file.write_text("import upcycling\n" + "\n".join(lines) + "\nupcycling.trian\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MYPYPATH": "lib"})
    revealed = re.findall(r'Revealed type is "(.*)"', result.stdout)
    assert len(revealed) == len(upcycling.__all__), result.stdout + result.stderr
    assert [name for name, seen in zip(upcycling.__all__, revealed) if seen == "Any"] == []
    assert result.stdout.count("error:") == 1 and 'no attribute "trian"' in result.stdout


# ------------------------------------------------------------------------------------------------------------ a reader


def test_each_name_is_used_in_a_notebook_or_in_readme():
    code = "\n".join(RECIPES)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code += "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    words = set(re.findall(r"\w+", code))
    assert set(upcycling.__all__) - words == set(), "use it, or take it off the list in upcycling/__init__.py"


def test_the_recipe_that_takes_long_has_its_imports(tmp_path):
    (recipe,) = [recipe for recipe in RECIPES if LONG in recipe]
    run("\n".join(re.findall(r"^from .*$", recipe, re.M)), tmp_path)


@pytest.mark.slow
def test_the_recipes_run_as_pasted(tmp_path):
    printed = run("\n".join(recipe for recipe in RECIPES if LONG not in recipe), tmp_path)
    assert "same function" in printed and "LlamaForCausalLM -> MixtralForCausalLM" in printed
    assert {"moe.safetensors", "routing.html", "dense", "moe"} <= {path.name for path in tmp_path.iterdir()}
