"""The optimizer and the schedule, torch's and transformers'."""

import hashlib
import re

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .config import TrainConfig


def optimizer_of(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """AdamW or Adafactor over the parameters that ask for a gradient; weight decay on matrices alone."""
    parameters = [item for item in model.named_parameters() if item[1].requires_grad]
    bias = re.compile(r"(^|\.)b_\w+$|bias$")
    matrices = [p for name, p in parameters if p.ndim > 1 and not bias.search(name)]
    rest = [p for _, p in parameters if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},  # norms, biases and the stacked biases of experts
    ]
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    fused = device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def set_optimizer_state(
    model: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Tensor]], config: TrainConfig
) -> str:
    """Give AdamW copies of `state`, by parameter name; return a key of the contents. Raises ValueError for a misfit."""
    if config.optimizer != "adamw":
        raise ValueError(f"optimizer_state is AdamW's, but optimizer={config.optimizer!r}; choose 'adamw'")
    parameters = dict(model.named_parameters())
    digest = hashlib.sha256()
    for name, values in sorted(state.items()):
        if name not in parameters:
            raise ValueError(f"optimizer_state names {name!r}, but the model has no such parameter")
        for key, value in sorted(values.items()):
            if value.ndim and value.shape != parameters[name].shape:
                raise ValueError(
                    f"optimizer_state[{name!r}][{key!r}] has shape {tuple(value.shape)}, but the parameter "
                    f"{tuple(parameters[name].shape)}"
                )
            digest.update(f"{name} {key} ".encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        optimizer.state[parameters[name]] = {
            key: value.detach().clone().to(parameters[name].device) for key, value in values.items()
        }
    return digest.hexdigest()[:10]


def scheduler_of(optimizer: Optimizer, config: TrainConfig) -> LRScheduler:
    """The learning rate of each update, as `train` describes."""
    if config.schedule == "onecycle":
        # torch counts the peak's position from 1; without warm-up there is only the way down.
        rise = (config.warmup_steps + 1) / config.steps if config.warmup_steps else 0.0
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.steps, pct_start=min(rise, 1.0), cycle_momentum=False
        )
    from transformers.optimization import get_scheduler

    names = {"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}
    return get_scheduler(
        names.get(config.schedule, config.schedule), optimizer, config.warmup_steps, config.steps,
        {"min_lr_rate": config.min_lr_ratio} if config.schedule == "cosine" else None,
    )  # fmt: skip
