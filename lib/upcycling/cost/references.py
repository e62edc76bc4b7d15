"""Named reference models of earlier public projects, and what was claimed of them."""

from __future__ import annotations

import math
from dataclasses import replace

from ..core.config import ModelConfig, MoEConfig
from ..tables import Table
from .parameters import count_parameters, forward_flops

_SIMPLE_100M = ModelConfig.simple(
    vocab_size=50257, d_model=832, n_layers=7, n_heads=8, d_ff=3328, seq_len=512, position="none"
)
_SMOL_119M = ModelConfig.smol(vocab_size=50257, d_model=832, n_layers=7, n_heads=8, d_ff=3328, seq_len=512)
_SIMPLE_16M = ModelConfig.simple(
    vocab_size=50257, d_model=256, n_layers=4, n_heads=4, d_ff=1024, seq_len=512, position="none"
)
_NANO = ModelConfig.nano(vocab_size=2048, d_model=256, n_layers=12, n_heads=8, d_ff=1024, seq_len=1080)
_8_TOP_2 = MoEConfig(num_experts=8, top_k=2, router_bias=True)

REFERENCE: dict[str, ModelConfig] = {
    "simple-100m": _SIMPLE_100M,
    "simple-100m-moe": replace(_SIMPLE_100M, moe=_8_TOP_2),
    "smol-119m": _SMOL_119M,
    "smol-119m-moe": replace(_SMOL_119M, moe=_8_TOP_2),
    "simple-16m": _SIMPLE_16M,
    "simple-16m-moe": replace(_SIMPLE_16M, moe=_8_TOP_2),
    "nano": _NANO,
    "nano-moe": replace(_NANO, moe=replace(_8_TOP_2, noisy=True)),
    "nano-moe-134m": replace(
        _NANO,
        d_model=288,
        n_layers=16,
        d_ff=1152,
        moe=MoEConfig(num_experts=12, top_k=2, router_bias=True, noisy=True),
    ),
    "sparse-158m": ModelConfig.simple(
        vocab_size=50257,
        d_model=512,
        n_layers=6,
        n_heads=8,
        d_ff=1024,
        seq_len=256,
        ffn_bias=False,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=16, top_k=2),
    ),
    "smolmoe": ModelConfig.smol(
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        seq_len=2048,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=3, top_k=1),
    ),
}
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
