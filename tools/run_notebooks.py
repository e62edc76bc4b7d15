"""Executes the notebooks in order, without a browser.

    python tools/run_notebooks.py [--out DIR] [NOTEBOOK...]    executed copies and HTML pages, into artifacts/run/
    python tools/run_notebooks.py --save [NOTEBOOK...]         saves the outputs into the notebooks themselves

A notebook that fails does not stop the others; the exit status is then 1. UPCYCLING_PRESET, UPCYCLING_CORPUS and
UPCYCLING_TOKENIZER reach the notebooks; outputs are saved only without them: readers and tests see the defaults.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
WIDGET = "application/vnd.jupyter.widget-view+json"
SETTINGS = ("UPCYCLING_PRESET", "UPCYCLING_CORPUS", "UPCYCLING_TOKENIZER")
SECONDS_BETWEEN_LINES = 20.0  # of progress, where there is no terminal to overwrite one


def find_notebooks(names: list[str]) -> list[Path]:
    """The series' notebooks in order, or those whose names start with one of `names` (such as "03").

    Raises FileNotFoundError when a name matches none.
    """
    everything = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not everything:
        raise FileNotFoundError(f"no notebooks in {ROOT / 'notebooks'}")
    if not names:
        return everything
    chosen = set()
    for name in names:
        matches = [path for path in everything if path.name.startswith(Path(name).name)]
        if not matches:
            raise FileNotFoundError(f"no notebook named {name!r}; there are {', '.join(p.stem for p in everything)}")
        chosen.update(matches)
    return sorted(chosen)


class Progress:
    """One line that says where a notebook is: overwritten on a terminal, else written now and then."""

    def __init__(self, name: str, cells: int):
        self.name, self.cells, self.started, self.shown = name, cells, time.monotonic(), time.monotonic()
        self.live = sys.stdout.isatty()

    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def show(self, cell: int) -> None:
        seconds = int(time.monotonic() - self.started)
        text = f"{self.name}: cell {cell}/{self.cells}, {seconds // 60}:{seconds % 60:02d}"
        if self.live:
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif time.monotonic() - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            print(text, flush=True)

    def close(self, result: str) -> None:
        start = "\r\x1b[K" if self.live else ""
        print(f"{start}{self.name}: {result}, {self.minutes():.1f} min", flush=True)


def execute(notebook, folder: Path, progress: Progress) -> str:
    """Runs all cells of a notebook in `folder` with this Python and fills in the outputs; "ok", or what went wrong."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    class ThisPython(KernelSpecManager):
        """Whatever kernels the user has installed, the notebooks run with the Python that runs this."""

        def get_kernel_spec(self, kernel_name):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
            return KernelSpec(argv=command, display_name=KERNELSPEC["display_name"], language="python")

    cells = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for index in cells:
        notebook.cells[index].update(outputs=[], execution_count=None)
    position = {index: number for number, index in enumerate(cells, 1)}
    running = 0

    def started(cell, cell_index):
        nonlocal running
        running = position.get(cell_index, running)
        progress.show(running)

    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
        timeout=None,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=started,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        value = error.evalue.strip().splitlines()
        return f"cell {running}: {error.ename}: {value[0] if value else ''}"
    except DeadKernelError:
        return f"cell {running}: the kernel died (out of memory?)"
    return "ok"


def is_progress_bar(output) -> bool:
    """True for the output that a tqdm bar leaves: saved, it would show 0 % for ever."""
    data = output.get("data", {})
    return WIDGET in data and re.search(r"\d+%\|", "".join(data.get("text/plain", ""))) is not None


def tidy(notebook, stamp: dict[str, str] | None = None) -> None:
    """Leaves nothing in an executed notebook that would differ when it is executed again."""
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    if stamp:
        notebook.metadata["upcycling"] = stamp
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not is_progress_bar(output)]
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                output["data"][WIDGET]["model_id"] = "0" * 32


