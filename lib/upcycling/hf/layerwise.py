"""The logits of models too large to load: one layer at a time is loaded, run and dropped.

Each layer is loaded by transformers itself, as a model of one layer of the same class, so what is compared is what a
user will load. The vocabulary is cut down to the tokens of the probe: logits are exact, for those tokens only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.equivalence import TOLERANCE
from ..routing.adapter import context_length
from .receipt import SENTENCES, Receipt, settings_of, versions
from .sources import check_loading, folder_tokenizer, quiet
from .weight_files import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# A layer of these needs others: Gemma 4's configuration names layers by number, and late ones reuse early ones' keys.
WHOLE_ONLY = {"Gemma4ForCausalLM"}
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def verify_layerwise(
    dense: WeightFiles, moe: WeightFiles, dense_config: PreTrainedConfig, moe_config: PreTrainedConfig,
    dtype: torch.dtype, *, progress: bool = True,
) -> Receipt:  # fmt: skip
    """Compare the logits of two folders in float32, their weights in `dtype` first.

    On random ids, and on real text where the dense model's folder has a tokenizer; without padding or cache, and
    nothing is generated. Memory: one layer in float32 and its weights in `dtype`. The tolerance is that of `verify`.
    """
    tokens_BT, probe = _probe(dense, dense_config)
    logits = [
        layerwise_logits(files, config, tokens_BT, dtype, progress)
        for files, config in ((dense, dense_config), (moe, moe_config))
    ]
    worst = float((logits[0].double() - logits[1].double()).abs().max())
    tolerance = TOLERANCE[torch.float32] * max(1.0, float(logits[0].abs().max()))
    return Receipt(
        dense_config.architectures[0], moe_config.architectures[0], worst, tolerance, {"layer by layer": worst},
        None, "too large to load", probe, settings_of(moe_config), versions(),
    )  # fmt: skip


def _probe(dense: WeightFiles, config: PreTrainedConfig) -> tuple[Tensor, str]:
    """(token ids, what they are): rows of random ids and, where there is a tokenizer, of text."""
    length = min(24, context_length(config))
    random_BT = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    tokenizer = folder_tokenizer(dense.folder)
    texts = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES] if tokenizer is not None else []
    texts = [ids[:length] for ids in texts if len(ids) >= length]
    probe = f"2 sequences of random ids (seed 0) and {len(texts)} of text, {length} tokens each"
    tokens_BT = torch.cat([random_BT, torch.tensor(texts, dtype=torch.long).reshape(-1, length)])
    return tokens_BT, f"{probe}; logits of the {len(tokens_BT.unique())} different tokens among them"


@torch.no_grad()
def layerwise_logits(
    files: WeightFiles, config: PreTrainedConfig, tokens_BT: Tensor, dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Return the float32 logits (B, T, U) for the U different tokens of the probe, in ascending order.

    `files` and its transformers `config`; the weights are rounded to `dtype` first. Raises ValueError when a tensor is
    missing, or belongs nowhere.
    """
    from tqdm.auto import tqdm

    kept, local_BT = torch.unique(tokens_BT, return_inverse=True)
    x_BTD = None
    name = config.architectures[0]
    for layer in tqdm(range(config.num_hidden_layers), desc=name, unit="layer", leave=False, disable=not progress):
        model = _one_layer_model(files, config, layer, kept.tolist(), dtype)
        block = model.model.layers[0]
        captured: list[Tensor] = []
        if x_BTD is not None:
            block.register_forward_pre_hook(_replace_input(x_BTD), with_kwargs=True)
        block.register_forward_hook(_capture_output(captured))
        logits_BTU = model(local_BT, use_cache=False).logits
        x_BTD = captured[0]
        del model, block
    return logits_BTU


def _replace_input(x_BTD: Tensor) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((x_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x_BTD})

    return hook


def _capture_output(captured: list[Tensor]) -> Callable:
    return lambda _module, _args, output: captured.append(output if torch.is_tensor(output) else output[0])


def _one_layer_model(
    files: WeightFiles, config: PreTrainedConfig, layer: int, kept: list[int], dtype: torch.dtype
) -> PreTrainedModel:
    import transformers

    weights = {}
    for name in files.names:
        found = LAYER.search(name)
        if found and int(found.group()) != layer:
            continue
        per_token = "embed_tokens." in name or name.startswith("lm_head.")
        tensor = files.rows(name, kept) if per_token else files[name]
        weights[LAYER.sub("0", name, count=1)] = tensor.to(dtype)
    with quiet():
        model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=_one_layer_config(config, layer, len(kept)), state_dict=weights, dtype=torch.float32,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    check_loading(report, f"layer {layer} in {files.folder}")
    return model.eval()


def _one_layer_config(config: PreTrainedConfig, layer: int, vocab_size: int) -> PreTrainedConfig:
    values, n_layers = config.to_dict(), config.num_hidden_layers
    values = {
        name: [value[layer]] if isinstance(value, list) and len(value) == n_layers else value
        for name, value in values.items()
    }
    # The balance loss that transformers adds is undefined for a layer without experts.
    values |= {"num_hidden_layers": 1, "vocab_size": vocab_size, "output_router_logits": False}
    values |= {f"{kind}_token_id": None for kind in ("pad", "bos", "eos")}
    for name in ("mlp_only_layers", "moe_layers"):  # these list numbers of layers
        if values.get(name) is not None:
            values[name] = [0] if layer in getattr(config, name) else []
    if values.get("first_k_dense_replace") is not None:
        values["first_k_dense_replace"] = int(layer < config.first_k_dense_replace)
    return type(config).from_dict(values)
