"""The logits of a model that does not fit in memory: one layer at a time is loaded, run and dropped.

Each layer is loaded by transformers itself, as a model of one layer of the same class, so what is checked is what a user
will load. The vocabulary is cut down to the tokens of the probe: logits are exact, for those tokens only.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@torch.no_grad()
def layerwise_logits(files, config, tokens_BT: Tensor) -> Tensor:
    """Return the float32 logits (B, T, U) for the U different tokens of the probe, in ascending order.

    `files` is a `WeightFiles`, `config` its transformers configuration. Memory: one layer in float32, twice while it
    is being loaded. Raises ValueError when a tensor is missing, or belongs nowhere.
    """
    kept, local_BT = torch.unique(tokens_BT, return_inverse=True)
    x_BTD = None
    for layer in range(config.num_hidden_layers):
        model = _one_layer_model(files, config, layer, kept.tolist())
        block = model.base_model.layers[0]
        captured = []
        if x_BTD is not None:
            block.register_forward_pre_hook(_replace_input(x_BTD), with_kwargs=True)
        block.register_forward_hook(lambda _m, _i, out: captured.append(out if torch.is_tensor(out) else out[0]))  # noqa: B023
        logits_BTU = model(local_BT, use_cache=False).logits
        x_BTD = captured[0]
    return logits_BTU


def _replace_input(x_BTD: Tensor):
    def hook(_module, args, kwargs):
        if args:
            return (x_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x_BTD}

    return hook


def _one_layer_model(files, config, layer: int, kept: list[int]):
    import transformers
    from transformers.utils import logging

    weights = {}
    for name in files.names:
        found = LAYER.search(name)
        if found and int(found.group()) != layer:
            continue
        per_token = "embed_tokens." in name or name.startswith("lm_head.")
        tensor = files.rows(name, kept) if per_token else files[name]
        weights[LAYER.sub("0", name, count=1)] = tensor.float()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=_one_layer_config(config, layer, len(kept)), state_dict=weights, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise ValueError(f"layer {layer} in {files.folder} does not load: {wrong[0]} is missing or belongs nowhere")
    return model.eval()


def _one_layer_config(config, layer: int, vocab_size: int):
    values, n_layers = config.to_dict(), config.num_hidden_layers
    values = {
        name: [value[layer]] if isinstance(value, list) and len(value) == n_layers else value
        for name, value in values.items()
    }
    values |= {"num_hidden_layers": 1, "vocab_size": vocab_size}
    values |= {f"{kind}_token_id": None for kind in ("pad", "bos", "eos")}
    if values.get("mlp_only_layers") is not None:
        values["mlp_only_layers"] = [0] if layer in config.mlp_only_layers else []
    if values.get("first_k_dense_replace") is not None:
        values["first_k_dense_replace"] = int(layer < config.first_k_dense_replace)
    return type(config).from_dict(values)