def write(text: str, path: Path) -> None:
    """Writes a text file so that either the old or the new one is there, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def to_html(notebook, source: Path, out: Path) -> str:
    """The notebook as one HTML page that needs no network: formulas as MathML, no scripts from elsewhere.

    Links between notebooks lead to their pages; other relative links of `source` are rewritten for the folder `out`.
    """
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body):
            return convert(body)

        def block_math(self, body):
            return convert(body, display="block")

        def block_html(self, html):  # to embed images it parses each piece alone, which would close a <details> at once
            return super().block_html(html) if "<img" in html else html

    template = "{% extends 'lab/index.html.j2' %}" + "".join(
        "{% block html_head_js" + name + " %}{% endblock %}" for name in ("", "_mathjax", "_mermaidjs")
    )
    exporter = HTMLExporter(raw_template=template, embed_images=True)
    exporter.register_filter(
        "markdown2html",
        lambda text: MarkdownWithMath(
            renderer=Renderer(escape=False, embed_images=True, path=str(source.parent))
        ).render(text),
    )
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": source.stem, "path": str(source.parent)}})

    def relink(match):
        before, target, rest = match.groups()
        if "/" not in target and target.endswith(".ipynb"):
            return f"{before}{target[:-6]}.html{rest}"
        return before + Path(os.path.relpath(source.parent / target, out)).as_posix() + rest

    return re.sub(r'(<a [^>]*?href=")(?![a-z]+:|#|/)([^"#]+)((?:#[^"]*)?")', relink, page)


def run(paths: list[Path], out: Path | None) -> list[tuple[str, float, str]]:
    """Executes the notebooks one after the other; rows of (name, minutes, "ok" or the error).

    out: folder for executed copies and HTML pages; None saves the outputs into the notebooks, only of those that ran.
    """
    import nbformat

    stamp = None
    if out is None:
        from fingerprint import provenance

        stamp = provenance()
    rows = []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        progress = Progress(path.stem, sum(cell.cell_type == "code" for cell in notebook.cells))
        try:
            result = execute(notebook, path.parent, progress)
            tidy(notebook, stamp)
            if out is not None:
                write(nbformat.writes(notebook) + "\n", out / path.name)
                write(to_html(notebook, path, out), out / f"{path.stem}.html")
            elif result == "ok":
                write(nbformat.writes(notebook) + "\n", path)
        except KeyboardInterrupt:
            progress.close("interrupted")
            rows.append((path.stem, progress.minutes(), "interrupted"))
            break
        progress.close(result)
        rows.append((path.stem, progress.minutes(), result))
    return rows


def table(rows: list[tuple[str, float, str]]) -> str:
    width = max(len("notebook"), *(len(name) for name, _, _ in rows))
    lines = [f"{'notebook':{width}}  minutes  result", f"{'-' * width}  -------  ------"]
    lines += [f"{name:{width}}  {minutes:7.1f}  {result}" for name, minutes, result in rows]
    return "\n".join([*lines, f"{'total':{width}}  {sum(row[1] for row in rows):7.1f}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_notebooks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="beginning of a name, such as 03; default: all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts" / "run", help="folder of the executed copies")
    parser.add_argument("--save", action="store_true", help="save the outputs into the notebooks instead")
    options = parser.parse_args(arguments)

    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    for name in SETTINGS[1:]:
        value = settings.get(name, "")
        if Path(value).suffix or "/" in value or os.sep in value:  # a file or folder, not the name of something known
            if not Path(value).exists():
                parser.error(f"{name}={value}: no such file or folder")
            os.environ[name] = str(Path(value).resolve())  # the kernels run in another folder
    if options.save and settings:
        parser.error(f"outputs are saved with the default settings only: unset {', '.join(settings)}")
    try:
        paths = find_notebooks(options.notebooks)
    except FileNotFoundError as error:
        parser.error(str(error))
    if settings:
        print(", ".join(f"{name}={value}" for name, value in settings.items()))
    rows = run(paths, None if options.save else options.out)
    print(f"\n{table(rows)}")
    if not options.save:
        print(f"copies and pages: {options.out}")
    return 0 if all(result == "ok" for _, _, result in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
