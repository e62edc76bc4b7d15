"""The experts of an MoE: stacked weights, and their computation over rows that are sorted by expert.

Shapes: R rows, D model width, F FFN width, E experts; B rows of one block (one expert's, and a few of its neighbours').

Three ways, chosen by `Experts.forward`: torch's grouped products (GPUs, and CPUs where nothing is faster), one expert
after the other by oneDNN's products (`upcycling.products`), and a product per expert for a handful of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .config import ModelConfig
from .products import NARROWEST, few_rows_linear, gradient_like, product, takes_onednn, weight_gradient


class Experts(nn.Module):
    """E feed-forward networks in stacked weights: w_up_EFD, (w_gate_EFD,) w_down_EDF and, if configured, biases."""

    def __init__(self, config: ModelConfig, num_experts: int | None = None, width: int | None = None):
        super().__init__()
        e, d, f = num_experts or config.moe.num_experts, config.d_model, width or config.expert_width
        self.activation = config.activation
        self.w_up_EFD = nn.Parameter(torch.empty(e, f, d))
        self.w_gate_EFD = nn.Parameter(torch.empty(e, f, d)) if config.activation == "swiglu" else None
        self.w_down_EDF = nn.Parameter(torch.empty(e, d, f))
        has_gate_bias = config.ffn_bias and config.activation == "swiglu"
        self.b_up_EF = nn.Parameter(torch.zeros(e, f)) if config.ffn_bias else None
        self.b_gate_EF = nn.Parameter(torch.zeros(e, f)) if has_gate_bias else None
        self.b_down_ED = nn.Parameter(torch.zeros(e, d)) if config.ffn_bias else None

    def forward(self, x_RD: Tensor, expert_ids_R: Tensor, counts_E: Tensor) -> Tensor:
        """y_RD: row r through expert expert_ids_R[r]; rows are sorted by expert, counts_E is how many each has.

        For the backward pass it keeps the rows and the hidden units before and after the activation, R (D + 2 F)
        numbers; for swiglu R (D + 4 F), expert by expert R (D + 2 F), as it computes what follows the gate again.
        """
        few, narrowest = len(x_RD) < 4 * len(counts_E), min(self.w_up_EFD.shape[1:])
        on_cpu = x_RD.device.type == "cpu"
        if few and narrowest >= NARROWEST and on_cpu and len(x_RD) and not torch.is_grad_enabled():
            parts = zip(range(len(counts_E)), x_RD.split(counts_E.tolist()))
            return torch.cat([self.expert(e, x, few_rows_linear) for e, x in parts if len(x)])
        enough = not few or narrowest >= 512  # for what oneDNN costs per expert
        if len(x_RD) and enough and takes_onednn(x_RD, self.w_up_EFD):
            weights = (self.w_up_EFD, self.w_gate_EFD, self.w_down_EDF, self.b_up_EF, self.b_gate_EF, self.b_down_ED)
            return _ExpertByExpert.apply(self.activation, counts_E.tolist(), x_RD, *weights)
        up_RF = grouped_linear(x_RD, self.w_up_EFD, self.b_up_EF, expert_ids_R, counts_E)
        gate_RF = None
        if self.w_gate_EFD is not None:
            gate_RF = grouped_linear(x_RD, self.w_gate_EFD, self.b_gate_EF, expert_ids_R, counts_E)
        return grouped_linear(
            activate(self.activation, up_RF, gate_RF), self.w_down_EDF, self.b_down_ED, expert_ids_R, counts_E
        )

    def expert(self, e: int, x_ND: Tensor, linear=F.linear) -> Tensor:
        """y_ND: x_ND through expert `e` alone; the definition of what an expert computes."""

        def apply(x, weight, bias):
            return linear(x, weight[e], None if bias is None else bias[e])

        up_NF = apply(x_ND, self.w_up_EFD, self.b_up_EF)
        gate_NF = None if self.w_gate_EFD is None else apply(x_ND, self.w_gate_EFD, self.b_gate_EF)
        return apply(activate(self.activation, up_NF, gate_NF), self.w_down_EDF, self.b_down_ED)


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


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, expert_ids_R: Tensor, counts_E: Tensor) -> Tensor:
    """y_RO: rows sorted by expert, each times its expert's matrix, plus its expert's bias.

    One grouped matrix product where torch has it for this dtype and these widths, else a product per expert.
    """
    if torch.is_autocast_enabled(x_RI.device.type):  # grouped_mm does not take part in autocast by itself
        dtype = torch.get_autocast_dtype(x_RI.device.type)
        x_RI, w_EOI = x_RI.to(dtype), w_EOI.to(dtype)
        b_EO = None if b_EO is None else b_EO.to(dtype)
    if _has_grouped_mm(x_RI, w_EOI):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_RO = F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=offsets_E)
    else:
        rows = x_RI.split(counts_E.tolist())
        # unbind, not w[e]: indexing a stacked parameter gives each expert a gradient as large as the whole stack
        y_RO = torch.cat([x @ w.t() for x, w in zip(rows, w_EOI.unbind(), strict=True)])
    # index_select keeps the backward pass a plain sum into (E, O)
    return y_RO if b_EO is None else y_RO + b_EO.index_select(0, expert_ids_R)


def _has_grouped_mm(x_RI: Tensor, w_EOI: Tensor) -> bool:
    """torch's grouped_mm wants float32 or bfloat16 and rows whose bytes are a multiple of 16; see its documentation."""
    aligned = all(width * x_RI.element_size() % 16 == 0 for width in w_EOI.shape[1:])
    return hasattr(F, "grouped_mm") and x_RI.dtype in (torch.float32, torch.bfloat16) and aligned and len(x_RI) > 0
