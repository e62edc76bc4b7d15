"""The saved notebooks are what a reader should get, and nbval really compares them.

The rules are in `problems`; each of them is tried on a small notebook with that one defect. The canaries show that one
wrong digit in a saved output makes nbval fail, on small notebooks and on what the real ones saved.
"""

import ast
import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types

import nbformat
import pytest
from cells import CHECK, COLAB_CELL, NOTEBOOKS, ROOT, code_cell, tags, text_of, without_magics
from nbval.plugin import get_sanitize_patterns

CHECKED_CELLS = 6
MACHINE_PATH = re.compile(r"(?<![\w.:/])(/home/|/root/|/Users/|/work/|/tmp/|/private/|[A-Z]:\\)\w")
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:href|src)=\"([^\"]+)\"")


def defined_classes(source):
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


@functools.cache
def library_classes():
    files = (ROOT / "lib" / "upcycling").rglob("*.py")
    return set().union(*(defined_classes(file.read_text(encoding="utf-8")) for file in files))


def problems(notebook, path):
    """Sentences about what is wrong with a notebook that is, or would be, saved at `path`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    found = []

    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernelspec is not python3")
    if "widgets" in notebook.metadata:
        found.append("widget state is saved")
    if "arithmetic" not in notebook.metadata.get("upcycling", {}):
        found.append("no stamp of the versions it ran with; save with `make notebooks`")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not saved executed 1..n in order; save with `make notebooks`")
    if not 40 <= len(notebook.cells) <= 90:
        found.append(f"{len(notebook.cells)} cells, not 40 to 90")
    words = sum(len(re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "]", source))) for source in prose)  # no addresses
    if not 900 <= words <= 3000:
        found.append(f"{words} words of prose, not 900 to 3000")
    if not code or COLAB_CELL not in code[0].source:
        found.append("the first code cell does not hold COLAB_CELL")

    for number, cell in enumerate(code, 1):
        where = f"code cell {number}"
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and "raises-exception" not in tags(cell):
            found.append(f"{where} ends in {errors[0].ename} without the tag raises-exception")
        if "raises-exception" in tags(cell) and not errors:
            found.append(f"{where} is tagged raises-exception and raises nothing")
        if "nbval-skip" in tags(cell) or "NBVAL_SKIP" in cell.source:
            found.append(f"{where} is skipped by nbval")
        if CHECK in tags(cell) and not text_of(cell):
            found.append(f"{where} is tagged {CHECK} and has no text to compare")
        if re.search(r"^print\(", cell.source, re.M) and not cell.outputs:
            found.append(f"{where} prints and has no saved output")
        if len(cell.source.splitlines()) > 25:
            found.append(f"{where} has {len(cell.source.splitlines())} lines, not at most 25")
        if not cell.source.strip():
            found.append(f"{where} is empty")
        for name in defined_classes(without_magics(cell.source)) & library_classes():
            found.append(f"{where} defines class {name}, which the library has")
        for output in cell.outputs:
            if len(json.dumps(output)) > 300_000:
                found.append(f"{where} has an output of {len(json.dumps(output)) // 1000} kB, not at most 300")
            if MACHINE_PATH.search(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))):
                found.append(f"{where} shows a path of the machine it ran on")
    checked = sum(CHECK in tags(cell) and bool(text_of(cell)) for cell in code)
    if checked < CHECKED_CELLS:
        found.append(f"{checked} cells are tagged {CHECK}, not at least {CHECKED_CELLS}")

    for source in prose:
        for match in LINK.finditer(re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.S)):
            target = (match[1] or match[2]).split("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                found.append(f"the link to {target} leads nowhere")

    first, last = notebook.cells[0], notebook.cells[-1]
    start = first.source.lower() if first.cell_type == "markdown" else ""
    if not start.startswith("# "):
        found.append("the first cell does not begin with a title")
    found += [
        f"the first cell does not say {word!r}" for word in ("do", "learn", "need", "minutes") if word not in start
    ]
    names = [other.name for other in NOTEBOOKS]
    if path.name in names:
        at = names.index(path.name)
        neighbours = names[max(at - 1, 0) : at] + names[at + 1 : at + 2]
        found += [f"the first cell has no link to {name}" for name in neighbours if f"({name})" not in first.source]
    end = last.source.lower() if last.cell_type == "markdown" else ""
    found += [f"the last cell does not say {word!r}" for word in ("know", "exercise", "read") if word not in end]
    return found


def test_there_are_notebooks_in_order():
    assert NOTEBOOKS
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers[0] == "00" and all(number.isdigit() for number in numbers)
    assert len(set(numbers)) == len(numbers), "two notebooks have one number"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.read_bytes().count(b"\r") == 0
    found = problems(notebook, path)
    assert not found, "\n".join(found)


def test_saved_by_the_same_versions():
    """One `make notebooks` saved them all: numbers quoted across notebooks come from one series."""
    stamps = {json.dumps(nbformat.read(path, as_version=4).metadata.get("upcycling")) for path in NOTEBOOKS}
    assert len(stamps) == 1


# names of the library


def unknown_names(notebook):
    """Names of the library that a notebook imports, or reads from a module that it imports, and that are not there."""
    modules, missing = {}, []
    trees = [ast.parse(without_magics(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "upcycling":
            continue
        namespace = {}
        try:
            exec(ast.unparse(node), namespace)
        except ImportError as error:
            missing.append(str(error))
        modules.update({name: value for name, value in namespace.items() if isinstance(value, types.ModuleType)})
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                missing.append(f"{module.__name__} has no {node.attr}")
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_of_the_library_exist(path):
    """Found in a second, what executing the notebooks would find in minutes."""
    assert not unknown_names(nbformat.read(path, as_version=4))


def test_an_unknown_name_is_found():
    notebook = nbformat.v4.new_notebook()
    source = "from upcycling import train, nothing\nfrom upcycling.core import moe\nmoe.nothing, moe.MoELayer"
    notebook.cells = [code_cell(source)]
    first, second = unknown_names(notebook)
    assert "nothing" in first and second == "upcycling.core.moe has no nothing"


# numbers in the prose


def numbers_in(text):
    """The decimal fractions in a text, as written."""
    return re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.]*\d)", text)


def unprinted_numbers(notebook):
    """Decimal fractions in the prose that no checked cell prints, rounded as the prose rounds them.

    A number also counts as explained when code sets it, and in a paragraph that cites where it is from with a link.
    """
    missing, printed, code = [], [], ""
    pending = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code += cell.source
            if CHECK in tags(cell):
                printed += [float(number) for number in numbers_in(text_of(cell))]
            continue
        for paragraph in re.split(r"\n\s*\n", cell.source):
            if "](http" in paragraph or paragraph.lstrip().startswith("#"):
                continue
            pending += [(number, cell.source[:40]) for number in numbers_in(re.sub(r"`[^`]*`", "", paragraph))]
    for number, where in pending:
        digits = len(number.split(".")[1])
        close = any(abs(value - float(number)) <= 0.5001 * 10**-digits for value in printed)
        if not close and number.lstrip("-") not in code:
            missing.append(f"{number} in {where!r}")
    return missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_in_the_prose_are_printed_by_checked_cells(path):
    assert not unprinted_numbers(nbformat.read(path, as_version=4))


# the rules themselves


@pytest.fixture
def sound():
    """A notebook that breaks no rule."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3"}, "upcycling": {"arithmetic": "0"}}
    notebook.cells = [nbformat.v4.new_markdown_cell("# Title\ndo, learn, need, 1 minutes " + "word " * 900)]
    notebook.cells += [code_cell(COLAB_CELL, number=1)]
    notebook.cells += [code_cell("print(2 / 3)", f"{2 / 3}\n", number, checked=True) for number in range(2, 8)]
    notebook.cells += [nbformat.v4.new_markdown_cell("a paragraph") for _ in range(31)]
    notebook.cells += [nbformat.v4.new_markdown_cell("You know; exercises; read")]
    return notebook


