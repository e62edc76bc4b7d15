"""The experts of an MoE: stacked weights, and their computation over rows that are sorted by expert.

Shapes: N tokens, R rows, D model width, F FFN width, E experts, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import faster
from .config import ModelConfig


def activate(name: str, up_NF: Tensor, gate_NF: Tensor | None) -> Tensor:
    """The FFN's hidden units: gelu(up), gelu_tanh(up) (OpenAI's GPT-2), relu(up), or silu(gate) * up for swiglu."""
    if gate_NF is not None:
        return F.silu(gate_NF) * up_NF
    if name == "relu":
        return F.relu(up_NF)
    return F.gelu(up_NF, approximate="tanh" if name == "gelu_tanh" else "none")


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """y (..., O) = x (..., I) @ weight_OI.T + bias_O, as `F.linear`; by a kernel where one is faster here."""
    y = faster("linear", x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O) if y is None else y


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        numbers; for swiglu R (D + 4 F), by a kernel R (D + 2 F), as it computes what follows the gate again.
        """
        y_RD = faster("experts", self, x_RD, counts_E)
        if y_RD is not None:
            return y_RD
        up_RF = grouped_linear(x_RD, self.w_up_EFD, self.b_up_EF, expert_ids_R, counts_E)
        gate_RF = None
        if self.w_gate_EFD is not None:
            gate_RF = grouped_linear(x_RD, self.w_gate_EFD, self.b_gate_EF, expert_ids_R, counts_E)
        act_RF = self.activate(up_RF, gate_RF)
        return grouped_linear(act_RF, self.w_down_EDF, self.b_down_ED, expert_ids_R, counts_E)

    def activate(self, up_NF: Tensor, gate_NF: Tensor | None) -> Tensor:
        """The hidden units of any rows, see `activate`."""
        return activate(self.activation, up_NF, gate_NF)

    def expert(self, e: int, x_ND: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        """y_ND: x_ND through expert `e` alone; the definition of what an expert computes."""

        def apply(x, weight, bias):
            return linear(x, weight[e], None if bias is None else bias[e])

        up_NF = apply(x_ND, self.w_up_EFD, self.b_up_EF)
        gate_NF = None if self.w_gate_EFD is None else apply(x_ND, self.w_gate_EFD, self.b_gate_EF)
        return apply(self.activate(up_NF, gate_NF), self.w_down_EDF, self.b_down_ED)


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
