"""Configurations: the model, its experts, the training run; parameter and FLOP accounting; named reference models.

Everything here is plain data: no torch is imported, so counting a 370-million-parameter model costs microseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checks import _at_least, _one_of

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu")
BALANCES = ("layer", "pooled", "sequence", "importance")


def _from_dict(cls, values: dict):
    unknown = set(values) - {field.name for field in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}; was it saved by another version?")
    return cls(**values)


@dataclass(frozen=True)
class MoEConfig:
    """How a feed-forward layer becomes experts.

    `num_experts` experts, of which each token uses `top_k`. `renormalize` divides the chosen probabilities by their
    sum, which is what keeps the outputs unchanged when experts are copies. `noisy` adds Shazeer's learned noise to the
    router's logits, in training only. `layers` lists the layers (0-based) that become MoE; None means all of them.
    `router_std` is the standard deviation of the router's initial weights (0 gives the zero router, a lesson in
    itself). `aux_weight` and `z_weight` multiply the sums over layers of the balance and z losses in the objective.

    `router` is the rule that turns scores into choices, one of `core.routers` (an instance, or its name for the
    defaults); None is softmax, then the `top_k` most probable. `balance` says which balance loss `aux_weight` weighs:
    "layer" (each layer's own), "pooled" (all layers' choices counted together, as transformers does), "sequence" (each
    sequence's own) or "importance" (the squared coefficient of variation of the experts' total weights).
    `shared_experts` more experts are used by every token. `expert_d_ff` is an expert's width, by default the dense
    FFN's. With a `capacity_factor` c an expert takes no more than c * tokens * top_k / num_experts choices; those that
    come later in the batch are dropped. In training only: `expert_dropout` is the probability that an expert cannot be
    chosen in an update, `router_jitter` j multiplies the router's inputs by uniform numbers from 1-j to 1+j. With a
    `logit_norm` the router's scores are standardised over the experts and multiplied by it.
    """

    num_experts: int = 8
    top_k: int = 2
    renormalize: bool = True
    router_bias: bool = False
    noisy: bool = False
    layers: tuple[int, ...] | None = None
    router_std: float = 0.02
    aux_weight: float = 0.01
    z_weight: float = 0.0
    router: Any = None
    balance: str = "layer"
    shared_experts: int = 0
    expert_d_ff: int | None = None
    capacity_factor: float | None = None
    expert_dropout: float = 0.0
    router_jitter: float = 0.0
    logit_norm: float | None = None

    def __post_init__(self):
        _at_least(1, num_experts=self.num_experts)
        _at_least(0, router_std=self.router_std, aux_weight=self.aux_weight, z_weight=self.z_weight)
        _at_least(0, shared_experts=self.shared_experts)
        _one_of("balance", self.balance, BALANCES)
        if self.expert_d_ff is not None:
            _at_least(1, expert_d_ff=self.expert_d_ff)
        for name in ("capacity_factor", "logit_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} is not a positive number; choose one, or None to leave it out")
        for name in ("expert_dropout", "router_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is outside 0 <= {name} < 1")
        if self.router is not None:
            from .routers import as_router

            object.__setattr__(self, "router", as_router(self.router))
            if self.noisy and self.balance == "importance" and self.router.kind != "top_k":
                raise ValueError(
                    f"balance='importance' with noisy=True adds Shazeer's smooth load, which is that of softmax top-k, "
                    f"not of router={self.router.kind!r}; choose another balance, router=None or noisy=False"
                )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} but there are {self.num_experts} experts; choose 1..{self.num_experts}"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model; the named constructors give the three families of the series.

    Sizes: `vocab_size` V, `d_model` D, `n_heads` H, `n_kv_heads` (fewer than H for grouped-query attention; None = H),
    `d_ff` F, and `seq_len`, the longest sequence in tokens. `causal=False` removes the causal mask: it exists to
    reproduce that bug in a lesson. `moe=None` is a dense model.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    seq_len: int
    n_kv_heads: int | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_theta: float = 10000.0
    activation: str = "gelu"
    qkv_bias: bool = True
    attention_out_bias: bool = True
    ffn_bias: bool = True
    head_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    causal: bool = True
    moe: MoEConfig | None = None

    def __post_init__(self):
        _one_of("norm", self.norm, NORMS)
        _one_of("position", self.position, POSITIONS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _at_least(
            1,
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            d_ff=self.d_ff,
            seq_len=self.seq_len,
        )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability below 1; choose 0 <= dropout < 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; change one of them")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope turns pairs, but a head has {self.head_dim} dimensions; make it even")
        if self.moe and self.moe.layers is not None:
            outside = [layer for layer in self.moe.layers if not 0 <= layer < self.n_layers]
            if outside:
                raise ValueError(f"moe.layers names layer {outside[0]}, but layers run from 0 to {self.n_layers - 1}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that hold experts, in order; empty for a dense model."""
        if self.moe is None:
            return ()
        return tuple(range(self.n_layers)) if self.moe.layers is None else self.moe.layers

    @property
    def expert_width(self) -> int:
        """Hidden units of one expert."""
        return (self.moe and self.moe.expert_d_ff) or self.d_ff

    @property
    def shared_width(self) -> int:
        """Hidden units of all shared experts of a layer together."""
        return self.moe.shared_experts * self.expert_width if self.moe else 0

    @classmethod
    def simple(cls, **sizes) -> ModelConfig:
        """GPT-2's shape: LayerNorm, two-matrix GELU FFN, biases, learned positions, tied head."""
        return cls(**sizes)

    @classmethod
    def smol(cls, **sizes) -> ModelConfig:
        """SmolLM's and Llama's shape: RMSNorm, RoPE, SwiGLU, no biases, tied head."""
        no_bias = dict(qkv_bias=False, attention_out_bias=False, ffn_bias=False)
        return cls(**{**dict(norm="rmsnorm", position="rope", activation="swiglu"), **no_bias, **sizes})

    @classmethod
    def nano(cls, **sizes) -> ModelConfig:
        """nanoGPT-lecture shape: LayerNorm, ReLU FFN, learned positions, untied head with a bias."""
        shape = dict(activation="relu", qkv_bias=False, tie_embeddings=False, head_bias=True)
        return cls(**{**shape, **sizes})

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """The configuration that `to_dict` (or its JSON) describes; an unknown field is a ValueError."""
        values = dict(values)
        if values.get("moe") is not None:
            values["moe"] = _from_dict(MoEConfig, values["moe"])
        return _from_dict(cls, values)
