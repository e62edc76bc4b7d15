"""The teaching core: everything between token ids and a trained Mixture of Experts that a learner must understand.

Read in this order, an evening with `text.tokenizer`, `text.stream` and `training`:

    config           sizes and settings, as plain data
    routing          what a router decides: softmax, the K best, their weights; loads and capacity
    balance          losses that keep all experts in use
    experts          stacked weights, and their computation over rows sorted by expert
    moe              the layer: route, dispatch, experts, combine
    model            DecoderLM: attention, FFN or experts, the loss and the objective
    initialisation   what experts start as: copies, with noise, partly redrawn, permuted
    transfer         `upcycle`: a dense model becomes an MoE with the same outputs
    equivalence      is it still the same function, and does it look into the future?
    routers          other rules than softmax top-k, one small class each
    shards           initialisations that cut one FFN into many experts (beyond the evening)

What may never come in: fast paths, private names of torch, options that no lesson uses. What is faster on some machine
lies in `kernels`, behind `faster`: it computes what is written here, or gives None. Imports: `checks` and that door.
"""

from __future__ import annotations

from typing import Any

try:
    from ..kernels import faster, uncompiled
except ModuleNotFoundError as error:  # the folder was deleted: all of it works without, slower
    if error.name != "upcycling.kernels":
        raise
    import torch

    uncompiled = torch.compiler.disable

    def faster(what: str, *arguments: Any) -> Any:
        return None


__all__ = ["faster", "uncompiled"]
