"""Routing: what the routers of a model decide, recorded, measured, judged and changed; our models' and transformers'.

Read in this order:

- `record.py`        `record_routing(model)` watches the routers; `trace.py`: the `RoutingTrace` that it fills
- `metrics.py`       how even the load is, how specialised the experts are, against shuffled and uniform baselines
- `load.py`          `load_report`, `evaluate_routing`: each layer's load, and an alarm where the pooled one hides it
- `gradient.py`      `diagnose_router`: does the gradient reach the router?
- `intervention.py`  `intervene`, `knockout`: the losses without this expert
- `snapshots.py`     the routing of one fixed probe during training
- `typed_text.py`    from a text that somebody typed to the routing of its tokens
- `hf_routers.py`    where the routers are in transformers' classes, and by which rule each decides
- `adapter.py`       a transformers MoE with the interface of a DecoderLM

Watching never changes what a model computes, and a changed choice is undone on the way out. What may never come in:
a figure (show), a weight that is written, or numbers over several seeds (experiments).
"""
