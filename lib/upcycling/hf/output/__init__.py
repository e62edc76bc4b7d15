"""What a conversion from folder to folder writes, and how it survives being killed; `hf/convert.py` calls all of it.

- `shards.py`    the weight files: which tensor goes into which, written one tensor at a time
- `partial.py`   the folder `<out>.partial` that everything is written into: what may be there, what a later run keeps
- `card.py`      the receipt as JSON and the model card

Nothing in here decides what a tensor is made of (`families/`) or compares models (`receipt.py`).
"""
