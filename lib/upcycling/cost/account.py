"""What does a model cost? Parameters, FLOPs, memory and arithmetic intensity, of any DecoderLM or transformers model.

    print(account(model, batch_size=8, seq_len=128))
    print(account(REFERENCE["sparse-158m"], seq_len=128))        # a configuration: nothing of that size is built

FLOPs are those of matrix products, two for each multiply-add: what `flop_counter` counts as a model runs. Attention
counts all T x T scores, although a causal kernel may skip almost half; softmax, norms and the optimizer's few
operations for each parameter are left out. The backward pass has two products for each one of the forward pass.

Intensity is FLOPs per byte that must at least travel between memory and processor: where it is low, the processor
waits. That least is each weight in use once a pass, and the key/value cache; in training two passes, the activations
written and read once, and gradients, weights and AdamW's moments read and written once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.config import ModelConfig
from ..core.model import DecoderLM
from ..tables import ShownAsTable, Table
from .activations import activation_bytes, extrapolated_activation_bytes
from .parts import parts_of
from .references import _rounded

Shape = Sequence[int]
# a line of the table: its name, the field, and the unit in which it is rounded (none: a whole number)
_LINES = json.loads((files(__package__) / "account.json").read_text(encoding="utf-8"))


def flop_counter() -> FlopCounterMode:
    """Torch's counter (a context manager), which also knows grouped products and the attention kernel of a CPU."""
    operations = {
        "_grouped_mm": _grouped,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    aten = torch.ops.aten
    known = {getattr(aten, name): flops for name, flops in operations.items() if hasattr(aten, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def _grouped(a_shape: Shape, b_shape: Shape, *_: Any, **__: Any) -> int:
    # (R,I) x (E,I,O) forward, (O,R) x (R,I) in the backward pass: every row meets one matrix
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def _attention(q_shape: Shape, k_shape: Shape, v_shape: Shape, *_: Any, **__: Any) -> int:
    b, h, t, c = q_shape
    return 2 * b * h * t * k_shape[2] * (c + v_shape[-1])


def _attention_backward(_: Shape, q_shape: Shape, k_shape: Shape, v_shape: Shape, *__: Any, **___: Any) -> int:
    return 2 * _attention(q_shape, k_shape, v_shape)  # what is computed a second time to save memory is not counted


@dataclass(frozen=True)
class Account(ShownAsTable):
    """What a model costs at B sequences of T tokens; `account` makes it. Prints as a table.

    Parameters: a tied matrix counts once; `active` are those that one token uses (`ParameterCount`),
    `experts` the routed experts of all layers, `router` all routers, `embeddings` the tables that are looked up.
    FLOPs: `forward` and `backward` of the batch with the loss at every position, `update` both; `prefill` of B prompts
    of T tokens with logits for the last; `decode` of one more token for each of B sequences that sees `context` tokens,
    itself included. Bytes: weights, gradients, the optimizer's (AdamW's two moments), activations (what the forward
    pass keeps for the backward pass; None: not measured), and the key/value cache of B x `context` tokens.
    """

    name: str
    batch_size: int
    seq_len: int
    context: int

    total: int
    active: int
    experts: int
    router: int
    embeddings: int

    forward: int
    scores: int  # the part of `forward` that is attention's scores and sums
    head: int  # the part of `forward` that is the head
    prefill: int
    decode: int

    weights: int
    activations: int | None
    kv_cache: int
    read_by_prefill: int  # bytes of weights, as far as experts are used
    read_by_decode: int

    @property
    def backward(self) -> int:
        return 2 * self.forward

    @property
    def update(self) -> int:
        return 3 * self.forward

    @property
    def gradients(self) -> int:
        return self.weights

    @property
    def optimizer(self) -> int:
        return 2 * self.weights

    @property
    def prefill_intensity(self) -> float:
        written = self.kv_cache * self.seq_len / self.context
        return self.prefill / (self.read_by_prefill + written)

    @property
    def decode_intensity(self) -> float:
        return self.decode / (self.read_by_decode + self.kv_cache)

    @property
    def training_intensity(self) -> float | None:
        if self.activations is None:
            return None
        # read for forward and for backward; activations, gradients, weights and moments written and read
        once = self.read_by_prefill + self.activations + self.gradients + self.weights + self.optimizer
        return self.update / (2 * once)

    def _as_table(self) -> Table:
        return side_by_side({self.name: self})


def side_by_side(accounts: Mapping[str, Account]) -> Table:
    """The accounts of several models in one table, a column each, headed by their names."""
    rows = [{"": "batch x tokens, context"}, *({"": line} for line, _, _ in _LINES)]
    for name, a in accounts.items():
        rows[0][name] = f"{a.batch_size} x {a.seq_len:,}, {a.context:,}"
        for row, (_, field, unit) in zip(rows[1:], _LINES, strict=True):
            row[name] = f"{getattr(a, field):,}" if unit is None else _rounded(getattr(a, field), unit)
    return Table(rows)


def account(
    model: nn.Module | ModelConfig,
    batch_size: int = 1,
    seq_len: int | None = None,
    *,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
    activations: bool = True,
) -> Account:
    """What `model` costs at `batch_size` sequences of `seq_len` tokens (default: all that it takes, at most 2,048).

    `model` is a DecoderLM, a ModelConfig (its weights are counted in `dtype`) or a transformers causal LM, which may be
    on the meta device: then nothing has its size. `context` (default: `seq_len`) is how many tokens a decoding step
    sees. `activations=False` leaves them out; else they are measured, see `activation_bytes`, in one forward pass
    of the batch. (Of a ModelConfig, and of a DecoderLM on the meta device: on models of one and two layers, from which
    the rest follows exactly; of a transformers model on the meta device they are None.)
    Experts read by a pass are those that even routing would touch. Raises ValueError for sequences longer than the
    model takes, for layers that mix tokens by anything but attention (their products are not known here), and for an
    MoE whose router `find_routers` does not know.
    """
    parts = parts_of(model, dtype)
    t = min(parts.longest, 2048) if seq_len is None else seq_len
    context = t if context is None else context
    if batch_size < 1 or t < 1 or context < 1:
        raise ValueError(f"batch_size={batch_size}, seq_len={t} and context={context} must all be at least 1")
    if max(t, context) > parts.longest:
        raise ValueError(f"{max(t, context)} tokens do not fit the model's context of {parts.longest}; ask for fewer")
    b = batch_size
    scores, head = parts.score_flops(t, t), 2 * parts.head
    return Account(
        name=parts.name,
        batch_size=b,
        seq_len=t,
        context=context,
        total=parts.total,
        active=parts.active,
        experts=parts.experts,
        router=parts.router,
        embeddings=parts.embeddings,
        forward=b * (t * (parts.per_token + head) + scores),
        scores=b * scores,
        head=b * t * head,
        prefill=b * (t * parts.per_token + head + scores),
        decode=b * (parts.per_token + head + parts.score_flops(1, context)),
        weights=parts.total * parts.bytes_each,
        activations=_activations(model, dtype, b, t) if activations else None,
        kv_cache=b * parts.cached(context) * parts.bytes_each,
        read_by_prefill=round(parts.read(b * t)),
        read_by_decode=round(parts.read(b)),
    )


def _activations(model: nn.Module | ModelConfig, dtype: torch.dtype, batch_size: int, seq_len: int) -> int | None:
    if isinstance(model, ModelConfig):
        return extrapolated_activation_bytes(model, dtype, batch_size, seq_len)
    if next(model.parameters()).is_meta:  # transformers looks at values, which are not there
        ours = model.config if isinstance(model, DecoderLM) else None
        return None if ours is None else extrapolated_activation_bytes(ours, dtype, batch_size, seq_len)
    return activation_bytes(model, batch_size, seq_len)
