"""Dense to MoE: every feed-forward layer becomes a router and E experts that start as copies of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import MoEConfig
from .initialisation import copy_into_experts, initialisation
from .model import DecoderLM

__all__ = ["copy_into_experts", "upcycle"]


def upcycle(dense: DecoderLM, moe: MoEConfig, init="copy", seed: int = 0) -> DecoderLM:
    """An MoE with `dense`'s weights: its FFNs copied into experts, everything else unchanged, routers N(0, router_std).

    With `init="copy"` and `moe.renormalize` the outputs are those of `dense` up to rounding, for any router
    (Sparse Upcycling, Komatsuzaki et al. 2022, section 3; renormalised as there for vision). `moe.layers` picks the
    layers; the others stay dense. `init` is a name or an instance from `upcycling.initialisation`, which says which of
    them keep the outputs. `seed` draws the routers, and what `init` draws, and does not touch torch's global random
    state. Returns a new model in `dense`'s dtype, device and mode; `dense` is unchanged. Raises ValueError for a model
    that is an MoE already, a layer that does not exist or an unknown `init`.
    """
    if dense.config.moe is not None:
        raise ValueError(f"the model has {dense.config.moe.num_experts} experts already; upcycle takes a dense model")
    recipe = initialisation(init)
    weight = dense.token_embedding.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = DecoderLM(replace(dense.config, moe=moe)).to(weight.dtype)
        # Routers have a stream of their own, so that one seed gives one router whatever else the model holds.
        torch.manual_seed(seed)
        for layer in sparse.config.moe_layers:
            for linear in (sparse.blocks[layer].ffn.router, sparse.blocks[layer].ffn.noise):
                if linear is not None:
                    torch.nn.init.normal_(linear.weight, std=moe.router_std)
    sparse = sparse.to(weight.device)
    kept = {name: value for name, value in dense.state_dict().items() if name in sparse.state_dict()}
    sparse.load_state_dict(kept, strict=False)
    for layer in sparse.config.moe_layers:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed * 1000 + layer)
            recipe.fill(dense.blocks[layer].ffn, sparse.blocks[layer].ffn, generator)
    sparse.gradient_checkpointing = dense.gradient_checkpointing
    return sparse.train(dense.training)
