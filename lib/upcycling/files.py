"""Files that are whole or not there: written under a temporary name, flushed to the disk and renamed."""

from __future__ import annotations

import json
import os
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

    def write(temporary):
        temporary.write_text(text, encoding="utf-8")

    _replace(path, write)


def write_tensors(path, tensors: dict, header: dict) -> None:
    """Replace a safetensors file atomically; `header` (JSON) lies in its metadata. Raises OSError with the remedy."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "upcycling": json.dumps(header, allow_nan=False)}
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _replace(path, write) -> None:
    """Let `write` make a temporary file, flush it to the disk, rename it to `path`; a failure leaves `path` alone."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
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
