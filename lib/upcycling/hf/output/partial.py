"""The folder that a conversion writes into until it is complete: `<out>.partial`, its lock and its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_text
from ..sources import COMPANIONS, on_one_line
from ..weight_files import INDEX, read_json

if TYPE_CHECKING:
    from ..convert import Conversion

RECEIPT = "upcycling_receipt.json"
MANIFEST = "conversion.json"
PENDING = "config.json.pending"  # the configuration's name until everything is verified
# Everything that a conversion writes, as patterns; nothing else is ever deleted.
OWN = (
    *(MANIFEST, PENDING, "config.json", RECEIPT, "README.md", "model.safetensors", "model-*-of-*.safetensors", INDEX),
    *("additional_chat_templates", *COMPANIONS),
)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_place(out: Path) -> None:
    """Raises ValueError or FileExistsError when nothing can be written to `out`, or something would be lost."""
    if out.name in ("", "..") or not str(out).isprintable():
        raise ValueError(
            f'"{on_one_line(out)}" is no name for a new folder; give one, in characters that can be printed'
        )
    partial, lock = partial_of(out), Path(f"{partial_of(out)}.lock")
    for path in (out, partial, lock):
        if path.is_symlink():
            raise FileExistsError(f"{path} is a symbolic link; choose another name, or delete it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another name, or delete it")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise FileExistsError(f"{out} cannot be a folder, because {above} is a file; choose another name")
    in_the_way = "is in the way and not from an interrupted conversion; delete or rename it"
    if partial.exists() and not partial.is_dir():
        raise FileExistsError(f"{partial} {in_the_way}")
    own = {path for pattern in OWN for end in ("", ".tmp", ".*.tmp") for path in partial.glob(pattern + end)}
    if foreign := sorted(set(partial.rglob("*")) - own):
        raise FileExistsError(f"{foreign[0]} {in_the_way}")
    if own - {*partial.glob(MANIFEST + ".*tmp")} and read_manifest(partial) is None:
        raise FileExistsError(f"{partial} {in_the_way}")


@contextlib.contextmanager
def alone(job: Conversion) -> Iterator[None]:
    """Nobody else writes the same folder meanwhile. Raises FileExistsError when somebody does."""
    from filelock import FileLock, Timeout

    path = Path(f"{job.partial}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FileExistsError(f"another conversion is writing {job.out}; wait for it, or choose another name") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where open files cannot be deleted, release() does it
            path.unlink()
        lock.release()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What is recorded in a folder of an interrupted run; None where nothing is, or not by this program."""
    try:
        found = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    ours = found.keys() == {"settings", "shards"} and all(isinstance(value, dict) for value in found.values())
    return found if ours else None


def open_partial(job: Conversion) -> dict[str, str]:
    """Make the folder that is written into, empty but for the finished weight files of a run with equal settings."""
    folder, finished = job.partial, job.finished
    kept = {}
    for shard in job.shards:
        path, digest = folder / shard.file, finished.get(shard.file)
        if digest and path.is_file() and path.stat().st_size == shard.bytes and sha256(path) == digest:
            kept[shard.file] = digest
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it; all of them ours, as checked
        if path.name != MANIFEST and path.name not in kept:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(job, kept)
    return kept


def write_manifest(job: Conversion, finished: dict[str, str]) -> None:
    write_text(job.partial / MANIFEST, json.dumps({"settings": job.settings, "shards": finished}) + "\n")


def write_companions(job: Conversion) -> None:
    """Everything that belongs to the model beside weights, receipt and card."""
    from transformers import GenerationConfig

    for path in job.companions:
        copy = job.partial / path.relative_to(job.source.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)  # the bytes, not the permissions: a hub cache may be read-only
    if len(job.shards) > 1:
        where = {entry.name: shard.file for shard in job.shards for entry in shard.entries}
        size = sum(entry.bytes for shard in job.shards for entry in shard.entries)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_text(job.partial / INDEX, json.dumps(index, indent=2) + "\n")
    if not (job.partial / "generation_config.json").exists():  # transformers would look for config.json instead
        GenerationConfig.from_model_config(job.plan.config).save_pretrained(job.partial)
    write_text(job.partial / PENDING, job.plan.config.to_json_string())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
