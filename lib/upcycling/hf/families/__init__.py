"""Which stock transformers MoE class computes the same function as a dense model, and from which tensors it is made.

Read `base.py` (the words: fields, rules, tensors, classes), then `rules.py` and one family in `families.json`, then
`engine.py` (a family's rule carried out: the MoE's configuration and the list of its tensors).

- `base.py`        the vocabulary; `fields.json`, the fields that most configurations share
- `families.json`  the families, a row each; how to add one is said in `rules.py`
- `rules.py`       a row as a rule, and what a row cannot say
- `more.py`        the same for the families whose tensors are changed on the way
- `classes.json`   the MoE classes, `refused.json` the families that have none, both read by `classes.py`
- `engine.py`      from a rule to the configuration and tensors of the MoE

All of it works on configurations and shapes. What may never come in: reading a weight, or a file of a model.
"""

from .classes import REFUSED
from .more import OWN as _CHANGED
from .rules import OWN, ROWS, rule_of

FAMILIES = {kind: rule_of(kind, (OWN | _CHANGED).get(kind)) for kind in ROWS}
"""model_type -> rule"""

__all__ = ["FAMILIES", "REFUSED"]
