"""Products of one to four rows, as in generation: what counts is how fast the weights are read.

NumPy's dot product of each weight row with the one input row, or `W @ x.T` instead of `x @ W.T`, read them up to twice
as fast as the products that torch calls, on some processors; on others they are slower (`choice`).

Shapes: R rows, I inputs, O outputs of a matrix, N tokens, E experts, K experts per token, D model width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import Kernel

# NumPy's products are invisible to torch, and with that to its FLOP counter. This operation does nothing, but says to
# whoever counts how many were done beside it; what is computed is the same with and without a counter.
_library = torch.library.Library("upcycling", "FRAGMENT")
_library.define("computed(Tensor by, int flops) -> ()")
_library.impl("computed", lambda by, flops: None, "CompositeExplicitAutograd")
computed = torch.ops.upcycling.computed


@register_flop_formula(computed)
def _flops(by_shape, flops, *_, **__) -> int:
    return flops


def dots(weight_OI: Tensor, x_1I: Tensor) -> Tensor:
    """y_1O = x_1I @ weight_OI.T as a dot product for each weight row, by NumPy, without autograd, on a CPU."""
    rows_O1I = weight_OI.detach().numpy()[:, None, :]  # so that matmul takes a dot product for each weight row
    return torch.from_numpy(np.matmul(rows_O1I, x_1I.detach().numpy()[0]).T)


def turned(weight_OI: Tensor, x_RI: Tensor) -> Tensor:
    """y_RO = x_RI @ weight_OI.T with the operands turned round: for MKL another product, on AMD in half the time."""
    return (weight_OI @ x_RI.contiguous().t()).t()


def _race(rows: int, ours):
    x, weights = torch.randn(rows, 1024), [torch.randn(2048, 1024) for _ in range(4)]  # 32 MiB: from memory, as in use
    return lambda: [ours(weight, x) for weight in weights], lambda: [F.linear(x, weight) for weight in weights]


ONE_ROW = Kernel("one row by NumPy's dot products", lambda: _race(1, dots))
TWO_TO_FOUR_ROWS = Kernel("two to four rows, operands turned round", lambda: _race(3, turned))


def few_rows_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
    """y_RO for one to four float32 rows on a CPU, without autograd; None where torch's own product is as fast."""
    if len(x_RI) == 1 and ONE_ROW.taken():
        y_RO = dots(weight_OI, x_RI)
        computed(y_RO, 2 * weight_OI.numel())
    elif 1 < len(x_RI) <= 4 and weight_OI.shape[1] <= 2048 and TWO_TO_FOUR_ROWS.taken():
        y_RO = turned(weight_OI, x_RI)
    else:
        return None
    return y_RO if bias_O is None else y_RO + bias_O


def faster_one_token(experts, x_ND: Tensor, routing) -> Tensor | None:
    """y_1D of a single token, as in generation, without gradients: its K experts, nothing to sort; else None."""
    plain = x_ND.device.type != "cpu" or torch.is_autocast_enabled("cpu") or routing.kept_NK is not None
    if len(x_ND) != 1 or plain or torch.is_grad_enabled():
        return None

    def product(x_1I, weight_OI, bias_O):
        y_1O = few_rows_linear(x_1I, weight_OI, bias_O) if x_1I.dtype == torch.float32 else None
        return F.linear(x_1I, weight_OI, bias_O) if y_1O is None else y_1O

    y_KD = torch.cat([experts.expert(e, x_ND, product) for e in routing.expert_ids_NK[0].tolist()])
    return (routing.weights_NK.to(y_KD.dtype).t() * y_KD).sum(0, keepdim=True)
