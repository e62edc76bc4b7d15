"""How tensors are dealt out to weight files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import split_state_dict_into_shards_factory
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
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name, get_storage_size=lambda entry: entry.bytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )  # fmt: skip
    # Wide types first, as safetensors writes them: then every tensor begins at a multiple of its element size.
    return tuple(
        Shard(file, tuple(sorted((by_name[name] for name in names), key=lambda entry: -entry.dtype.itemsize)))
        for file, names in split.filename_to_tensors.items()
    )
