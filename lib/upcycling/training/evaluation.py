"""The mean loss over a whole stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checks import IGNORE
from ..core.model import DecoderLM, evaluating
from ..text.stream import TokenStream

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    model: DecoderLM, stream: TokenStream, *, batch_size: int = 32, seq_len: int | None = None,
    accelerator: Accelerator | None = None,
) -> float:  # fmt: skip
    """Mean nats per target over the whole stream, each target counted once, in eval mode; uses no random numbers.

    `seq_len` defaults to the model's context; an `accelerator` shares the windows among its processes.
    """
    device = next(model.parameters()).device
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    total, count = 0.0, 0
    with evaluating(model):
        for index, (tokens_BT, targets_BT) in enumerate(stream.windows(batch_size, seq_len or model.config.seq_len)):
            real = int((targets_BT != IGNORE).sum())
            if index % processes == rank and real:
                total += model(tokens_BT.to(device), targets_BT.to(device)).loss.item() * real
                count += real
    if accelerator and processes > 1:
        total, count = accelerator.reduce(torch.tensor([total, count], dtype=torch.float64, device=device)).tolist()
    return total / count
