"""A preset that trains in a second, for the tests of what is built on a series."""

from dataclasses import replace

import pytest

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.experiments.presets import Preset
from upcycling.experiments.series import Series
from upcycling.training.config import TrainConfig

SHORT = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, eval_every=2, log_every=1)
TINY = Preset(
    name="tiny",
    corpus="worlds",
    documents=120,
    tokenizer="train",
    model=ModelConfig.simple(vocab_size=300, d_model=16, n_layers=2, n_heads=2, d_ff=16, seq_len=32),
    moe=MoEConfig(num_experts=4, top_k=2),
    dense=SHORT,
    sparse=replace(SHORT, steps=4),
)


def prepare(folder, preset=TINY):
    """`folder`, as artifacts that hold the preset's corpus, tokenizer, streams and parent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPCYCLING_ARTIFACTS", str(folder))
        series = Series(preset, preset.corpus)
        series.dense_parent(progress=False, verbose=False)
        _ = series.validation_stream, series.domain_streams()
    return folder