def error(notebook):
    notebook.cells[2].outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]))


DEFECTS = {
    "kernelspec": lambda nb: nb.metadata["kernelspec"].update(name="conda"),
    "widget state": lambda nb: nb.metadata.update(widgets={}),
    "no stamp": lambda nb: nb.metadata.pop("upcycling"),
    "executed": lambda nb: nb.cells[3].update(execution_count=None),
    "cells, not 40": lambda nb: nb.cells.pop(20),
    "words of prose": lambda nb: nb.cells[0].update(source="# Title\ndo learn need minutes"),
    "COLAB_CELL": lambda nb: nb.cells[1].update(source="import sys"),
    "without the tag raises-exception": error,
    "raises nothing": lambda nb: nb.cells[2].metadata["tags"].append("raises-exception"),
    "skipped by nbval": lambda nb: nb.cells[2].metadata["tags"].append("nbval-skip"),
    "no text to compare": lambda nb: nb.cells[2].outputs.clear(),
    "prints and has no saved output": lambda nb: nb.cells[2].outputs.clear(),
    "lines, not at most 25": lambda nb: nb.cells[2].update(source="x = 1\n" * 26),
    "is empty": lambda nb: nb.cells[2].update(source=" "),
    "which the library has": lambda nb: nb.cells[2].update(source="%time\nclass EnvironmentReport:\n    pass"),
    "kB, not at most": lambda nb: nb.cells[2].outputs[0].update(text="x" * 300_001),
    "path of the machine": lambda nb: nb.cells[2].outputs[0].update(text="saved /home/me/x"),
    "not at least 6": lambda nb: nb.cells[2].metadata["tags"].clear(),
    "leads nowhere": lambda nb: nb.cells[10].update(source="see [it](../lib/nothing.py)"),
    "begin with a title": lambda nb: nb.cells[0].update(source=nb.cells[0].source[2:]),
    "does not say 'minutes'": lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("minutes", "")),
    "does not say 'exercise'": lambda nb: nb.cells[-1].update(source="you know; read"),
}


