"""Dense to MoE: every feed-forward layer becomes a router and experts made of it. And an MoE's experts doubled.

Shapes: E experts, D model width, L layers, C domains, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .config import IGNORE, MoEConfig
from .initialisation import Copy, copy_into_experts, initialisation
from .model import DecoderLM, FeedForward
from .moe import MoELayer

__all__ = ["copy_into_experts", "double", "router_rows", "upcycle"]

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
    layers; the others stay dense. `init` is a name or an instance from `upcycling.initialisation`, which says which of
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


def double(moe: DecoderLM, init="copy", keep_top_k: bool = False, seed: int = 0) -> DecoderLM:
    """`moe` with twice the experts: each expert e becomes the twins 2e and 2e + 1, which share its router row.

    `top_k` doubles, too, so that whenever e was chosen both twins are, each with half its weight: the same function
    under softmax top-k (renormalised or not), and under every other rule that is renormalised but top-p, which may cut
    between twins; under ReLU and selection bias without renormalising the output doubles. `init` says what is done to
    the second twins to tell them apart: "copy" (nothing), or "noise", "drop", "permute" as in `upcycle`; `seed` draws
    it. With `keep_top_k` the number of experts per token stays, as in expert upcycling during training (Amazon, 2026):
    then twins push the token's other experts out, and the function changes.

    Returns a new model in `moe`'s dtype, device and mode; what a routing rule remembers is doubled with the experts.
    Raises ValueError for a dense model, or an `init` that cuts FFNs.
    """
    if moe.config.moe is None:
        raise ValueError("the model is dense; `upcycle` gives it experts, `double` takes an MoE")
    recipe = initialisation(init)
    if not isinstance(recipe, Copy):
        raise ValueError(f"init={init!r} cuts FFNs; twins can be 'copy', 'noise', 'drop' or 'permute'")
    old = moe.config.moe
    top_k = old.top_k if keep_top_k else 2 * old.top_k
    with torch.random.fork_rng(devices=[]):
        larger = DecoderLM(replace(moe.config, moe=replace(old, num_experts=2 * old.num_experts, top_k=top_k)))
    weight = moe.token_embedding.weight
    larger = larger.to(weight.device, weight.dtype)
    values = moe.state_dict()
    for name, value in larger.state_dict().items():
        if name.endswith("rule_state.experts_of_VK"):
            twins_VK2 = torch.stack([2 * values[name], 2 * values[name] + 1], dim=-1)
            values[name] = twins_VK2.flatten(1)[:, :top_k]
        elif value.shape != values[name].shape:  # whatever counts the experts does so in its first dimension
            values[name] = values[name].repeat_interleave(2, dim=0)
    larger.load_state_dict(values)
    for layer in larger.config.moe_layers:
        experts = larger.blocks[layer].ffn.experts
        second = copy.deepcopy(moe.blocks[layer].ffn.experts)
        with torch.no_grad():
            recipe.change(second, torch.Generator().manual_seed(seed * 1000 + layer))
            for ours, theirs in zip(experts.parameters(), second.parameters(), strict=True):
                ours[1::2] = theirs
    larger.gradient_checkpointing = moe.gradient_checkpointing
    return larger.train(moe.training)


@torch.no_grad()
def router_rows(dense: DecoderLM, texts, router_std: float = 0.02) -> Tensor:
    """rows_LCD for `upcycle(router_rows=…)`: what each router sees, on average, in the texts of each domain.

    `texts` holds, for each expert or domain, token ids tokens_BT, or (tokens_BT, targets_BT), whose ignored targets
    mark padding: a list, or a dict by name (`Series.domain_windows()`). The row of domain c in layer l is the mean of
    the FFN's inputs (after the norm) over the domain's tokens, less the mean over the domains, which would add the same
    to all scores; a layer's rows are scaled to the standard deviation `router_std`, that of a drawn router. The idea is
    mergekit's "hidden" gates (Goddard et al. 2024, arXiv:2403.13257).

    Raises ValueError for fewer than two domains, one without tokens, or domains that do not differ.
    """
    domains = list(texts.values()) if isinstance(texts, Mapping) else list(texts)
    if len(domains) < 2:
        raise ValueError(f"router rows tell domains apart, but there are {len(domains)}; give at least 2")
    means_LCD = torch.stack([_mean_ffn_inputs(dense, domain) for domain in domains], dim=1)
    rows_LCD = means_LCD - means_LCD.mean(1, keepdim=True)
    std_L11 = rows_LCD.std(dim=(1, 2), correction=0, keepdim=True)
    if not (std_L11 > 0).all():
        raise ValueError("the domains' mean hidden states are equal in some layer; give texts that differ")
    return router_std * rows_LCD / std_L11


def _mean_ffn_inputs(dense: DecoderLM, domain) -> Tensor:
    """means_LD over a domain's tokens, in float64."""
    tokens_BT, targets_BT = domain if isinstance(domain, tuple | list) else (domain, None)
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if targets_BT is None else targets_BT != IGNORE
    if not real_BT.any():
        raise ValueError("a domain has no tokens; leave it out or give it texts")
    device, training = dense.token_embedding.weight.device, dense.training
    sums_LD = torch.zeros(dense.config.n_layers, dense.config.d_model, dtype=torch.float64)
    seen: list[Tensor] = []
    hooks = [block.ffn_norm.register_forward_hook(lambda *call: seen.append(call[-1])) for block in dense.blocks]
    dense.eval()
    try:
        for tokens, real in zip(tokens_BT.split(32), real_BT.split(32), strict=True):
            seen.clear()
            dense(tokens.to(device))
            sums_LD += torch.stack([x_BTD[real.to(device)].double().sum(0).cpu() for x_BTD in seen])
    finally:
        dense.train(training)
        for hook in hooks:
            hook.remove()
    return sums_LD / real_BT.sum()


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
            value += sum(other[name].to(value) - value for other in others) / len(parents)
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
