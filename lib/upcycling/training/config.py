"""The settings of one training run."""

from dataclasses import dataclass

from ..checks import _at_least, _one_of

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "cosine", "onecycle", "inverse_sqrt")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `steps` are optimizer updates; see `upcycling.training.train` for what each field does."""

    steps: int
    batch_size: int = 16
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    eval_every: int = 100
    eval_batch_size: int = 32
    log_every: int = 10
    checkpoint_every: int = 0
    seed: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, PRECISIONS)
        for minimum, names in (
            (1, ("steps", "batch_size", "accumulation", "eval_batch_size", "log_every")),
            (0, ("weight_decay", "warmup_steps", "min_lr_ratio", "grad_clip", "eval_every", "checkpoint_every")),
        ):
            _at_least(minimum, **{name: getattr(self, name) for name in names})
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} does not train; choose a number above 0")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "trackers", tuple(self.trackers))
