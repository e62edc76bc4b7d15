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

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .activations import activation_bytes, extrapolated_activation_bytes
from .config import REFERENCE, ModelConfig, count_parameters, forward_flops
from .diagnosis import expert_weights, render_html, render_text, router_weights
from .model import DecoderLM
from .router_rules import _LOOKS_LIKE_MOE, find_routers

# -------------------------------------------------------------------------------------------------- executed products


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


def _grouped(a_shape, b_shape, *_, out_shape=None, **__) -> int:
    # (R,I) x (E,I,O) forward, (O,R) x (R,I) in the backward pass: every row meets one matrix
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


def _attention(q_shape, k_shape, v_shape, *_, out_shape=None, **__) -> int:
    b, h, t, c = q_shape
    return 2 * b * h * t * k_shape[2] * (c + v_shape[-1])


def _attention_backward(_, q_shape, k_shape, v_shape, *__, out_shape=None, **___) -> int:
    return 2 * _attention(q_shape, k_shape, v_shape)  # what is computed a second time to save memory is not counted


# -------------------------------------------------------------------------------------------------------- the account


@dataclass(frozen=True)
class Account:
    """What a model costs at B sequences of T tokens; `account` makes it. Prints as a table.

    Parameters: a tied matrix counts once; `active` are those that one token uses (`upcycling.config.ParameterCount`),
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

    def __str__(self) -> str:
        return str(side_by_side({self.name: self}))

    def _repr_html_(self) -> str:
        return side_by_side({self.name: self})._repr_html_()


class Table(list):
    """Rows, each a dict of the same keys, that print as a table in text and in a notebook."""

    def __str__(self) -> str:
        return render_text(self, [])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_html(self, [])


def side_by_side(accounts: Mapping[str, Account]) -> Table:
    """The accounts of several models in one table, a column each, headed by their names."""
    lines = {
        "batch x tokens, context": lambda a: f"{a.batch_size} x {a.seq_len:,}, {a.context:,}",
        "parameters": lambda a: f"{a.total:,}",
        "active per token": lambda a: f"{a.active:,}",
        "experts": lambda a: f"{a.experts:,}",
        "routers": lambda a: f"{a.router:,}",
        "embeddings": lambda a: f"{a.embeddings:,}",
        "GFLOPs forward": lambda a: _rounded(a.forward, 1e9),
        "of these attention scores": lambda a: _rounded(a.scores, 1e9),
        "of these head": lambda a: _rounded(a.head, 1e9),
        "GFLOPs backward": lambda a: _rounded(a.backward, 1e9),
        "GFLOPs training update": lambda a: _rounded(a.update, 1e9),
        "GFLOPs prefill": lambda a: _rounded(a.prefill, 1e9),
        "GFLOPs decoding step": lambda a: _rounded(a.decode, 1e9),
        "MiB weights": lambda a: _rounded(a.weights, 2**20),
        "MiB gradients": lambda a: _rounded(a.gradients, 2**20),
        "MiB AdamW": lambda a: _rounded(a.optimizer, 2**20),
        "MiB activations": lambda a: _rounded(a.activations, 2**20),
        "MiB key/value cache": lambda a: _rounded(a.kv_cache, 2**20),
        "FLOPs per byte, training": lambda a: _rounded(a.training_intensity),
        "FLOPs per byte, prefill": lambda a: _rounded(a.prefill_intensity),
        "FLOPs per byte, decoding": lambda a: _rounded(a.decode_intensity),
    }
    return Table({"": line} | {name: write(a) for name, a in accounts.items()} for line, write in lines.items())


def published_claims() -> Table:
    """What earlier public projects said of their models, and what their configurations come to."""
    config = REFERENCE["sparse-158m"]
    count, tokens = count_parameters(config), 128
    moe = config.moe
    twin = replace(config, d_ff=moe.num_experts * config.expert_width, moe=None)  # as many parameters, all in use

    def giga(head: bool) -> str:
        return f"{forward_flops(config, tokens, head) / 1e9:.2f}"

    def less(head: bool) -> str:
        return f"{forward_flops(twin, tokens, head) / forward_flops(config, tokens, head):.2f}"

    without_tables = count.active_without_embeddings
    parts = [count.active, without_tables, without_tables - count.head]
    whole, inner, trunk = (f"{part / 1e6:.2f}M" for part in parts)
    nano, large = (f"{count_parameters(REFERENCE[name]).total / 1e6:.1f}M" for name in ("nano-moe", "nano-moe-134m"))
    rows = [
        ("sparse-158m", "8.05 GFLOPs", f"{giga(True)} for {tokens} tokens forward; without the head {giga(False)}"),
        ("sparse-158m", "~20M active", f"{whole}; without tables {inner}; without the head, too, {trunk}"),
        ("sparse-158m", "6x less", f"{less(True)}x fewer FLOPs than its dense twin; without the head {less(False)}x"),
        ("sparse-158m", "6x less", f"{count.total / count.active:.2f}x fewer parameters in use than in all"),
        ("nano-moe", "134.6M", f"{nano} at its sizes; {large} with d 288, 16 layers, 12 experts"),
    ]
    return Table(dict(zip(("model", "published", "recomputed"), row, strict=True)) for row in rows)


def _rounded(value: float | None, unit: float = 1) -> str:
    """Three digits at least."""
    if value is None:
        return "not measured"
    value /= unit
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def account(
    model,
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
    if isinstance(model, DecoderLM):
        dtype = model.token_embedding.weight.dtype
    if isinstance(model, DecoderLM | ModelConfig):
        parts = _of_config(getattr(model, "config", model), dtype)
    else:
        parts = _of_transformers(model)
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


def _activations(model, dtype: torch.dtype, batch_size: int, seq_len: int) -> int | None:
    if isinstance(model, ModelConfig):
        return extrapolated_activation_bytes(model, dtype, batch_size, seq_len)
    if next(model.parameters()).is_meta:
        ours = isinstance(model, DecoderLM)  # transformers looks at values, which are not there
        return extrapolated_activation_bytes(model.config, dtype, batch_size, seq_len) if ours else None
    return activation_bytes(model, batch_size, seq_len)


# ----------------------------------------------------------------------------------------------- the parts of a model


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: all query heads' widths in scores and in sums, and numbers cached for a token.

    `expanded`: weights that a decoding step applies to each cached token again.
    """

    score_width: int
    cache_width: int
    window: int | None = None
    expanded: int = 0

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class _Parts:
    """What the account needs to know of a model: numbers of parameters, and FLOPs without scores and head."""

    name: str
    longest: int
    bytes_each: int
    total: int
    experts: int
    share: float  # of the experts that a token uses
    router: int
    embeddings: int
    looked_up: int  # parameters of tables that are no matrix of a product, too
    head: int  # parameters of the head's matrix
    per_token: int
    layers: tuple[_Layer, ...]

    @property
    def active(self) -> int:
        return self.total - self.experts + round(self.share * self.experts)

    def score_flops(self, queries: int, context: int) -> int:
        # many queries: with a mask, all scores are computed; a single one meets a cache that was cut to the window
        return sum(
            2 * queries * (context if queries > 1 else layer.seen(context)) * layer.score_width
            + 2 * (context - queries) * layer.expanded
            for layer in self.layers
        )

    def cached(self, context: int) -> int:
        return sum(layer.seen(context) * layer.cache_width for layer in self.layers)

    def read(self, tokens: int) -> float:
        """Bytes of the weights that a pass over `tokens` evenly routed tokens uses."""
        touched = 1 - (1 - self.share) ** tokens
        return self.bytes_each * (self.total - self.looked_up - self.experts * (1 - touched))


