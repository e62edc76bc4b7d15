"""The saved notebooks and their cells, for the tests that read them."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECK = "nbval-check-output"

# The first code cell of every notebook. pip leaves alone what Colab has within pyproject.toml's bounds. torchvision is
# named since each of its releases fits one torch only, and transformers imports it where it finds it.
COLAB_CELL = """\
import os
import sys

if "google.colab" in sys.modules:  # Google Colab: fetch the library
    REPOSITORY = "https://github.com/..."  # the address of the repository that holds this notebook
    if not os.path.isdir("/content/upcycling"):
        !git clone -q --depth 1 {REPOSITORY} /content/upcycling
    # Colab's torch stays, unless it is newer than the library knows: then the newest that it knows
    !pip install -q -e /content/upcycling torchvision
    sys.path.insert(0, "/content/upcycling/lib")
    os.chdir("/content/upcycling/notebooks")"""


def text_of(cell):
    """What nbval compares of a code cell's saved outputs."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("display_data", "execute_result"):
            parts.append(output.data.get("text/plain", ""))
        elif output.output_type == "error":
            parts.append(f"{output.ename}: {output.evalue}")
    return "\n".join(parts).strip()


def tags(cell):
    return cell.metadata.get("tags", [])


def without_magics(source):
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M)


def code_cell(source, text="", number=None, checked=False, **metadata):
    cell = nbformat.v4.new_code_cell(source, execution_count=number, metadata=metadata)
    if checked:
        cell.metadata["tags"] = [CHECK]
    if text:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return cell
