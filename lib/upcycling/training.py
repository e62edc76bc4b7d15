"""The training loop: on Accelerate, so that the same code runs on a CPU, a GPU, or several under `torchrun`.

    windows of update s -> micro-batches: forward, objective, backward -> clip -> finite? -> optimizer, schedule
    every log_every updates a row of history; every eval_every the validation loss; every checkpoint_every a checkpoint

The windows of update s are a function of (stream, seed, s) alone, so a resumed run sees the data it would have seen.
In `directory`: `latest.safetensors` (all that resuming needs), `best.safetensors` (weights with the lowest validation
loss), `history.jsonl`.
"""

import hashlib
import importlib.util
import json
import math
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from upcycling.checkpoint import load_checkpoint, save_checkpoint, save_model, write_text
from upcycling.config import IGNORE


@dataclass(frozen=True)
class TrainResult:
    """History rows, the last and the lowest validation loss (nats per target), and seconds of training alone."""

    history: list[dict]
    final_loss: float
    best_loss: float
    seconds: float


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


@torch.no_grad()
def evaluate(model, stream, *, batch_size=32, seq_len=None, accelerator=None) -> float:
    """Mean nats per target over the whole stream, each target counted once, in eval mode; uses no random numbers.

    `seq_len` defaults to the model's context; an `accelerator` shares the windows among its processes.
    """
    device = next(model.parameters()).device
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for index, (tokens_BT, targets_BT) in enumerate(stream.windows(batch_size, seq_len or model.config.seq_len)):
        real = int((targets_BT != IGNORE).sum())
        if index % processes == rank and real:
            total += model(tokens_BT.to(device), targets_BT.to(device)).loss.item() * real
            count += real
    model.train(was_training)
    if processes > 1:
        total, count = accelerator.reduce(torch.tensor([total, count], dtype=torch.float64, device=device)).tolist()
    return total / count


