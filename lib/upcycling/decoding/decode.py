"""One token of one sequence at a time, on a CPU, without modules: what `generate` uses for a batch of one.

Computing one token means reading every active weight once; so what counts is how fast a matrix-vector product reads,
and how little is done between two of them. NumPy's dot product of each row with the vector reads a weight as it lies,
(out, in), at nearly the speed of memory, where the products that torch calls reach half of it (MKL on AMD, measured);
transposed copies for them would read at two thirds, need the memory twice, and cost what 40 to 180 tokens save. It
uses one thread. The arrays below share memory with the model's parameters and its KVCache: nothing is copied, set-up
takes a millisecond, no weight is stale. Routing is `MoELayer.route` itself, so every rule works, also one that
`upcycling.intervention` changes for a while.

Shapes: D model width, F FFN width, H query heads, G key/value heads, C head width, S context, V vocabulary, I inputs
and O outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..core.experts import Experts
from ..core.model import Attention, Block, DecoderLM, FeedForward, KVCache, rotary_tables
from ..core.moe import MoELayer
from ..kernels.activation import activate
from ..kernels.products import Linear

Function = Callable[[np.ndarray], np.ndarray]
_KNOWN = (DecoderLM, Block, Attention, FeedForward, MoELayer, Experts, nn.Module, nn.ModuleList)
_KNOWN += (nn.Linear, Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout)


def can_decode(model) -> bool:
    """Does a `Decoder` compute what `model` would? A DecoderLM as built, in float32 or float64 on a CPU.

    Not where something watches or changes its modules (a hook, a replaced module, torch.compile, autocast, a FLOP
    counter); hooks on routers are heard.
    """
    if type(model) is not DecoderLM or torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None:
        return False
    dtype = model.token_embedding.weight.dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    if any(p.device.type != "cpu" or p.dtype != dtype or type(p) is not nn.Parameter for p in model.parameters()):
        return False
    routers = {block.ffn.router for block in model.blocks if isinstance(block.ffn, MoELayer)}
    return all(_is_plain(module) for module in model.modules() if module not in routers)


def _is_plain(module: nn.Module) -> bool:
    changed = module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None
    return type(module) in _KNOWN and not changed and "forward" not in vars(module)


class Decoder:
    """Continues the one sequence in `cache`: `decoder.step(token)` is the last row of `model(token, cache=cache)`.

    For a model in evaluation mode that `can_decode` says yes to.
    """

    def __init__(self, model: DecoderLM, cache: KVCache):
        self.config, self.cache = model.config, cache
        self.embedding_VD = _array(model.token_embedding.weight)
        self.position_SD = None if model.position_embedding is None else _array(model.position_embedding.weight)
        self.rotary = None
        if self.config.position == "rope":
            self.rotary = _signed_tables(self.config, self.embedding_VD.dtype)
        self.layers = []
        for block in model.blocks:
            feed = _experts(block.ffn) if isinstance(block.ffn, MoELayer) else _feed_forward(block.ffn)
            self.layers.append((_norm(block.attention_norm), self._attention(block), _norm(block.ffn_norm), feed))
        self.norm, self.head = _norm(model.norm), _linear(model.head)

    def step(self, token: int) -> Tensor:
        """logits_1V after one more token."""
        x_D = self.embedding_VD[token]
        if self.position_SD is not None:
            x_D = x_D + self.position_SD[self.cache.length]
        for attention_norm, attend, ffn_norm, feed in self.layers:
            x_D = x_D + attend(attention_norm(x_D))
            x_D = x_D + feed(ffn_norm(x_D), token)
        self.cache.length += 1
        return torch.from_numpy(self.head(self.norm(x_D)))[None]

    def _attention(self, block: Block) -> Function:
        h, g, c = self.config.n_heads, self.config.kv_heads, self.config.head_dim
        q, k, v, out = (_linear(getattr(block.attention, name)) for name in ("q", "k", "v", "out"))
        keys_GSC, values_GSC = (x[block.layer, 0] for x in (self.cache.keys, self.cache.values))
        new_keys_GSC, new_values_GSC = _array(keys_GSC), _array(values_GSC)

        def attend(x_D):
            past = self.cache.length
            q_HC, k_GC = q(x_D).reshape(h, c), k(x_D).reshape(g, c)
            if self.rotary is not None:
                q_HC, k_GC = self._rotate(q_HC, past), self._rotate(k_GC, past)
            new_keys_GSC[:, past], new_values_GSC[:, past] = k_GC, v(x_D).reshape(g, c)
            y_1H1C = F.scaled_dot_product_attention(
                torch.from_numpy(q_HC).view(1, h, 1, c),
                keys_GSC[None, :, : past + 1],
                values_GSC[None, :, : past + 1],
                enable_gqa=g != h,
            )
            return out(y_1H1C.numpy().reshape(h * c))

        return attend

    def _rotate(self, x_HC: np.ndarray, position: int) -> np.ndarray:
        """As `upcycling.model.rotate`: the halves of a head change places, and one of them its sign."""
        cos, sin = self.rotary
        halves = x_HC.reshape(len(x_HC), 2, -1)
        return (halves * cos[position] + halves[:, ::-1] * sin[position]).reshape(x_HC.shape)


def _array(x: Tensor) -> np.ndarray:
    """The same memory, as NumPy sees it."""
    return x.detach().numpy()


def _signed_tables(config, dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every position as (S, 2, C/2), the sine of the first half negative."""
    tables = rotary_tables(torch.arange(config.seq_len), config.head_dim, config.rope_theta)
    cos, sin = (table.numpy().astype(dtype).reshape(config.seq_len, 2, -1) for table in tables)
    sin[:, 0] *= -1
    return cos, sin


