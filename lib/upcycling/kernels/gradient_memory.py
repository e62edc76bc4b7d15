"""The memory of a large gradient, kept from one update to the next.

glibc gives blocks of 32 MiB and more back to the system when they are freed, and fresh pages in every update cost up to
a third of an MoE layer's forward and backward pass. So such memory stays for as long as the weight is there, as it does
with `zero_grad(set_to_none=False)`.
"""

import torch
from torch import Tensor

from . import private

KEPT_BYTES = 2**25
_last = None if private.WeakKeys is None else private.WeakKeys()  # weight -> the memory of its last large gradient


def gradient_like(weight: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient of `weight`: in the memory of its last one, if nothing uses that."""
    kept = _last is not None and private.use_count is not None
    if not kept or weight.nbytes < KEPT_BYTES or weight.device.type != "cpu":
        return torch.empty_like(weight)
    memory = _last.pop(weight, None)  # taken out, so that no other thread takes it, too
    if memory is None or private.users(memory) > 1:
        memory = torch.empty_like(weight).untyped_storage()
    _last[weight] = memory
    return weight.new_empty(0).set_(memory, 0, weight.shape, weight.stride())
