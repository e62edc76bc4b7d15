"""Configurations: the model, its experts, the training run; parameter and FLOP accounting; named reference models.

Everything here is plain data: no torch is imported, so counting a 370-million-parameter model costs microseconds.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "cosine", "onecycle", "inverse_sqrt")
PRECISIONS = ("fp32", "bf16", "fp16")
BALANCES = ("layer", "pooled", "sequence", "importance")
IGNORE = -100  # the target that no loss counts: padding (torch's cross_entropy skips it by default)


def _one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _at_least(minimum: float, **values) -> None:
    for name, value in values.items():
        if not value >= minimum:  # written so that NaN fails too
            raise ValueError(f"{name}={value!r} is too small; choose at least {minimum}")


def whole_number(name: str, value) -> int:
    """`value` as int; ValueError for what is no integer of Python, NumPy or torch, and for True and 2.0."""
    try:
        if str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.") == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not a whole number") from None


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

    `router` is the rule that turns scores into choices, one of `upcycling.routers` (an instance, or its name for the
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


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. Each definition counts a tied embedding matrix once.

    `total`: every parameter. `active`: those that one token's forward pass uses: as `total`, with only `top_k` of the
    experts per MoE layer; the whole router and the head are counted. `active_without_embeddings`: `active` less the
    parameters that are only looked up, that is the position table and, when the head has a matrix of its own, the
    token table; the head stays counted.
    """

    total: int
    active: int
    active_without_embeddings: int
    expert: int  # one expert, or the dense FFN
    router: int  # one MoE layer's router
    head: int

    def __str__(self) -> str:
        return f"{self.total:,} parameters, {self.active:,} active per token"


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `config`'s model from its sizes alone; `DecoderLM(config)` has exactly as many."""
    d, f, kv = config.d_model, config.d_ff, config.kv_heads * config.head_dim
    up_matrices = 2 if config.activation == "swiglu" else 1

    def ffn_size(width: int) -> int:
        return up_matrices * _linear(d, width, config.ffn_bias) + _linear(width, d, config.ffn_bias)

    ffn = ffn_size(f)
    attention = _linear(d, d + 2 * kv, config.qkv_bias) + _linear(d, d, config.attention_out_bias)
    norm = d if config.norm == "rmsnorm" else 2 * d
    token_table = config.vocab_size * d
    position_table = config.seq_len * d if config.position == "learned" else 0
    head = _linear(d, config.vocab_size, config.head_bias)
    trunk = token_table + position_table + (head - token_table if config.tie_embeddings else head) + norm
    trunk += config.n_layers * (attention + 2 * norm)

    n_moe = len(config.moe_layers)
    total = active = trunk + (config.n_layers - n_moe) * ffn
    expert, router = ffn, 0
    if config.moe:
        expert = ffn_size(config.expert_width)
        router = _linear(d, config.moe.num_experts, config.moe.router_bias) * (2 if config.moe.noisy else 1)
        shared = ffn_size(config.shared_width) if config.moe.shared_experts else 0
        total += n_moe * (config.moe.num_experts * expert + shared + router)
        active += n_moe * (config.moe.top_k * expert + shared + router)
    looked_up = position_table + (0 if config.tie_embeddings else token_table)
    return ParameterCount(total, active, active - looked_up, expert, router, head)


