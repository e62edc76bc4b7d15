"""Activations of a feed-forward layer, and their derivatives in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(name: str, up_NF: Tensor, gate_NF: Tensor | None) -> Tensor:
    """The FFN's hidden units: gelu(up), gelu_tanh(up) (OpenAI's GPT-2), relu(up), or silu(gate) * up for swiglu."""
    if name == "swiglu":
        return F.silu(gate_NF) * up_NF
    if name == "relu":
        return F.relu(up_NF)
    return F.gelu(up_NF, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_backward(name: str, dact_NF: Tensor, up_NF: Tensor) -> Tensor:
    """dup_NF of gelu, gelu_tanh or relu, in the memory of dact_NF."""
    if name == "relu":
        return dact_NF.masked_fill_(up_NF <= 0, 0)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(dact_NF, up_NF, approximate=approximate, grad_input=dact_NF)
