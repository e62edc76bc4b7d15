"""The training loop: on Accelerate, so that the same code runs on a CPU, a GPU, or several under `torchrun`.

    windows of update s -> micro-batches: forward, objective, backward -> clip -> finite? -> optimizer, schedule
    every log_every updates a row of history; every eval_every the validation loss; every checkpoint_every a checkpoint

The windows of update s are a function of (stream, seed, s) alone, so a resumed run sees the data it would have seen.
In `directory`: `latest.safetensors` (all that resuming needs), `best.safetensors` (weights with the lowest validation
loss), `history.jsonl`. `train` is what users call, `Run.update` is one update, `Run.fit` what happens around it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.model import DecoderLM, evaluating
from ..text.stream import TokenStream
from .checkpoint import RunFiles, private_random_numbers
from .config import TrainConfig
from .evaluation import evaluate
from .optim import optimizer_of, scheduler_of, set_optimizer_state
from .preparation import check_settings, let_go, make_accelerator
from .records import Row, Standing, TrainResult, stop

if TYPE_CHECKING:
    from accelerate import Accelerator

Callback = Callable[[int, DecoderLM, Row | None], object]


def train(
    model: DecoderLM,
    train_stream: TokenStream,
    validation_stream: TokenStream,
    config: TrainConfig,
    *,
    seq_len: int | None = None,
    directory: str | os.PathLike | None = None,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    verbose: bool = True,
    optimizer_state: dict[str, dict[str, Tensor]] | None = None,
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
    (`upcycling.variants.moments.carry_moments`); parameters that it does not name start fresh.

    With a `directory` a killed run resumes where its last checkpoint stands, on a CPU bit for bit (on a GPU as exactly
    as its kernels repeat); a finished one returns its result at once. The caller's random state is left as it was.

    Raises ValueError for data or settings that do not fit (another run's checkpoint, too), RuntimeError when the loss
    or the gradient is no longer finite or a tracker is not installed, OSError when a file cannot be written.
    """
    check_settings(model, train_stream, validation_stream, config, directory)
    accelerator = make_accelerator(config, directory)
    home, checkpointing = next(model.parameters()).device, model.gradient_checkpointing
    model.gradient_checkpointing = config.gradient_checkpointing
    try:
        with private_random_numbers(accelerator.device):
            torch.manual_seed(config.seed + accelerator.process_index)  # each process has its own dropout
            run = Run(accelerator, model, train_stream, validation_stream, config, seq_len or model.config.seq_len)
            if optimizer_state is not None:
                run.optimizer_key = set_optimizer_state(model, run.optimizer, optimizer_state, config)
            if directory is not None:
                run.files = RunFiles(directory)
                run.files.open(run, resume)
            return run.fit(progress, callbacks, verbose)
    finally:
        let_go(accelerator, model)
        model.gradient_checkpointing = checkpointing
        model.to(home).eval()


