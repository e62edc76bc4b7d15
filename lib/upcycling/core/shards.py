"""Initialisations that cut one FFN into many experts.

Shapes: E experts, K experts per token, G shards, D width, F hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .config import ModelConfig, MoEConfig
from .experts import Experts
from .initialisation import weights_sum_to_1
from .model import FeedForward
from .moe import MoELayer


@dataclass(frozen=True)
class Granular:
    """The FFN cut into G = d_ff / expert_d_ff shards; expert e holds shard e modulo G. He et al. 2024, section 3.2.

    (Upcycling LLMs into MoE, arXiv:2410.07524.) With `virtual_groups` the G experts of a group share one router row, so
    that a token that chooses one of them chooses all: the K chosen experts hold each shard K/G times, each with the
    weight 1/G in all. What that takes away, `scale` gives back:

        "linear"     the down matrix times G: the dense function, whatever the activation
        "cube_root"  gate, up and down times the cube root of G (without a gate: up and down times the square root), as
                     Megatron-LM does: the dense function only where the activation is homogeneous (ReLU without a gate)
        None         nothing

    Where the weights do not sum to 1, G becomes G * E / K, which is right for equal probabilities only. A group stays
    whole as long as its experts get equal scores and the number of experts is fixed: under TopK, StraightThrough and
    SelectionBias, with jitter, too; learned noise, sampling and expert dropout split groups in training, hash, top-p,
    ReLU, expert choice and capacity at all times. `topk` may also split two groups whose scores are equal to the last
    bit: all of them under a zero router, and in bf16 those of about 0.2 % of the tokens. As soon as the rows of a group
    have learned to differ, it is a group no more.
    """

    scale: str | None = "linear"
    virtual_groups: bool = True

    def __post_init__(self):
        if self.scale not in ("linear", "cube_root", None):
            raise ValueError(f"scale={self.scale!r} is unknown; choose 'linear', 'cube_root' or None")

    @property
    def preserves_function(self) -> bool:
        return self.scale == "linear" and self.virtual_groups

    def check(self, config: ModelConfig) -> None:
        moe, width = config.moe, config.expert_width
        if config.d_ff % width:
            raise ValueError(f"expert_d_ff={width} does not divide the FFN's d_ff={config.d_ff} into equal shards")
        shards = config.d_ff // width
        for name in ("num_experts", "top_k") if self.virtual_groups else ("num_experts",):
            if getattr(moe, name) % shards:
                raise ValueError(
                    f"{name}={getattr(moe, name)} is not a multiple of the {shards} shards that d_ff={config.d_ff} and "
                    f"expert_d_ff={width} make: a token needs whole FFNs"
                )

    def experts_per_ffn(self, config: ModelConfig) -> int:
        return config.d_ff // config.expert_width

    def fill(self, ffn: FeedForward, layer: MoELayer, generator: torch.Generator) -> None:
        units, width = len(ffn.up.weight), layer.experts.w_up_EFD.shape[1]
        shards = torch.arange(units).split(width)
        total = len(shards) * _missing_weight(layer.moe)
        inner, outer = 1.0, 1.0
        if self.scale == "linear":
            outer = total
        elif self.scale == "cube_root":
            inner = outer = total ** (1 / 2 if ffn.gate is None else 1 / 3)
        _write_shards(ffn, layer, shards, inner, outer)
        if self.virtual_groups:
            for linear in (layer.router, layer.noise):
                for rows in linear.parameters() if linear is not None else ():
                    rows.copy_(rows[: len(rows) // len(shards)].repeat_interleave(len(shards), 0))


@dataclass(frozen=True)
class Partition:
    """The FFN's hidden units dealt out to the E experts, each unit to one. LLaMA-MoE (Zhu et al. 2024), section 3.1.

    (arXiv:2406.16554.) `by="random"` deals at random, "kmeans" puts units with similar up rows together, in clusters of
    equal size. The active parameters shrink: a token uses K of the E parts of one FFN, so this is the dense function
    only if K = E and all weights are equal. `scale` multiplies the down matrices; None takes E (where the weights sum
    to 1), for which the mean output over random choices is the dense output. LLaMA-MoE's own is E/K; K gives the plain
    sum of the chosen parts.
    """

    by: str = "random"
    scale: float | None = None
    preserves_function: ClassVar[bool] = False

    def __post_init__(self):
        if self.by not in ("random", "kmeans"):
            raise ValueError(f"by={self.by!r} is unknown; choose 'random' or 'kmeans'")

    def check(self, config: ModelConfig) -> None:
        experts = config.moe.num_experts
        if config.d_ff % experts:
            raise ValueError(f"d_ff={config.d_ff} cannot be dealt out to num_experts={experts} equally")
        if config.expert_width * experts != config.d_ff:
            raise ValueError(
                f"a partition of d_ff={config.d_ff} into {experts} experts needs expert_d_ff={config.d_ff // experts}, "
                f"not {config.expert_width}"
            )

    def experts_per_ffn(self, config: ModelConfig) -> int:
        return config.moe.num_experts

    def fill(self, ffn: FeedForward, layer: MoELayer, generator: torch.Generator) -> None:
        experts = layer.moe.num_experts
        parts: Sequence[Tensor]
        if self.by == "random":
            parts = torch.randperm(len(ffn.up.weight), generator=generator).chunk(experts)
        else:
            parts = balanced_kmeans(ffn.up.weight.detach(), experts, generator)
        scale = experts * _missing_weight(layer.moe) if self.scale is None else self.scale
        _write_shards(ffn, layer, parts, 1.0, scale)


def balanced_kmeans(rows_FD: Tensor, clusters: int, generator: torch.Generator, rounds: int = 10) -> list[Tensor]:
    """The indices of `rows_FD` in `clusters` groups of equal size, close in Euclidean distance: Lloyd's rounds.

    In each round the (row, centre) pairs take their turns from the closest to the farthest, as long as the cluster has
    room. Raises ValueError if the rows cannot be divided equally.
    """
    count = len(rows_FD)
    if count % clusters:
        raise ValueError(f"{count} rows cannot make {clusters} clusters of equal size")
    rows_FD = rows_FD.float().cpu()
    centres_CD = rows_FD[torch.randperm(count, generator=generator)[:clusters]]
    for _ in range(rounds):
        members: list[list[int]] = [[] for _ in range(clusters)]
        placed = set()
        for pair in torch.cdist(rows_FD, centres_CD).flatten().argsort().tolist():
            row, cluster = divmod(pair, clusters)
            if row not in placed and len(members[cluster]) < count // clusters:
                members[cluster].append(row)
                placed.add(row)
        centres_CD = torch.stack([rows_FD[indices].mean(0) for indices in members])
    return [torch.tensor(sorted(indices)) for indices in members]


def _missing_weight(moe: MoEConfig) -> float:
    """1 where a token's combine weights sum to 1, else what equal probabilities lack: E / K."""
    return 1.0 if weights_sum_to_1(moe) else moe.num_experts / moe.top_k


