"""Equal tokens, equal FLOPs, equal seconds: how many updates each arm gets."""

import json
import statistics
import time
from collections.abc import Sequence

import torch

from ..core.model import DecoderLM
from ..cost.account import flop_counter
from ..files import write_text
from .arms import DENSE, Arm
from .presets import Preset
from .series import Series, artifacts_dir, key_of

BUDGETS = ("tokens", "FLOPs", "seconds")
SHARED_WITHIN = 0.02  # budgets of one arm whose updates differ by no more than this fraction share one run


def update_flops(model: DecoderLM, tokens_BT, targets_BT) -> int:
    """Matrix-product FLOPs that one training update of `model` executes, two for each multiply-add.

    For a model that computes `top_k` experts this is three times `forward_flops`, B times.
    """
    with flop_counter() as counter:
        model.objective(model(tokens_BT, targets_BT)).backward()
    model.zero_grad()
    return counter.get_total_flops()


def costs(series: Series, arms: Sequence[Arm], rounds: int = 80) -> dict[str, dict[str, float]]:
    """{arm: {budget: what one of its updates costs in dense updates}}; arms of one configuration cost the same.

    The seconds are measured once for a configuration and kept under `artifacts/`: another measurement would ask for
    other numbers of updates, and every run would have to be made again.
    """
    models = {None: series.arm(DENSE).train()}
    for arm in arms:
        if arm.moe not in models:
            models[arm.moe] = series.arm(arm).train()
    batch_size, context = series.preset.sparse.batch_size, series.preset.model.seq_len
    batches = [series.train_stream.random_windows(batch_size, context, seed=0, step=step) for step in range(rounds + 2)]
    flops = {moe: update_flops(model, *batches[0]) for moe, model in models.items()}

    config = {moe: model.config.to_dict() for moe, model in models.items()}
    files = {moe: artifacts_dir() / "costs" / key_of(config[None], config[moe], batch_size) for moe in models if moe}
    if missing := [moe for moe, file in files.items() if not file.exists()]:
        _, *measured = seconds_ratios([models[moe] for moe in (None, *missing)], batches)
        for moe, ratio in zip(missing, measured, strict=True):
            write_text(files[moe], json.dumps({"seconds": ratio}))
    seconds = {moe: json.loads(file.read_text(encoding="utf-8"))["seconds"] for moe, file in files.items()}

    def relative(moe) -> tuple[float, ...]:
        return 1.0, round(flops[moe] / flops[None], 3), round(seconds.get(moe, 1.0), 3)

    return {arm.name: dict(zip(BUDGETS, relative(arm.moe), strict=True)) for arm in arms}


def seconds_ratios(models: Sequence[DecoderLM], batches: Sequence[tuple]) -> list[float]:
    """CPU seconds of an update of each model over those of the first: medians over `batches` less the first two.

    All models take each batch in turn (which trains them), so that what else the machine does meets all of them.
    """
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in models]
    rounds = []
    for tokens_BT, targets_BT in batches:
        seconds = []
        for model, optimizer in zip(models, optimizers, strict=True):
            start = time.process_time()
            model.objective(model(tokens_BT, targets_BT)).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
        rounds.append([own / seconds[0] for own in seconds])
    return [statistics.median(ratios) for ratios in zip(*rounds[2:], strict=True)]


def updates_per_budget(
    preset: Preset, arms: Sequence[Arm], cost: dict[str, dict[str, float]], reference: str, budgets=BUDGETS, second=None
) -> dict[str, dict[int, list[str]]]:
    """{arm: {updates: the budgets that they stand for}}; updates that differ by less than 2 % become the first of them.

    The reference gets `second` updates (default: the preset's second phase).
    """
    planned, second = {}, second or preset.sparse.steps
    for arm in arms:
        runs = planned[arm.name] = {}
        for budget in budgets:
            own = cost[arm.name][budget]
            steps = round(second * cost[reference][budget] / own)
            if arm.start == "scratch":
                steps += round(preset.dense.steps / own)
            near = next((n for n in runs if abs(n - steps) <= SHARED_WITHIN * n), steps)
            runs.setdefault(near, []).append(budget)
    return planned