class _Run:
    """One call of `train`: the wrapped model, its optimizer and schedule, and where the run stands."""

    def __init__(
        self, accelerator, model, train_stream, validation_stream, config, seq_len, directory, resume, optimizer_state
    ):  # fmt: skip
        self.accelerator, self.model, self.config = accelerator, model, config
        self.seq_len = seq_len or model.config.seq_len
        self.train_stream, self.validation_stream = train_stream, validation_stream
        self.directory = None if directory is None else Path(directory)
        model.to(accelerator.device)
        self.optimizer = _optimizer(model, config, accelerator.device)
        self.scheduler = _scheduler(self.optimizer, config)
        # Accelerate's scheduler wrapper would advance once per process; ours advances once per update.
        self.wrapped, self.stepper = accelerator.prepare(model, self.optimizer)
        self.tokens_per_update = accelerator.num_processes * config.accumulation * config.batch_size * self.seq_len
        self.step, self.tokens, self.history = 0, 0, []
        self.seconds = self.cpu_seconds = 0.0
        self.last_loss, self.val_loss, self.best_loss, self.saved_step = None, None, None, None
        self._new_row()
        self.optimizer_key = None
        if optimizer_state is not None:
            if config.optimizer != "adamw":
                raise ValueError(f"optimizer_state is AdamW's, but optimizer={config.optimizer!r}; choose 'adamw'")
            self.optimizer_key = _set_optimizer_state(model, self.optimizer, optimizer_state)
        if self.directory is not None:
            self._open_directory(resume)

    def fit(self, progress, callbacks, verbose) -> TrainResult:
        from tqdm.auto import tqdm

        config, main = self.config, self.accelerator.is_main_process
        bar = tqdm(
            total=config.steps, initial=self.step, unit="update", desc="training", leave=False, mininterval=0.5,
            disable=not (progress and main),
        )  # fmt: skip
        with bar:
            if self.step == 0:
                self._record(row := self._row({}), True, verbose, bar)
                self._call(callbacks, row, True)
            self.wrapped.train()
            while self.step < config.steps:
                stats = self._update()
                done = self.step == config.steps
                evaluated = done or _due(self.step, config.eval_every)
                bar.update()
                rate = self.row_tokens / max(self.seconds - self.row_seconds, 1e-9)
                bar.set_postfix_str(f"loss {stats['loss']:.3f}, {rate:,.0f} tok/s", refresh=False)
                row = self._row(stats) if evaluated or _due(self.step, config.log_every) else None
                if row is not None:
                    self._record(row, evaluated, verbose, bar)
                self._call(callbacks, row, evaluated)
                if self.directory is not None and (done or _due(self.step, config.checkpoint_every)):
                    self._save()
        return TrainResult(self.history, self.val_loss, self.best_loss, self.seconds)

    def _update(self) -> dict:
        """One optimizer update; returns its means over all processes. Nothing is changed unless all is finite."""
        start, cpu_start = time.perf_counter(), time.process_time()
        accelerator, config, device = self.accelerator, self.config, self.accelerator.device
        rank, processes, rows = accelerator.process_index, accelerator.num_processes, config.batch_size
        tokens_BT, targets_BT = self.train_stream.random_windows(
            processes * config.accumulation * rows, self.seq_len, seed=config.seed, step=self.step
        )
        sums, counts = torch.zeros(3, device=device), []
        for micro in range(config.accumulation):
            mine = slice((micro * processes + rank) * rows, (micro * processes + rank + 1) * rows)
            with accelerator.accumulate(self.wrapped):
                out = self.wrapped(tokens_BT[mine].to(device), targets_BT[mine].to(device))
                objective = self.model.objective(out)
                accelerator.backward(objective)  # divides by the number of micro-batches
            with torch.no_grad():
                aux = out.aux_losses_L.mean() if out.routings else torch.zeros_like(out.loss)
                sums += torch.stack([out.loss, objective, aux]).float()
                if (counts_LE := self.model.choices(out)) is not None:
                    counts.append(counts_LE)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        means = accelerator.reduce(sums / config.accumulation, reduction="mean").tolist()
        stats = dict(zip(("loss", "objective", "aux_loss"), means)) | {"grad_norm": norm.item()}
        stats["learning_rate"] = self.scheduler.get_last_lr()[0]
        self._stop_unless_finite(stats)
        if not math.isfinite(stats["grad_norm"]):
            stats["grad_norm"] = None  # fp16 overflowed: the scaler skips this update
        self.stepper.step()
        if counts:  # a routing rule that moves towards balance, by what all processes saw
            self.model.after_update(accelerator.reduce(sum(counts), reduction="sum"), self.tokens_per_update)
        self.scheduler.step()
        self.stepper.zero_grad()
        self.step += 1
        self.last_loss = stats["loss"]
        self.row_updates += 1
        self.tokens += self.tokens_per_update
        self.row_tokens += self.tokens_per_update
        for name in self.row_sums:
            self.row_sums[name] += stats[name]
        if device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        return stats

    def _stop_unless_finite(self, stats: dict) -> None:
        scaler = self.accelerator.scaler
        overflow = scaler is not None and scaler.get_scale() >= 1  # fp16 only: the update is skipped, the scale halved
        if not math.isfinite(stats["objective"]):
            what, value = ("loss", stats["loss"]) if not math.isfinite(stats["loss"]) else ("objective", math.nan)
        elif not math.isfinite(stats["grad_norm"]) and not overflow:
            what, value = "the gradient norm", stats["grad_norm"]
        else:
            return
        self._diverged(what, value, self.step + 1, stats["learning_rate"])

    def _diverged(self, what: str, value: float, step: int, learning_rate: float):
        config = self.config
        if config.precision == "fp16":
            remedy = "fp16 overflows above 65504: train in bf16 or fp32, or lower the learning rate"
        elif self.last_loss is None:
            remedy = "nothing has been learned yet, so the given weights are the cause: check how they were made"
        else:
            remedy = "lower the learning rate or raise warmup_steps"
            remedy += "" if config.grad_clip else ", or set grad_clip=1"
        last = "none" if self.last_loss is None else f"{self.last_loss:.4g}"
        kept = "no checkpoint was written" if self.directory is not None else "there is no directory, so no checkpoint"
        if self.saved_step is not None:
            kept = f"the checkpoint of update {self.saved_step} is intact"
        raise RuntimeError(
            f"{what} became {value} at update {step} (last finite loss {last}, learning rate {learning_rate:.1e}): "
            f"{remedy}; {kept}"
        )

    def _row(self, stats: dict) -> dict:
        """The row of the present step, and the start of the next one's means and rates."""
        means = {name: total / self.row_updates if self.row_updates else None for name, total in self.row_sums.items()}
        seconds = self.seconds - self.row_seconds
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": means["loss"],
            "objective": means["objective"],
            "val_loss": None,
            "aux_loss": means["aux_loss"] if self.model.config.moe else None,
            "grad_norm": stats.get("grad_norm"),
            "learning_rate": stats.get("learning_rate"),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens_per_second": self.row_tokens / seconds if seconds else None,
        }
        self._new_row()
        return row

    def _new_row(self) -> None:
        self.row_sums = dict.fromkeys(("loss", "objective", "aux_loss"), 0.0)
        self.row_updates = self.row_tokens = 0
        self.row_seconds = self.seconds

    def _record(self, row: dict, evaluated: bool, verbose, bar) -> None:
        """Complete a row (with a validation loss if it is to be `evaluated`), keep, print, write and track it."""
        config, accelerator = self.config, self.accelerator
        improved = False
        if evaluated:
            row["val_loss"] = self.val_loss = evaluate(
                self.model, self.validation_stream, batch_size=config.eval_batch_size, seq_len=self.seq_len,
                accelerator=accelerator,
            )  # fmt: skip
            if not math.isfinite(self.val_loss):
                self._diverged("the validation loss", self.val_loss, self.step, row["learning_rate"] or math.nan)
            improved = self.best_loss is None or self.val_loss < self.best_loss
            self.best_loss = self.val_loss if improved else self.best_loss
        self.history.append(row)
        accelerator.log({name: value for name, value in row.items() if value is not None}, step=self.step)
        if not accelerator.is_main_process:
            return
        if self.directory is not None:
            self._append(row)
            if improved:
                save_model(self.model, self.directory / "best.safetensors", step=self.step, val_loss=self.val_loss)
        if evaluated and verbose:
            trained = "    –" if row["loss"] is None else f"{row['loss']:.3f}"
            bar.write(f"step {self.step:>4}/{config.steps}  train {trained}  val {self.val_loss:.3f}")

    def _call(self, callbacks, row: dict | None, evaluated: bool) -> None:
        """Call the callbacks whose turn it is, in eval mode and with random numbers of their own."""
        mine = [call for call in callbacks if evaluated or (hasattr(call, "due") and call.due(self.step))]
        if not mine or not self.accelerator.is_main_process:
            return
        self.model.eval()
        with _private_random_numbers(self.accelerator.device):
            for callback in mine:
                callback(self.step, self.model, row)
        self.model.train()

    def _open_directory(self, resume: bool) -> None:
        """Take up the run whose checkpoint is in the directory, or start a new one there."""
        latest, history = self.directory / "latest.safetensors", self.directory / "history.jsonl"
        if resume and latest.exists():
            standing, rng = load_checkpoint(
                latest, self.model, self.optimizer, self.scheduler,
                scaler=self.accelerator.scaler, rng=self._all_random_states(), setup=self._setup(),
                names=_STANDING,
            )  # fmt: skip
            for name in _STANDING:
                setattr(self, name, standing[name])
            self.saved_step = self.step
            # cloned: torch crashes on a state that does not begin its storage
            mine = {name: states[self.accelerator.process_index].clone() for name, states in rng.items()}
            try:
                _set_random_states(self.accelerator.device, mine)
            except RuntimeError as error:
                raise ValueError(f"{latest} cannot be resumed from: {error}; start over with resume=False") from error
            # Rows behind the checkpoint will be made again; a line cut off by a kill can only be such a row.
            self.history = [row for row in _read_rows(history) if row["step"] <= self.step]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if not resume:
                for name in ("latest", "best"):
                    (self.directory / f"{name}.safetensors").unlink(missing_ok=True)
            write_text(history, "".join(json.dumps(row) + "\n" for row in self.history))

    def _save(self) -> None:
        rng = self._all_random_states()  # gathered, so by every process
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            self._diverged("a weight", math.inf, self.step, self.optimizer.param_groups[0]["lr"])
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.directory / "latest.safetensors", self.model, self.optimizer, self.scheduler,
                scaler=self.accelerator.scaler, rng=rng, setup=self._setup(),
                standing={name: getattr(self, name) for name in _STANDING},
            )  # fmt: skip
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def _append(self, row: dict) -> None:
        path = self.directory / "history.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"could not write {path} ({error}): free disk space; the checkpoint is intact") from error

    def _setup(self) -> dict:
        """What a run that goes on from our checkpoint must share with us."""
        data = {"train_stream": self.train_stream.key, "validation_stream": self.validation_stream.key}
        data["processes"] = self.accelerator.num_processes
        if self.seq_len != self.model.config.seq_len:
            data["seq_len"] = self.seq_len
        if self.optimizer_key is not None:
            data["optimizer_state"] = self.optimizer_key
        return {"model": self.model.config.to_dict(), "training": asdict(self.config), "data": data}

    def _all_random_states(self) -> dict:
        """{name: uint8 tensor (process, bytes)}."""
        states = _random_states(self.accelerator.device)
        gather, device = self.accelerator.gather, self.accelerator.device
        return {name: gather(state.to(device).unsqueeze(0)).cpu() for name, state in states.items()}


# Where a run stands, in the checkpoint's header.
_STANDING = (
    "step", "tokens", "seconds", "cpu_seconds", "last_loss", "val_loss", "best_loss",
    "row_sums", "row_updates", "row_tokens", "row_seconds",
)  # fmt: skip


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


def _optimizer(model, config, device):
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


def _set_optimizer_state(model, optimizer, state) -> str:
    """Give the optimizer copies of `state`, by parameter name; return a key of the contents."""
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


def _scheduler(optimizer, config):
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


def _random_states(device) -> dict:
    """Torch's random states: the CPU's and, if it is another, the device's."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {"device": torch.get_device_module(device).get_rng_state()}


def _set_random_states(device, states: dict) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"])


@contextmanager
def _private_random_numbers(device):
    """Leave torch's random states as they were found, whatever happens inside."""
    states = _random_states(device)
    try:
        yield
    finally:
        _set_random_states(device, states)


def _read_rows(path) -> list[dict]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
