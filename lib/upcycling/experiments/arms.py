"""What is compared: named arms, and the sets of them behind the notebooks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core import routers
from ..core.config import MoEConfig
from ..core.initialisation import Drop
from .presets import Preset


@dataclass(frozen=True)
class Arm:
    """A recipe: `moe=None` stays dense; `init` is what `upcycle` takes; `start` is "parent" or "scratch"."""

    name: str
    moe: MoEConfig | None = None
    init: object = "copy"
    start: str = "parent"

    def __post_init__(self):
        if self.start not in ("parent", "scratch"):
            raise ValueError(f"start={self.start!r} is unknown; choose 'parent' or 'scratch'")

    def to_dict(self) -> dict:
        moe = None if self.moe is None else {name: _plain(value) for name, value in vars(self.moe).items()}
        return {"name": self.name, "moe": moe, "init": _plain(self.init), "start": self.start}


def _plain(value):
    """`value` if JSON can write it, else its repr (a rule or an initialisation with its settings)."""
    return value if isinstance(value, str | int | float | None) else repr(value)


# ---------------------------------------------------------------------------------------------------- sets of arms


DENSE = Arm("dense control")


def upcycling_arms(preset: Preset) -> list[Arm]:
    """Notebook 04: is upcycling better than training the dense model on, and than an MoE without a parent?"""
    return [DENSE, Arm("upcycled MoE", preset.moe), Arm("MoE from scratch", preset.moe, start="scratch")]


def pooling_arms(preset: Preset) -> list[Arm]:
    """Notebook 06: how much of "naive upcycling is bad" is the balance loss that pools the layers?"""
    layer, pooled = replace(preset.moe, balance="layer"), replace(preset.moe, balance="pooled")
    return [
        DENSE,
        Arm("copy, per layer", layer),
        Arm("copy, pooled", pooled),
        Arm("drop, per layer", layer, Drop(0.5)),
        Arm("drop, pooled", pooled, Drop(0.5)),
    ]


def router_arms(preset: Preset) -> list[Arm]:
    """Notebook 06: the same copies under every rule, one thing changed at a time."""

    def changed(name: str, **fields) -> Arm:
        return Arm(name, replace(preset.moe, **fields))

    k = preset.moe.top_k
    return [
        DENSE,
        changed(f"softmax top-{k}"),
        changed("no balance loss", aux_weight=0.0),
        changed(f"noisy top-{k}", noisy=True),
        changed("sigmoid + selection bias", router=routers.SelectionBias(), aux_weight=0.0),
        changed("top-p 0.25", router=routers.TopP(0.25)),
        changed("ReLU", router=routers.ReLURouter(), aux_weight=0.0),
        changed("straight-through", router=routers.StraightThrough()),
        changed("expert choice (leaks)", router=routers.ExpertChoice(), aux_weight=0.0),
        changed("hash", router=routers.Hash(), aux_weight=0.0),
        changed(f"1 shared + top-{k}", shared_experts=1),
        changed("capacity 1.25", capacity_factor=1.25),
        changed("sampled", router=routers.Sampled()),
    ]


ARM_SETS: dict[str, Callable[[Preset], list[Arm]]] = {
    "upcycling": upcycling_arms,
    "pooling": pooling_arms,
    "routers": router_arms,
}
