"""Checkpoints: one safetensors file holds everything, is written in one atomic step, and can run no code when loaded.

    model.<name>              weights and buffers (a tied weight once)
    optimizer.<name>.<key>    the optimizer's state of that parameter
    rng.cpu, rng.device       torch's random states, one row per process
    metadata["upcycling"]     JSON: format, model configuration, and for a training checkpoint the rest of its state

A file is written under a temporary name in the same folder, flushed to the disk and renamed over its predecessor, so
whoever is killed, and whenever, leaves either the old file or the new one. What is read is checked completely before
anything is changed: a file that does not fit raises one sentence and leaves model and optimizer as they were.
"""

import json
import platform
from importlib.metadata import version

import torch

from ..files import FORMAT, read_tensors, write_tensors

# Settings that may differ on resume because the weights do not depend on them.
FREE_SETTINGS = {"eval_every", "eval_batch_size", "log_every", "checkpoint_every", "trackers", "gradient_checkpointing"}
# Schedules whose value at a step does not depend on how many steps there are: only these runs can be prolonged.
OPEN_ENDED_SCHEDULES = ("constant", "inverse_sqrt")
_MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of a well-formed file


def save_model(model, path, **header) -> None:
    """Write weights and configuration to `path`, atomically; `header` adds entries to its JSON. Raises OSError."""
    write_tensors(
        path, {f"model.{name}": tensor for name, tensor in _unique(model).items()}, _model_header(model) | header
    )


def load_model(path):
    """Return the `DecoderLM` of a file of `save_model` or of a training checkpoint, in eval mode, on the CPU.

    Does not touch the random state. Raises FileNotFoundError, and ValueError for a file that is damaged, is not one of
    ours, or whose tensors do not fit its own configuration (checked before memory for the model is taken).
    """
    from ..core.config import ModelConfig
    from ..core.model import DecoderLM

    tensors, header = read_tensors(path)
    weights = _part(tensors, "model.")
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


def save_checkpoint(path, model, optimizer, scheduler, *, scaler=None, rng, setup, standing) -> None:
    """Write everything that resuming needs to `path`, atomically.

    `rng` maps names to uint8 tensors (process, bytes); `setup` is what a resuming run must share (configurations and
    data), `standing` where the run stands; both are JSON-able. Raises OSError (a full disk, say) and then leaves the
    former file as it was.
    """
    tensors = {f"model.{name}": tensor for name, tensor in _unique(model).items()}
    for name, parameter in _trained(model, optimizer):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors |= {f"rng.{name}": state for name, state in rng.items()}
    header = _model_header(model) | {
        "setup": setup,
        "standing": standing,
        "scheduler": scheduler.state_dict(),
        "optimizer_groups": optimizer.state_dict()["param_groups"],
        "scaler": scaler.state_dict() if scaler is not None else None,
        "tensors": sorted(tensors),
    }
    write_tensors(path, tensors, header)


def load_checkpoint(path, model, optimizer, scheduler, *, scaler=None, rng, setup, names) -> tuple[dict, dict]:
    """Load a file of `save_checkpoint` into model, optimizer, scheduler and scaler; return (standing, rng).

    `rng` and `setup` are those of the present run, `names` those of what `standing` must hold. Raises ValueError when
    the file is damaged or was made with another setup, naming each field that differs.
    """
    tensors, header = read_tensors(path)
    try:
        _check_setup(header["setup"], json.loads(json.dumps(setup)))
        weights, states, standing = _part(tensors, "model."), _part(tensors, "rng."), header["standing"]
        _check_weights(weights, model)
        shapes = {name: state.shape for name, state in states.items()}
        if header["tensors"] != sorted(tensors) or shapes != {name: state.shape for name, state in rng.items()}:
            raise ValueError("tensors are missing, or some do not belong")
        if set(standing) != set(names) or header["scheduler"]["last_epoch"] != standing["step"]:
            raise ValueError("it does not say where its run stood")
        moments = {}
        for index, (name, parameter) in enumerate(_trained(model, optimizer)):
            moments[index] = _part(tensors, f"optimizer.{name}.")
            for value in moments[index].values():  # full or factored or a scalar: each broadcasts to its parameter
                if torch.broadcast_shapes(value.shape, parameter.shape) != parameter.shape:
                    raise ValueError(f"the optimizer's state of {name} has shape {tuple(value.shape)}")
        optimizer.load_state_dict({"state": moments, "param_groups": header["optimizer_groups"]})
        scheduler.load_state_dict(header["scheduler"])
        if scaler is not None:
            scaler.load_state_dict(header["scaler"])
    except _MISFITS as error:
        remedy = "use another directory, or resume=False to start over"
        raise ValueError(f"{path} cannot be resumed from: {_reason(error)}; {remedy}") from error
    model.load_state_dict(weights, strict=False)
    return standing, states


def _model_header(model) -> dict:
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "safetensors", "accelerate", "transformers", "numpy")}
    return {"format": FORMAT, "model_config": model.config.to_dict(), "versions": versions}


def _unique(model) -> dict:
    """Return the state dict without second names of the same tensor (a head tied to the embedding)."""
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in kept.values()):
            kept[name] = tensor
    return kept


def _trained(model, optimizer) -> list:
    """Return (name, parameter) in the order in which the optimizer counts its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _part(tensors: dict, prefix: str) -> dict:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_weights(weights: dict, model) -> None:
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
    for part, fields in current.items():
        there = saved[part]
        for field in sorted(there.keys() | fields.keys()):
            if there.get(field) != fields.get(field) and field not in FREE_SETTINGS:
                differing.append(f"{part}.{field} is {there.get(field)!r} there and {fields.get(field)!r} here")
    prolonged = saved["training"]["steps"] < current["training"]["steps"]
    if prolonged and current["training"]["schedule"] in OPEN_ENDED_SCHEDULES:
        differing = [text for text in differing if not text.startswith("training.steps ")]
    if differing:
        raise ValueError(f"it belongs to another run: {'; '.join(differing)}")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"it is none of this library's ({error!r})"
