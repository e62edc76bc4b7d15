"""The house: which folder may import which, read from the imports themselves, those inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "upcycling"
FLOORS = (
    ("checks", "files", "tables"),
    ("environment",),
    ("kernels",),
    ("core", "text"),
    ("training",),
    ("decoding",),
    ("variants",),
    ("routing",),
    ("hf",),
    ("cost", "selection"),
    ("experiments",),
    ("show",),
    ("bench",),
    ("cli",),
    ("__main__", "__init__", "compare", "continued", "knockouts", "selected"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(library: Path) -> dict[str, Path]:
    """Dotted name below the library (a package is `folder.__init__`) -> file."""
    return {".".join(path.relative_to(library).with_suffix("").parts): path for path in sorted(library.rglob("*.py"))}


def imports(library: Path) -> dict[str, set[str]]:
    """Module -> the modules of the library that it imports, anywhere in its text but under TYPE_CHECKING."""
    files = modules(library)
    return {name: set(_imported(name, path.read_text(encoding="utf-8"), files)) for name, path in files.items()}


def _imported(name: str, text: str, files: dict[str, Path]):
    package = name.split(".")[:-1]
    for node in _nodes(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module == "upcycling" or node.module.startswith("upcycling."):
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                module = ".".join([*base, alias.name])
                if module not in files:
                    module = ".".join(base) if ".".join(base) in files else ".".join([*base, "__init__"])
                if module != name:
                    yield module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "upcycling":
                    yield ".".join(alias.name.split(".")[1:]) or "__init__"


def _nodes(node: ast.AST):
    """All nodes but those of `if TYPE_CHECKING:`, which no program runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child)


def upward(library: Path) -> list[str]:
    found = []
    for name, targets in imports(library).items():
        here = "__main__" if name.endswith("__main__") else name.split(".")[0]  # a command, whatever folder bears it
        for target in sorted(targets):
            there = target.split(".")[0]
            if there != here and not (FLOOR[there] < FLOOR[here]) and target != "__init__":
                found.append(f"{name} imports {target}, which lies no lower")
    return found


def circles(library: Path) -> list[str]:
    """Each strongly connected set of modules of more than one, as a sentence."""
    graph = imports(library)
    reach = {name: set(targets) for name, targets in graph.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach.get(target, set()) for target in targets)) - targets
            if more:
                targets |= more
                changed = True
    rings = {frozenset({b for b in reach[a] if a in reach.get(b, set())}) for a in reach if a in reach[a]}
    return [" <-> ".join(sorted(ring)) for ring in sorted(rings, key=sorted)]


def test_every_room_has_a_floor():
    rooms = {name.split(".")[0] for name in modules(LIBRARY)}
    assert rooms == set(FLOOR)


def test_no_folder_imports_one_above_it():
    assert upward(LIBRARY) == []


def test_no_two_modules_import_each_other():
    assert circles(LIBRARY) == []


@pytest.mark.parametrize(
    "text", ["from ..show import panel\n", "def f():\n    from upcycling.show.panel import Panel\n"]
)
def test_an_upward_arrow_is_found_and_named(tmp_path, text):
    for file, content in {"core/moe.py": text, "show/panel.py": "Panel = 1\n"}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert upward(tmp_path) == ["core.moe imports show.panel, which lies no lower"]


def test_a_circle_is_found_and_named(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("from .b import y\n")
    (tmp_path / "core/b.py").write_text("def f():\n    from .a import x\n")
    assert circles(tmp_path) == ["core.a <-> core.b"]
