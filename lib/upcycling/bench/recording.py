"""What recording the routing adds to a forward pass."""

from dataclasses import replace

import torch

from ..experiments.presets import PRESETS
from ..experiments.series import new_model
from ..routing.record import record_routing
from .measure import Bench, Comparison, compared


def compare(bench: Bench) -> list[Comparison]:
    """A forward pass of the quick preset's MoE on 2,048 tokens, with its routing recorded and without."""
    preset = PRESETS["quick"]
    model = new_model(replace(preset.model, moe=preset.moe), seed=0).eval().to(bench.device)
    size = (2048 // preset.model.seq_len, preset.model.seq_len)
    tokens_BT = torch.randint(preset.model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    tokens_BT = tokens_BT.to(bench.device)

    @torch.no_grad()
    def plain():
        model(tokens_BT)

    @torch.no_grad()
    def recorded():
        with record_routing(model):
            model(tokens_BT)

    setting = f"{size[0]} x {size[1]} tokens, {preset.moe.num_experts} experts, {preset.model.n_layers} layers"
    seconds = bench.times({"forward, routing recorded": recorded, "forward": plain})
    return [compared("recording", setting, seconds, "forward, routing recorded", "forward", "time", 1.10)]
