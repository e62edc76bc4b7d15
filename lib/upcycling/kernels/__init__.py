"""Everything fast and machine-specific, behind one door: `faster(what, *arguments)`.

The door returns what a kernel computes, or None where none is taken: then `core` goes its plain way. So this folder can
be deleted and everything else still works, slower, and UPCYCLING_KERNELS=0 turns all of it off. In the order to read:

    choice             whether a kernel is taken here: raced once against torch's own functions, the answer kept
    private            the private names of torch, each tried once; they stand nowhere else in the library
    products           float32 products by oneDNN, twice MKL's speed on AMD processors with AVX-512
    few_rows           products of one to four rows, as in generation; FLOPs that NumPy computes are announced
    expert_by_expert   the experts' products one expert after the other, with a backward pass of their own, which keeps
                       the memory of a large gradient from one update to the next

A kernel computes what the plain path computes, up to rounding: values and gradients are tested beside it. It may import
`files`, and nothing of the library above that: what it works on is given to it. No lesson looks in here.
"""

from typing import Any

from .choice import ON
from .expert_by_expert import faster_experts
from .few_rows import faster_one_token
from .private import uncompiled
from .products import faster_linear

__all__ = ["faster", "uncompiled"]

_BY_NAME = {"linear": faster_linear, "experts": faster_experts, "one token": faster_one_token}


def faster(what: str, *arguments: Any) -> Any:
    """What the kernel for `what` computes, or None where none is taken for these arguments on this machine."""
    return _BY_NAME[what](*arguments) if ON else None
