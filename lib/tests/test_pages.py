"""Each folder has a page that names its modules, at most ten of them; the evening path is short, and in README."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "lib" / "upcycling"
FOLDERS = sorted(path.parent for path in LIBRARY.rglob("*/__init__.py"))
PATH = [
    *(f"core/{name}.py" for name in ["config", "routing", "balance", "experts", "moe", "model"]),
    *(f"core/{name}.py" for name in ["initialisation", "transfer", "equivalence", "routers"]),
    *("text/tokenizer.py", "text/stream.py"),
    *("training/config.py", "training/optim.py", "training/loop.py"),
]


def modules(folder):
    return sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def problems(folder, page):
    """Sentences about what is wrong with a folder's page."""
    found = []
    if not 6 <= len(page.strip().splitlines()) <= 24:
        found.append(f"{len(page.strip().splitlines())} lines, not 6 to 24")
    if not re.search(r"\b(never|nothing|no)\b", page, re.I):
        found.append("does not say what may never come in")
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+)(?:\.py)?`|^ {4}(\w+)  ", page, re.M))
    named = {name for pair in named for name in pair}
    found += [f"does not name {path.stem}" for path in modules(folder) if path.stem not in named]
    for target in re.findall(r"`([\w/]+(?:\.py|/))`", page):
        if not any((base / target).exists() for base in (folder, folder.parent, LIBRARY)):
            found.append(f"names {target}, which is gone")
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(LIBRARY).as_posix())
def test_a_folder_has_its_page_and_at_most_ten_modules(folder):
    page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert problems(folder, page) == []
    # shards stands beside the ten of the evening path
    assert len(modules(folder)) <= (11 if folder.name == "core" else 10)


def test_what_a_page_lacks_is_found(tmp_path):
    (tmp_path / "moe.py").write_text("")
    page = "Layers.\n" * 6 + "Nothing else: `moe.py`."
    assert problems(tmp_path, page) == []
    assert problems(tmp_path, "Layers: `gone.py`, `away/`") == [
        "1 lines, not 6 to 24", "does not say what may never come in", "does not name moe",
        "names gone.py, which is gone", "names away/, which is gone",
    ]  # fmt: skip


def test_the_evening_path_is_all_of_the_core_and_under_3000_lines():
    assert {f"core/{path.name}" for path in modules(LIBRARY / "core")} - set(PATH) == {"core/shards.py"}
    assert sum(lines(LIBRARY / path) for path in PATH) < 3000


def test_the_evening_path_is_in_readme_in_order_with_its_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## The code in one evening") :].split("\n## ")[0]
    rows = re.findall(r"\]\(lib/upcycling/([\w/]+\.py)\) \| (\d+) \|", section)
    assert [path for path, _ in rows] == PATH
    stale = [path for path, stated in rows if abs(int(stated) - lines(LIBRARY / path)) > 20]
    assert stale == [], "give their lines anew, rounded to tens"


def test_the_links_in_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    assert len(targets) > 20
    assert [target for target in sorted(targets) if not (ROOT / target).exists()] == []


def test_the_modules_that_readme_says_a_notebook_shows_exist():
    rows = re.findall(r"^\| \d\d \|.*\| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(rows) == len(list((ROOT / "notebooks").glob("*.ipynb"))) and len(named) > 15
    paths = [LIBRARY / name.replace(".", "/") for name in named]
    assert [str(path) for path in paths if not (path.is_dir() or path.with_suffix(".py").exists())] == []
