"""The files of one run: its history, its best weights, and the checkpoint from which a killed run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_text
from .checkpoint import load_checkpoint, save_checkpoint, save_model
from .records import Row, stop

if TYPE_CHECKING:
    from .loop import Run


class RunFiles:
    """`latest.safetensors`, `best.safetensors` and `history.jsonl` in one directory."""

    def __init__(self, directory: str | os.PathLike):
        folder = Path(directory)
        self.latest, self.best = folder / "latest.safetensors", folder / "best.safetensors"
        self.history = folder / "history.jsonl"
        self.saved_step: int | None = None

    def open(self, run: Run, resume: bool) -> None:
        """Take up the run whose checkpoint is in the directory, or start a new one there."""
        if resume and self.latest.exists():
            load_checkpoint(self.latest, run)
            self.saved_step = run.standing.step
            # Rows behind the checkpoint will be made again; what follows the last line break was cut off by a kill.
            text = self.history.read_text(encoding="utf-8") if self.history.exists() else ""
            rows = map(json.loads, text.split("\n")[:-1])
            run.history = [row for row in rows if row["step"] <= run.standing.step]
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            if not resume:
                for path in (self.latest, self.best):
                    path.unlink(missing_ok=True)
            write_text(self.history, "".join(json.dumps(row) + "\n" for row in run.history))

    def append(self, row: Row) -> None:
        """Add a row to the history."""
        try:
            with open(self.history, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            remedy = "free disk space; the checkpoint is intact"
            raise OSError(f"could not write {self.history} ({error}): {remedy}") from error

    def save_best(self, run: Run) -> None:
        """Write the weights, which have the lowest validation loss so far."""
        save_model(run.model, self.best, step=run.standing.step, val_loss=run.standing.val_loss)

    def save(self, run: Run) -> None:
        """Write the checkpoint; RuntimeError for weights that are not finite. Called by every process."""
        if not all(torch.isfinite(parameter).all() for parameter in run.model.parameters()):
            stop(run, "a weight", math.inf, run.standing.step, run.optimizer.param_groups[0]["lr"])
        save_checkpoint(self.latest, run)
        self.saved_step = run.standing.step
        run.accelerator.wait_for_everyone()
