"""Read a pretrained model's weights without loading it: a folder, or a name on the hub, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What a folder holds beside weights and configuration, and what the converted one needs from it.
COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip  # how safetensors calls them
_DTYPES = {code: dtype for dtype, code in CODES.items()}


class WeightFiles:
    """The tensors of a folder's safetensors files, read one at a time: `files[name]`.

    `names` is the tensors' order, `shapes` and `dtypes` are known without reading any. A file is opened anew for each
    tensor: the pages of an open one would stay in memory, and in the end that is the whole model. Raises
    FileNotFoundError for a folder without safetensors and ValueError for a damaged one.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
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
        self._file_of, self.shapes, self.dtypes = {}, {}, {}
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
        if (self.shapes[name], self.dtypes[name]) != (self.shapes[other], self.dtypes[other]):
            return False
        return torch.equal(*(self[each].reshape(-1).view(torch.uint8) for each in (name, other)))

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


def read_json(path) -> dict:
    """Return the object in a JSON file. Raises OSError, and ValueError naming the file for anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for brackets within brackets
        raise ValueError(f"{path} is not JSON ({error}); download or make it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; download or make it again")
    return found


@contextlib.contextmanager
def naming(path, understood: tuple[type, ...] = (OSError, ValueError)):
    """Turn whatever a library raises about `path`, but for what is `understood`, into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"{path} needs code of its own (auto_map), which is not run here") from error
        if isinstance(error, understood):
            raise
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def on_one_line(text: str) -> str:
    r"""`text` from a file or folder of others for a terminal: a line break as \u{A}, an escape as \u{1B}."""
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):X}}}" for c in str(text))


def open_source(model) -> Path:
    """Return the local folder of `model`, a folder or a name such as "HuggingFaceTB/SmolLM2-135M" on the hub.

    From the hub only safetensors, JSON and tokenizer files are fetched (into the hub's cache). Raises
    FileNotFoundError when there is no such folder or the hub does not give the model.
    """
    if not str(model):
        raise FileNotFoundError("the model's name is empty; give its folder, or a hub name such as owner/model")
    path = Path(model).expanduser()
    if path.exists() or not _is_hub_name(str(model)):
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path}; give a model's folder, or a hub name such as owner/model"
            )
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", *COMPANIONS]))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{model} needs its owner's permission: accept its terms on the hub and log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"neither a folder nor a model on the hub is called {model}") from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {model} here and the hub cannot be reached; download the model where there is a "
            "connection and give its folder"
        ) from error


def _is_hub_name(text: str) -> bool:
    return re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", text) is not None


def load_tokenizer(folder):
    """Return the folder's tokenizer, or None where there is none (a model works without).

    Raises ValueError when it does not load, or only with code from the folder, which is never run.
    """
    from transformers import AutoTokenizer

    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")]
    files = [path for path in files if path.is_file()]
    for path in files:
        if path.suffix == ".json":
            read_json(path)
    if not files:
        return None
    with naming(f"the tokenizer of {folder} ({', '.join(path.name for path in files)})", understood=()):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bars (they are for downloads) and its tables of what did not load (they are turned
    into errors), and without torch's remark on shared experts of width 0."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
