"""The private names of torch that kernels use: they stand here and nowhere else.

Each may be gone, or take other arguments, in another release. So each is looked up, tried once on a small input and,
where it fails, replaced by None (or by what is public), with one logged sentence: what needs it is then not taken.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.weak
from torch import Tensor

log = logging.getLogger("upcycling.kernels")


def tried(what: str, find: Callable[[], Any], trial: Callable[[Any], None], otherwise: Any = None) -> Any:
    """What `find` finds if `trial` runs with it, else `otherwise` and one logged sentence."""
    try:
        found = find()
        trial(found)
        return found
    except Exception as error:
        log.warning("%s is not used: this torch (%s) has it no more as expected (%r)", what, torch.__version__, error)
        return otherwise


def _multiplies(linear_pointwise) -> None:
    x_RI, weight_OI, bias_O = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    ours_RO = linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")
    if not torch.allclose(ours_RO, F.linear(x_RI, weight_OI, bias_O)):
        raise ValueError("it computes something else")


linear_pointwise: Callable[..., Tensor] | None = None  # oneDNN's product of plain tensors; builds for ARM have none
if torch.backends.mkldnn.is_available():
    linear_pointwise = tried(
        "oneDNN's product (torch.ops.mkldnn._linear_pointwise)", lambda: torch.ops.mkldnn._linear_pointwise, _multiplies
    )


def _disables(disable) -> None:
    if not callable(disable(lambda: 1)):  # calling what it returns would load the compiler here
        raise ValueError("it returns something else")


# torch.compiler.disable loads the compiler, a second or more; torch's own name for it does not until it is needed
uncompiled: Callable = tried("torch._disable_dynamo", lambda: torch._disable_dynamo, _disables)
if uncompiled is None:
    uncompiled = tried("torch.compiler.disable", lambda: torch.compiler.disable, _disables, lambda function: function)

# a dictionary whose keys are tensors, compared by identity and held weakly
WeakKeys = tried(
    "torch.utils.weak.WeakTensorKeyDictionary",
    lambda: torch.utils.weak.WeakTensorKeyDictionary,
    lambda dictionary: dictionary().pop(torch.zeros(1), None),
)

# how many tensors use a storage
use_count: Callable[[int], int] | None = tried(
    "torch._C._storage_Use_Count",
    lambda: torch._C._storage_Use_Count,
    lambda count: count(torch.zeros(1).untyped_storage()._cdata) + 0,
)


def users(storage: torch.UntypedStorage) -> int:
    """How many tensors use `storage`, the one that holds it here included."""
    assert use_count is not None
    return use_count(storage._cdata)
