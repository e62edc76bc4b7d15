"""What experts start as: one small class for each published recipe.

    upcycle(dense, moe, init=Drop(0.25))      # an instance, or its name for the defaults

    recipe      an expert is                                same function (under weights that sum to 1)
    Copy        the FFN                                     yes
    Noise       the FFN + noise                             no
    Drop        the FFN, a part of its units drawn anew     no
    Permute     the FFN, its units in another order         yes
    Granular    one of G shards, all in use for a token     yes: virtual groups, down matrix scaled; TopK, SelectionBias
    Partition   one of E parts, K of them in use            no; only if all parts are used equally

Each has `preserves_function`, `check(config)`, which raises ValueError where the recipe does not fit the sizes, and
`fill(ffn, layer, generator)`, which writes one MoE layer from one dense FFN.
A hidden unit of an FFN is one row of the up matrix (and of the gate matrix) and one column of the down matrix.
Shapes: E experts, K experts per token, G shards, D width, F hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .config import ModelConfig, MoEConfig
from .experts import Experts
from .model import FeedForward
from .moe import MoELayer


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


@dataclass(frozen=True)
class Copy:
    """Every expert is an exact copy. Sparse Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055), section 3.

    With S shared experts, those are copies too, and the output side of all experts is divided by S + 1, so that the
    routed and the shared ones together give the dense output.
    """

    preserves_function: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        if config.expert_width != config.d_ff:
            raise ValueError(
                f"expert_d_ff={config.expert_width} but a copy is as wide as the FFN, {config.d_ff}: leave expert_d_ff "
                "out, or choose init=Granular() or Partition(), which cut the FFN"
            )

    def experts_per_ffn(self, config: ModelConfig) -> int:
        """How many experts it takes to hold one whole FFN."""
        return 1

    def fill(self, ffn: FeedForward, layer: MoELayer, generator: torch.Generator) -> None:
        copy_into_experts(ffn, layer.experts)
        if layer.shared is not None:
            _copy_into_shared(ffn, layer)
        self.change(layer.experts, generator)

    def change(self, experts: Experts, generator: torch.Generator) -> None:
        """What is done to the copies, in place."""


@dataclass(frozen=True)
class Noise(Copy):
    """N(0, `std`) is added to a random `fraction` of each matrix's entries, drawn anew for each expert.

    The defaults are those of the noise baseline in Drop-Upcycling (Nakamura et al. 2025, arXiv:2502.19261).
    """

    std: float = 0.02
    fraction: float = 0.5
    preserves_function: ClassVar[bool] = False

    def __post_init__(self):
        if self.std < 0:
            raise ValueError(f"std={self.std} is negative; choose 0 or more")
        _check_fraction(self.fraction)

    def change(self, experts: Experts, generator: torch.Generator) -> None:
        for weight in _matrices(experts):
            chosen = _uniform(weight.shape, generator) < self.fraction
            weight += (self.std * _normal(weight.shape, generator) * chosen).to(weight)


@dataclass(frozen=True)
class Drop(Copy):
    """Drop-Upcycling: a `fraction` of each expert's hidden units is drawn anew, other units in each expert.

    New entries come from a normal distribution with the mean and standard deviation of the entries they replace.
    With `one_index_set` the same units are replaced in the gate, up and down matrices (Nakamura et al. 2025,
    arXiv:2502.19261, section 3.2). Without it each matrix has a set of its own, as in the code released with the
    paper: kept for comparison only, because then a unit stays whole with probability (1 - fraction)^3.
    """

    fraction: float = 0.5
    one_index_set: bool = True
    preserves_function: ClassVar[bool] = False

    def __post_init__(self):
        _check_fraction(self.fraction)

    def change(self, experts: Experts, generator: torch.Generator) -> None:
        num_experts, units = experts.w_up_EFD.shape[:2]
        dropped = round(self.fraction * units)
        if dropped == 0:
            return
        for e in range(num_experts):
            chosen_F = torch.randperm(units, generator=generator)[:dropped]
            for weight, unit_dim in _unit_tensors(experts, e):
                if not self.one_index_set:
                    chosen_F = torch.randperm(units, generator=generator)[:dropped]
                _redraw(weight, unit_dim, chosen_F.to(weight.device), generator)


@dataclass(frozen=True)
class Permute(Copy):
    """Each expert's hidden units in an order of its own: the same function, at another place in weight space.

    Alone it breaks no symmetry that training could use: the gradients are permuted with the units. It is the exact
    first half of recipes that mix experts or cut them into shards.
    """

    preserves_function: ClassVar[bool] = True

    def change(self, experts: Experts, generator: torch.Generator) -> None:
        num_experts, units = experts.w_up_EFD.shape[:2]
        for e in range(num_experts):
            order_F = torch.randperm(units, generator=generator)
            for weight, unit_dim in _unit_tensors(experts, e):
                weight.copy_(weight.index_select(unit_dim, order_F.to(weight.device)))


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
        if self.by == "random":
            parts = torch.randperm(len(ffn.up.weight), generator=generator).chunk(experts)
        else:
            parts = balanced_kmeans(ffn.up.weight.detach(), experts, generator)
        scale = experts * _missing_weight(layer.moe) if self.scale is None else self.scale
        _write_shards(ffn, layer, parts, 1.0, scale)


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


def weights_sum_to_1(moe: MoEConfig) -> bool:
    """Do every token's combine weights sum to 1, so that experts that are copies give what one of them does?"""
    return moe.renormalize if moe.router is None else moe.router.preserves_function(moe.renormalize)


