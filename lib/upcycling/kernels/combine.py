"""Each token's rows, looked up and added with their weights in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _Combine(torch.autograd.Function):
    """y_ND: each token's K rows of y_RD, looked up and added with their weights in one pass.

    `embedding_bag` with a backward pass of its own: each row is looked up by one choice at most, so its gradient can
    be gathered, where embedding_bag would add into zeros. order_R: which of the N*K choices a row belongs to.
    """

    @staticmethod
    def forward(ctx, y_RD, weights_NK, row_of_NK, order_R):
        ctx.save_for_backward(y_RD, weights_NK, row_of_NK, order_R)
        return F.embedding_bag(row_of_NK, y_RD, mode="sum", per_sample_weights=weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        y_RD, weights_NK, row_of_NK, order_R = ctx.saved_tensors
        n, k = weights_NK.shape
        dy_RD = dy_ND.index_select(0, order_R // k).mul_(weights_NK.flatten()[order_R].unsqueeze(-1))
        if not ctx.needs_input_grad[1]:
            return dy_RD, None, None, None
        choices_R = torch.arange(n * k, device=order_R.device)
        dweights_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy_ND, y_RD, row_of_NK.flatten(), choices_R[::k], choices_R // k, 0
        )
        return dy_RD, dweights_R.view(n, k), None, None
