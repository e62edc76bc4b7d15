"""Text from a model: greedy decoding with a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import DecoderLM


@torch.no_grad()
def generate(
    model: DecoderLM, prompt_BT: Tensor, max_new_tokens: int, *, eos_id: int | None = None, use_cache: bool = True
) -> Tensor:
    """tokens_BT: the prompts, each followed by its most probable continuation.

    With `use_cache` each new token costs one token's forward pass; without, the whole sequence is computed again: the
    tokens are the same. A sequence that has produced `eos_id` is filled up with it, and decoding stops when all have.
    Raises ValueError for an empty prompt or when prompt and new tokens do not fit the model's context.
    """
    if prompt_BT.dim() != 2 or prompt_BT.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt_BT.shape)}; give (batch, tokens) with at least one token")
    if prompt_BT.shape[1] + max_new_tokens > model.config.seq_len:
        raise ValueError(
            f"{prompt_BT.shape[1]} prompt tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{model.config.seq_len}; ask for at most {model.config.seq_len - prompt_BT.shape[1]} new tokens"
        )
    training = model.training
    model.eval()
    try:
        cache = model.new_cache(len(prompt_BT)) if use_cache else None
        tokens_BT = unseen_BT = prompt_BT
        done_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
        for _ in range(max_new_tokens):
            logits_BV = model(unseen_BT if use_cache else tokens_BT, cache=cache).logits_BTV[:, -1]
            next_B = logits_BV.argmax(-1)
            if eos_id is not None:
                next_B = torch.where(done_B, eos_id, next_B)
                done_B = done_B | (next_B == eos_id)
            unseen_BT = next_B[:, None]
            tokens_BT = torch.cat([tokens_BT, unseen_BT], dim=1)
            if done_B.all():
                break
        return tokens_BT
    finally:
        model.train(training)
