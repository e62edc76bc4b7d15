"""Before the first update: what does not fit is refused, and Accelerate is set up; after the last one, it is let go."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..core.model import DecoderLM
from ..text.stream import TokenStream
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = ("tensorboard", "trackio", "wandb")


def check_settings(
    model: DecoderLM, train_stream: TokenStream, validation_stream: TokenStream, config: TrainConfig,
    directory: str | os.PathLike | None,
) -> None:  # fmt: skip
    """Raise ValueError or RuntimeError for what `train` cannot do, before anything is changed."""
    vocabulary = model.config.vocab_size
    for name, stream in (("training", train_stream), ("validation", validation_stream)):
        if stream.vocab_size > vocabulary:
            raise ValueError(
                f"the {name} stream has token ids up to {stream.vocab_size - 1} but the model's vocabulary is "
                f"{vocabulary}; build the model with vocab_size={stream.vocab_size}"
            )
    highest = {"cosine": config.steps, "onecycle": max(config.steps - 2, 0)}.get(config.schedule, math.inf)
    if config.warmup_steps > highest:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} does not fit into the {config.schedule} schedule of "
            f"steps={config.steps}; choose 0..{highest}"
        )
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            raise ValueError(f"tracker {tracker!r} is unknown; choose of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(tracker) is None:
            raise RuntimeError(f"tracker {tracker!r} is not installed; `pip install {tracker}` or leave it out")
    if "tensorboard" in config.trackers and directory is None:
        raise ValueError("tensorboard writes files; give train() a directory")


def make_accelerator(config: TrainConfig, directory: str | os.PathLike | None) -> Accelerator:
    """Accelerate for this precision, accumulation and these trackers; ValueError for fp16 on a CPU."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # Accelerate has to be told, or processes that torchrun starts on a CPU would not find together.
    cpu = not torch.accelerator.is_available()
    if config.precision == "fp16" and PartialState(cpu=cpu).device.type == "cpu":
        raise ValueError("precision='fp16' needs a GPU; on a CPU choose 'fp32' (or 'bf16' if it has it in hardware)")
    AcceleratorState._reset_state()  # else a second train() in the same process could not choose another precision
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_steps=config.accumulation,
        log_with=list(config.trackers) or None,
        project_dir=directory,
    )
    if config.trackers:
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in asdict(config).items()
        }
        accelerator.init_trackers("upcycling", config=settings)
    return accelerator


def let_go(accelerator: Accelerator, model: DecoderLM) -> None:
    """Close the trackers and take off the model what Accelerate has put on it."""
    for tracker in accelerator.trackers:  # not end_training(), which would end the caller's process group, too
        tracker.finish()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)  # would keep the next run from wrapping it
    model.zero_grad(set_to_none=True)
