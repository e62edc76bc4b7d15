"""The experts by oneDNN, one after the other, so that the rows of each stay in the cache.

Shapes: R rows sorted by expert, D model width, F FFN width, E experts; B rows of one block (one expert's, and a few of
its neighbours').
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import private
from .choice import Kernel
from .few_rows import few_rows_linear
from .products import ONEDNN, fits, product, weight_gradient

# glibc gives blocks of 32 MiB and more back to the system when they are freed, and fresh pages in every update cost up
# to a third of an MoE layer's forward and backward pass. So such memory stays for as long as the weight is there, as it
# does with `zero_grad(set_to_none=False)`.
KEPT_BYTES = 2**25
_last = None if private.WeakKeys is None else private.WeakKeys()  # weight -> the memory of its last large gradient


def faster_experts(experts, x_RD: Tensor, counts_E: Tensor) -> Tensor | None:
    """y_RD of `core.experts.Experts`, rows sorted by expert, counts_E of each; None where the plain way is as fast."""
    if not fits(x_RD, experts.w_up_EFD):
        return None
    few = len(x_RD) < 4 * len(counts_E)
    if few and not torch.is_grad_enabled():
        return _one_product_each(experts, x_RD, counts_E) if FEW.taken() else None
    if few and min(experts.w_up_EFD.shape[1:]) < 512:  # too little for what oneDNN costs per expert
        return None
    return _by_onednn(experts, x_RD, counts_E) if MANY.taken() else None


def _one_product_each(experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """A product per expert for a handful of rows, in the order that reads the weights fastest."""

    def linear(x_RI, weight_OI, bias_O):
        y_RO = few_rows_linear(x_RI, weight_OI, bias_O)
        if y_RO is None:
            y_RO = (product if ONEDNN.taken() else F.linear)(x_RI, weight_OI, bias_O)
        return y_RO

    parts = zip(range(len(counts_E)), x_RD.split(counts_E.tolist()))
    return torch.cat([experts.expert(e, x, linear) for e, x in parts if len(x)])


def _by_onednn(experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    names = ("w_up_EFD", "w_gate_EFD", "w_down_EDF", "b_up_EF", "b_gate_EF", "b_down_ED")
    weights = (getattr(experts, name) for name in names)
    return _ExpertByExpert.apply(experts.activate, experts.activation, counts_E.tolist(), x_RD, *weights)


class _ExpertByExpert(torch.autograd.Function):
    """`Experts.forward` by oneDNN's products, one expert after the other, so that its rows stay in the cache.

    oneDNN makes a program for each number of rows that it meets. That takes 0.2 ms, as multiplying 40 rows does at 512
    by 1,024, and routers send another number each time. So the numbers are rounded up: a few rows of the neighbours
    are computed, too, and left out (`_blocks`).
    The backward pass writes each expert's gradients into one tensor for all.
    """

    @staticmethod
    def forward(ctx, activate, activation, counts, x_RD, *weights):
        w_up_EFD, w_gate_EFD, w_down_EDF, b_up_EF, b_gate_EF, b_down_ED = weights
        y_RD, hidden, blocks = torch.empty_like(x_RD), [], [*_blocks(counts)]
        for e, rows, block, own in blocks:
            up_BF, gate_BF = product(x_RD[block], w_up_EFD[e], None if b_up_EF is None else b_up_EF[e]), None
            if w_gate_EFD is not None:
                gate_BF = product(x_RD[block], w_gate_EFD[e], None if b_gate_EF is None else b_gate_EF[e])
            act_BF = activate(up_BF, gate_BF)
            y_RD[rows] = product(act_BF, w_down_EDF[e], None if b_down_ED is None else b_down_ED[e])[own]
            hidden += [up_BF, act_BF if gate_BF is None else gate_BF]
        ctx.activation, ctx.counts, ctx.blocks = activation, counts, blocks
        ctx.save_for_backward(x_RD, *weights, *hidden)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        saved = ctx.saved_tensors
        x_RD, weights, hidden = saved[0], saved[1:7], iter(saved[7:])
        w_up_EFD, w_gate_EFD, w_down_EDF = weights[:3]
        dy_RD, dx_RD = dy_RD.contiguous(), torch.empty_like(x_RD)
        gradients = [gradient_like(w) if wanted else None for w, wanted in zip(weights, ctx.needs_input_grad[4:])]
        dw_up_EFD, dw_gate_EFD, dw_down_EDF, db_up_EF, db_gate_EF, db_down_ED = gradients
        for e, rows, block, own in ctx.blocks:
            x_BD, dy_BD, up_BF, other_BF = x_RD[block], _only(own, dy_RD[block]), next(hidden), next(hidden)
            dact_BF = product(dy_BD, w_down_EDF[e].t())
            if w_gate_EFD is None:
                act_BF, dup_BF, dgate_BF = other_BF, activate_backward(ctx.activation, dact_BF, up_BF), None
            else:
                silu_BF = F.silu(other_BF)
                act_BF, dup_BF = silu_BF * up_BF, silu_BF.mul_(dact_BF)
                dgate_BF = torch.ops.aten.silu_backward(dact_BF.mul_(up_BF), other_BF)
            for dw, db, dout_BO, in_BI in (
                (dw_down_EDF, db_down_ED, dy_BD, act_BF),
                (dw_up_EFD, db_up_EF, dup_BF, x_BD),
                (dw_gate_EFD, db_gate_EF, dgate_BF, x_BD),
            ):
                if dw is not None:
                    dw[e] = weight_gradient(dout_BO, in_BI)
                if db is not None:
                    db[e] = dout_BO.sum(0)
            dx_BD = product(dup_BF, w_up_EFD[e].t())
            if dgate_BF is not None:
                dx_BD += product(dgate_BF, w_gate_EFD[e].t())
            dx_RD[rows] = dx_BD[own]
        for e, count in enumerate(ctx.counts):
            for gradient in gradients:
                if count == 0 and gradient is not None:
                    gradient[e] = 0
        return None, None, None, dx_RD, *gradients


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


def _blocks(counts: list[int]) -> Iterator[tuple[int, slice, slice, slice]]:
    """(expert, its rows, a block that holds them, where in the block they are) for each expert that has any.

    Rows are sorted by expert. A block has a multiple of 4 rows, from 256 on of 8, from 512 on of 16, and so forth: 32
    sizes per octave, at most 3 % more rows from 128 on.
    """
    end, total = 0, sum(counts)
    for e, count in enumerate(counts):
        start, end = end, end + count
        if count:
            step = max(4, 1 << max(0, count.bit_length() - 6))
            size = min(-(-count // step) * step, total)
            first = min(start, total - size)
            yield e, slice(start, end), slice(first, first + size), slice(start - first, end - first)


def _only(own: slice, x_BI: Tensor) -> Tensor:
    """x_BI with 0 in all rows but its own: then whatever is made of them adds nothing to a gradient."""
    if own == slice(0, len(x_BI)):
        return x_BI
    x_BI = x_BI.clone()
    x_BI[: own.start] = 0
    x_BI[own.stop :] = 0
    return x_BI


def activate_backward(name: str, dact_BF: Tensor, up_BF: Tensor) -> Tensor:
    """dup_BF of gelu, gelu_tanh or relu, in the memory of dact_BF."""
    if name == "relu":
        return dact_BF.masked_fill_(up_BF <= 0, 0)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(dact_BF, up_BF, approximate=approximate, grad_input=dact_BF)


class _Raced(SimpleNamespace):
    """GELU experts with the interface of `core.experts.Experts`, for the races."""

    def activate(self, up, gate):
        return F.gelu(up)

    def expert(self, e, x, linear):
        return linear(F.gelu(linear(x, self.w_up_EFD[e], None)), self.w_down_EDF[e], None)

    def plain(self, x_RD, counts_E):
        """As torch multiplies in groups, or a product for each expert where it cannot."""
        if hasattr(F, "grouped_mm"):
            ends_E = counts_E.cumsum(0).to(torch.int32)
            act_RF = F.gelu(F.grouped_mm(x_RD, self.w_up_EFD.transpose(1, 2), offs=ends_E))
            return F.grouped_mm(act_RF, self.w_down_EDF.transpose(1, 2), offs=ends_E)
        parts = zip(x_RD.split(counts_E.tolist()), self.w_up_EFD.unbind(), self.w_down_EDF.unbind())
        return torch.cat([F.gelu(x @ up.t()) @ down.t() for x, up, down in parts])


def _raced(counts: list[int], d: int, f: int, training: bool):
    if private.linear_pointwise is None and training:
        raise RuntimeError("this torch has no oneDNN product for plain tensors")
    none = dict.fromkeys(("w_gate_EFD", "b_up_EF", "b_gate_EF", "b_down_ED"))
    up_EFD, down_EDF = (torch.randn(len(counts), *size, requires_grad=training) for size in ((f, d), (d, f)))
    experts = _Raced(activation="gelu", w_up_EFD=up_EFD, w_down_EDF=down_EDF, **none)
    x_RD, counts_E = torch.randn(sum(counts), d, requires_grad=training), torch.tensor(counts)

    def forward(compute):
        with torch.no_grad():
            compute(x_RD, counts_E)

    def both(compute):
        compute(x_RD, counts_E).square().sum().backward()
        x_RD.grad = up_EFD.grad = down_EDF.grad = None

    run, ours = (both, _by_onednn) if training else (forward, _one_product_each)
    return lambda: run(lambda *rows: ours(experts, *rows)), lambda: run(experts.plain)


MANY = Kernel("experts one after the other", lambda: _raced([128] * 4, 512, 1024, training=True))
# the weights are 32 MiB: from memory, as in use
FEW = Kernel("experts of a few rows", lambda: _raced([1, 2, 3, 4, 1, 2, 2, 1], 512, 1024, training=False))
