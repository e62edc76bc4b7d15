"""Dense to MoE: every feed-forward layer becomes a router and E experts that start as copies of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import MoEConfig
from .model import DecoderLM, FeedForward
from .moe import Experts

INITS = ("copy",)


@torch.no_grad()
def copy_into_experts(ffn: FeedForward, experts: Experts) -> None:
    """Write the dense FFN's weights and biases into every expert."""
    pairs = [
        (experts.w_up_EFD, ffn.up.weight),
        (experts.w_down_EDF, ffn.down.weight),
        (experts.b_up_EF, ffn.up.bias),
        (experts.b_down_ED, ffn.down.bias),
    ]
    if ffn.gate is not None:
        pairs += [(experts.w_gate_EFD, ffn.gate.weight), (experts.b_gate_EF, ffn.gate.bias)]
    for stacked, dense in pairs:
        if stacked is not None:
            stacked.copy_(dense.expand_as(stacked))


def upcycle(dense: DecoderLM, moe: MoEConfig, init: str = "copy", seed: int = 0) -> DecoderLM:
    """An MoE with `dense`'s weights: its FFNs copied into experts, everything else unchanged, routers N(0, router_std).

    With `init="copy"` and `moe.renormalize` the outputs are those of `dense` up to rounding, for any router
    (Sparse Upcycling, Komatsuzaki et al. 2022, section 3; renormalised as there for vision). `moe.layers` picks the
    layers; the others stay dense. `seed` draws the routers and does not touch torch's global random state. Returns a
    new model in `dense`'s dtype, device and mode; `dense` is unchanged. Raises ValueError for a model that is an MoE
    already, a layer that does not exist or an unknown `init`.
    """
    if dense.config.moe is not None:
        raise ValueError(f"the model has {dense.config.moe.num_experts} experts already; upcycle takes a dense model")
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(map(repr, INITS))}")
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
        copy_into_experts(dense.blocks[layer].ffn, sparse.blocks[layer].ffn.experts)
    sparse.gradient_checkpointing = dense.gradient_checkpointing
    return sparse.train(dense.training)
