"""One token of one sequence at a time, on a CPU, without modules: what `generate` uses for a batch of one.

Computing one token means reading every active weight once; so what counts is how fast a matrix-vector product reads,
and how little is done between two of them. On some processors NumPy's dot product of each row with the vector reads a
weight as it lies, (out, in), at nearly the speed of memory, where the products that torch calls reach half of it; it
is taken where it is faster (`upcycling.kernels`), else torch's. The arrays below share memory with the model's
parameters and its KVCache: nothing is copied, set-up takes a millisecond, no weight is stale. Routing is
`MoELayer.route` itself, so every rule works, also one that `upcycling.intervene` changes for a while.

Shapes: D model width, F FFN width, H query heads, G key/value heads, C head width, S context, V vocabulary, I inputs
and O outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import ModelConfig
from ..core.experts import Experts, Linear, activate
from ..core.model import Attention, Block, DecoderLM, FeedForward, KVCache, rotary_tables
from ..core.moe import MoELayer
from ..kernels.choice import ON
from ..kernels.few_rows import ONE_ROW, computed

Function = Callable[[np.ndarray], np.ndarray]
Feed = Callable[[np.ndarray, int], tuple[np.ndarray, int]]  # (x_D, token) -> (y_D, the FLOPs that torch did not see)
_KNOWN: tuple[type, ...] = (DecoderLM, Block, Attention, FeedForward, MoELayer, Experts, nn.Module, nn.ModuleList)
_KNOWN += (nn.Linear, Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout)


def can_decode(model) -> bool:
    """Does a `Decoder` compute what `model` would? A DecoderLM as built, in float32 or float64 on a CPU.

    Not where something watches or changes its modules (a hook, a replaced module, torch.compile, autocast); hooks on
    routers are heard, and a FLOP counter is told what NumPy computes. UPCYCLING_KERNELS=0 says no, too.
    """
    if not ON or type(model) is not DecoderLM or torch.is_autocast_enabled("cpu"):
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
        self.rotary: Any = None  # or (cos, sin)
        if self.config.position == "rope":
            self.rotary = _tables(self.config, self.embedding_VD.dtype)
        self.layers, self.flops = [], 0  # flops: of the products that every token takes and torch does not see
        for block in model.blocks:
            feed = _experts(block.ffn) if isinstance(block.ffn, MoELayer) else _ffn(block.ffn)
            self.layers.append((_norm(block.attention_norm), self._attention(block), _norm(block.ffn_norm), feed))
        self.norm, self.head = _norm(model.norm), _linear(model.head)
        self.flops += self.head.flops

    def step(self, token: int) -> Tensor:
        """logits_1V after one more token."""
        x_D, flops = self.embedding_VD[token], self.flops
        if self.position_SD is not None:
            x_D = x_D + self.position_SD[self.cache.length]
        for attention_norm, attend, ffn_norm, feed in self.layers:
            x_D = x_D + attend(attention_norm(x_D))
            y_D, unseen = feed(ffn_norm(x_D), token)
            x_D, flops = x_D + y_D, flops + unseen
        self.cache.length += 1
        logits_1V = torch.from_numpy(self.head(self.norm(x_D)))[None]
        computed(logits_1V, flops)
        return logits_1V

    def _attention(self, block: Block) -> Function:
        h, g, c = self.config.n_heads, self.config.kv_heads, self.config.head_dim
        q, k, v, out = (_linear(getattr(block.attention, name)) for name in ("q", "k", "v", "out"))
        self.flops += sum(product.flops for product in (q, k, v, out))
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
        """As `core.model.rotate`: the halves of a head change places, and one of them its sign."""
        cos, sin = self.rotary
        halves = x_HC.reshape(len(x_HC), 2, -1)
        return (halves * cos[position] + halves[:, ::-1] * sin[position]).reshape(x_HC.shape)


def _array(x: Tensor) -> np.ndarray:
    """The same memory, as NumPy sees it."""
    return x.detach().numpy()


def _tables(config: ModelConfig, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every position as (S, 2, C/2), the sine of the first half negative."""
    tables = rotary_tables(torch.arange(config.seq_len), config.head_dim, config.rope_theta)
    cos, sin = (table.numpy().astype(dtype).reshape(config.seq_len, 2, -1) for table in tables)
    return cos, sin


