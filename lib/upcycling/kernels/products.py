"""Matrix products by oneDNN, forward and backward, where they are faster than torch's own.

Torch multiplies float32 matrices on x86 through MKL, which on AMD processors does not use the AVX-512 units that Zen 4
and later have. oneDNN, which every x86 build of torch contains, does: about twice the speed on those machines. The
experts of an MoE do the same (`expert_by_expert`), a handful of rows go another way (`few_rows`).

Shapes: R rows, I inputs, O outputs of a matrix.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import private
from .choice import Kernel
from .few_rows import few_rows_linear

NARROWEST = 256  # both sides of a weight: narrower ones gain little, least in their own gradient


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether there is anything to choose: float32 on a CPU, without autocast, and a large `weight` (..., O, I)."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight.shape[-2:]) >= NARROWEST
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x_RI @ weight_OI.T + bias_O by oneDNN, without autograd; either may be the transpose of a contiguous matrix."""
    if torch.compiler.is_compiling():
        return _opaque_product(x_RI, weight_OI, bias_O)
    return private.linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


@torch.library.custom_op("upcycling::product", mutates_args=())
def _opaque_product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`product` for torch.compile, which would otherwise want constant, packed weights for oneDNN."""
    return private.linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


@_opaque_product.register_fake
def _(x_RI, weight_OI, bias_O):
    return x_RI.new_empty(len(x_RI), len(weight_OI))


def weight_gradient(dy_RO: Tensor, x_RI: Tensor) -> Tensor:
    """dweight_OI = dy_RO.T @ x_RI by `product`, both contiguous; it may be the transpose of a contiguous matrix."""
    rows, narrow = x_RI.shape
    if rows >= 256 and narrow <= 512 and dy_RO.shape[1] >= 4 * narrow:
        return product(x_RI.t(), dy_RO.t()).t()  # up to twice the speed, where oneDNN finds such a shape hard
    return product(dy_RO.t(), x_RI.t())


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
        dweight_OI = weight_gradient(dy_RO, x_RI).contiguous() if ctx.needs_input_grad[1] else None
        return dx_RI, dweight_OI, dy_RO.sum(0) if ctx.has_bias else None


def _race():
    if private.linear_pointwise is None:
        raise RuntimeError("this torch has no oneDNN product for plain tensors")
    x, weight = torch.randn(256, 512), torch.randn(512, 512)
    return lambda: product(x, weight), lambda: F.linear(x, weight)


ONEDNN = Kernel("oneDNN's products", _race)


def faster_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
    """y (..., O): x (..., I) @ weight_OI.T + bias_O, with first derivatives only; None where torch's own is as good."""
    if not fits(x, weight_OI):
        return None
    x_RI = x.reshape(-1, x.shape[-1])
    y_RO = None
    if not torch.is_grad_enabled() and len(x_RI) <= 4 and not torch.compiler.is_compiling():
        y_RO = few_rows_linear(x_RI, weight_OI, bias_O)
    if y_RO is None and ONEDNN.taken():
        y_RO = (_Linear.apply if torch.is_grad_enabled() else product)(x_RI, weight_OI, bias_O)
    return None if y_RO is None else y_RO.view(*x.shape[:-1], len(weight_OI))


def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


if private.linear_pointwise is not None:
    with contextlib.suppress(RuntimeError):  # somebody told the counter already
        register_flop_formula(private.linear_pointwise)(_flops)
