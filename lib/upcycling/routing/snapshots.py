"""Routing during training: what the routers decided about one fixed probe, every so many updates, to be played back.

    snapshots = RoutingSnapshots(probe_BT, folder / "snapshots.safetensors")
    train(model, ..., callbacks=[snapshots])
    RoutingSnapshots.load(path).expert_ids       # (S, L, N, K)

Shapes: S snapshots, L MoE layers, N tokens of the probe (B windows of T), E experts, K experts per token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.model import DecoderLM, evaluating
from ..core.routing import refuse_varying_choices
from ..files import FORMAT, read_tensors, write_tensors
from .trace import RoutingTrace


class RoutingSnapshots:
    """A callback of `train` that keeps the routing of `probe_BT`; training goes on as if it were not there.

    It asks for the updates 0, 1, 2, 4, 8, ... (copies of one expert part early) and every `every`-th, and gets those
    with an evaluation, the last one among them. `labels` names what each window is of (its domain).
    With a `path` everything is in that one file after each snapshot, written atomically. A run that is resumed with
    the same probe and path keeps what was there before the present step, and replaces what came after it; snapshots
    of another probe are replaced.

    - steps (S,), layers: optimizer updates done, and the blocks' numbers (L of them)
    - expert_ids (S, L, N, K) int64, weights (S, L, N, K), probabilities (S, L, N, E): float32, kept in half precision
    - tokens (N,), sequence (N,): the probe's token ids and which window each stands in
    - domains, labels (N,): the names in order of appearance, and each token's number among them; one name if none given
    """

    steps = property(lambda self: self._kept["steps"])
    expert_ids = property(lambda self: self._kept["expert_ids"].long())
    weights = property(lambda self: self._kept["weights"].float())
    probabilities = property(lambda self: self._kept["probabilities"].float())

    def __init__(
        self,
        probe_BT: Tensor,
        path: str | os.PathLike | None = None,
        *,
        every: int = 50,
        labels: Sequence[str] | None = None,
    ):
        if every < 1:
            raise ValueError(f"every={every} is no number of updates; choose at least 1")
        labels = ["probe"] * len(probe_BT) if labels is None else list(labels)
        if len(labels) != len(probe_BT):
            raise ValueError(f"{len(labels)} labels for {len(probe_BT)} windows; give one a window")
        self.probe_BT, self.every, self.window_labels = probe_BT.cpu(), every, labels
        windows, length = self.probe_BT.shape
        self.tokens = self.probe_BT.flatten()
        self.sequence = torch.arange(windows).repeat_interleave(length)
        self.domains = tuple(dict.fromkeys(labels))
        self.labels = torch.tensor([self.domains.index(name) for name in labels]).repeat_interleave(length)
        self.path = None if path is None else Path(path)
        self.layers: tuple[int, ...] = ()
        self._kept: dict[str, Tensor] = {}
        if self.path is not None and self.path.exists():
            earlier = RoutingSnapshots.load(self.path)
            if torch.equal(earlier.probe_BT, self.probe_BT):
                self.layers, self._kept = earlier.layers, earlier._kept

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingSnapshots:
        """The snapshots in a file. Raises FileNotFoundError, and ValueError for a file that is not one of these."""
        tensors, header = read_tensors(path)
        try:
            loaded = cls(tensors.pop("probe_BT"), labels=header["labels"], every=header["every"])
            loaded.layers = tuple(header["layers"])
            loaded._kept = {name: tensors[name] for name in ("steps", "expert_ids", "weights", "probabilities")}
        except KeyError as error:
            raise ValueError(f"{path} holds no routing snapshots: {error} is missing") from error
        return loaded

    def due(self, step: int) -> bool:
        return step % self.every == 0 or (step < self.every and step.bit_count() == 1)

    @torch.no_grad()
    def __call__(self, step: int, model: DecoderLM, row: dict | None = None) -> None:
        """Record one snapshot of a DecoderLM. Raises ValueError for a dense model and where K varies."""
        with evaluating(model):
            routings = model(self.probe_BT.to(next(model.parameters()).device)).routings
        if not routings:
            raise ValueError("the model is dense: there is no routing to keep; train it without RoutingSnapshots")
        for routing in routings:
            refuse_varying_choices(routing)
        new = {
            "steps": torch.tensor(step),
            "expert_ids": torch.stack([routing.expert_ids_NK for routing in routings]).short(),
            "weights": torch.stack([routing.weights_NK for routing in routings]).half(),
            "probabilities": torch.stack([routing.probabilities_NE for routing in routings]).half(),
        }
        new = {name: tensor.unsqueeze(0).cpu() for name, tensor in new.items()}
        if self._kept:
            before = self._kept["steps"] < step
            new = {name: torch.cat([self._kept[name][before], tensor]) for name, tensor in new.items()}
        self._kept, self.layers = new, model.config.moe_layers
        if self.path is not None:
            header = {"format": FORMAT, "layers": self.layers, "labels": self.window_labels, "every": self.every}
            write_tensors(self.path, self._kept | {"probe_BT": self.probe_BT}, header)

    def trace(self, index: int) -> RoutingTrace:
        """Snapshot number `index` as a RoutingTrace; its logits are log probabilities, right but for a shift."""
        probabilities_LNE = self.probabilities[index]
        return RoutingTrace(
            layers=self.layers,
            logits=probabilities_LNE.clamp_min(2**-24).log(),  # the smallest number that half precision holds
            probabilities=probabilities_LNE,
            expert_ids=self.expert_ids[index],
            weights=self.weights[index],
            tokens=self.tokens,
            sequence=self.sequence,
            position=torch.arange(self.probe_BT.shape[1]).repeat(len(self.probe_BT)),
        )

    def __len__(self) -> int:
        return len(self._kept["steps"]) if self._kept else 0
