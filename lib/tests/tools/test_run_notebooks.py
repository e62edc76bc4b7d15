"""The runner behind `make run` and `make notebooks`, on small notebooks."""

import re
import sys

import nbformat
import pytest

import run_notebooks

markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """notebooks/ of an otherwise empty project: one that works, one that fails, and one after it."""
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    for name in run_notebooks.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    result = tmp_path / "notebooks"
    result.mkdir()
    links = "[next](01_fails.ipynb), [code](../lib/x.py#L3), [paper](https://arxiv.org/abs/1)"
    text = f"# Works\n{links}, $f_i P_i$\n\n$$x^2$$"
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(2)):\n    print(i)"
    save(result, "00_works", markdown(text), code("import sys; sys.prefix"), code(bar))
    save(result, "01_fails", code("1 + 1"), markdown("text"), code("raise ValueError('top_k=9')"), code("2"))
    save(result, "02_after", code("import os; os.environ['OMP_NUM_THREADS']"))
    return result


def save(folder, name, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"language_info": {"version": "3.8"}, "widgets": {"state": {}}}
    notebook.cells = list(cells)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_run_goes_on_after_a_failure_and_names_it(folder, tmp_path, capsys):
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_notebooks.main(["--out", str(out)]) == 1
    table = capsys.readouterr().out.split("notebook ")[-1]
    assert re.search(
        r"00_works +\d+\.\d  ok\n01_fails +\d+\.\d  cell 2: ValueError: top_k=9\n02_after +\d+\.\d  ok", table
    )
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{kind}" for name in ("00_works", "01_fails", "02_after") for kind in ("ipynb", "html")
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    executed = nbformat.read(out / "00_works.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells[1:]] == [1, 2]
    assert sys.prefix in executed.cells[1].outputs[0].data["text/plain"]  # this Python, whatever kernels there are
    assert [output.output_type for output in executed.cells[2].outputs] == ["stream"]  # no bar that shows 0 % for ever

    page = (out / "00_works.html").read_text(encoding="utf-8")
    assert page.count("<math") == 2 and "$" not in re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    assert 'href="01_fails.html"' in page and 'href="../lib/x.py#L3"' in page and "https://arxiv.org/abs/1" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(https?:)?//", page)  # opens without a network
    assert "cdnjs" not in page and "unpkg" not in page


def test_save_keeps_what_failed_and_repeats_itself(folder):
    failed = (folder / "01_fails.ipynb").read_bytes()
    assert run_notebooks.main(["--save", "00", "01"]) == 1
    assert (folder / "01_fails.ipynb").read_bytes() == failed
    first = (folder / "00_works.ipynb").read_bytes()
    notebook = nbformat.reads(first.decode(), as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "upcycling"}
    assert {"torch", "arithmetic", "platform"} <= set(notebook.metadata["upcycling"])
    assert "version" not in notebook.metadata["language_info"]
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert b"\r" not in first and first.endswith(b"}\n")
    assert run_notebooks.main(["--save", "00"]) == 0
    assert (folder / "00_works.ipynb").read_bytes() == first
    assert not list(folder.glob("*.tmp"))


def test_dead_kernel_is_a_result(folder, capsys, tmp_path):
    save(folder, "03_dies", code("import os; os._exit(9)"))
    assert run_notebooks.main(["--out", str(tmp_path / "out"), "03"]) == 1
    assert "cell 1: the kernel died" in capsys.readouterr().out


def test_a_stray_kernel_is_not_used(folder, tmp_path, monkeypatch):
    """A `python3` that the user installed elsewhere would run the notebooks without this project's packages."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(
        '{"argv": ["no-such-python", "{connection_file}"], "display_name": "stray", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert run_notebooks.main(["--out", str(tmp_path / "out"), "02"]) == 0


def test_one_thread_and_settings_reach_the_kernel(folder, tmp_path, monkeypatch):
    corpus = tmp_path / "mine.txt"
    corpus.write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPCYCLING_CORPUS", "mine.txt")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    save(folder, "03_asks", code("import os; print(os.environ['UPCYCLING_CORPUS'], os.environ['OMP_NUM_THREADS'])"))
    assert run_notebooks.main(["--out", str(tmp_path / "out"), "03"]) == 0
    cell = nbformat.read(tmp_path / "out" / "03_asks.ipynb", as_version=4).cells[0]
    assert cell.outputs[0].text == f"{corpus} 1\n"


@pytest.mark.parametrize(
    "settings, arguments, sentence",
    [
        ({"UPCYCLING_CORPUS": "nowhere/x.txt"}, [], "UPCYCLING_CORPUS=nowhere/x.txt: no such file or folder"),
        ({"UPCYCLING_TOKENIZER": "tokenizer.json"}, [], "UPCYCLING_TOKENIZER=tokenizer.json: no such file or folder"),
        ({"UPCYCLING_PRESET": "laptop"}, ["--save"], "unset UPCYCLING_PRESET"),
        ({}, ["07"], "no notebook named '07'; there are 00_works, 01_fails, 02_after"),
    ],
)
def test_bad_wishes_are_refused_before_anything_runs(folder, monkeypatch, capsys, settings, arguments, sentence):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        run_notebooks.main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.ipynb"
    path.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_notebooks.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run_notebooks.write("new", path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_folded_in_a_notebook_is_folded_in_its_page(folder, tmp_path):
    text = "Predict.\n\n<details><summary>Answer</summary>\n\nIt is *seven*.\n</details>\n\nOn we go."
    page = run_notebooks.to_html(nbformat.v4.new_notebook(cells=[markdown(text)]), folder / "00_works.ipynb", tmp_path)
    folded = page.split("<details>")[1].split("</details>")[0]
    assert "<em>seven</em>" in folded and "On we go" not in folded
