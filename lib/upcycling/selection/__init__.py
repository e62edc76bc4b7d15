"""Selection: which documents are worth a fixed budget, and a proof of what training then reads. Notebook 08.

Read in this order:

- `scores.py`           one number for each document: entropies, cross-entropy, excess loss of an MoE
- `choose.py`           `select`, and the `Selection` it returns, saves and turns into a token stream
- `quotas.py`           how a budget is shared among strata
- `near_duplicates.py`  documents that are nearly equal, by MinHash
- `rows.py`             rows of documents, read from whatever holds them

What may never come in: training (a `Selection` ends in a stream), a score that reads the validation split, or a choice
that depends on anything but rows, scores and seed.
"""
