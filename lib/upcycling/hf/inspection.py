"""What is in a model's folder, and do its routers work? Parameters, router, settings, receipt, a collapse check."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from ..routing.adapter import context_length
from ..routing.gradient import expert_weights
from ..routing.hf_routers import find_routers
from ..routing.load import LoadReport, load_report
from ..routing.record import record_routing
from .output.partial import RECEIPT
from .receipt import PROBES, settings_of
from .sources import folder_tokenizer, in_bytes, load_dense, naming, on_one_line, open_source, read_config
from .weight_files import WeightFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Shown to a model when no text is given: a few kinds of text, so that a router has something to tell apart.
DEFAULT_TEXT = "".join(PROBES["default_text"])
WINDOW = 512  # tokens that are routed at once


def inspect_folder(
    folder: str | os.PathLike, *, text: str | None = None, ids: list[int] | None = None
) -> Iterator[str]:
    """Yield, in sentences, what `python -m upcycling inspect` prints about an MoE's folder or hub name.

    The collapse check routes `ids`, or `text` (a few sentences of several kinds by default). Raises FileNotFoundError
    for a folder without weights; ValueError for a dense model, for a configuration or weights that do not fit, for
    empty text, text without a tokenizer, and ids that the vocabulary does not have.
    """
    if text is not None and not text.strip():
        raise ValueError("the text to route is empty; give some, or leave it out for a few built-in sentences")
    import transformers

    folder = open_source(folder)
    files = WeightFiles(folder)
    with naming(folder / "config.json"):
        config = read_config(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    yield f"class       {on_one_line(type(model).__name__)}"
    routers = find_routers(model)
    experts, top_k = routers[0].num_experts, routers[0].holder.top_k
    if not 1 <= top_k <= experts:
        raise ValueError(f"{folder / 'config.json'} asks for the top {top_k} of {experts} experts; choose 1..{experts}")
    total = sum(map(math.prod, files.shapes.values()))
    in_experts = sum(weight.numel() for router in routers for weight in expert_weights(model, router))
    active = total - in_experts + in_experts * top_k // experts
    yield f"parameters  {total:,}, {active:,} of them active per token"
    yield f"router      {type(routers[0].holder).__name__}, top-{top_k} of {experts} experts"
    shown = [f"{name}={value!r}" for name, value in settings_of(config).items()]
    yield f"settings    {on_one_line(', '.join(shown))}"
    yield f"receipt     {on_one_line(_receipt(folder))}"

    size = sum(path.stat().st_size for path in files.files)
    available = psutil.virtual_memory().available
    if size > available:
        yield f"routing not checked: the model takes {in_bytes(size)}, and {in_bytes(available)} of memory is free"
        return
    if ids is None:
        tokenizer = folder_tokenizer(folder)
        if tokenizer is None and text is not None:
            raise ValueError(f"{folder} has no tokenizer, so it cannot read text; give token ids with --ids 5,17,3")
        if tokenizer is None:
            yield "routing not checked: the folder has no tokenizer; give token ids with --ids 5,17,3"
            return
        with naming("the text"):  # such as half a surrogate pair, which some terminals give
            ids = tokenizer(DEFAULT_TEXT if text is None else text)["input_ids"]
    yield str(collapse_check(folder, config, ids))


def collapse_check(folder: str | os.PathLike, config: PreTrainedConfig, ids: list[int]) -> LoadReport:
    """Route token ids, in windows, and report the load of every layer.

    Raises ValueError for unknown ids, and for weights that do not fit the configuration: transformers would put random
    numbers where some are missing, and what such routers do says nothing.
    """
    vocab = config.get_text_config().vocab_size
    outside = [i for i in ids if not 0 <= i < vocab]
    if outside or not ids:
        raise ValueError(
            f"token id {outside[0]} is not in 0..{vocab - 1}" if outside else "there are no tokens to route"
        )
    with naming(folder):
        model = load_dense(folder)
    model.eval()
    window = min(WINDOW, context_length(config))
    with record_routing(model) as trace, torch.no_grad():
        for start in range(0, len(ids), window):
            model(torch.tensor([ids[start : start + window]]), use_cache=False)
        return load_report(trace)


def _receipt(folder: Path) -> str:
    try:
        receipt = read_json(folder / RECEIPT)
        if not receipt["verified"]:
            return f"made from {receipt['base_model']}, not verified"
        verdict = "the same function" if receipt["passed"] else "NOT the same function"
        found = f"max |Δlogit| {float(receipt['max_abs_diff']):.1e}, tolerance {receipt['tolerance']:.1e}"
        return f"made from {receipt['base_model']}: {verdict}, {found}"
    except FileNotFoundError:
        return "none: the folder was not made by this program"
    except (ValueError, KeyError, TypeError):
        return f"{RECEIPT} cannot be read"
