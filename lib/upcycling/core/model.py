"""DecoderLM: one decoder-only transformer for every dense and MoE variant, chosen by its ModelConfig.

Shapes: B batch, T sequence, D model width, H query heads, G key/value heads, C head width, F FFN width, V vocabulary.
The forward pass: token (and position) embedding -> n_layers x [norm -> attention -> add, norm -> FFN or MoE -> add]
-> norm -> head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import IGNORE
from .balance import aux_loss, importance_loss, load_loss, pooled_aux_loss, sequence_aux_loss, z_loss
from .config import ModelConfig
from .experts import Experts, Linear, activate
from .moe import MoELayer
from .routing import Routing, expert_counts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in evaluation mode inside; on the way out each of its modules, also after an error, is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


MANY_LOGITS = 2**26  # 256 MiB in float32: more are not kept all at once
CHUNK_LOGITS = 2**24  # then this many exist at a time


@dataclass(frozen=True)
class LMOutput:
    """What one forward pass returns."""

    logits_BTV: Tensor | None  # None beside a loss over more than MANY_LOGITS, which is computed in chunks
    loss: Tensor | None = None  # mean cross-entropy in nats over the targets that are not IGNORE
    routings: list[Routing] = field(default_factory=list)  # one per MoE layer, in order
    sequences: int = 1  # B

    @property
    def aux_losses_L(self) -> Tensor:
        """The balance loss of each MoE layer (1 = balanced); empty for a dense model."""
        return self._per_layer(aux_loss)

    @property
    def z_losses_L(self) -> Tensor:
        """The z-loss of each MoE layer; empty for a dense model."""
        return self._per_layer(z_loss)

    def _per_layer(self, function) -> Tensor:
        values = [function(routing) for routing in self.routings]
        return torch.stack(values) if values else torch.zeros(0)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Mean nats over the targets that are not IGNORE, in float32 at least."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE)


def loss_in_chunks(x_ND: Tensor, head: nn.Linear, targets_N: Tensor) -> Tensor:
    """`cross_entropy(head(x_ND), targets_N)`, whose logits never exist all at once where torch can do that (2.13)."""
    if not hasattr(F, "linear_cross_entropy"):
        return cross_entropy(head(x_ND), targets_N)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, CHUNK_LOGITS // len(head.weight)))
    weight_VD, bias_V = head.weight, head.bias
    return F.linear_cross_entropy(x_ND, weight_VD, targets_N, linear_bias=bias_V, ignore_index=IGNORE, options=options)


Rotary = tuple[Tensor, Tensor]  # cos_TC, sin_TC


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in tensors allocated once: (B, G, seq_len, C)."""

    def __init__(self, config: ModelConfig, batch_size: int, device, dtype):
        shape = (config.n_layers, batch_size, config.kv_heads, config.seq_len, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens up to now, the new ones included."""
        end = self.length + k_BGTC.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BGTC
        self.values[layer, :, :, self.length : end] = v_BGTC
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotary_tables(positions_T: Tensor, head_dim: int, theta: float) -> Rotary:
    """cos_TC, sin_TC of RoPE (Su et al. 2021) in the half-split layout of Hugging Face's Llama, as `rotate` wants them:
    a pair is (i, i + C/2), and the sine of the first half is negative."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim)
    angles_TP = torch.outer(positions_T.float(), frequencies)
    sin_TP = angles_TP.sin()
    return angles_TP.cos().repeat(1, 2), torch.cat((-sin_TP, sin_TP), dim=-1)


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn each pair of a head by its position's angle: the halves change places, one of them its sign."""
    return x_BHTC * cos_TC + x_BHTC.roll(x_BHTC.shape[-1] // 2, dims=-1) * sin_TC


class Attention(nn.Module):
    """Causal self-attention with H query heads and G <= H key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        self.q = Linear(config.d_model, config.d_model, bias=config.qkv_bias)
        self.k = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v = Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.out = Linear(config.d_model, config.d_model, bias=config.attention_out_bias)

    def forward(self, x_BTD: Tensor, rotary: Rotary | None, cache: KVCache | None, layer: int) -> Tensor:
        """y_BTD: what each position gathers from itself and those before it.

        `rotary` is (cos_TC, sin_TC) under RoPE. With a `cache` the T tokens follow those that it holds, and see them.
        """
        c, (b, t, _) = self.config, x_BTD.shape
        q_BHTC = self.q(x_BTD).view(b, t, c.n_heads, c.head_dim).transpose(1, 2)
        k_BGTC = self.k(x_BTD).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        v_BGTC = self.v(x_BTD).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        if rotary is not None:
            q_BHTC, k_BGTC = rotate(q_BHTC, *rotary), rotate(k_BGTC, *rotary)
        past = 0
        if cache is not None:
            past = cache.length
            k_BGTC, v_BGTC = cache.extend(layer, k_BGTC, v_BGTC)
        mask_TS = None
        if c.causal and past and t > 1:  # new tokens see the cached ones and the new ones before them
            mask_TS = torch.ones(t, past + t, dtype=torch.bool, device=x_BTD.device).tril(past)
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BGTC, v_BGTC, mask_TS,
            is_causal=c.causal and past == 0 and t > 1,
            dropout_p=c.dropout if self.training else 0.0, enable_gqa=c.kv_heads != c.n_heads,
        )  # fmt: skip
        return self.out(y_BHTC.transpose(1, 2).reshape(b, t, c.d_model))


class FeedForward(nn.Module):
    """The dense FFN: down(act(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.d_model, config.d_ff, bias=config.ffn_bias)
        gated = config.activation == "swiglu"
        self.gate = Linear(config.d_model, config.d_ff, bias=config.ffn_bias) if gated else None
        self.down = Linear(config.d_ff, config.d_model, bias=config.ffn_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """y_BTD: each position by itself, through F hidden units."""
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        return self.down(activate(self.activation, self.up(x_BTD), gate_BTF))


def make_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


class Block(nn.Module):
    """One layer: attention and an FFN (or experts), each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn: Any = MoELayer(config) if layer in config.moe_layers else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary | None, cache: KVCache | None, tokens_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(the residual stream x_BTD after this layer, the Routing of its experts or None for a dense FFN).

        `tokens_BT`, the token ids, is for hash routing; `rotary` and `cache` as in `Attention.forward`.
        """
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary, cache, self.layer))
        routing = None
        if isinstance(self.ffn, MoELayer):
            y_BTD, routing = self.ffn(self.ffn_norm(x_BTD), tokens_BT)
        else:
            y_BTD = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + self.dropout(y_BTD), routing


class DecoderLM(nn.Module):
    """A decoder-only language model, dense or MoE, as its config says."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass instead of storing it
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.seq_len, config.d_model) if learned else None
        blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.blocks: Sequence[Block] = blocks
        self.norm = make_norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, init_std), zero biases, residual outputs scaled by 1/sqrt(2 n_layers)."""
        std, out_std = self.config.init_std, self.config.init_std / (2 * self.config.n_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if name.endswith((".router", ".noise")):
                    nn.init.normal_(module.weight, std=self.config.moe.router_std)
                elif not (name == "head" and self.config.tie_embeddings):
                    nn.init.normal_(module.weight, std=out_std if name.endswith((".out", ".down")) else std)
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    nn.init.zeros_(bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.w_up_EFD, std=std)
                nn.init.normal_(module.w_down_EDF, std=out_std)
                if module.w_gate_EFD is not None:
                    nn.init.normal_(module.w_gate_EFD, std=std)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: KVCache | None = None) -> LMOutput:
        """Logits for each position, the loss if `targets_BT` is given, and each MoE layer's routing.

        With targets and more than MANY_LOGITS logits (a large vocabulary) only the loss, which then never holds them
        all; call without targets for the logits.

        `targets_BT[b, t]` is the token that should follow `tokens_BT[b, t]`; IGNORE (-100) is not counted. With a
        `cache`, the tokens continue those that the cache has seen. Raises ValueError for a sequence longer than the
        context and, on a CPU (where looking costs no synchronisation), for an id outside the vocabulary.
        """
        past = cache.length if cache is not None else 0
        self._check(tokens_BT, past)
        positions_T = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.token_embedding(tokens_BT)
        rotary = None
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_T)
        elif self.config.position == "rope":
            tables = rotary_tables(positions_T, self.config.head_dim, self.config.rope_theta)
            rotary = (tables[0].to(x_BTD.dtype), tables[1].to(x_BTD.dtype))
        x_BTD = self.dropout(x_BTD)
        routings = []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x_BTD, routing = checkpoint(block, x_BTD, rotary, cache, tokens_BT, use_reentrant=False)
            else:
                x_BTD, routing = block(x_BTD, rotary, cache, tokens_BT)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        x_BTD = self.norm(x_BTD)
        if targets_BT is not None and tokens_BT.numel() * self.config.vocab_size > MANY_LOGITS:
            chunked = loss_in_chunks(x_BTD.flatten(0, 1), self.head, targets_BT.flatten())
            return LMOutput(None, chunked, routings, len(tokens_BT))
        logits_BTV = self.head(x_BTD)
        loss = None if targets_BT is None else cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        return LMOutput(logits_BTV, loss, routings, len(tokens_BT))

    def objective(self, output: LMOutput) -> Tensor:
        """What training minimises: the loss plus, for an MoE, the weighted sums over layers of balance and z loss.

        Which balance loss that is, `MoEConfig.balance` says; "pooled" counts once for each layer, so that a weight
        means the same strength as with "layer". Rules that ask for a penalty of their own add it.
        """
        moe, total = self.config.moe, output.loss
        if total is None:
            raise ValueError("there is no loss to minimise: call the model with targets_BT, too")
        if moe is not None and moe.aux_weight:
            total = total + moe.aux_weight * self._balance(output)
        if moe is not None and moe.z_weight:
            total = total + moe.z_weight * output.z_losses_L.sum()
        for routing in output.routings:
            if routing.penalty is not None:
                total = total + routing.penalty
        return total

    def _balance(self, output: LMOutput) -> Tensor:
        routings, balance = output.routings, self.config.moe.balance
        if balance == "layer":
            return output.aux_losses_L.sum()
        if balance == "pooled":
            return len(routings) * pooled_aux_loss(routings)
        if balance == "sequence":
            return sum(sequence_aux_loss(routing, output.sequences) for routing in routings)  # type: ignore[return-value]
        noisy = [routing for routing in routings if routing.noise_std_NE is not None]
        return sum(map(importance_loss, routings)) + sum(map(load_loss, noisy))  # type: ignore[return-value]

    def choices(self, output: LMOutput) -> Tensor | None:
        """counts_LE, the choices that fell on each expert, where a routing rule wants to know them; else None."""
        moe = self.config.moe
        if moe is None or moe.router is None or not moe.router.moves:
            return None
        return torch.stack([expert_counts(routing, wanted=True) for routing in output.routings])

    def after_update(self, counts_LE: Tensor, tokens: int) -> None:
        """Let each layer's routing rule move what it remembers, after an optimizer update over `tokens` tokens."""
        for layer, counts_E in zip(self.config.moe_layers, counts_LE, strict=True):
            self.blocks[layer].ffn.after_update(counts_E, tokens)

    def num_parameters(self, active: bool = False) -> int:
        """Parameters in all, or those that one token uses: of the E experts of a layer, K; everything else whole."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if active and self.config.moe is not None:
            moe = self.config.moe
            for layer in self.config.moe_layers:
                experts = sum(parameter.numel() for parameter in self.blocks[layer].ffn.experts.parameters())
                total -= experts // moe.num_experts * (moe.num_experts - moe.top_k)
        return total

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty key/value cache for `batch_size` sequences, on this model's device and in its dtype."""
        weight = self.token_embedding.weight
        return KVCache(self.config, batch_size, weight.device, weight.dtype)

    def _check(self, tokens_BT: Tensor, past: int) -> None:
        length = past + tokens_BT.shape[1]
        if length > self.config.seq_len:
            raise ValueError(
                f"the sequence has {length} tokens but the model's context is {self.config.seq_len}; "
                "shorten it or build the model with a larger seq_len"
            )
        if tokens_BT.device.type == "cpu" and tokens_BT.numel():
            low, high = (int(value) for value in tokens_BT.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}; "
                    "was the text tokenized with this model's tokenizer?"
                )