def _of_config(config: ModelConfig, dtype: torch.dtype) -> _Parts:
    count, moe, n_moe = count_parameters(config), config.moe, len(config.moe_layers)
    kv_width = config.kv_heads * config.head_dim
    layers = config.n_layers * (_Layer(2 * config.d_model, 2 * kv_width),)
    position_table = config.seq_len * config.d_model if config.position == "learned" else 0
    parts = _Parts(
        name="DecoderLM",
        longest=config.seq_len,
        bytes_each=dtype.itemsize,
        total=count.total,
        experts=n_moe * moe.num_experts * count.expert if moe else 0,
        share=moe.top_k / moe.num_experts if moe else 0.0,
        router=n_moe * count.router,
        embeddings=config.vocab_size * config.d_model + position_table,
        looked_up=count.active - count.active_without_embeddings,
        head=config.vocab_size * config.d_model,
        per_token=0,
        layers=layers,
    )
    return replace(parts, per_token=forward_flops(config, 1, head=False) - parts.score_flops(1, 1))


def _of_transformers(model: nn.Module) -> _Parts:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"a {type(model).__name__} is not a causal language model: give a DecoderLM, a ModelConfig or a "
            "transformers ...ForCausalLM"
        )
    has_experts = any(_LOOKS_LIKE_MOE.search(type(module).__name__) for module in model.modules())
    routers = find_routers(model) if has_experts else []
    routed = {id(weight): weight for router in routers for weight in expert_weights(model, router)}
    share = routers[0].holder.top_k / len(next(iter(routed.values()))) if routers else 0.0
    tables, in_products, per_token = {}, {id(head.weight)}, 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                tables[id(weight)] = weight.numel()
            elif id(weight) in routed:
                per_token += 2 * share * weight.numel() * (weight.ndim == 3)  # a stacked bias has two dimensions
            elif weight.ndim > 1 and module is not head:
                in_products.add(id(weight))
                per_token += 2 * weight.numel()
    config = model.config.get_text_config()
    some = next(model.parameters())
    return _Parts(
        name=type(model).__name__,
        longest=config.max_position_embeddings,
        bytes_each=some.element_size(),
        total=sum(weight.numel() for weight in model.parameters()),
        experts=sum(weight.numel() for weight in routed.values()),
        share=share,
        router=sum(weight.numel() for router in routers for weight in router_weights(router)),
        embeddings=sum(tables.values()),
        looked_up=sum(size for key, size in tables.items() if key not in in_products),
        head=head.weight.numel(),
        per_token=round(per_token),
        layers=_attention_layers(config),
    )