def test_a_sound_notebook_has_no_problems(sound):
    assert problems(sound, ROOT / "notebooks" / "x.ipynb") == []


@pytest.mark.parametrize("expected", DEFECTS)
def test_each_defect_is_found(sound, expected):
    DEFECTS[expected](sound)
    assert any(expected in problem for problem in problems(sound, ROOT / "notebooks" / "x.ipynb"))


def test_numbers_without_a_source_are_found():
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        code_cell("print(1)", "loss 0.7468", 1, checked=True),
        code_cell("print(1)", "loss 0.9999", 2),
        nbformat.v4.new_markdown_cell(
            "The loss is 0.747, or 0.75; it was 3.14.\n\n[They](https://x.org) saw 6.7. `0.5`"
        ),
        nbformat.v4.new_markdown_cell("Untagged: 0.9999"),
    ]
    assert [line.split()[0] for line in unprinted_numbers(notebook)] == ["3.14", "0.9999"]


# canaries


def doctored(text):
    """The text with one of its digits changed, for every digit."""
    for match in re.finditer(r"\d", text):
        yield text[: match.start()] + str((int(match[0]) + 1) % 10) + text[match.end() :]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_changed_digit_in_the_saved_outputs_is_not_sanitised_away(path):
    """In at least six checked cells of each notebook nbval sees every digit of a number change."""
    patterns = get_sanitize_patterns((ROOT / "notebooks" / "sanitize.cfg").read_text(encoding="utf-8"))

    def seen(text):
        for pattern, replacement in patterns:
            text = re.sub(pattern, replacement, text)
        return text

    count = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and CHECK in tags(cell):
            text = text_of(cell)
            count += any(seen(changed) != seen(text) for changed in doctored(text))
    assert count >= CHECKED_CELLS


def run_nbval(folder, option):
    """(exit status, notebooks with a failed cell, output)."""
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(ROOT / "notebooks" / name, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", option, "--nbval-current-env"]
    command += ["--nbval-sanitize-with=sanitize.cfg", "--tb=no", "-rf", "."]
    paths = os.pathsep.join(filter(None, (str(ROOT / "tools"), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, PYTHONPATH=paths)  # conftest.py needs run_notebooks
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return (
        result.returncode,
        sorted(set(re.findall(r"FAILED (\w+)\.ipynb", result.stdout))),
        result.stdout + result.stderr,
    )


def save(folder, name, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = list(cells)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_canary_one_wrong_digit_fails(tmp_path):
    source = "print(f'{2 / 3:.4f} nats after 3.1 s')"
    right, wrong, slower = "0.6667 nats after 3.1 s\n", "0.6668 nats after 3.1 s\n", "0.6667 nats after 9.9 s\n"
    save(tmp_path, "right", code_cell(source, right, 1, checked=True))
    save(tmp_path, "slower", code_cell(source, slower, 1, checked=True))
    save(tmp_path, "wrong", code_cell(source, wrong, 1, checked=True))
    save(tmp_path, "wrong_unchecked", code_cell(source, wrong, 1))
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(2)):\n    print(i)"
    save(tmp_path, "bar", code_cell(bar, "0\n1\n", 1, checked=True))

    status, failed, output = run_nbval(tmp_path, "--nbval")
    assert (status, failed) == (1, ["wrong", "wrong_unchecked"]), output
    status, failed, output = run_nbval(tmp_path, "--nbval-lax")
    assert (status, failed) == (1, ["wrong"]), output
    assert "compared the text of 1 cells of right.ipynb" in output


@pytest.mark.parametrize("option", ["--nbval", "--nbval-lax"])
def test_canary_a_run_that_compared_nothing_fails(tmp_path, option):
    """nbval itself passes a stripped notebook: it compares no cell whose execution count is null."""
    save(tmp_path, "stripped", code_cell("print(1)", checked=True))
    status, failed, output = run_nbval(tmp_path, option)
    assert "1 passed" in output and not failed
    assert status == 1 and "compared nothing" in output


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
def test_canary_in_a_real_notebook(tmp_path, monkeypatch):
    """The first notebook up to its first checked number: as saved it passes, with one digit changed it fails."""
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "artifacts"))
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    end = next(
        index
        for index, cell in enumerate(notebook.cells)
        if CHECK in (cell.metadata.get("tags") or []) and re.search(r"\d\.\d", text_of(cell))
    )
    notebook.cells = notebook.cells[: end + 1]
    wrong = copy.deepcopy(notebook)
    for output in wrong.cells[end].outputs:
        if output.output_type == "stream":
            output.text = re.sub(r"(\d\.)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), output.text)
        elif "text/plain" in output.get("data", {}):
            plain = output.data["text/plain"]
            output.data["text/plain"] = re.sub(r"(\d\.)(\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), plain)
    folder = tmp_path / "copies"
    folder.mkdir()
    nbformat.write(notebook, folder / "as_saved.ipynb")
    nbformat.write(wrong, folder / "wrong_digit.ipynb")
    status, failed, output = run_nbval(folder, "--nbval-lax")
    assert (status, failed) == (1, ["wrong_digit"]), output
