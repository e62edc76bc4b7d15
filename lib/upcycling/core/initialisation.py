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


def weights_sum_to_1(moe: MoEConfig) -> bool:
    """Do every token's combine weights sum to 1, so that experts that are copies give what one of them does?"""
    return moe.renormalize if moe.router is None else moe.router.preserves_function(moe.renormalize)


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
