"""Files that are whole or not there: written under a temporary name, flushed to the disk and renamed.

    write_text(path, text)                          # a small file of text
    write_tensors(path, tensors, header)            # safetensors; read_tensors(path) reads it
    with replacing(path) as temporary:              # anything else: write to `temporary`, which then becomes `path`
        save(temporary)

Nothing is ever pickled: reading a file runs no code.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write a file to; on the way out the file is flushed and renamed to `path`.

    The name is `<name>.<process>.tmp`; what a process that was killed left there is deleted. If anything fails, or the
    block raises, the former file stays and the temporary one goes. Raises OSError, one sentence, where writing fails.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(path)
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
        with suppress(OSError):  # nothing may be there, not even the folder
            temporary.unlink()


def _delete_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        process = leftover.name.removeprefix(f"{path.name}.").removesuffix(".tmp")
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            leftover.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a small text file (UTF-8, lines end in \\n everywhere) atomically. Raises OSError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping) -> None:
    """Replace a safetensors file atomically; `header` (JSON) lies in its metadata. Raises OSError as `replacing`."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "upcycling": json.dumps(header, allow_nan=False)}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def read_tensors(
    path: str | os.PathLike,
    what: str = "checkpoint of this library",
    remedy: str = "train first, or give the path of a .safetensors file",
) -> tuple[dict[str, Tensor], dict]:
    """Return (tensors, header) of a file, tensors copied to memory of their own (a mapped file has any alignment).

    Raises FileNotFoundError with the remedy, and ValueError for a file that is damaged or not `what` it should be.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {what.split()[0]} {path}: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["upcycling"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: recursion, too
        raise ValueError(f"{path} cannot be read ({error}): it is truncated, damaged or not a {what}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}, the only one this version reads: it is not a {what}")
    return tensors, header
