"""`to_hf`, `from_hf` and `save_hf`: each weight copied once into its place."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ...core.model import DecoderLM
from ...files import replacing
from ...text.tokenizer import UNKNOWN, bos_eos, save_tokenizer
from .configuration import from_config, kind_of, to_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = json.loads(files(__package__).joinpath("names.json").read_text(encoding="utf-8"))
_NAMES |= {"mixtral": _NAMES["llama"], "qwen2_moe": _NAMES["llama"]}


def to_hf(model: DecoderLM, tokenizer: Tokenizer | None = None) -> PreTrainedModel:
    """`model` as the transformers class that computes the same logits; see the top of this package for which.

    Returns a new model in `model`'s dtype, device and mode; torch's random state is untouched. Biases that the class
    always has and `model` lacks are zeros (GPT-2's, and Llama's when some of q, k, v, out have one). With a
    `tokenizer` the ids of its special tokens are entered. transformers' balance loss pools all layers and is top_k at
    balance, so its coefficient is `aux_weight * layers / top_k`: the same size where layers agree.
    (With it on, transformers 5.23 cannot generate() from a padded batch: pass output_router_logits=False there.)
    What only training uses and the class lacks stays behind: z-loss, balance="sequence" or "importance", router jitter,
    expert dropout.
    Raises ValueError, naming the setting, for what no class expresses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not isinstance(model, DecoderLM):
        raise TypeError(f"to_hf takes a DecoderLM, not a {type(model).__name__}; from_hf goes the other way")
    kind = kind_of(model.config)
    settings = to_settings(model.config, kind) | _special_tokens(tokenizer, model.config.vocab_size)
    weight, own = model.token_embedding.weight, model.state_dict()
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(kind, **settings)
        theirs = AutoModelForCausalLM.from_config(config, dtype=weight.dtype)  # buffers stay float32
    state = {}
    for name, value in theirs.state_dict().items():
        parts = [own[part] for part in _ours(kind, name) if part in own]
        joined = torch.cat(parts, dim=_joined_dim(name)) if parts else torch.zeros_like(value)
        state[name] = joined.t() if _transposed(kind, name) else joined
    theirs.load_state_dict(state)
    return theirs.to(weight.device).train(model.training)


def from_hf(model_or_folder: PreTrainedModel | str | os.PathLike) -> DecoderLM:
    """A DecoderLM with the logits of a Llama, Mixtral, Qwen2-MoE (without shared expert) or GPT-2 of transformers.

    Takes the model or the folder (or hub name) of one; a folder's weights are read from safetensors only. Returns a
    new model in its dtype, device and mode; torch's random state is untouched. Raises ValueError, naming the field
    or the weight, for what DecoderLM does not express (scaled RoPE, sliding windows, a free head width, ...) and for
    weights that do not fit, and OSError where there is no model.
    """
    from ...routing.hf_routers import check_model
    from ..sources import load_dense, read_config

    theirs = model_or_folder
    if isinstance(theirs, str | os.PathLike):
        try:
            from_config(read_config(theirs))  # before any weight is read
            theirs = load_dense(theirs)
        except OSError as error:
            raise OSError(
                f"no model could be read from {str(model_or_folder)!r} ({str(error).splitlines()[0]}); from_hf takes a "
                "folder with config.json and safetensors, as save_pretrained writes it, or a name on the hub"
            ) from error
    check_model(theirs, "from_hf", or_else=" or a folder")
    config = from_config(theirs.config)
    kind = theirs.config.model_type
    state: dict[str, torch.Tensor] = {}
    for name, value in theirs.state_dict().items():
        parts = _ours(kind, name)
        value = value.t() if _transposed(kind, name) else value
        state |= zip(parts, value.chunk(len(parts), dim=_joined_dim(name)) if parts else (), strict=True)
    if config.tie_embeddings and not torch.equal(state["head.weight"], state["token_embedding.weight"]):
        raise ValueError(
            "lm_head.weight is not the embedding although the configuration ties them; set tie_word_embeddings=False"
        )
    with torch.random.fork_rng(devices=[]):
        own = DecoderLM(config).to(dtype=theirs.dtype, device=theirs.device)
    own.load_state_dict(state)
    return own.train(theirs.training)


def save_hf(model: DecoderLM, folder: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
    """Write `to_hf(model)` and the tokenizer to `folder`, for `AutoModelForCausalLM` and `AutoTokenizer`.

    Safetensors and JSON only. Files are written beside the folder and moved in whole, config.json last, so that a
    new folder loads only when it is complete; the parts of a sharded model that was there are deleted. Raises
    ValueError as `to_hf` does.
    """
    folder, theirs = Path(folder), to_hf(model, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp") as temporary:
        theirs.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        written = sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json")
        for file in written:
            with replacing(folder / file.name) as place:
                os.replace(file, place)
    for pattern in ("model-?????-of-?????.safetensors", "model.safetensors.index.json"):
        for stale in folder.glob(pattern):  # of a larger model that was here before
            if stale.name not in {file.name for file in written}:
                stale.unlink()


def _special_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, int | None]:
    if tokenizer is None:
        return dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"the tokenizer is a {type(tokenizer).__name__}, not one of the tokenizers library; of one of transformers "
            "give its backend_tokenizer"
        )
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model only {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    bos_id, eos_id = bos_eos(tokenizer)
    # never eos: the embedding of the padding token gets no gradient
    return dict(bos_token_id=eos_id if bos_id is None else bos_id, eos_token_id=eos_id) | dict(
        pad_token_id=tokenizer.token_to_id(UNKNOWN)
    )


def _ours(kind: str, name: str) -> list[str]:
    """Our parameters that stand, in this order, in their parameter `name`; ValueError for one that is unknown."""
    outer, layer = _NAMES[kind]["model"], _NAMES[kind]["layer"]
    module, _, suffix = name.rpartition(".")
    if module in outer:
        return [f"{ours}.{suffix}" for ours in outer[module]]
    parts = name.split(".", 3)  # model.layers.0.rest or transformer.h.0.rest
    if len(parts) == 4 and parts[1] in ("layers", "h"):
        block, rest = f"blocks.{parts[2]}.", parts[3]
        module, _, suffix = rest.rpartition(".")
        if rest in layer:
            return [block + ours for ours in layer[rest]]
        if module in layer:
            return [f"{block}{ours}.{suffix}" for ours in layer[module]]
    raise ValueError(
        f"the weight {name} has no place in DecoderLM; give a plain causal language model, with adapters merged"
    )


def _joined_dim(name: str) -> int:
    return 1 if ".experts." in name else 0  # experts are stacked: (E, 2F, D)


def _transposed(kind: str, name: str) -> bool:
    """GPT-2's Conv1D keeps its matrices as (in, out)."""
    return kind == "gpt2" and name.endswith(".weight") and ".c_" in name
