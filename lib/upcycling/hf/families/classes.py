"""The stock MoE classes and the families that none of them computes, read from the two tables beside this module.

`classes.json`, one entry a class: "tensors" says how each tensor is made that is no copy of the dense one of the same
name ("kind", "sources", "transform", "value": the fields of `Rule`), the rest are those fields of `MoEClass` that are
not at their default, and "why" is for readers. `refused.json`: model types, why no stock class computes them, and what
comes closest, if anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import MoEClass, Rule, table


def rows(*tensors: Tensor) -> Tensor:
    """The tensors, one below the other: [gate; up]."""
    return torch.cat(tensors)


def rows_transposed(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors).t()


_TRANSFORMS = {"rows": rows, "rows_transposed": rows_transposed}


def _rule(kind: str, sources: tuple[str, ...] = (), transform: str | None = None, value: float = 0.0) -> Rule:
    return Rule(kind, tuple(sources), None if transform is None else _TRANSFORMS[transform], value)


def _class(name: str, tensors: dict[str, dict], why: str = "", **fields: Any) -> MoEClass:
    return MoEClass(name, {tensor: _rule(**rule) for tensor, rule in tensors.items()}, **fields)


CLASSES = {name: _class(name, **fields) for name, fields in table("classes.json").items()}
# model_type -> (why no stock class computes it, what comes closest, if anything)
REFUSED: dict[str, tuple[str, str | None]] = {
    kind: (row["reason"], row["nearest"]) for row in table("refused.json") for kind in row["model_types"]
}