def _linear(linear: nn.Linear) -> Function:
    return _product(_array(linear.weight), None if linear.bias is None else _array(linear.bias))


def _product(weight_OI: np.ndarray, bias_O: np.ndarray | None) -> Function:
    rows_O1I = weight_OI[:, None, :]  # so that matmul takes a dot product for each row
    if bias_O is None:
        return lambda x_I: np.matmul(rows_O1I, x_I)[:, 0]
    return lambda x_I: np.matmul(rows_O1I, x_I)[:, 0] + bias_O


def _norm(norm: nn.Module) -> Function:
    weight_D, eps = _array(norm.weight), norm.eps
    if isinstance(norm, nn.RMSNorm):
        return lambda x_D: x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D
    bias_D = _array(norm.bias)

    def layer_norm(x_D):
        x_D = x_D - np.add.reduce(x_D) / len(x_D)
        return x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D + bias_D

    return layer_norm


def _feed_forward(ffn: FeedForward) -> Callable[[np.ndarray, int], np.ndarray]:
    gate = None if ffn.gate is None else _linear(ffn.gate)
    unit = _unit(ffn.activation, _linear(ffn.up), gate, _linear(ffn.down))
    return lambda x_D, token: unit(x_D)


def _unit(activation: str, up: Function, gate: Function | None, down: Function) -> Function:
    """One FFN, or one expert."""

    def unit(x_D):
        gate_F = None if gate is None else torch.from_numpy(gate(x_D))
        return down(activate(activation, torch.from_numpy(up(x_D)), gate_F).numpy())

    return unit


def _experts(layer: MoELayer) -> Callable[[np.ndarray, int], np.ndarray]:
    units = _units(layer.experts)
    shared = None if layer.shared is None else _units(layer.shared)[0]

    def feed(x_D, token):
        routing = layer.route(torch.from_numpy(x_D)[None], torch.tensor([token]))
        y_D = np.zeros_like(x_D) if shared is None else shared(x_D)
        for e, weight in zip(routing.expert_ids_NK[0].tolist(), routing.weights_NK[0].tolist()):
            if weight:  # a choice that was not kept has weight 0
                y_D += weight * units[e](x_D)
        return y_D

    return feed


def _units(experts: Experts) -> list[Function]:
    """Each expert as a function of x_D."""

    def products(weight_EOI, bias_EO):
        if weight_EOI is None:
            return [None] * len(experts.w_up_EFD)
        biases = [None] * len(weight_EOI) if bias_EO is None else _array(bias_EO)
        return [_product(weight_OI, bias_O) for weight_OI, bias_O in zip(_array(weight_EOI), biases)]

    ups, gates = products(experts.w_up_EFD, experts.b_up_EF), products(experts.w_gate_EFD, experts.b_gate_EF)
    downs = products(experts.w_down_EDF, experts.b_down_ED)
    return [_unit(experts.activation, *parts) for parts in zip(ups, gates, downs)]
