"""An MoE with twice the experts."""

import copy
from dataclasses import replace

import torch

from ..core.initialisation import Copy
from ..core.model import DecoderLM
from ..core.transfer import initialisation


def double(moe: DecoderLM, init: str | Copy = "copy", keep_top_k: bool = False, seed: int = 0) -> DecoderLM:
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
