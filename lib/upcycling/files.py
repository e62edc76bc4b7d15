"""Files that are whole or not there: written under a temporary name, flushed to the disk and renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


FORMAT = 1


def write_text(path, text: str) -> None:
    """Replace a small text file atomically. Raises OSError with the path and the remedy."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path, tensors: dict, header: dict) -> None:
    """Replace a safetensors file atomically; `header` (JSON) lies in its metadata. Raises OSError with the remedy."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "upcycling": json.dumps(header, allow_nan=False)})


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there is flushed to the disk and renamed to `path`.

    Whatever happens, and whenever, `path` is the old file or the new one, and no temporary file stays but that of a
    process that was killed. Raises OSError with the path and the remedy.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # the rename itself survives a power cut only once the folder is flushed, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}): free disk space or choose another folder; the former file is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path) -> tuple[dict, dict]:
    """Return (tensors, header) of a file, tensors copied to memory of their own (a mapped file has any alignment)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: train first, or give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["upcycling"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (
        SafetensorError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # RecursionError is a RuntimeError
        raise ValueError(
            f"{path} cannot be read ({error}): it is truncated, damaged or not a checkpoint of this library"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not of checkpoint format {FORMAT}, the only one this version reads")
    return tensors, header
