"""Random states: saved, restored, and private to a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
