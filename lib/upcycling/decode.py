"""One token of one sequence at a time, on a CPU, without modules: what `generate` uses for a batch of one.

Computing one token means reading every active weight once, and nothing else takes long: so what counts is how fast a
matrix-vector product reads, and how little is done between two of them. NumPy's products (OpenBLAS) read a weight as
it lies, (out, in), about twice as fast as torch's do on AMD processors, and a call of theirs costs a fraction of a
module's. The arrays below share memory with the model's parameters and its KVCache, so that nothing is copied, set-up
takes microseconds and no weight can be stale. Routing is `MoELayer.route` itself: every rule works, also one that
`upcycling.intervention` has changed for a while.

Shapes: D model width, F FFN width, H query heads, G key/value heads, C head width, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .model import Attention, Block, DecoderLM, FeedForward, KVCache, rotary_tables
from .moe import Experts, MoELayer, activate

_KNOWN = (DecoderLM, Block, Attention, FeedForward, MoELayer, Experts, nn.Module, nn.ModuleList)
_KNOWN += (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout)


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
    """Continues the one sequence in `cache`: `decoder.step(token)` is the last row of `model(token, cache=cache)`."""

    def __init__(self, model: DecoderLM, cache: KVCache):
        self.config, self.cache = model.config, cache
        self.embedding_VD = _array(model.token_embedding.weight)
        self.position_SD = None if model.position_embedding is None else _array(model.position_embedding.weight)
        self.rotary = None
        if self.config.position == "rope":
            self.rotary = _signed_tables(self.config, self.embedding_VD.dtype)
        self.layers = [self._layer(block) for block in model.blocks]
        self.norm, self.head = _norm(model.norm), _linear(model.head)

    def step(self, token: int) -> Tensor:
        """logits_1V after one more token."""
        x_D = self.embedding_VD[token]
        if self.position_SD is not None:
            x_D = x_D + self.position_SD[self.cache.length]
        for attend, feed in self.layers:
            x_D = x_D + attend(x_D)
            x_D = x_D + feed(x_D, token)
        self.cache.length += 1
        return torch.from_numpy(self.head(self.norm(x_D)))[None]

    def _layer(self, block: Block) -> tuple[Callable, Callable]:
        feed = _experts(block.ffn) if isinstance(block.ffn, MoELayer) else _feed_forward(block.ffn)
        norm = _norm(block.ffn_norm)
        return self._attention(block), lambda x_D, token: feed(norm(x_D), token)

    def _attention(self, block: Block) -> Callable:
        h, g, c = self.config.n_heads, self.config.kv_heads, self.config.head_dim
        norm, part = _norm(block.attention_norm), block.attention
        q, k, v, out = (_linear(linear) for linear in (part.q, part.k, part.v, part.out))
        keys_GSC, values_GSC = (_array(x[block.layer, 0]) for x in (self.cache.keys, self.cache.values))
        scale = 1 / math.sqrt(c)

        def attend(x_D):
            x_D, past = norm(x_D), self.cache.length
            q_HC, k_GC = q(x_D).reshape(h, c), k(x_D).reshape(g, c)
            if self.rotary is not None:
                q_HC, k_GC = self._rotate(q_HC, past), self._rotate(k_GC, past)
            keys_GSC[:, past], values_GSC[:, past] = k_GC, v(x_D).reshape(g, c)
            q_GRC = (q_HC * scale).reshape(g, h // g, c)  # R query heads share a key head
            p_GRS = np.matmul(q_GRC, keys_GSC[:, : past + 1].transpose(0, 2, 1))
            p_GRS -= p_GRS.max(-1, keepdims=True)
            np.exp(p_GRS, out=p_GRS)
            p_GRS /= p_GRS.sum(-1, keepdims=True)
            return out(np.matmul(p_GRS, values_GSC[:, : past + 1]).reshape(h * c))

        return attend

    def _rotate(self, x_HC: np.ndarray, position: int) -> np.ndarray:
        """As `upcycling.model.rotate`: the halves of a head change places, one of them with its sign changed."""
        cos_2, sin_2 = (table[position] for table in self.rotary)
        halves_H2 = x_HC.reshape(len(x_HC), 2, -1)
        return (halves_H2 * cos_2 + halves_H2[:, ::-1] * sin_2).reshape(x_HC.shape)


def _array(x: Tensor) -> np.ndarray:
    """The same memory, as NumPy sees it."""
    return x.detach().numpy()


def _signed_tables(config, dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every position as (S, 2, C/2), the sine of the first half negative."""
    tables = rotary_tables(torch.arange(config.seq_len), config.head_dim, config.rope_theta)
    cos, sin = (table.numpy().astype(dtype).reshape(config.seq_len, 2, -1) for table in tables)
    sin[:, 0] *= -1
    return cos, sin


