"""Which stock transformers MoE class computes the same function as a dense model, and from which tensors it is made.

Read `base.py` (the words: fields, rules, tensors, classes), then one family in `rules.py`, then `engine.py` (a family's
rule carried out: the MoE's configuration and the list of its tensors).

- `base.py`       the vocabulary
- `rules.py`      the families that need no more than that: Llama, Mistral, Qwen 2 and 3, OLMo, Granite; how to add one
- `more.py`       the families whose tensors are changed on the way
- `classes.json`  the MoE classes, `refused.json` the families that have none, both read by `classes.py`
- `engine.py`     from a rule to the configuration and tensors of the MoE

All of it works on configurations and shapes. What may never come in: reading a weight, or a file of a model.
"""

from .classes import REFUSED
from .more import FAMILIES as _MORE
from .rules import FAMILIES as _FIRST

FAMILIES = {**_FIRST, **_MORE}
"""model_type -> rule"""

__all__ = ["FAMILIES", "REFUSED"]
