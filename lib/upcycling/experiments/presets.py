"""The sizes at which the series runs: quick, laptop, gpu."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.config import ModelConfig, MoEConfig
from ..cost.references import _8_TOP_2, _SIMPLE_100M, _SMOL_119M
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
