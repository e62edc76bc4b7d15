"""What a run remembers and writes down: where it stands, its rows of history, its result, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .loop import Run

Row = dict[str, Any]  # of the history: its entries are listed at `train`


@dataclass(frozen=True)
class TrainResult:
    """History rows, the last and the lowest validation loss (nats per target), and seconds of training alone."""

    history: list[Row]
    final_loss: float
    best_loss: float
    seconds: float


def _no_sums() -> dict[str, float]:
    return dict.fromkeys(("loss", "objective", "aux_loss"), 0.0)


@dataclass
class Standing:
    """Where a run stands, the sums since the last row included: these fields are in the checkpoint's header."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    last_loss: float | None = None
    val_loss: float | None = None
    best_loss: float | None = None
    row_sums: dict[str, float] = field(default_factory=_no_sums)
    row_updates: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0

    def count(self, stats: Row, tokens: int, seconds: float, cpu_seconds: float) -> None:
        """One more update, over `tokens` tokens."""
        self.step += 1
        self.last_loss = stats["loss"]
        self.row_updates += 1
        self.tokens += tokens
        self.row_tokens += tokens
        for name in self.row_sums:
            self.row_sums[name] += stats[name]
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Since the last row."""
        seconds = self.seconds - self.row_seconds
        return self.row_tokens / seconds if seconds else None

    def row(self, stats: Row, sparse: bool) -> Row:
        """The row of the present step, and the start of the next one's means and rates."""
        means = {name: total / self.row_updates if self.row_updates else None for name, total in self.row_sums.items()}
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": means["loss"],
            "objective": means["objective"],
            "val_loss": None,
            "aux_loss": means["aux_loss"] if sparse else None,
            "grad_norm": stats.get("grad_norm"),
            "learning_rate": stats.get("learning_rate"),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        self.row_sums, self.row_updates, self.row_tokens, self.row_seconds = _no_sums(), 0, 0, self.seconds
        return row

    def evaluated(self, val_loss: float) -> bool:
        """Note a validation loss; is it the lowest so far?"""
        self.val_loss, improved = val_loss, self.best_loss is None or val_loss < self.best_loss
        self.best_loss = val_loss if improved else self.best_loss
        return improved


def stop(run: Run, what: str, value: float, step: int, learning_rate: float) -> NoReturn:
    """Raise a RuntimeError that says what is no longer finite, what may help, and which checkpoint is left."""
    last_loss = run.standing.last_loss
    if run.config.precision == "fp16":
        remedy = "fp16 overflows above 65504: train in bf16 or fp32, or lower the learning rate"
    elif last_loss is None:
        remedy = "nothing has been learned yet, so the given weights are the cause: check how they were made"
    else:
        remedy = "lower the learning rate or raise warmup_steps"
        remedy += "" if run.config.grad_clip else ", or set grad_clip=1"
    last = "none" if last_loss is None else f"{last_loss:.4g}"
    kept = "no checkpoint was written" if run.files else "there is no directory, so no checkpoint"
    if run.files and run.files.saved_step is not None:
        kept = f"the checkpoint of update {run.files.saved_step} is intact"
    raise RuntimeError(
        f"{what} became {value} at update {step} (last finite loss {last}, learning rate {learning_rate:.1e}): "
        f"{remedy}; {kept}"
    )
