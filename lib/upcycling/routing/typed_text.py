"""From a text to the routing of its tokens, for `DecoderLM` and transformers MoEs, and for both kinds of tokenizers.

Every way in which a typed text can be wrong is a ValueError of one sentence here, before a model sees the text.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core.model import evaluating
from ..text.tokenizer import encode_prompt
from .adapter import context_length
from .record import record_routing
from .trace import RoutingTrace


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text`, with what the tokenizer puts before a text. Raises ValueError where it cannot encode it."""
    if not text:
        raise ValueError("there is no text; type some, or choose an example")
    try:
        if not hasattr(tokenizer, "encode_batch_fast"):  # transformers'
            return list(tokenizer(text)["input_ids"])
        try:
            return encode_prompt(tokenizer, text)
        except ValueError:  # no token is known to begin a document
            return tokenizer.encode(text).ids
    except (TypeError, UnicodeEncodeError):  # a lone surrogate is no character
        raise ValueError("the text holds half of a surrogate pair, which is no character; delete it") from None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each id stands for, its leading space included; `[id]` where the tokenizer has no such token."""
    to_token = getattr(tokenizer, "id_to_token", None) or tokenizer.convert_ids_to_tokens
    texts = []
    for i in ids:
        try:
            piece = to_token(int(i))
        except (OverflowError, IndexError):
            piece = None
        text = f"[{i}]" if piece is None else tokenizer.decode([int(i)], skip_special_tokens=False) or piece
        # sentencepiece's mark of a space is lost when a token is decoded alone
        texts.append(" " + text if piece and piece.startswith("▁") and not text.startswith(" ") else text)
    return texts


def route_text(model: Any, tokenizer: Any, text: str, max_tokens: int = 256) -> tuple[RoutingTrace, list[str]]:
    """How `model` routes `text`, and the text of each token.

    Raises ValueError, one sentence, for a text that is empty, cannot be encoded or does not fit.
    """
    ids = encode(tokenizer, text)
    context = context_length(model.config)
    if len(ids) > context:
        raise ValueError(f"the text has {len(ids):,} tokens but the model's context is {context:,}; shorten it")
    if len(ids) > max_tokens:
        raise ValueError(f"the text has {len(ids):,} tokens, this panel shows at most {max_tokens:,}; shorten it")
    check_ids(model, ids)
    with evaluating(model), torch.no_grad(), record_routing(model) as trace:
        model(torch.tensor([ids], device=next(model.parameters()).device))
    return trace, token_texts(tokenizer, ids)


def check_ids(model: Any, ids: Sequence[int]) -> None:
    size = model.config.vocab_size
    if max(ids) >= size:
        raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {size}; is this its tokenizer?")


def twin(model: nn.Module) -> Any:
    """A copy of `model` that shares its weights, in eval mode: to run and to change while others use `model`."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()
