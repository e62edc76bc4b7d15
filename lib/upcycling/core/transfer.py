"""Dense to MoE: every feed-forward layer becomes a router and experts made of it. And an MoE's experts doubled.

Shapes: E experts, D model width, L layers, C domains, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .config import MoEConfig
from .initialisation import Copy, Drop, Noise, Permute
from .model import DecoderLM, FeedForward
from .moe import MoELayer
from .shards import Granular, Partition

TWIN_NOISE = 0.1  # of router_std: what tells experts apart that were given the same router row


def upcycle(
    dense: DecoderLM | Sequence[DecoderLM],
    moe: MoEConfig,
    init="copy",
    seed: int = 0,
    router_rows: Tensor | None = None,
) -> DecoderLM:
    """An MoE with `dense`'s weights: its FFNs copied into experts, everything else unchanged, routers N(0, router_std).

    With `init="copy"` and `moe.renormalize` the outputs are those of `dense` up to rounding, for any router
    (Sparse Upcycling, Komatsuzaki et al. 2022, section 3; renormalised as there for vision). `moe.layers` picks the
    layers; the others stay dense. `init` is a name or an instance from `core.initialisation`, which says which of
    them keep the outputs. `seed` draws the routers, and what `init` draws, and does not touch torch's global random
    state.

    Several dense models of one configuration, P of them, become one MoE as in Branch-Train-MiX (Sukhbaatar et al. 2024,
    arXiv:2403.07816): expert e comes from model e modulo P, and everything else is the mean over the models, the FFNs
    of layers without experts and of shared experts, too.

    `router_rows` of shape (L, C, D), L counting all layers, replaces the drawn routers: expert e gets row e modulo C.
    If C is less than E, a tenth of a drawn row is added to each, or experts with the same row would be chosen together.

    Returns a new model in `dense`'s dtype, device and mode; `dense` is unchanged. Raises ValueError for a model that is
    an MoE already, a layer that does not exist, an unknown `init` or one that does not fit the sizes, rows of another
    shape, models whose configurations differ.
    """
    parents = list(dense) if isinstance(dense, Sequence) else [dense]
    for parent in parents:
        if parent.config.moe is not None:
            raise ValueError(
                f"the model has {parent.config.moe.num_experts} experts already; upcycle takes a dense model"
            )
    recipe = initialisation(init)
    dense = _mean(parents)
    config = replace(dense.config, moe=moe)
    recipe.check(config)
    _check_parents(len(parents), recipe.experts_per_ffn(config), moe)
    weight = dense.token_embedding.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = DecoderLM(config).to(weight.dtype)
        # Routers have a stream of their own, so that one seed gives one router whatever else the model holds.
        torch.manual_seed(seed)
        for layer in sparse.config.moe_layers:
            for linear in (sparse.blocks[layer].ffn.router, sparse.blocks[layer].ffn.noise):
                if linear is not None:
                    torch.nn.init.normal_(linear.weight, std=moe.router_std)
    sparse = sparse.to(weight.device)
    if router_rows is not None:
        _set_router_rows(sparse, router_rows)
    kept = {name: value for name, value in dense.state_dict().items() if name in sparse.state_dict()}
    sparse.load_state_dict(kept, strict=False)
    for layer in sparse.config.moe_layers:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed * 1000 + layer)
            recipe.fill(dense.blocks[layer].ffn, sparse.blocks[layer].ffn, generator)
            if len(parents) > 1:
                ffns = [parent.blocks[layer].ffn for parent in parents]
                _deal_experts(ffns, sparse.blocks[layer].ffn, recipe, recipe.experts_per_ffn(config), generator)
    sparse.gradient_checkpointing = dense.gradient_checkpointing
    return sparse.train(dense.training)


@torch.no_grad()
def _set_router_rows(sparse: DecoderLM, rows_LCD: Tensor) -> None:
    config, experts = sparse.config, sparse.config.moe.num_experts
    expected = (config.n_layers, rows_LCD.shape[1] if rows_LCD.ndim == 3 else "C", config.d_model)
    if tuple(rows_LCD.shape) != expected or rows_LCD.shape[1] > experts:
        raise ValueError(
            f"router_rows has shape {tuple(rows_LCD.shape)}; give (layers, rows, width) = ({config.n_layers}, "
            f"1..{experts}, {config.d_model})"
        )
    row_of_E = torch.arange(experts) % rows_LCD.shape[1]
    for layer in config.moe_layers:
        weight = sparse.blocks[layer].ffn.router.weight
        drawn = TWIN_NOISE * weight if rows_LCD.shape[1] < experts else 0
        weight.copy_(rows_LCD[layer, row_of_E].to(weight) + drawn)


def _mean(parents: list[DecoderLM]) -> DecoderLM:
    """The model whose every weight is the mean over `parents`; the parent itself if there is one."""
    if not parents:
        raise ValueError("there is no dense model to upcycle; give one, or a list of them")
    first = parents[0]
    if len(parents) == 1:
        return first
    ours = first.config.to_dict()
    for parent in parents[1:]:
        theirs = parent.config.to_dict()
        differ = [f"{name} ({ours[name]} and {theirs[name]})" for name in ours if ours[name] != theirs[name]]
        if differ:
            raise ValueError(f"the dense models cannot become one MoE: they differ in {', '.join(differ)}")
    mean = copy.deepcopy(first)
    others = [dict(parent.named_parameters()) for parent in parents[1:]]
    with torch.no_grad():
        for name, value in mean.named_parameters():  # each once, tied or not
            # relative to the first: the mean of equal weights is then that weight, to the last bit
            value.add_(sum(other[name].to(value) - value for other in others) / len(parents))
    return mean


def _check_parents(parents: int, experts_per_ffn: int, moe: MoEConfig) -> None:
    if parents * experts_per_ffn > moe.num_experts:
        raise ValueError(
            f"num_experts={moe.num_experts} cannot hold {parents} models' FFNs, which take {experts_per_ffn} expert(s) "
            "each; raise num_experts"
        )


def _deal_experts(ffns: list[FeedForward], layer: MoELayer, recipe, experts_per_ffn: int, generator) -> None:
    """Let each parent fill the layer and keep its own experts: whole FFNs in turn."""
    scratch = copy.deepcopy(layer)
    parent_of_E = torch.arange(layer.moe.num_experts) // experts_per_ffn % len(ffns)
    for index, ffn in enumerate(ffns):
        recipe.fill(ffn, scratch, generator)
        mine = parent_of_E == index
        for ours, theirs in zip(layer.experts.parameters(), scratch.experts.parameters(), strict=True):
            ours[mine] = theirs[mine]


INITS = {
    "copy": Copy, "noise": Noise, "drop": Drop, "permute": Permute, "granular": Granular, "partition": Partition,
}  # fmt: skip


def initialisation(init):
    """The instance meant by `init`: itself, or the one of that name with its defaults. ValueError for another name."""
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(map(repr, INITS))}")
        return INITS[init]()
    if type(init) not in INITS.values():
        raise ValueError(f"init={init!r} is no initialisation; choose one of {', '.join(map(repr, INITS))}")
    return init
