"""What lies beside converted weights: the receipt as JSON, and the model card (README.md) as the hub wants it."""

from __future__ import annotations

import json

from .receipt import Receipt, _versions

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- upcycled
{base_model}---

# {source} upcycled to {num_experts} experts, top-{top_k}

{target} with {moe:,} parameters, {active:,} of them active per token, made from {name} ({source}, {dense:,}
parameters): {where} {experts}. It was not trained: {state}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{equality}

## Before training it

{notes}
## Who reads it

{engines}
Settings: `--experts {num_experts} --top-k {top_k} --layers {layers} --init {init} --router-std {router_std} --seed {seed}`.
The full record is in `upcycling_receipt.json`.
"""


def receipt_record(job, receipt: Receipt | None, digests: dict[str, str]) -> dict:
    """The JSON beside the weights: what was asked for, what was found, and the SHA-256 of each weight file."""
    plan = job.plan
    asked = {name: getattr(plan, name) for name in ("num_experts", "top_k", "layers", "init", "router_std", "seed")}
    found = {"source": plan.source, "target": plan.target, "versions": _versions()}
    if receipt is not None:
        found = json.loads(receipt.to_json())
    return {"base_model": job.title, "conversion": asked, "verified": receipt is not None, **found, "weights": digests}


def model_card(job, receipt: Receipt | None) -> str:
    """README.md: front matter, how to load it, the receipt, what to know before training."""
    plan = job.plan
    copies = plan.init == "copy"
    return CARD.format(
        base_model=f"base_model: {job.name}\n" if job.from_hub else "",
        **{name: getattr(plan, name) for name in ("source", "target", "num_experts", "top_k", "init", "router_std", "seed")},
        name=job.title, dense=plan.sizes.dense, moe=plan.sizes.moe, active=plan.sizes.active,
        where=f"the feed-forward networks of all {len(plan.layers)} layers"
        if len(plan.layers) == plan.config.num_hidden_layers else f"those of layers {', '.join(map(str, plan.layers))}",
        layers=",".join(map(str, plan.layers)),
        experts="became experts that are copies of them" if copies else "became experts: copies of them, with noise",
        state="it computes what the dense model computes." if copies else "its outputs differ a little from the dense model's.",
        equality=receipt.to_markdown() if receipt is not None else "Its outputs were **not compared** with the dense model's.",
        notes="".join(f"- {note}\n" for note in plan.notes),
        engines="".join(f"- {engine}: {what}\n" for engine, what in plan.engines.items()),
    )  # fmt: skip
