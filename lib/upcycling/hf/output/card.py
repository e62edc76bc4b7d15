"""What lies beside converted weights: the receipt as JSON, and the model card (README.md, `data/card.md` filled in)."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..receipt import Receipt, versions

if TYPE_CHECKING:
    from ..convert import Conversion

CARD = files(__package__).joinpath("data/card.md").read_text(encoding="utf-8")
_ASKED = ("num_experts", "top_k", "layers", "init", "noise", "router_std", "seed")


def receipt_record(job: Conversion, receipt: Receipt | None, digests: dict[str, str]) -> dict[str, Any]:
    """The JSON beside the weights: what was asked for, what was found, and the SHA-256 of each weight file."""
    found = {"source": job.plan.source, "target": job.plan.target, "versions": versions()}
    if receipt is not None:
        found = asdict(receipt)
    asked = {name: getattr(job.plan, name) for name in _ASKED}
    return {"base_model": job.title, "conversion": asked, "verified": receipt is not None, **found, "weights": digests}


def model_card(job: Conversion, receipt: Receipt | None) -> str:
    """README.md: front matter, how to load it, the receipt, what to know before training."""
    plan, sizes = job.plan, job.plan.sizes
    exact = plan.init == "copy"
    values = {name: getattr(plan, name) for name in ("source", "target", *_ASKED)} | {
        "base_model": f"base_model: {job.name}\n" if job.from_hub else "",
        "title": job.title,
        "dense": sizes.dense,
        "moe": sizes.moe,
        "active": sizes.active,
        "where": "every layer" if plan.layers == tuple(range(plan.config.num_hidden_layers)) else "some layers",
        "layers": ",".join(map(str, plan.layers)),
        "noise": "" if exact else f" --noise {plan.noise}",
        "copies": "all of them copies" if exact else "copies with noise",
        "state": "it computes what the dense model computes" if exact else "it is a little off the dense model",
        "equality": "Its outputs were **not compared** with the dense model's.",
        "notes": "".join(f"- {note}\n" for note in plan.notes),
        "engines": "".join(f"- {engine}: {what}\n" for engine, what in plan.engines.items()),
    }
    if receipt is not None:
        values["equality"] = receipt.to_markdown()
    return CARD.format(**values)
