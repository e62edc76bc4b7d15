"""What lies beside converted weights: the receipt as JSON, and the model card (README.md) as the hub wants it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..receipt import Receipt, versions

if TYPE_CHECKING:
    from ..convert import Conversion

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- upcycled
{base_model}---

# {source} upcycled to {num_experts} experts, top-{top_k}

A {target} made from {title}, a {source} with {dense:,} parameters: in {where} the feed-forward network
became {num_experts} experts, {copies}. {moe:,} parameters, {active:,} of them active per token.
It was not trained since: {state}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{equality}

## Before you train it

{notes}
## What other engines make of it (from reading their sources, not run)

{engines}
## Settings

`--experts {num_experts} --top-k {top_k} --layers {layers} --init {init}{noise} --router-std {router_std}
--seed {seed}`; the full record is in `upcycling_receipt.json`.
"""
_ASKED = ("num_experts", "top_k", "layers", "init", "noise", "router_std", "seed")


def receipt_record(job: Conversion, receipt: Receipt | None, digests: dict[str, str]) -> dict[str, Any]:
    """The JSON beside the weights: what was asked for, what was found, and the SHA-256 of each weight file."""
    found = {"source": job.plan.source, "target": job.plan.target, "versions": versions()}
    if receipt is not None:
        found = json.loads(receipt.to_json())
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