def _missing_weight(moe: MoEConfig) -> float:
    """1 where a token's combine weights sum to 1, else what equal probabilities lack: E / K."""
    return 1.0 if weights_sum_to_1(moe) else moe.num_experts / moe.top_k


def _write_shards(ffn: FeedForward, layer: MoELayer, shards, inner: float, outer: float) -> None:
    """Expert e gets the hidden units shards[e % G], gate and up times `inner`, down times `outer`.

    A shared expert i gets shards[i % G], too, as it is; each shard's output is divided equally among the routed and the
    shared experts that hold it. The down bias, which is not a unit's, goes to the routed experts whole.
    """
    moe, groups = layer.moe, len(shards)
    holders = [1 + len(range(g, moe.shared_experts, groups)) for g in range(groups)]
    for e in range(moe.num_experts):
        g = e % groups
        _write_units(ffn, layer.experts, e, slice(None), shards[g], inner, outer / holders[g])
    if ffn.down.bias is not None:
        layer.experts.b_down_ED.copy_((ffn.down.bias * _missing_weight(moe)).expand_as(layer.experts.b_down_ED))
    width = len(shards[0])
    for i in range(moe.shared_experts):
        places = slice(i * width, (i + 1) * width)
        _write_units(ffn, layer.shared, 0, places, shards[i % groups], 1.0, 1 / holders[i % groups])
    if layer.shared is not None and ffn.down.bias is not None:
        layer.shared.b_down_ED.zero_()


def _write_units(ffn, experts: Experts, e: int, places: slice, units_F: Tensor, inner: float, outer: float) -> None:
    units_F = units_F.to(ffn.up.weight.device)
    experts.w_up_EFD[e, places] = ffn.up.weight[units_F] * inner
    experts.w_down_EDF[e, :, places] = ffn.down.weight[:, units_F] * outer
    if ffn.up.bias is not None:
        experts.b_up_EF[e, places] = ffn.up.bias[units_F] * inner
    if ffn.gate is not None:
        experts.w_gate_EFD[e, places] = ffn.gate.weight[units_F] * inner
        if ffn.gate.bias is not None:
            experts.b_gate_EF[e, places] = ffn.gate.bias[units_F] * inner


def _copy_into_shared(ffn: FeedForward, layer: MoELayer) -> None:
    """Write S copies side by side into the shared FFN and give each of the S + 1 parts its share of the output."""
    shared, experts, copies = layer.shared, layer.experts, layer.moe.shared_experts
    shared.w_up_EFD.copy_(ffn.up.weight.repeat(copies, 1))
    shared.w_down_EDF.copy_(ffn.down.weight.repeat(1, copies))
    if ffn.up.bias is not None:
        shared.b_up_EF.copy_(ffn.up.bias.repeat(copies))
        shared.b_down_ED.copy_(ffn.down.bias * copies)  # one bias for all copies
    if ffn.gate is not None:
        shared.w_gate_EFD.copy_(ffn.gate.weight.repeat(copies, 1))
        if ffn.gate.bias is not None:
            shared.b_gate_EF.copy_(ffn.gate.bias.repeat(copies))
    for output in (shared.w_down_EDF, shared.b_down_ED, experts.w_down_EDF, experts.b_down_ED):
        if output is not None:
            output /= copies + 1


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} is outside 0..1; it is a share of the units (Drop) or entries (Noise)")


def _matrices(experts: Experts) -> list[Tensor]:
    return [w for w in (experts.w_up_EFD, experts.w_gate_EFD, experts.w_down_EDF) if w is not None]


def _unit_tensors(experts: Experts, e: int) -> list[tuple[Tensor, int]]:
    """Expert `e`'s tensors that have a hidden-unit dimension, and which dimension that is."""
    found = [(experts.w_gate_EFD, 0), (experts.b_gate_EF, 0), (experts.w_up_EFD, 0), (experts.b_up_EF, 0)]
    return [(stacked[e], dim) for stacked, dim in [*found, (experts.w_down_EDF, 1)] if stacked is not None]


def _redraw(weight: Tensor, unit_dim: int, chosen_F: Tensor, generator: torch.Generator) -> None:
    old = weight.index_select(unit_dim, chosen_F)
    std, mean = torch.std_mean(old.float(), correction=0)
    new = mean + std * _normal(old.shape, generator).to(weight.device)
    weight.index_copy_(unit_dim, chosen_F, new.to(weight.dtype))


# drawn on the CPU, so that a seed means the same experts on every device
def _normal(shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(shape, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)