def _write_shards(ffn: FeedForward, layer: MoELayer, shards: Sequence[Tensor], inner: float, outer: float) -> None:
    """Expert e gets the hidden units shards[e % G], gate and up times `inner`, down times `outer`.

    A shared expert i gets shards[i % G], too, as it is; each shard's output is divided equally among the routed and the
    shared experts that hold it. The down bias, which is not a unit's, goes to the routed experts whole.
    """
    moe, groups = layer.moe, len(shards)
    holders = [1 + len(range(g, moe.shared_experts, groups)) for g in range(groups)]
    for e in range(moe.num_experts):
        g = e % groups
        _write_units(ffn, layer.experts, e, slice(None), shards[g], inner, outer / holders[g])
    if layer.experts.b_down_ED is not None:
        layer.experts.b_down_ED.copy_((ffn.down.bias * _missing_weight(moe)).expand_as(layer.experts.b_down_ED))
    width = len(shards[0])
    if layer.shared is not None:
        for i in range(moe.shared_experts):
            places = slice(i * width, (i + 1) * width)
            _write_units(ffn, layer.shared, 0, places, shards[i % groups], 1.0, 1 / holders[i % groups])
        if ffn.down.bias is not None:
            layer.shared.b_down_ED.zero_()


def _write_units(
    ffn: FeedForward, experts: Experts, e: int, places: slice, units_F: Tensor, inner: float, outer: float
) -> None:
    units_F = units_F.to(ffn.up.weight.device)
    experts.w_up_EFD[e, places] = ffn.up.weight[units_F] * inner
    experts.w_down_EDF[e, :, places] = ffn.down.weight[:, units_F] * outer
    if experts.b_up_EF is not None:
        experts.b_up_EF[e, places] = ffn.up.bias[units_F] * inner
    if ffn.gate is not None and experts.w_gate_EFD is not None:
        experts.w_gate_EFD[e, places] = ffn.gate.weight[units_F] * inner
        if experts.b_gate_EF is not None:
            experts.b_gate_EF[e, places] = ffn.gate.bias[units_F] * inner
