"""Checkpoints: one safetensors file holds everything, is written in one atomic step, and can run no code when loaded.

    model.<name>              weights and buffers (a tied weight once)
    optimizer.<name>.<key>    the optimizer's state of that parameter
    rng.cpu, rng.device       torch's random states, one row per process
    metadata["upcycling"]     JSON: format, model configuration, and for a training checkpoint the rest of its state

A file is written under a temporary name in the same folder, flushed to the disk and renamed over its predecessor, so
whoever is killed, and whenever, leaves either the old file or the new one. What is read is checked completely before
anything is changed: a file that does not fit raises one sentence and leaves model and optimizer as they were.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.config import ModelConfig
from ..core.model import DecoderLM
from ..files import FORMAT, read_tensors, write_tensors, write_text
from .records import Row, Standing, stop

if TYPE_CHECKING:
    from .loop import Run

# Settings that may differ on resume because the weights do not depend on them.
FREE_SETTINGS = {"eval_every", "eval_batch_size", "log_every", "checkpoint_every", "trackers", "gradient_checkpointing"}
# Schedules whose value at a step does not depend on how many steps there are: only these runs can be prolonged.
OPEN_ENDED_SCHEDULES = ("constant", "inverse_sqrt")
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of a well-formed file


def save_model(model: DecoderLM, path: str | os.PathLike, **header: Any) -> None:
    """Write weights and configuration to `path`, atomically; `header` adds entries to its JSON. Raises OSError."""
    write_tensors(path, _prefixed("model", _unique(model)), _model_header(model) | header)


def load_model(path: str | os.PathLike) -> DecoderLM:
    """Return the `DecoderLM` of a file of `save_model` or of a training checkpoint, in eval mode, on the CPU.

    Does not touch the random state. Raises FileNotFoundError, and ValueError for a file that is damaged, is not one of
    ours, or whose tensors do not fit its own configuration (checked before memory for the model is taken).
    """
    tensors, header = read_tensors(path)
    weights = part(tensors, "model.")
    try:
        config = ModelConfig.from_dict(header["model_config"])
        if config.n_layers > len(weights):  # or a hostile header could have us build layers for hours
            raise ValueError(f"it claims {config.n_layers} layers but has {len(weights)} tensors")
        with torch.device("meta"):
            _check_weights(weights, DecoderLM(config))
        with torch.random.fork_rng():
            model = DecoderLM(config)
    except _MISFITS as error:
        raise ValueError(f"{path} does not hold a model that fits its own configuration: {_reason(error)}") from error
    model.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def save_checkpoint(path: str | os.PathLike, run: Run) -> None:
    """Write everything that resuming `run` needs to `path`, atomically; called by every process, written by the main.

    Raises OSError (a full disk, say) and then leaves the former file as it was.
    """
    tensors = _prefixed("model", _unique(run.model)) | _prefixed("rng", _all_random_states(run))
    for name, parameter in _trained(run.model, run.optimizer):
        tensors |= _prefixed(f"optimizer.{name}", run.optimizer.state.get(parameter, {}))
    scaler = run.accelerator.scaler
    header = _model_header(run.model) | {
        "setup": _setup(run),
        "standing": asdict(run.standing),
        "scheduler": run.scheduler.state_dict(),
        "optimizer_groups": run.optimizer.state_dict()["param_groups"],
        "scaler": scaler.state_dict() if scaler is not None else None,
        "tensors": sorted(tensors),
    }
    if run.accelerator.is_main_process:
        write_tensors(path, tensors, header)


def load_checkpoint(path: str | os.PathLike, run: Run) -> None:
    """Put `run` where the run that wrote `path` stood: model, optimizer, schedule, scaler, random states, standing.

    Raises ValueError when the file is damaged or was made with another setup, naming each field that differs.
    """
    tensors, header = read_tensors(path)
    model, optimizer, accelerator = run.model, run.optimizer, run.accelerator
    try:
        _check_setup(header["setup"], json.loads(json.dumps(_setup(run))))
        weights, states, standing = part(tensors, "model."), part(tensors, "rng."), header["standing"]
        _check_weights(weights, model)
        shapes = {name: state.shape for name, state in _all_random_states(run).items()}
        if header["tensors"] != sorted(tensors) or shapes != {name: state.shape for name, state in states.items()}:
            raise ValueError("tensors are missing, or some do not belong")
        names = {field.name for field in fields(Standing)}
        if set(standing) != names or header["scheduler"]["last_epoch"] != standing["step"]:
            raise ValueError("it does not say where its run stood")
        moments = {}
        for index, (name, parameter) in enumerate(_trained(model, optimizer)):
            moments[index] = part(tensors, f"optimizer.{name}.")
            for value in moments[index].values():  # full or factored or a scalar: each broadcasts to its parameter
                if torch.broadcast_shapes(value.shape, parameter.shape) != parameter.shape:
                    raise ValueError(f"the optimizer's state of {name} has shape {tuple(value.shape)}")
        # cloned: torch crashes on a state that does not begin its storage
        mine = {name: state_PB[accelerator.process_index].clone() for name, state_PB in states.items()}
        set_random_states(accelerator.device, mine)
        optimizer.load_state_dict({"state": moments, "param_groups": header["optimizer_groups"]})
        run.scheduler.load_state_dict(header["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(header["scaler"])
    except _MISFITS as error:
        remedy = "use another directory, or resume=False to start over"
        raise ValueError(f"{path} cannot be resumed from: {_reason(error)}; {remedy}") from error
    model.load_state_dict(weights, strict=False)
    run.standing = Standing(**standing)


def _setup(run: Run) -> dict[str, dict[str, Any]]:
    """What a run that goes on from a checkpoint must share with the one that wrote it."""
    data: dict[str, Any] = {"train_stream": run.train_stream.key, "validation_stream": run.validation_stream.key}
    data["processes"] = run.accelerator.num_processes
    if run.seq_len != run.model.config.seq_len:
        data["seq_len"] = run.seq_len
    if run.optimizer_key is not None:
        data["optimizer_state"] = run.optimizer_key
    return {"model": run.model.config.to_dict(), "training": asdict(run.config), "data": data}


def _all_random_states(run: Run) -> dict[str, Tensor]:
    """{name: uint8 tensor (process, bytes)}: gathered, so called by every process."""
    gather, device = run.accelerator.gather, run.accelerator.device
    return {name: gather(state.to(device).unsqueeze(0)).cpu() for name, state in random_states(device).items()}


def _model_header(model: DecoderLM) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "safetensors", "accelerate", "transformers", "numpy")}
    return {"format": FORMAT, "model_config": model.config.to_dict(), "versions": versions}


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of the same tensor (a head tied to the embedding)."""
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in kept.values()):
            kept[name] = tensor
    return kept


