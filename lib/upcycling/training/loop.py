"""The training loop: on Accelerate, so that the same code runs on a CPU, a GPU, or several under `torchrun`.

    windows of update s -> micro-batches: forward, objective, backward -> clip -> finite? -> optimizer, schedule
    every log_every updates a row of history; every eval_every the validation loss; every checkpoint_every a checkpoint

The windows of update s are a function of (stream, seed, s) alone, so a resumed run sees the data it would have seen.
In `directory`: `latest.safetensors` (all that resuming needs), `best.safetensors` (weights with the lowest validation
loss), `history.jsonl`.
"""

import importlib.util
import math
from dataclasses import asdict

import torch

from .random_state import _private_random_numbers
from .run import TrainResult, _Run


def train(
    model,
    train_stream,
    validation_stream,
    config,
    *,
    seq_len=None,
    directory=None,
    resume=True,
    progress=True,
    callbacks=(),
    verbose=True,
    optimizer_state=None,
) -> TrainResult:
    """Train `model` in place for `config.steps` optimizer updates and leave it in eval mode, on the device it came on.

    An update takes batch_size x accumulation x processes windows of `seq_len` tokens (default: the context) and
    minimises `model.objective(out)`; what is reported as loss is the cross-entropy alone, in nats per target.

    - optimizer: adamw (torch's, fused) or adafactor (torch's: it factors the last two dimensions, so each expert of a
      stack by itself, and all its state is tensors; its step is relative to a weight's own size, so learning rates are
      about 10 times AdamW's). Weight decay acts on matrices, not on norms and biases.
    - schedule: constant, cosine (down to min_lr_ratio), inverse_sqrt (transformers') or onecycle (torch's), each with
      a linear warm-up from 0 (onecycle: its own, from 1/25) whose top is reached after warmup_steps updates.
    - grad_clip: largest norm of the gradient; 0 measures the norm and clips nothing.
    - precision: fp32, or bf16 or fp16 by autocast. An fp16 update that overflows counts as a step and changes nothing.
    - trackers: tensorboard, trackio, wandb; they get each row, too.

    Each row of the history has: step, tokens (targets so far), loss, objective and aux_loss (means over the updates
    since the last row; aux_loss over layers, too; None where there is none), val_loss (None if not evaluated),
    grad_norm (before clipping), learning_rate (of that update), seconds and cpu_seconds (so far, of training alone,
    without evaluation and checkpoints), tokens_per_second (since the last row). Step 0 is the model as given.
    `callbacks` are called as `callback(step, model, row)` on the main process after each evaluation; one that has a
    method `due(step)` is called after the updates for which that is true, too (row is None where none was due).

    `optimizer_state`, {parameter name: {key: tensor}}, is what AdamW remembers at the start, from an earlier run say
    (`upcycling.moments.carry_moments`); parameters that it does not name start fresh.

    With a `directory` a killed run resumes where its last checkpoint stands, on a CPU bit for bit (on a GPU as exactly
    as its kernels repeat); a finished one returns its result at once. The caller's random state is left as it was.

    Raises ValueError for data or settings that do not fit (another run's checkpoint, too), RuntimeError when the loss
    or the gradient is no longer finite or a tracker is not installed, OSError when a file cannot be written.
    """
    _check(model, train_stream, validation_stream, config, directory)
    accelerator = _accelerator(config, directory)
    home, checkpointing = next(model.parameters()).device, model.gradient_checkpointing
    model.gradient_checkpointing = config.gradient_checkpointing
    try:
        with _private_random_numbers(accelerator.device):
            torch.manual_seed(config.seed + accelerator.process_index)  # each process has its own dropout
            run = _Run(
                accelerator, model, train_stream, validation_stream, config, seq_len, directory, resume, optimizer_state
            )  # fmt: skip
            return run.fit(progress, callbacks, verbose)
    finally:
        for tracker in accelerator.trackers:  # not end_training(), which would end the caller's process group, too
            tracker.finish()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)  # what Accelerate leaves on a model would keep the next run from wrapping it
        model.gradient_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        model.to(home).eval()


def _check(model, train_stream, validation_stream, config, directory) -> None:
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
        if tracker not in ("tensorboard", "trackio", "wandb"):
            raise ValueError(f"tracker {tracker!r} is unknown; choose of tensorboard, trackio, wandb")
        if importlib.util.find_spec(tracker) is None:
            raise RuntimeError(f"tracker {tracker!r} is not installed; `pip install {tracker}` or leave it out")
    if "tensorboard" in config.trackers and directory is None:
        raise ValueError("tensorboard writes files; give train() a directory")


def _accelerator(config, directory):
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
