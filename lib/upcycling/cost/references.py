"""Named reference models of earlier public projects, and what was claimed of them."""

import json
import math
from dataclasses import replace
from importlib.resources import files
from typing import Any

from ..core.config import ModelConfig, MoEConfig
from ..tables import Table
from .parts import count_parameters, forward_flops


def _config(shape: str, moe: dict | None = None, **sizes: Any) -> ModelConfig:
    return getattr(ModelConfig, shape)(**sizes, moe=moe and MoEConfig(**moe))


_SETTINGS = json.loads((files(__package__) / "references.json").read_text(encoding="utf-8"))
REFERENCE: dict[str, ModelConfig] = {name: _config(**settings) for name, settings in _SETTINGS.items()}
"""The configurations of earlier public projects by name; `count_parameters` gives their published sizes exactly."""


def published_claims() -> Table:
    """What earlier public projects said of their models, and what their configurations come to."""
    config = REFERENCE["sparse-158m"]
    count, tokens = count_parameters(config), 128
    assert config.moe is not None
    width = config.moe.num_experts * config.expert_width
    twin = replace(config, d_ff=width, moe=None)  # as many parameters, all in use

    def giga(head: bool) -> str:
        return f"{forward_flops(config, tokens, head) / 1e9:.2f}"

    def less(head: bool) -> str:
        return f"{forward_flops(twin, tokens, head) / forward_flops(config, tokens, head):.2f}"

    without_tables = count.active_without_embeddings
    parts = [count.active, without_tables, without_tables - count.head]
    whole, inner, trunk = (f"{part / 1e6:.2f}M" for part in parts)
    nano, large = (f"{count_parameters(REFERENCE[name]).total / 1e6:.1f}M" for name in ("nano-moe", "nano-moe-134m"))
    rows = [
        ("sparse-158m", "8.05 GFLOPs", f"{giga(True)} for {tokens} tokens forward; without the head {giga(False)}"),
        ("sparse-158m", "~20M active", f"{whole}; without tables {inner}; without the head, too, {trunk}"),
        ("sparse-158m", "6x less", f"{less(True)}x fewer FLOPs than its dense twin; without the head {less(False)}x"),
        ("sparse-158m", "6x less", f"{count.total / count.active:.2f}x fewer parameters in use than in all"),
        ("nano-moe", "134.6M", f"{nano} at its sizes; {large} with d 288, 16 layers, 12 experts"),
    ]
    return Table(dict(zip(("model", "published", "recomputed"), row, strict=True)) for row in rows)


def _rounded(value: float | None, unit: float = 1) -> str:
    """Three digits at least."""
    if value is None:
        return "not measured"
    value /= unit
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