def _linear(linear: nn.Linear) -> Callable[[np.ndarray], np.ndarray]:
    return _product(_array(linear.weight), None if linear.bias is None else _array(linear.bias))


def _product(weight_OI: np.ndarray, bias_O: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    if bias_O is None:
        return weight_OI.dot
    return lambda x_I: weight_OI.dot(x_I) + bias_O


def _norm(norm: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    weight_D, eps = _array(norm.weight), norm.eps
    if isinstance(norm, nn.RMSNorm):
        return lambda x_D: x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D
    bias_D = _array(norm.bias)

    def layer_norm(x_D):
        x_D = x_D - np.add.reduce(x_D) / len(x_D)
        return x_D * (1 / math.sqrt(x_D.dot(x_D) / len(x_D) + eps)) * weight_D + bias_D

    return layer_norm


def _feed_forward(ffn: FeedForward) -> Callable:
    up, down = _linear(ffn.up), _linear(ffn.down)
    gate = None if ffn.gate is None else _linear(ffn.gate)
    return lambda x_D, token: _unit(ffn.activation, up, gate, down, x_D)


def _unit(activation: str, up: Callable, gate: Callable | None, down: Callable, x_D: np.ndarray) -> np.ndarray:
    gate_F = None if gate is None else torch.from_numpy(gate(x_D))
    return down(activate(activation, torch.from_numpy(up(x_D)), gate_F).numpy())


def _experts(layer: MoELayer) -> Callable:
    units = _units(layer.experts)
    shared = _units(layer.shared)[0] if layer.shared is not None else None

    def feed(x_D, token):
        routing = layer.route(torch.from_numpy(x_D)[None], torch.tensor([token]))
        kept_K = None if routing.kept_NK is None else routing.kept_NK[0].tolist()
        y_D = np.zeros_like(x_D) if shared is None else shared(x_D)
        for i, (e, weight) in enumerate(zip(routing.expert_ids_NK[0].tolist(), routing.weights_NK[0].tolist())):
            if kept_K is None or kept_K[i]:
                y_D += weight * units[e](x_D)
        return y_D

    return feed


def _units(experts: Experts) -> list[Callable]:
    """Each expert as a function of x_D."""

    def products(weight_EOI, bias_EO):
        if weight_EOI is None:
            return [None] * len(experts.w_up_EFD)
        biases = [None] * len(weight_EOI) if bias_EO is None else _array(bias_EO)
        return [_product(weight, bias) for weight, bias in zip(_array(weight_EOI), biases)]

    parts = (
        products(experts.w_up_EFD, experts.b_up_EF),
        products(experts.w_gate_EFD, experts.b_gate_EF),
        products(experts.w_down_EDF, experts.b_down_ED),
    )
    return [_bound(experts.activation, *part) for part in zip(*parts)]


def _bound(activation: str, up: Callable, gate: Callable | None, down: Callable) -> Callable:
    return lambda x_D: _unit(activation, up, gate, down, x_D)