def forward_flops(config: ModelConfig, tokens: int | None = None, head: bool = True) -> int:
    """Floating-point operations of one forward pass over a sequence of `tokens` (default: the whole context).

    Matrix products only, two operations for each multiply-add; `top_k` experts a token, whatever the routing rule;
    attention counts all T x T scores, as the usual counters do, although a causal kernel may skip half. A training
    step costs three times this: the backward pass has two products for each one of the forward pass.
    """
    t = config.seq_len if tokens is None else tokens
    d, f, kv = config.d_model, config.d_ff, config.kv_heads * config.head_dim
    per_unit = (3 if config.activation == "swiglu" else 2) * d
    per_token = config.n_layers * (d * (d + 2 * kv) + d * d)
    per_token += (config.n_layers - len(config.moe_layers)) * per_unit * f
    if config.moe:
        routers = 2 if config.moe.noisy else 1
        units = config.moe.top_k * config.expert_width + config.shared_width
        per_token += len(config.moe_layers) * (per_unit * units + routers * d * config.moe.num_experts)
    if head:
        per_token += d * config.vocab_size
    attention = config.n_layers * 2 * t * t * d
    return 2 * (t * per_token + attention)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `steps` are optimizer updates; see `upcycling.training.train` for what each field does."""

    steps: int
    batch_size: int = 16
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    eval_every: int = 100
    eval_batch_size: int = 32
    log_every: int = 10
    checkpoint_every: int = 0
    seed: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        _at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            eval_batch_size=self.eval_batch_size,
            log_every=self.log_every,
        )
        _at_least(
            0,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
            grad_clip=self.grad_clip,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
        )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} does not train; choose a number above 0")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "trackers", tuple(self.trackers))


_SIMPLE_100M = ModelConfig.simple(
    vocab_size=50257, d_model=832, n_layers=7, n_heads=8, d_ff=3328, seq_len=512, position="none"
)
_SMOL_119M = ModelConfig.smol(vocab_size=50257, d_model=832, n_layers=7, n_heads=8, d_ff=3328, seq_len=512)
_SIMPLE_16M = ModelConfig.simple(
    vocab_size=50257, d_model=256, n_layers=4, n_heads=4, d_ff=1024, seq_len=512, position="none"
)
_NANO = ModelConfig.nano(vocab_size=2048, d_model=256, n_layers=12, n_heads=8, d_ff=1024, seq_len=1080)
_8_TOP_2 = MoEConfig(num_experts=8, top_k=2, router_bias=True)

REFERENCE: dict[str, ModelConfig] = {
    "simple-100m": _SIMPLE_100M,
    "simple-100m-moe": replace(_SIMPLE_100M, moe=_8_TOP_2),
    "smol-119m": _SMOL_119M,
    "smol-119m-moe": replace(_SMOL_119M, moe=_8_TOP_2),
    "simple-16m": _SIMPLE_16M,
    "simple-16m-moe": replace(_SIMPLE_16M, moe=_8_TOP_2),
    "nano": _NANO,
    "nano-moe": replace(_NANO, moe=replace(_8_TOP_2, noisy=True)),
    "nano-moe-134m": replace(
        _NANO,
        d_model=288,
        n_layers=16,
        d_ff=1152,
        moe=MoEConfig(num_experts=12, top_k=2, router_bias=True, noisy=True),
    ),
    "sparse-158m": ModelConfig.simple(
        vocab_size=50257,
        d_model=512,
        n_layers=6,
        n_heads=8,
        d_ff=1024,
        seq_len=256,
        ffn_bias=False,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=16, top_k=2),
    ),
    "smolmoe": ModelConfig.smol(
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        seq_len=2048,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=3, top_k=1),
    ),
}
"""The configurations of earlier public projects by name; `count_parameters` gives their published sizes exactly."""


@dataclass(frozen=True)
class Preset:
    """The sizes of one way to run the series: corpus, dense model, experts, and the two training phases."""

    name: str
    corpus: str
    documents: int | None  # of the corpus; None takes all
    tokenizer: str  # "train" trains a BPE of the model's vocabulary on the training split; or a name or folder
    model: ModelConfig
    moe: MoEConfig
    dense: TrainConfig
    sparse: TrainConfig


def _preset(
    name, corpus, documents, tokenizer, model, moe, dense_steps, sparse_steps, sparse_learning_rate, **training
) -> Preset:
    shared = dict(warmup_steps=50) | training
    return Preset(
        name,
        corpus,
        documents,
        tokenizer,
        model,
        moe,
        TrainConfig(steps=dense_steps, **shared),
        TrainConfig(steps=sparse_steps, **shared | dict(learning_rate=sparse_learning_rate)),
    )


_16_TOP_2 = MoEConfig(num_experts=16, top_k=2)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # A 2-core CPU, minutes. The FFN is narrow on purpose: where it is the bottleneck, experts have room to help.
        _preset(
            "quick",
            "worlds",
            8_000,
            "train",
            ModelConfig.smol(vocab_size=2048, d_model=128, n_layers=3, n_heads=4, d_ff=64, seq_len=128),
            _16_TOP_2,
            batch_size=8,
            dense_steps=1500,
            sparse_steps=1000,
            learning_rate=3e-3,
            sparse_learning_rate=2e-3,
            eval_every=100,
        ),
        # About an hour on a laptop's CPU.
        _preset(
            "laptop",
            "worlds",
            50_000,
            "train",
            ModelConfig.smol(vocab_size=2048, d_model=256, n_layers=4, n_heads=4, d_ff=128, seq_len=128),
            _16_TOP_2,
            batch_size=16,
            dense_steps=4000,
            sparse_steps=4000,
            learning_rate=2e-3,
            sparse_learning_rate=1.5e-3,
            eval_every=500,
        ),
        # One GPU: the reference models on TinyStories with GPT-2's tokens, 1,000 + 1,000 updates of 2,048 tokens.
        _preset(
            "gpu",
            "tinystories",
            50_000,
            "gpt2",
            replace(_SIMPLE_100M, seq_len=256),
            _8_TOP_2,
            batch_size=8,
            dense_steps=1000,
            sparse_steps=1000,
            learning_rate=3e-4,
            sparse_learning_rate=3e-4,
            precision="bf16",
        ),
    )
}
"""The sizes to run the series at: UPCYCLING_PRESET picks one by name."""
PRESETS["gpu-smol"] = replace(PRESETS["gpu"], name="gpu-smol", model=replace(_SMOL_119M, seq_len=256))
