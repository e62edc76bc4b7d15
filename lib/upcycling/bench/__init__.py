"""Bench: side-by-side measurements on this machine, `make bench`. Things that do the same work run in turn.

- `measure.py`     how: in turn, the median of ratios with its spread, a goal beside each
- `layer.py`       the MoE layer beside a dense FFN of the same active FLOPs, transformers' experts, tutorial loops
- `step.py`        a training step beside libraries' models of the same shape
- `generation.py`  greedy text beside `generate()`; `recording.py`: what watching the routers adds
- `scaling.py`     the layer's cost by tokens and by experts
- `tokenizing.py`  texts to a packed file of tokens

Only ratios are goals: seconds belong to one machine. What may never come in: a measurement of ours alone, or anything
that another folder imports, the command line aside.
"""
