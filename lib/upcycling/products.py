"""Matrix products at the speed of the machine: torch's, or oneDNN's where torch's leave half of a CPU unused.

Torch multiplies float32 matrices on x86 through MKL, which on AMD processors does not use the AVX-512 units that Zen 4
and later have. oneDNN, which every x86 build of torch contains, does: about twice the speed on those machines, equal
elsewhere. So `linear` takes oneDNN's products, forward and backward, where that is so and the matrix is large enough
to gain; on any other device, dtype and size, under autocast and when torch.compile traces, it is `F.linear`. The
experts of an MoE do the same (`upcycling.moe.Experts`).

Shapes: R rows, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

NARROWEST = 256  # both sides of a weight: narrower ones gain little, least in their own gradient


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch holds oneDNN's product for plain tensors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")  # elsewhere platform.processor() names the vendor
    vendor = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in vendor


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply the rows of `x` by `weight` (..., O, I)."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight.shape[-2:]) >= NARROWEST
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x_RI @ weight_OI.T + bias_O by oneDNN, without autograd; either may be the transpose of a contiguous matrix."""
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_OI, bias_O):
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.has_bias = bias_O is not None
        return product(x_RI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RO):
        x_RI, weight_OI = ctx.saved_tensors
        dy_RO = dy_RO.contiguous()
        dx_RI = product(dy_RO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        dweight_OI = product(dy_RO.t(), x_RI.t()) if ctx.needs_input_grad[1] else None
        return dx_RI, dweight_OI, dy_RO.sum(0) if ctx.has_bias else None


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y (..., O): x (..., I) @ weight_OI.T + bias_O, as `F.linear`."""
    if not takes_onednn(x, weight_OI) or x.numel() == 0:
        return F.linear(x, weight_OI, bias_O)
    x_RI = x.reshape(-1, x.shape[-1])
    multiply = _Linear.apply if torch.is_grad_enabled() else product
    return multiply(x_RI, weight_OI, bias_O).view(*x.shape[:-1], len(weight_OI))


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]
