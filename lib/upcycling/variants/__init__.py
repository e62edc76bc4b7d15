"""Variants: what notebook 06 does to an upcycled model beyond `upcycle` itself. Each module stands alone.

- `jumps.py`        `initial_jumps`: what a recipe costs before any training, with the published recipes by name
- `domain_rows.py`  `router_rows`: a router that starts from the mean hidden state of each domain
- `moments.py`      `carry_moments`: AdamW's memory of the dense run, handed on to the experts
- `doubling.py`     `double`: an MoE with twice the experts, the same function

The shard recipes, Granular and Partition, are in `core/shards.py`, since `upcycle` takes them like any other.
What may never come in: what a plain upcycling needs (that is core), a training loop, or a comparison over seeds
(experiments).
"""