def _attention_layers(config) -> tuple[_Layer, ...]:
    """The attention of each layer, from a transformers configuration; ValueError where layers mix tokens otherwise."""
    for name in ("index_topk", "num_kv_shared_layers", "attention_chunk_size"):
        if getattr(config, name, None):
            _refuse(config, f"attention with {name}={getattr(config, name)}")
    if not hasattr(config, "num_attention_heads"):
        _refuse(config, "no attention")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        plain = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [plain] * config.num_hidden_layers
    of_layers = getattr(config, "per_layer_config", None) or [config] * len(kinds)
    return tuple(_attention_layer(layer, kind) for layer, kind in zip(of_layers, kinds, strict=True))


def _attention_layer(config, kind: str) -> _Layer:
    if kind not in ("full_attention", "sliding_attention"):
        _refuse(config, f"layers of kind {kind!r}")
    window = config.sliding_window if kind == "sliding_attention" else None
    heads, rank = config.num_attention_heads, getattr(config, "kv_lora_rank", None)
    if rank:  # multi-head latent attention: the cache holds what keys and values are made from
        nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        return _Layer(heads * (nope + rope + v), rank + rope, window, expanded=rank * heads * (nope + v))
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return _Layer(heads * 2 * width, kv_heads * 2 * width, window)


def _refuse(config, what: str):
    raise ValueError(
        f"{config.model_type} has {what}, whose products are not known here; count what a run of it executes with "
        "upcycling.accounting.flop_counter"
    )
