"""The experts by oneDNN, one after the other, so that the rows of each stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .activation import activate, activate_backward
from .products import gradient_like, product, weight_gradient


class _ExpertByExpert(torch.autograd.Function):
    """`Experts.forward` by oneDNN's products, one expert after the other, so that its rows stay in the cache.

    oneDNN makes a program for each number of rows that it meets. That takes 0.2 ms, as multiplying 40 rows does at 512
    by 1,024, and routers send another number each time. So the numbers are rounded up: a few rows of the neighbours
    are computed, too, and left out (`_blocks`).
    The backward pass writes each expert's gradients into one tensor for all.
    """

    @staticmethod
    def forward(ctx, activation, counts, x_RD, w_up_EFD, w_gate_EFD, w_down_EDF, b_up_EF, b_gate_EF, b_down_ED):
        y_RD, hidden, blocks = torch.empty_like(x_RD), [], [*_blocks(counts)]
        for e, rows, block, own in blocks:
            up_BF, gate_BF = product(x_RD[block], w_up_EFD[e], None if b_up_EF is None else b_up_EF[e]), None
            if w_gate_EFD is not None:
                gate_BF = product(x_RD[block], w_gate_EFD[e], None if b_gate_EF is None else b_gate_EF[e])
            act_BF = activate(activation, up_BF, gate_BF)
            y_RD[rows] = product(act_BF, w_down_EDF[e], None if b_down_ED is None else b_down_ED[e])[own]
            hidden += [up_BF, act_BF if gate_BF is None else gate_BF]
        ctx.activation, ctx.counts, ctx.blocks = activation, counts, blocks
        ctx.save_for_backward(x_RD, w_up_EFD, w_gate_EFD, w_down_EDF, b_up_EF, b_gate_EF, b_down_ED, *hidden)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        saved = ctx.saved_tensors
        x_RD, weights, hidden = saved[0], saved[1:7], iter(saved[7:])
        w_up_EFD, w_gate_EFD, w_down_EDF = weights[:3]
        dy_RD, dx_RD = dy_RD.contiguous(), torch.empty_like(x_RD)
        gradients = [gradient_like(w) if wanted else None for w, wanted in zip(weights, ctx.needs_input_grad[3:])]
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
        return None, None, dx_RD, *gradients


def _blocks(counts: list[int]) -> Iterator[tuple[int, slice, slice, slice]]:
    """(expert, its rows, a block that holds them, where in the block they are) for each expert that has any.

    Rows are sorted by expert. A block has a multiple of 4 rows, from 256 on of 8, from 512 on of 16, and so forth: 32
    sizes per octave, at most 3 % more rows from 128 on. Under a FLOP counter it has the expert's own rows alone.
    """
    exact = _get_current_dispatch_mode() is not None
    end, total = 0, sum(counts)
    for e, count in enumerate(counts):
        start, end = end, end + count
        if count:
            step = 1 if exact else max(4, 1 << max(0, count.bit_length() - 6))
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
