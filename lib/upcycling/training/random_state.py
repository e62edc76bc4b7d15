"""Random states: saved, restored, and private to a run."""

from contextlib import contextmanager

import torch


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
