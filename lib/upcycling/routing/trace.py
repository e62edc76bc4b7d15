"""What the routers of a model decided, token by token: `RoutingTrace`, in memory or, when it is large, in files.

Shapes: L MoE layers, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
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


class Store:
    """Chunks of tokens: in memory up to `memory_limit` bytes, then appended to a file per field in a temporary folder.

    In a file the tokens come first, (N, L, ...), so that a chunk is appended; a reader gets (L, N, ...) all the same.
    """

    def __init__(self, memory_limit: float, directory: str | os.PathLike | None = None):
        self.memory_limit, self.directory = memory_limit, directory
        self.chunks: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
        self.sizes: dict[str, tuple[int, int]] = {}  # (L, E) or (L, K) of the fields per layer
        self.length = self.resident_bytes = 0
        self.folder: tempfile.TemporaryDirectory | None = None  # is deleted when the trace is
        self.closed = False

    def append(self, chunk: dict[str, Tensor]) -> None:
        if self.closed:
            return
        sizes = {name: (chunk[name].shape[0], chunk[name].shape[2]) for name in PER_LAYER}
        if self.sizes and sizes != self.sizes:
            raise ValueError(
                f"this forward used {sizes['weights'][1]} experts per token, those before {self.sizes['weights'][1]}; "
                "record them in separate contexts"
            )
        self.sizes = sizes
        for name, tensor in chunk.items():
            self.chunks[name].append(tensor)
            self.resident_bytes += tensor.nbytes
        self.length += len(chunk["tokens"])
        if self.resident_bytes > self.memory_limit:
            self._flush()

    def read(self, name: str) -> Tensor:
        if self.closed:
            raise ValueError("this trace was closed when it could not be written to the disk; record it again")
        if self.length == 0:
            raise ValueError(
                "nothing was recorded: call the model that you gave to record_routing, inside the `with` block, on at "
                "least one token that is not padding (a function compiled before does not run the hooks)"
            )
        if self.folder is None:
            if len(self.chunks[name]) > 1:
                self.chunks[name] = [torch.cat(self.chunks[name], dim=1 if name in PER_LAYER else 0)]
            return self.chunks[name][0]
        self._flush()
        dtype = "f4" if FIELDS[name] is torch.float32 else "i8"
        # "c": what a reader writes into its tensor stays in its memory and never reaches the file
        shape = (self.length, *self.sizes.get(name, ()))
        mapped = torch.from_numpy(np.memmap(self._file(name), dtype, "c", shape=shape))
        return mapped.transpose(0, 1) if name in PER_LAYER else mapped

    def _flush(self) -> None:
        """Move the chunks in memory to the files."""
        try:
            if self.folder is None:
                if self.directory is not None:
                    Path(self.directory).mkdir(parents=True, exist_ok=True)
                self.folder = tempfile.TemporaryDirectory(
                    prefix="upcycling-trace-", dir=self.directory, ignore_cleanup_errors=True
                )
            for name in FIELDS:
                with open(self._file(name), "ab") as file:
                    for tensor in self.chunks[name]:
                        (tensor.transpose(0, 1) if name in PER_LAYER else tensor).contiguous().numpy().tofile(file)
                self.chunks[name] = []
        except OSError as error:
            self.closed, self.chunks = True, {}  # some fields may have been written and others not
            if self.folder is not None:
                self.folder.cleanup()
            raise OSError(
                f"the trace could not be written to {self.folder.name if self.folder else self.directory} ({error}): "
                "free disk space, choose another `directory`, or raise `memory_limit`"
            ) from error
        self.resident_bytes = 0

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return Path(self.folder.name) / f"{name}.bin"


def _field(name: str, doc: str) -> property:
    return property(lambda trace: trace._store.read(name), doc=doc)


class RoutingTrace:
    """What the routers of L layers decided for N tokens, on the CPU.

    Reading a field of an empty or closed trace raises ValueError. The fields of a trace that outgrew its memory limit
    are memory-mapped and not contiguous: use `reshape` where you would use `view`.
    """

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
        self._store = Store(float("inf"))
        self._store.append(fields)

    @classmethod
    def _recording(cls, layers: Iterable[int], store: Store) -> RoutingTrace:
        trace = cls.__new__(cls)
        trace.layers, trace._store = tuple(layers), store
        return trace

    def __len__(self) -> int:
        """N, the tokens recorded so far."""
        return self._store.length

    @property
    def num_experts(self) -> int:
        return self.probabilities.shape[-1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[-1]

    def select(self, keep_N: Any) -> RoutingTrace:
        """The trace, in memory, of some tokens: `keep_N` is a mask of N booleans, or token indices."""
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
        if self._store.closed or not len(self):
            return f"RoutingTrace({'closed' if self._store.closed else 'empty'}, layers {self.layers})"
        sequences = len(self.sequence.unique())
        where = "in memory" if self._store.folder is None else "memory-mapped"
        return (
            f"RoutingTrace({len(self.layers)} MoE layers {self.layers}, {self.num_experts} experts, top-{self.top_k}, "
            f"{len(self):,} tokens of {sequences:,} sequences, {where})"
        )

    def _repr_html_(self) -> str:
        """One row per layer: the busiest expert's load over the mean load, and how many experts got no token."""
        title = repr(self)
        if self._store.closed or not len(self):
            return f"<p>{html.escape(title)}</p>"
        rows = []
        for layer, expert_ids_NK in zip(self.layers, self.expert_ids, strict=True):
            counts_E = count_ids(expert_ids_NK, self.num_experts)
            ratio, unused = float(counts_E.max() / counts_E.float().mean()), int((counts_E == 0).sum())
            rows.append({"layer": layer, "largest load / mean": ratio, "experts without a token": unused})
        return Table(rows, formats={"largest load / mean": ".2f"}, above=[title])._repr_html_()