def _linear(linear: nn.Linear) -> Product:
    return Product(linear.weight, linear.bias)


class Product:
    """x_I -> weight_OI @ x_I + bias_O, by the product that is faster here; `flops`: no counter sees either."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        self.bias_O = None if bias_O is None else _array(bias_O)
        self.by_numpy = weight_OI.dtype == torch.float64 or ONE_ROW.taken()
        self.weight_OI, self.flops = weight_OI.detach(), 2 * weight_OI.numel()
        self.rows_O1I = _array(weight_OI)[:, None, :]  # so that matmul takes a dot product for each row

    def __call__(self, x_I: np.ndarray) -> np.ndarray:
        if self.by_numpy:
            y_O = np.matmul(self.rows_O1I, x_I)[:, 0]
        else:
            y_O = torch.mv(self.weight_OI, torch.from_numpy(x_I)).numpy()
        return y_O if self.bias_O is None else y_O + self.bias_O


def _norm(norm: nn.RMSNorm | nn.LayerNorm) -> Function:
    weight_D, eps = _array(norm.weight), norm.eps
    if isinstance(norm, nn.RMSNorm):
        return lambda x_D: x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D
    bias_D = _array(norm.bias)

    def layer_norm(x_D: np.ndarray) -> np.ndarray:
        x_D = x_D - np.add.reduce(x_D) / len(x_D)
        return x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D + bias_D

    return layer_norm


class Unit:
    """One FFN, or one expert."""

    def __init__(self, activation: str, up: Product, gate: Product | None, down: Product):
        self.activation, self.up, self.gate, self.down = activation, up, gate, down
        self.flops = sum(product.flops for product in (up, gate, down) if product is not None)

    def __call__(self, x_D: np.ndarray) -> np.ndarray:
        gate_F = None if self.gate is None else torch.from_numpy(self.gate(x_D))
        return self.down(activate(self.activation, torch.from_numpy(self.up(x_D)), gate_F).numpy())


def _ffn(ffn: FeedForward) -> Feed:
    gate = None if ffn.gate is None else _linear(ffn.gate)
    unit = Unit(ffn.activation, _linear(ffn.up), gate, _linear(ffn.down))
    return lambda x_D, token: (unit(x_D), unit.flops)


def _experts(layer: MoELayer) -> Feed:
    """The experts that the layer's own `route` chooses."""
    units, shared = _units(layer.experts), None if layer.shared is None else _units(layer.shared)[0]

    def feed(x_D: np.ndarray, token: int) -> tuple[np.ndarray, int]:
        routing = layer.route(torch.from_numpy(x_D)[None], torch.tensor([token]))
        y_D, flops = (np.zeros_like(x_D), 0) if shared is None else (shared(x_D), shared.flops)
        for e, weight in zip(routing.expert_ids_NK[0].tolist(), routing.weights_NK[0].tolist()):
            if weight:  # a choice that was not kept has weight 0
                y_D += weight * units[e](x_D)
                flops += units[e].flops
        return y_D, flops

    return feed


def _units(experts: Experts) -> list[Unit]:
    """Each expert as a function of x_D."""

    def products(weight_EOI: Tensor | None, bias_EO: Tensor | None) -> list[Any]:
        if weight_EOI is None:
            return [None] * len(experts.w_up_EFD)
        biases = [None] * len(weight_EOI) if bias_EO is None else bias_EO
        return [Product(weight_OI, bias_O) for weight_OI, bias_O in zip(weight_EOI, biases)]

    ups, gates = products(experts.w_up_EFD, experts.b_up_EF), products(experts.w_gate_EFD, experts.b_gate_EF)
    downs = products(experts.w_down_EDF, experts.b_down_ED)
    return [Unit(experts.activation, *parts) for parts in zip(ups, gates, downs)]