@dataclass
class Run:
    """One call of `train`: the wrapped model, its optimizer and schedule, and where the run stands."""

    accelerator: Accelerator
    model: DecoderLM
    train_stream: TokenStream
    validation_stream: TokenStream
    config: TrainConfig
    seq_len: int
    history: list[Row] = field(default_factory=list)
    standing: Standing = field(default_factory=Standing)
    files: RunFiles | None = None
    optimizer_key: str | None = None  # of a given optimizer state

    def __post_init__(self) -> None:
        self.model.to(self.accelerator.device)
        self.optimizer = optimizer_of(self.model, self.config, self.accelerator.device)
        self.scheduler = scheduler_of(self.optimizer, self.config)
        # Accelerate's scheduler wrapper would advance once per process; ours advances once per update.
        self.wrapped, self.stepper = self.accelerator.prepare(self.model, self.optimizer)

    @property
    def tokens_per_update(self) -> int:
        """Targets in one update, over all processes."""
        config = self.config
        return self.accelerator.num_processes * config.accumulation * config.batch_size * self.seq_len

    def update(self) -> Row:
        """One optimizer update; returns its means over all processes. Nothing is changed unless all is finite."""
        accelerator, model, config = self.accelerator, self.model, self.config
        sums, counts = torch.zeros(3, device=accelerator.device), []
        for tokens_BT, targets_BT in self.micro_batches():
            with accelerator.accumulate(self.wrapped):
                out = self.wrapped(tokens_BT, targets_BT)
                objective = model.objective(out)
                accelerator.backward(objective)  # divides by the number of micro-batches
            with torch.no_grad():
                aux = out.aux_losses_L.mean() if out.routings else torch.zeros_like(out.loss)
                sums += torch.stack([out.loss, objective, aux]).float()
                if (counts_LE := model.choices(out)) is not None:
                    counts.append(counts_LE)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        means = accelerator.reduce(sums / config.accumulation, reduction="mean").tolist()
        stats = dict(zip(("loss", "objective", "aux_loss"), means)) | {"grad_norm": norm.item()}
        stats["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.stop_unless_finite(stats)
        self.stepper.step()
        if counts:  # a routing rule that moves towards balance, by what all processes saw
            model.after_update(accelerator.reduce(sum(counts), reduction="sum"), self.tokens_per_update)
        self.scheduler.step()
        self.stepper.zero_grad()
        return stats

    def stop_unless_finite(self, stats: Row) -> None:
        """Raise RuntimeError where the update must not be made; a gradient that overflows fp16 becomes None."""
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1 and not math.isfinite(stats["grad_norm"]):
            stats["grad_norm"] = None  # the scaler will skip this update and halve its scale
        for name, what in {"loss": "loss", "objective": "objective", "grad_norm": "the gradient norm"}.items():
            if stats[name] is not None and not math.isfinite(stats[name]):
                stop(self, what, stats[name], self.standing.step + 1, stats["learning_rate"])

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the update's windows: `accumulation` pairs (tokens_BT, targets_BT)."""
        rank, processes, rows = self.accelerator.process_index, self.accelerator.num_processes, self.config.batch_size
        tokens_BT, targets_BT = self.train_stream.random_windows(
            processes * self.config.accumulation * rows, self.seq_len, seed=self.config.seed, step=self.standing.step
        )
        for micro in range(self.config.accumulation):
            mine = slice((micro * processes + rank) * rows, (micro * processes + rank + 1) * rows)
            yield tokens_BT[mine].to(self.accelerator.device), targets_BT[mine].to(self.accelerator.device)

    def fit(self, progress: bool, callbacks: Sequence[Callback], verbose: bool) -> TrainResult:
        """Update until `config.steps`; evaluate, record, call back and save when it is time."""
        from tqdm.auto import tqdm

        config, standing, sparse = self.config, self.standing, bool(self.model.config.moe)
        bar = tqdm(
            total=config.steps, initial=standing.step, unit="update", desc="training", leave=False, mininterval=0.5,
            disable=not (progress and self.accelerator.is_main_process),
        )  # fmt: skip
        say = bar.write if verbose else None
        with bar:
            if standing.step == 0:
                first = standing.row({}, sparse)
                self.record(first, True, say)
                self.call(callbacks, first, True)
            self.wrapped.train()
            while standing.step < config.steps:
                stats = self.timed_update()
                done = standing.step == config.steps
                evaluated = done or due(standing.step, config.eval_every)
                bar.update()
                bar.set_postfix_str(f"loss {stats['loss']:.3f}, {standing.tokens_per_second:,.0f} tok/s", refresh=False)
                row = standing.row(stats, sparse) if evaluated or due(standing.step, config.log_every) else None
                if row is not None:
                    self.record(row, evaluated, say)
                self.call(callbacks, row, evaluated)
                if self.files is not None and (done or due(standing.step, config.checkpoint_every)):
                    self.files.save(self)
        assert standing.val_loss is not None and standing.best_loss is not None  # evaluated after the last update
        return TrainResult(self.history, standing.val_loss, standing.best_loss, standing.seconds)

    def timed_update(self) -> Row:
        """`update`, counted with its seconds."""
        start, cpu_start = time.perf_counter(), time.process_time()
        stats = self.update()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        self.standing.count(stats, self.tokens_per_update, seconds, cpu_seconds)
        return stats

    def record(self, row: Row, evaluated: bool, say: Callable[[str], object] | None) -> None:
        """Complete a row (with a validation loss if it is to be `evaluated`), keep, print, write and track it."""
        standing, accelerator, improved = self.standing, self.accelerator, False
        if evaluated:
            row["val_loss"] = val_loss = evaluate(
                self.model, self.validation_stream, batch_size=self.config.eval_batch_size, seq_len=self.seq_len,
                accelerator=accelerator,
            )  # fmt: skip
            if not math.isfinite(val_loss):
                stop(self, "the validation loss", val_loss, standing.step, row["learning_rate"] or math.nan)
            improved = standing.evaluated(val_loss)
        self.history.append(row)
        accelerator.log({name: value for name, value in row.items() if value is not None}, step=standing.step)
        if not accelerator.is_main_process:
            return
        if self.files is not None:
            self.files.append(row)
            if improved:
                self.files.save_best(self)
        if evaluated and say:
            trained = "    –" if row["loss"] is None else f"{row['loss']:.3f}"
            say(f"step {standing.step:>4}/{self.config.steps}  train {trained}  val {val_loss:.3f}")

    def call(self, callbacks: Sequence[Callback], row: Row | None, evaluated: bool) -> None:
        """Call the callbacks whose turn it is, in eval mode and with random numbers of their own."""
        step = self.standing.step
        mine = [call for call in callbacks if evaluated or (hasattr(call, "due") and call.due(step))]
        if not mine or not self.accelerator.is_main_process:
            return
        with evaluating(self.model), private_random_numbers(self.accelerator.device):
            for callback in mine:
                callback(step, self.model, row)


def due(step: int, every: int) -> bool:
    """Is it time again, `every` so many steps (0: never)?"""
    return bool(every) and step % every == 0
