"""A model's folder, or its name on the hub: configuration, model and tokenizer, with none of its own code run."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .weight_files import WeightFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
# What a folder holds beside weights and configuration, and what the converted one needs from it.
COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


@contextlib.contextmanager
def naming(path: str | os.PathLike, understood: tuple[type, ...] = (OSError, ValueError)) -> Iterator[None]:
    """Turn whatever a library raises about `path`, but for what is `understood`, into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"{path} needs code of its own (auto_map), which is not run here") from error
        if isinstance(error, understood):
            raise
        raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def on_one_line(text: object) -> str:
    r"""`text` from a file or folder of others for a terminal: a line break as \u{A}, an escape as \u{1B}."""
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):X}}}" for c in str(text))


def open_source(model: str | os.PathLike) -> Path:
    """Return the local folder of `model`, a folder or a name such as "HuggingFaceTB/SmolLM2-135M" on the hub.

    From the hub only safetensors, JSON and tokenizer files are fetched (into the hub's cache). Raises
    FileNotFoundError when there is no such folder or the hub does not give the model.
    """
    if not str(model):
        raise FileNotFoundError("the model's name is empty; give its folder, or a hub name such as owner/model")
    path = Path(model).expanduser()
    if path.exists() or not HUB_NAME.fullmatch(str(model)):
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


def in_bytes(count: float) -> str:
    """Such as "14.2 GB": three digits and a decimal unit."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def folder_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """Return the folder's tokenizer as transformers' class, or None where there is none (a model works without).

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
def quiet() -> Iterator[None]:
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


def read_config(config: Any) -> PreTrainedConfig:
    """A transformers configuration from one, from its model, from a dict (config.json) or from a folder or hub name.

    No code that comes with a model is run. Raises ValueError for a model_type that transformers does not know, OSError
    where nothing is found.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    config = getattr(config, "config", config)
    if isinstance(config, PreTrainedConfig):
        return config
    if isinstance(config, Mapping):
        values, name = config, "the configuration"
    elif isinstance(config, str | os.PathLike):
        path, name = Path(config), str(config)
        if path.is_dir() and not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} has no config.json; give a folder that save_pretrained wrote, or a hub name"
            )
        try:
            values = dict(PreTrainedConfig.get_config_dict(path if path.exists() else name)[0])
        except (TypeError, ValueError) as error:
            raise ValueError(f"the config.json of {name} holds no JSON object ({error})") from error
    else:
        raise TypeError(f"{type(config).__name__} is no configuration; give one, a dict, a folder or a hub name")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        reason = "; its auto_map names code of its own, which is not run here" if values.get("auto_map") else ""
        raise ValueError(f"{name} has model_type={kind!r}, which transformers does not know{reason}")
    try:
        if isinstance(config, Mapping):
            return AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})
        return AutoConfig.from_pretrained(path if path.exists() else name, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"{name} does not make a {kind} configuration: {' '.join(str(error).split())}") from error


def load_dense(folder: str | os.PathLike, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model in a folder (or under a hub name), read from safetensors, with none of its own code run.

    Raises FileNotFoundError where there are no safetensors, ValueError naming a tensor that is missing, left over or
    of another shape than the configuration says.
    """
    import transformers

    folder = open_source(folder)
    config = read_config(folder)
    WeightFiles(folder)  # raises for pickles and damaged files
    with quiet():
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    check_loading(loading, f"{type(model).__name__} of {folder}")
    return model


def check_loading(loading: Mapping[str, Any], where: str) -> None:
    """Raises ValueError naming a tensor that transformers reports not to fit the model `where`."""
    for kind, what in _WRONG.items():
        if wrong := sorted(entry if isinstance(entry, str) else entry[0] for entry in loading.get(kind, ())):
            raise ValueError(f"{wrong[0]} {what}: {where} ({len(wrong)} such tensors)")


# What transformers reports about loading -> what that means
_WRONG = {
    "missing_keys": "is missing from the weights",
    "unexpected_keys": "is in the weights but no part of the model",
    "mismatched_keys": "has another shape in the weights than by the configuration",
    "error_msgs": "(an error while loading)",
}
