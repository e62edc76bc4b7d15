"""Pretrained models and texts for tests: a tiny Llama that is always here, and those of ../shared/data where it is."""

from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY_LLAMA = ROOT / "data/tiny_llama"  # made by tools/make_tiny_model.py: 512 tokens, 4 layers, a context of 256
SHARED = ROOT.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real models and stories of ../shared/data")


def tolerance(logits):
    """What rounding may change in float32: 1e-5, times the largest logit where that exceeds 1."""
    return 1e-5 * max(1.0, float(logits.abs().max()))


def difference(expected, found):
    """The largest difference between two sets of logits, in units of the largest logit (at least 1)."""
    expected, found = expected.detach().double(), found.detach().double()
    return float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))


@cache
def stories(count=40):
    """Texts of the kind that the tiny model was trained on, drawn anew."""
    from upcycling import load_corpus

    rows = load_corpus("worlds", documents=12 * count, seed=1)["train"]
    return [row["text"] for row in rows if row["domain"] == "stories"][:count]
