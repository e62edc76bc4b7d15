"""Cost: what a model takes, counted from its parts or measured where counting cannot know. Notebook 09.

Read in this order:

- `parts.py`        a model's parts as counting needs them, ours and transformers'; parameters and FLOPs
- `account.py`      `account`, `side_by_side`: parameters, FLOPs, memory, intensity of either kind of model
- `activations.py`  the memory that the backward pass keeps, measured
- `profile.py`      `time_by_kind`: where the seconds go
- `references.py`   named reference models, and what was claimed of them

What may never come in: a benchmark beside other libraries (bench), or a number that was not counted or measured.
Parameters that are tied count once; a multiplication and an addition are two FLOPs.
"""
