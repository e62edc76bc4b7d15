"""What the routers of a model decided, token by token: `RoutingTrace`.

Shapes: L MoE layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.routing import count_ids
from ..files import FORMAT, read_tensors, write_tensors
from ..tables import Table

# Field -> dtype. The first four are (L, N, ...), the others (N,).
PER_LAYER = {
    "logits": torch.float32,
    "probabilities": torch.float32,
    "expert_ids": torch.int64,
    "weights": torch.float32,
}
PER_TOKEN = {"tokens": torch.int64, "sequence": torch.int64, "position": torch.int64}
FIELDS = PER_LAYER | PER_TOKEN


def _field(name: str, doc: str) -> property:
    return property(lambda trace: trace._read(name), doc=doc)


class RoutingTrace:
    """What the routers of L layers decided for N tokens, on the CPU. Reading a field of an empty one: ValueError."""

    logits = _field("logits", "(L, N, E) float32: the router's scores.")
    probabilities = _field(
        "probabilities",
        "(L, N, E) float32: softmax of the logits over all experts; for routers that score with a sigmoid "
        "(DeepSeek-V3's kind), sigmoid(logit) before the selection bias, which does not add up to 1.",
    )
    expert_ids = _field("expert_ids", "(L, N, K) int64: the chosen experts, in the router's order.")
    weights = _field("weights", "(L, N, K) float32: the combine weights that the layer used.")
    tokens = _field("tokens", "(N,) int64: input ids; -1 where the model was given embeddings.")
    sequence = _field("sequence", "(N,) int64: running number of the token's sequence, over all forwards.")
    position = _field("position", "(N,) int64: the token's place in its sequence, padding not counted.")

    def __init__(
        self, *, layers: Iterable[int], logits: Any, probabilities: Any, expert_ids: Any, weights: Any,
        tokens: Any, sequence: Any, position: Any,
    ):  # fmt: skip
        """A trace from arrays or tensors with the shapes and dtypes of the fields; `layers` are the L block indices.

        Raises ValueError when shapes do not fit each other.
        """
        given = (logits, probabilities, expert_ids, weights, tokens, sequence, position)
        typed = zip(FIELDS.items(), given, strict=True)
        fields = {name: torch.as_tensor(value).detach().to("cpu", dtype) for (name, dtype), value in typed}
        self.layers = tuple(int(layer) for layer in layers)
        n = len(fields["tokens"])
        for name, tensor in fields.items():
            like = {"probabilities": "logits", "weights": "expert_ids"}.get(name)
            shape = (len(self.layers), n, tensor.shape[-1] if tensor.dim() == 3 else "*") if name in PER_LAYER else (n,)
            if tuple(tensor.shape) != shape or (like and tensor.shape != fields[like].shape):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} but there are {len(self.layers)} layers and {n} tokens: "
                    "logits and probabilities are (L, N, E), expert_ids and weights (L, N, K), the others (N,)"
                )
        self._chunks = {name: [tensor] for name, tensor in fields.items()}

    @classmethod
    def _empty(cls, layers: Iterable[int]) -> RoutingTrace:
        """A trace of no token, which `_append` fills."""
        trace = cls.__new__(cls)
        trace.layers, trace._chunks = tuple(layers), {name: [] for name in FIELDS}
        return trace

    def _append(self, chunk: dict[str, Tensor]) -> None:
        """Add tokens; a ValueError where K is not that of those before."""
        for before in self._chunks["weights"][-1:]:
            if before.shape[-1] != chunk["weights"].shape[-1]:
                raise ValueError(
                    f"this forward used {chunk['weights'].shape[-1]} experts per token, those before "
                    f"{before.shape[-1]}; record them in separate contexts"
                )
        for name, tensor in chunk.items():
            self._chunks[name].append(tensor)

    def _read(self, name: str) -> Tensor:
        if not len(self):
            raise ValueError(
                "nothing was recorded: call the model that you gave to record_routing, inside the `with` block, on at "
                "least one token that is not padding (a function compiled before does not run the hooks)"
            )
        if len(self._chunks[name]) > 1:
            self._chunks[name] = [torch.cat(self._chunks[name], dim=1 if name in PER_LAYER else 0)]
        return self._chunks[name][0]

    def __len__(self) -> int:
        """N, the tokens recorded so far."""
        return sum(map(len, self._chunks["tokens"]))

    @property
    def num_experts(self) -> int:
        return self.probabilities.shape[-1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[-1]

    def select(self, keep_N: Any) -> RoutingTrace:
        """The trace of some tokens: `keep_N` is a mask of N booleans, or token indices."""
        keep = torch.as_tensor(keep_N)
        if keep.dtype == torch.bool and keep.shape != (len(self),):
            raise ValueError(f"the mask has shape {tuple(keep.shape)} but the trace has {len(self)} tokens")
        keep = keep.nonzero().flatten() if keep.dtype == torch.bool else keep.flatten().long()
        if len(keep) == 0:
            raise ValueError(f"this selects none of the trace's {len(self)} tokens")
        fields = {name: getattr(self, name)[:, keep] for name in PER_LAYER}
        return RoutingTrace(layers=self.layers, **fields, **{name: getattr(self, name)[keep] for name in PER_TOKEN})

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically. Raises ValueError for an empty trace, OSError for a full disk."""
        write_tensors(path, {name: getattr(self, name) for name in FIELDS}, {"format": FORMAT, "layers": self.layers})

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingTrace:
        """Read a file of `save`. Raises FileNotFoundError, and ValueError for a damaged or foreign file."""
        what = "trace of RoutingTrace.save"
        tensors, header = read_tensors(path, what, "trace.save(path) writes one")
        try:
            return cls(layers=header["layers"], **{name: tensors[name] for name in FIELDS})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is damaged or not a {what}") from error

    def __repr__(self) -> str:
        if not len(self):
            return f"RoutingTrace(empty, layers {self.layers})"
        sequences = len(self.sequence.unique())
        return (
            f"RoutingTrace({len(self.layers)} MoE layers {self.layers}, {self.num_experts} experts, top-{self.top_k}, "
            f"{len(self):,} tokens of {sequences:,} sequences, in memory)"
        )

    def _repr_html_(self) -> str:
        """One row per layer: the busiest expert's load over the mean load, and how many experts got no token."""
        title = repr(self)
        if not len(self):
            return f"<p>{html.escape(title)}</p>"
        rows = []
        for layer, expert_ids_NK in zip(self.layers, self.expert_ids, strict=True):
            counts_E = count_ids(expert_ids_NK, self.num_experts)
            ratio, unused = float(counts_E.max() / counts_E.float().mean()), int((counts_E == 0).sum())
            rows.append({"layer": layer, "largest load / mean": ratio, "experts without a token": unused})
        return Table(rows, formats={"largest load / mean": ".2f"}, above=[title])._repr_html_()