def _trained(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in the order in which the optimizer counts them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return ((names[parameter], parameter) for group in optimizer.param_groups for parameter in group["params"])


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    expected = _unique(model)
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"it lacks {len(missing)} tensors of the model, {missing[0]} first")
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"it has {len(unexpected)} tensors that the model lacks, {unexpected[0]} first")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)} but {tuple(tensor.shape)} in the model")


def _check_setup(saved: dict, current: dict) -> None:
    differing = []
    for part, settings in current.items():
        there = saved[part]
        for name in sorted(there.keys() | settings.keys()):
            if there.get(name) != settings.get(name) and name not in FREE_SETTINGS:
                differing.append(f"{part}.{name} is {there.get(name)!r} there and {settings.get(name)!r} here")
    prolonged = saved["training"]["steps"] < current["training"]["steps"]
    if prolonged and current["training"]["schedule"] in OPEN_ENDED_SCHEDULES:
        differing = [text for text in differing if not text.startswith("training.steps ")]
    if differing:
        raise ValueError(f"it belongs to another run: {'; '.join(differing)}")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"it is none of this library's ({error!r})"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Torch's random states: the CPU's and, if it is another, the device's."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {"device": torch.get_device_module(device).get_rng_state()}


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Go on from `random_states`; RuntimeError for what is no state."""
    torch.set_rng_state(states["cpu"])
    if "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"])


@contextmanager
def private_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave torch's random states as they were found, whatever happens inside."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(device, states)


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
