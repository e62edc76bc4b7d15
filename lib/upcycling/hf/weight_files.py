"""Read a pretrained model's weights without loading it: a folder, or a name on the hub, one tensor at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip  # how safetensors calls them
_DTYPES = {code: dtype for dtype, code in CODES.items()}


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, row after row, as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


class WeightFiles:
    """The tensors of a folder's safetensors files, read one at a time: `files[name]`.

    `names` is the tensors' order, `shapes` and `dtypes` are known without reading any. A file is opened anew for each
    tensor: the pages of an open one would stay in memory, and in the end that is the whole model. Raises
    FileNotFoundError for a folder without safetensors and ValueError for a damaged one.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if (self.folder / "model.safetensors").is_file():  # before the index, as transformers does
            files = ["model.safetensors"]
        elif index.is_file():
            contents = read_json(index)
            where = contents.get("weight_map")
            # Without metadata transformers would not load it.
            if not isinstance(where, dict) or not isinstance(contents.get("metadata"), dict):
                raise ValueError(f"{index} needs a weight_map and metadata (it may be {{}}); download the model again")
            for file in where.values():
                if not isinstance(file, str) or Path(file).name != file:
                    raise ValueError(f"{index} names {file!r}, which is no file beside it; download the model again")
            files = sorted(set(where.values()))
        else:
            raise FileNotFoundError(self._what_is_missing())
        self.files = [self.folder / file for file in files]
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is in the index but not in the folder; download the model again")
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        part = file.get_slice(name)
                        self._file_of[name] = path
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = _DTYPES[part.get_dtype()]
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged ({error}); download the model again") from error
            except KeyError as error:
                raise ValueError(f"{path} has tensors of type {error}; give a model that is not quantised") from error
        self.names = list(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def same(self, name: str, other: str) -> bool:
        """Do two tensors have the same type, shape and bytes?"""
        alike = (self.shapes[name], self.dtypes[name]) == (self.shapes[other], self.dtypes[other])
        return alike and torch.equal(as_bytes(self[name]), as_bytes(self[other]))

    def rows(self, name: str, rows: list[int]) -> Tensor:
        """Some rows of a matrix, without reading the others."""
        with safe_open(self._file_of[name], framework="pt") as file:
            part = file.get_slice(name)
            return torch.stack([part[row : row + 1][0] for row in rows])

    def _what_is_missing(self) -> str:
        if not self.folder.is_dir():
            return f"there is no folder {self.folder}"
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder} has its weights in {pickles[0]}, a pickle, which can run code when it is opened; "
                "if you trust it, load it with transformers, save_pretrained() it to a new folder and convert that one"
            )
        return f"{self.folder} has no model.safetensors; give a folder that save_pretrained() wrote, or a hub name"


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError, and ValueError naming the file for anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for brackets within brackets
        raise ValueError(f"{path} is not JSON ({error}); download or make it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; download or make it again")
    return found
