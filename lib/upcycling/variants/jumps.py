"""What an initialisation costs before any training: the loss of the MoE at step 0 minus that of the model it came from.

initial_jumps(dense, published_arms(dense, MoEConfig(num_experts=8, top_k=2)), series.validation_stream)
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import IGNORE
from ..core.config import MoEConfig
from ..core.initialisation import Copy, Drop, Noise, Permute, weights_sum_to_1
from ..core.model import DecoderLM, evaluating
from ..core.shards import Granular, Partition
from ..core.transfer import initialisation, upcycle
from ..text.stream import TokenStream

Recipe = str | Copy | Granular | Partition  # what `upcycle` takes as init


@torch.no_grad()
def initial_jumps(
    before: DecoderLM, after: Mapping[str, DecoderLM | tuple[MoEConfig, Recipe]],
    windows: TokenStream | tuple[Tensor, Tensor], seed: int = 0, batch_size: int = 32,
) -> list[dict]:  # fmt: skip
    """One row for each entry of `after`: name, exact, loss, jump (nats per target), max_logit_diff.

    `after` maps names to MoEs that came from `before`, or to pairs (MoEConfig, init) for `upcycle(before, …, seed)`.
    `windows` is a TokenStream, all of whose windows are used, or one (tokens_BT, targets_BT); the logits of all of them
    are held in memory. `jump` is the loss minus that of `before` on the same windows. `exact` says whether theory wants
    a jump of 0; None for a given model.
    """
    if not isinstance(windows, tuple):
        windows = next(windows.windows(len(windows), before.config.seq_len))
    batches = list(zip(windows[0].split(batch_size), windows[1].split(batch_size), strict=True))
    old_loss, old_logits = _evaluate(before, batches)
    rows = []
    for name, model in after.items():
        exact = None
        if not isinstance(model, DecoderLM):
            moe, init = model
            recipe = initialisation(init)
            exact = recipe.preserves_function and weights_sum_to_1(moe)
            model = upcycle(before, moe, init=recipe, seed=seed)
        loss, logits = _evaluate(model, batches)
        largest = max(float((new - old).abs().max()) for new, old in zip(logits, old_logits, strict=True))
        rows.append(dict(name=name, exact=exact, loss=loss, jump=loss - old_loss, max_logit_diff=largest))
    return rows


def _evaluate(model: DecoderLM, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, list[Tensor]]:
    """The loss in nats per target, in eval mode, and the logits of each batch."""
    device = model.token_embedding.weight.device
    total, count, logits = 0.0, 0, []
    with evaluating(model):
        for tokens_BT, targets_BT in batches:
            out, real = model(tokens_BT.to(device), targets_BT.to(device)), int((targets_BT != IGNORE).sum())
            total, count = total + out.loss.item() * real, count + real
            logits.append(out.logits_BTV)
    return total / count, logits


def published_arms(dense: DecoderLM, moe: MoEConfig) -> dict[str, tuple[MoEConfig, Recipe]]:
    """The published recipes by name, for `initial_jumps`: each with the sizes it needs, else as `moe` says.

    Shards are a quarter of the FFN, with four times the experts per token (half, where a quarter does not divide the
    sizes): the same active parameters. Partitions have `num_experts` parts.
    """
    width, experts = dense.config.d_ff, moe.num_experts
    shards = 4 if width % 4 == 0 and experts % 4 == 0 and 4 * moe.top_k < experts else 2
    fine = replace(moe, expert_d_ff=width // shards, top_k=shards * moe.top_k)
    parts = replace(moe, expert_d_ff=width // experts)
    bare = replace(moe, renormalize=False)
    arms: dict[str, tuple[MoEConfig, Recipe]] = {
        "copy": (moe, Copy()),
        "copy, router σ 0.5": (replace(moe, router_std=0.5), Copy()),
        "permuted copies": (moe, Permute()),
        "copy + 1 shared": (replace(moe, shared_experts=1), Copy()),
        "noise 0.001": (moe, Noise(std=0.001, fraction=1.0)),
        "noise 0.02 on half": (moe, Noise()),
    }
    arms |= {f"drop {r:g}": (moe, Drop(r)) for r in (0.1, 0.25, 0.5, 1.0)}
    arms |= {f"drop {r:g}, three index sets": (moe, Drop(r, one_index_set=False)) for r in (0.1, 0.25, 0.5, 1.0)}
    arms |= {
        f"copy, weights not renormalised, router σ {std:g}": (replace(bare, router_std=std), Copy())
        for std in (0.02, 0.5)
    }
    arms |= {
        f"granular, {shards} shards": (fine, Granular()),
        "granular, cube root": (fine, Granular(scale="cube_root")),
        "granular, not scaled": (fine, Granular(scale=None)),
        "granular, no virtual groups": (fine, Granular(virtual_groups=False)),
        "granular, weights not renormalised": (replace(fine, renormalize=False), Granular()),
    }
    if width % experts == 0:
        everyone = replace(parts, top_k=experts, router_std=0.0)
        arms["partition, all parts, zero router"] = (everyone, Partition())
        for by in ("random", "kmeans"):
            for scale in (moe.top_k, experts / moe.top_k, experts):
                arms[f"partition {by}, {moe.top_k} of {experts}, × {scale:g}"] = (parts, Partition(by, scale))
    return arms
