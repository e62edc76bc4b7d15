"""One training run: updates, rows of history, evaluation, checkpoints, resuming."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..files import write_text
from .checkpoint import load_checkpoint, save_checkpoint, save_model
from .evaluation import evaluate
from .optim import _optimizer, _scheduler, _set_optimizer_state
from .random_state import _private_random_numbers, _random_states, _set_random_states


@dataclass(frozen=True)
class TrainResult:
    """History rows, the last and the lowest validation loss (nats per target), and seconds of training alone."""

    history: list[dict]
    final_loss: float
    best_loss: float
    seconds: float


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
