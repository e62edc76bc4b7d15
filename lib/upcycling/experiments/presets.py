"""The sizes at which the series runs: quick, laptop, gpu."""

from dataclasses import dataclass, replace

from ..core.config import ModelConfig, MoEConfig
from ..cost.references import REFERENCE
from ..training.config import TrainConfig


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


_8_TOP_2 = MoEConfig(num_experts=8, top_k=2, router_bias=True)
_16_TOP_2 = MoEConfig(num_experts=16, top_k=2)
_SMALL = dict(vocab_size=2048, n_heads=4, seq_len=128)

# A 2-core CPU, minutes. The FFN is narrow on purpose: where it is the bottleneck, experts have room to help.
_QUICK = Preset(
    "quick", "worlds", 8_000, "train", ModelConfig.smol(d_model=128, n_layers=3, d_ff=64, **_SMALL), _16_TOP_2,
    dense=TrainConfig(steps=1500, batch_size=8, learning_rate=3e-3, warmup_steps=50),
    sparse=TrainConfig(steps=1000, batch_size=8, learning_rate=2e-3, warmup_steps=50),
)  # fmt: skip
# About an hour on a laptop's CPU.
_LAPTOP = Preset(
    "laptop", "worlds", 50_000, "train", ModelConfig.smol(d_model=256, n_layers=4, d_ff=128, **_SMALL), _16_TOP_2,
    dense=TrainConfig(steps=4000, batch_size=16, learning_rate=2e-3, warmup_steps=50, eval_every=500),
    sparse=TrainConfig(steps=4000, batch_size=16, learning_rate=1.5e-3, warmup_steps=50, eval_every=500),
)  # fmt: skip
# One GPU: the reference models on TinyStories with GPT-2's tokens, 1,000 + 1,000 updates of 2,048 tokens.
_ON_GPU = TrainConfig(steps=1000, batch_size=8, learning_rate=3e-4, warmup_steps=50, precision="bf16")
_GPU = Preset(
    "gpu", "tinystories", 50_000, "gpt2", replace(REFERENCE["simple-100m"], seq_len=256), _8_TOP_2,
    dense=_ON_GPU, sparse=_ON_GPU,
)  # fmt: skip
_GPU_SMOL = replace(_GPU, name="gpu-smol", model=replace(REFERENCE["smol-119m"], seq_len=256))

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_QUICK, _LAPTOP, _GPU, _GPU_SMOL)}
"""The sizes to run the series at: UPCYCLING_PRESET picks one by name."""
