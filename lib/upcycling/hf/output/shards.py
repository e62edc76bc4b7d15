"""How tensors are dealt out to weight files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ...files import replacing
from ..families.base import TargetTensor
from ..weight_files import CODES, WeightFiles, as_bytes

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_SHARD_SIZE = 2 * 10**9  # bytes; transformers loads several files no slower than one


def made(tensor: TargetTensor, source: WeightFiles) -> Tensor:
    """The tensor as it will stand in its file."""
    # First the type, then the arithmetic, as when a model of this type is upcycled in memory.
    return tensor.make(*(source[name].to(tensor.dtype) for name in tensor.sources), dtype=tensor.dtype)


@dataclass(frozen=True)
class Shard:
    """One weight file that will be written: its name and its entries, in the file's order."""

    file: str
    entries: tuple[TargetTensor, ...]

    @property
    def header(self) -> bytes:
        """The file's beginning: the header's length, then names, types, shapes and places of all tensors, as JSON."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in self.entries:
            begin, end = end, end + entry.bytes
            header[entry.name] = {
                "dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(entry.bytes for entry in self.entries)

    def write(self, folder: Path, source: WeightFiles, bar: tqdm) -> str:
        """Write the file, holding one tensor at a time, and return its SHA-256.

        The safetensors format allows that: a header with every tensor's place, then their bytes in that order. The
        file has another name until it is complete and flushed to the disk. Raises OSError.
        """
        digest = hashlib.sha256(self.header)
        with replacing(folder / self.file) as temporary, open(temporary, "wb") as file:
            file.write(self.header)
            bar.update(len(self.header))
            for entry in self.entries:
                data = as_bytes(made(entry, source)).numpy().data
                file.write(data)
                digest.update(data)
                bar.update(data.nbytes)
        return digest.hexdigest()


def plan_shards(entries: list[TargetTensor], max_shard_size: int) -> tuple[Shard, ...]:
    """Distribute tensors, in order, over files of at most `max_shard_size` bytes (a larger tensor gets its own)."""
    groups: list[list[TargetTensor]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    # Wide types first, as safetensors writes them: then every tensor begins at a multiple of its element size.
    contents = [tuple(sorted(group, key=lambda entry: -entry.dtype.itemsize)) for group in groups]
    if len(contents) == 1:
        return (Shard("model.safetensors", contents[0]),)
    many = len(contents)
    return tuple(Shard(f"model-{i:05d}-of-{many:05d}.safetensors", group) for i, group in enumerate(contents, 1))
