"""Matrix products at the speed of the machine: torch's, or oneDNN's where torch's leave half of a CPU unused.

Torch multiplies float32 matrices on x86 through MKL, which on AMD processors does not use the AVX-512 units that Zen 4
and later have. oneDNN, which every x86 build of torch contains, does: about twice the speed on those machines, equal
elsewhere. So `linear` takes oneDNN's products, forward and backward, where that is so and the matrix is large enough
to gain; on any other device, dtype and size, and under autocast, it is `F.linear`. The experts of an MoE do the same
(`upcycling.experts.Experts`).

Shapes: R rows, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

NARROWEST = 256  # both sides of a weight: narrower ones gain little, least in their own gradient


def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch holds oneDNN's product for plain tensors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpuinfo = Path("/proc/cpuinfo")  # elsewhere platform.processor() names the vendor
    vendor = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in vendor


ONEDNN_IS_FASTER = _onednn_is_faster()  # a constant, so that torch.compile takes it for one


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply the rows of `x` by `weight` (..., O, I)."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight.shape[-2:]) >= NARROWEST
        and ONEDNN_IS_FASTER
        and not torch.is_autocast_enabled("cpu")
    )


def product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x_RI @ weight_OI.T + bias_O by oneDNN, without autograd; either may be the transpose of a contiguous matrix."""
    if torch.compiler.is_compiling():
        return _opaque_product(x_RI, weight_OI, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


@torch.library.custom_op("upcycling::product", mutates_args=())
def _opaque_product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`product` for torch.compile, which would otherwise want constant, packed weights for oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")


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


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y (..., O): x (..., I) @ weight_OI.T + bias_O, as `F.linear`; by oneDNN it has first derivatives only."""
    if not takes_onednn(x, weight_OI) or x.numel() == 0:
        return F.linear(x, weight_OI, bias_O)
    x_RI = x.reshape(-1, x.shape[-1])
    few = len(x_RI) <= 4 and not torch.compiler.is_compiling()
    multiply = _Linear.apply if torch.is_grad_enabled() else few_rows_linear if few else product
    return multiply(x_RI, weight_OI, bias_O).view(*x.shape[:-1], len(weight_OI))


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are made with the loss, chunk by chunk, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, x_NI, weight_VI, bias_V, targets_N, ignore_index, chunk):
        wanted = any(ctx.needs_input_grad[:3])
        if torch.is_autocast_enabled(x_NI.device.type):
            dtype = torch.get_autocast_dtype(x_NI.device.type)
            x_NI, weight_VI = x_NI.to(dtype), weight_VI.to(dtype)
        count = (targets_N != ignore_index).sum()
        total = x_NI.new_zeros((), dtype=torch.promote_types(x_NI.dtype, torch.float32))
        dx_NI = torch.empty_like(x_NI) if wanted else None
        dweight_VI = torch.zeros_like(weight_VI, dtype=total.dtype) if wanted else None
        dbias_V = torch.zeros_like(bias_V) if wanted and bias_V is not None else None
        for start in range(0, len(x_NI), chunk):
            x, targets = x_NI[start : start + chunk], targets_N[start : start + chunk]
            logits = linear(x, weight_VI, None if bias_V is None else bias_V.to(x.dtype)).to(total.dtype)
            total += F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
            if wanted:
                real = targets != ignore_index
                gradient = logits.softmax(-1)
                gradient[torch.arange(len(x), device=x.device), targets.where(real, 0)] -= 1
                gradient *= (real.to(total.dtype) / count).unsqueeze(-1)
                dx_NI[start : start + chunk] = linear(gradient.to(x.dtype), weight_VI.t())
                dweight_VI += linear(gradient.t().to(x.dtype), x.t())
                if dbias_V is not None:
                    dbias_V += gradient.sum(0).to(dbias_V.dtype)
        ctx.save_for_backward(dx_NI, dweight_VI, dbias_V)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        gradients = [None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors]
        return *gradients, None, None, None


MOST_LOGITS = 2**24  # that exist at once: 64 MiB in float32


def linear_cross_entropy(x_NI: Tensor, weight_VI: Tensor, bias_V: Tensor | None, targets_N: Tensor, ignore_index: int):
    """Mean cross-entropy (nats) of the logits `x_NI @ weight_VI.T + bias_V`, which never exist all at once.

    Rows are taken in chunks of `MOST_LOGITS` / V; targets equal to `ignore_index` are not counted. Memory beside the
    gradients: one chunk of logits and as much again, where cross_entropy of all logits takes three times N x V.
    """
    chunk = max(1, MOST_LOGITS // len(weight_VI))
    return _LinearCrossEntropy.apply(x_NI, weight_VI, bias_V, targets_N, ignore_index, chunk)


def row_linear(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y_1O of a single row on a CPU, without autograd.

    One row costs what reading the weights costs, and NumPy's dot product of each weight row with it reads them about
    twice as fast as the products that torch calls.
    """
    watched = _get_current_dispatch_mode() is not None  # by a FLOP counter, say: NumPy's product would escape it
    if watched or weight_OI.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return F.linear(x_1I, weight_OI, bias_O)
    rows_O1I = weight_OI.detach().numpy()[:, None, :]  # so that matmul takes a dot product for each weight row
    y_1O = torch.from_numpy(np.matmul(rows_O1I, x_1I.detach().numpy()[0]).T)
    return y_1O if bias_O is None else y_1O + bias_O


def few_rows_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y_RO on a CPU, without autograd, in the order that reads the weights fastest when rows are few."""
    if len(x_RI) == 1:
        return row_linear(x_RI, weight_OI, bias_O)
    if len(x_RI) <= 4 and weight_OI.shape[1] <= 2048 and not torch.is_autocast_enabled("cpu"):
        y_RO = (weight_OI @ x_RI.contiguous().t()).t()  # for MKL another product: half the time of x @ weight.T
        return y_RO if bias_O is None else y_RO + bias_O
    return (product if takes_onednn(x_RI, weight_OI) else F.linear)(x_RI, weight_OI, bias_O)


KEPT_BYTES = 2**25
_last_gradient = WeakTensorKeyDictionary()  # weight -> the memory of its last gradient, if that was a large one


def gradient_like(weight: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient of `weight`: in the memory of its last one, if nothing uses that.

    glibc gives blocks of 32 MiB and more back to the system when they are freed, and fresh pages in every update cost
    up to a third of an MoE layer's forward and backward pass. So such memory stays from one update to the next, for as
    long as the weight is there, as it does with `zero_grad(set_to_none=False)`.
    """
    if weight.nbytes < KEPT_BYTES or weight.device.type != "cpu":
        return torch.empty_like(weight)
    memory = _last_gradient.pop(weight, None)  # taken out, so that no other thread takes it, too
    if memory is None or torch._C._storage_Use_Count(memory._cdata) > 1:
        memory = torch.empty_like(weight).untyped_storage()
    _last_gradient[weight] = memory
    return weight.new_empty(0).set_(memory, 0, weight.shape, weight.stride())


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in builds for ARM

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]
