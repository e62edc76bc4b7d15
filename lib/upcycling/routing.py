"""Record what the routers of a model decide, token by token: `record_routing(model)` and its `RoutingTrace`.

Shapes: L MoE layers, N tokens, E experts, K experts per token, B batch, T sequence.

    with record_routing(model) as trace:
        model(tokens_BT)                      # or generate, or evaluate: every forward inside is recorded
    trace.expert_ids                          # (L, N, K); see RoutingTrace

A `DecoderLM` returns its routings, so a hook on its output suffices. In transformers' MoE classes (release 5) the
router is a module that returns (logits, weights, expert ids); a hook on each collects that, and hooks on the modules
around the layers say where a forward begins and ends and which tokens it saw. What happens outside a forward (a block
recomputed by gradient checkpointing, a layer called by hand) is not recorded.

`find_routers` and `Router` are the table of the router classes; recording reads through it, `intervention` writes.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .checkpoint import _write
from .model import DecoderLM, LMOutput
from .moe import MoELayer

MIB = 2**20


# ------------------------------------------------------------------------------------------------- the router classes


def softmax_then_top_k(router: nn.Module, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(weights_NK, expert_ids_NK): Mixtral's and Qwen's rule; divided by their sum unless `norm_topk_prob` is False."""
    weights_NK, expert_ids_NK = logits_NE.float().softmax(-1).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return weights_NK, expert_ids_NK


def top_k_then_softmax(router: nn.Module, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(weights_NK, expert_ids_NK): GraniteMoe's and GPT-OSS's rule, softmax over the chosen logits alone."""
    chosen_NK, expert_ids_NK = logits_NE.topk(router.top_k, dim=-1)
    return chosen_NK.float().softmax(-1), expert_ids_NK


def grouped_sigmoid(router: nn.Module, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(weights_NK, expert_ids_NK): DeepSeek-V3's rule (arXiv:2412.19437, section 2.1.2).

    Experts stand in `num_group` groups; the `topk_group` groups whose two best sigmoid(logit) + bias add up to most
    stay, and their best experts are taken. The bias decides who is chosen, not with which weight. An expert whose logit
    is -inf counts as absent: it is not chosen and adds nothing to its group.
    """
    scores_NE = logits_NE.float().sigmoid()
    biased_NE = scores_NE + router.e_score_correction_bias
    absent_NE = logits_NE == -torch.inf
    groups = (-1, router.num_group, router.num_experts // router.num_group)
    group_score_NG = biased_NE.masked_fill(absent_NE, 0.0).view(groups).topk(2, dim=-1)[0].sum(-1)
    group_score_NG = group_score_NG.masked_fill(absent_NE.view(groups).all(-1), -torch.inf)
    best_groups = group_score_NG.topk(router.topk_group, dim=-1, sorted=False)[1]
    left_out_NG = torch.ones_like(group_score_NG, dtype=torch.bool).scatter(1, best_groups, False)
    left_out_NE = left_out_NG.unsqueeze(-1).expand(-1, *groups[1:]).reshape(scores_NE.shape)
    eligible_NE = biased_NE.masked_fill(left_out_NE | absent_NE, -torch.inf)
    expert_ids_NK = eligible_NE.topk(router.top_k, dim=-1, sorted=False)[1]
    weights_NK = scores_NE.gather(1, expert_ids_NK)
    if router.norm_topk_prob:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    return weights_NK * router.routed_scaling_factor, expert_ids_NK


# Class name of a transformers router -> its rule. Names, so that nothing of transformers is imported here.
RULES: dict[str, Callable] = {
    **dict.fromkeys(
        [
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "MiniMaxTopKRouter",
            "MixtralTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3VLMoeTextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ],
        softmax_then_top_k,
    ),
    **dict.fromkeys(
        [
            "GptOssTopKRouter",
            "GraniteMoeTopKRouter",
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSharedTopKRouter",
        ],
        top_k_then_softmax,
    ),
    **dict.fromkeys(
        [
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "SolarOpenTopkRouter",
        ],
        grouped_sigmoid,
    ),
}
_LOOKS_LIKE_MOE = re.compile(r"(Router|Experts|MoE|Moe|SparseMoeBlock|SparseMLP)$")


@dataclass(frozen=True)
class Router:
    """One MoE layer's router, for reading and for changing what it decides.

    `layer` is the block's index, `name` the path inside the model. `module` is what to hook: its forward's output holds
    the logits. `holder` has the attribute `top_k` that the layer reads (set it to use another number of experts).
    To intervene, register a forward hook on `module` that returns `router.rerouted(output, new_logits_NE)`; a logit of
    -inf removes an expert. With `holder.top_k` unchanged and the logits `router.logits(output)`, the output is the same
    as before, bit for bit. In a `DecoderLM` the logits are those before the noise of a noisy router.
    """

    layer: int
    name: str
    module: nn.Module
    holder: nn.Module

    def logits(self, output) -> Tensor:
        """logits_NE in `output`, what `module` returned."""
        return output if isinstance(self.holder, MoELayer) else _unpack(self, output)[0]

    def rerouted(self, output, logits_NE: Tensor):
        """What `module` would have returned for these logits, in the layout and dtypes of `output`."""
        if isinstance(self.holder, MoELayer):
            return logits_NE  # the layer itself takes softmax, top-k and weights from here
        _, weights_NK, _ = _unpack(self, output)
        new_weights_NK, expert_ids_NK = _rule(self.holder)(self.holder, logits_NE)
        return logits_NE, new_weights_NK.to(weights_NK.dtype), expert_ids_NK

    def probabilities(self, logits_NE: Tensor) -> Tensor:
        """probabilities_NE in float32: softmax over all experts; sigmoid(logit) where the class's rule is a sigmoid."""
        scored_by_sigmoid = _rule(self.holder) is grouped_sigmoid
        return logits_NE.float().sigmoid() if scored_by_sigmoid else logits_NE.float().softmax(-1)


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of `model`, a `DecoderLM` or a transformers MoE (also wrapped), in the order of their layers.

    Raises ValueError for a model without MoE layers, for an MoE whose router class is not in the table, and for a
    transformers release whose routers return probabilities in place of logits.
    """
    routers = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            routers.append(Router(_layer_of(name), name, module.router, module))
        elif _rule(module) is not None:
            routers.append(Router(_layer_of(name), name, module, module))
    if not routers:
        raise ValueError(_why_no_router(model))
    if not isinstance(routers[0].holder, MoELayer) and _release("transformers") < (5, 6):
        raise ValueError(
            f"transformers {version('transformers')} is installed, whose routers return probabilities in place of "
            "logits; install transformers>=5.23"
        )
    routers.sort(key=lambda router: router.layer)
    for first, second in pairwise(routers):
        if first.layer == second.layer:
            raise ValueError(
                f"{first.name} and {second.name} are both in layer {first.layer}: this model has more than one stack "
                "of MoE layers; pass one of its sub-models"
            )
    return routers


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version(package).split(".")[:2])


def _rule(module: nn.Module) -> Callable | None:
    return next((RULES[base.__name__] for base in type(module).__mro__ if base.__name__ in RULES), None)


def _unpack(router: Router, output) -> tuple[Tensor, Tensor, Tensor]:
    fits = isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point()
    if not fits or output[1].shape != output[2].shape:
        raise ValueError(
            f"{type(router.module).__name__} did not return (logits, weights, expert ids), as it does in transformers "
            f"5.23; {version('transformers')} is installed"
        )
    return output


def _layer_of(name: str) -> int:
    """The block's index: the first number in a module's path (model.layers.3.mlp.gate -> 3)."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else 0


def _why_no_router(model: nn.Module) -> str:
    kind = type(model).__name__
    for module in model.modules():
        if _LOOKS_LIKE_MOE.search(type(module).__name__):
            known = sorted({re.sub(r"(Text)?Top[Kk]Router$", "", name) for name in RULES})
            return (
                f"{kind} holds {type(module).__name__}, whose routing rule is not known here; known are DecoderLM and, "
                f"from transformers 5, {', '.join(known)}"
            )
    how = "upcycling.upcycle" if isinstance(model, DecoderLM) else "upcycling.upcycle_pretrained"
    return f"{kind} has no MoE layer; upcycle it first, for instance with {how}"


# ------------------------------------------------------------------------------------------------------------ the trace

# Field -> dtype. The first four are (L, N, ...), the others (N,).
_PER_LAYER = {
    "logits": torch.float32,
    "probabilities": torch.float32,
    "expert_ids": torch.int64,
    "weights": torch.float32,
}
_PER_TOKEN = {"tokens": torch.int64, "sequence": torch.int64, "position": torch.int64}
_FIELDS = _PER_LAYER | _PER_TOKEN


class _Store:
    """Chunks of tokens: in memory up to `memory_limit` bytes, then appended to a file per field in a temporary folder.

    In a file the tokens come first, (N, L, ...), so that a chunk is appended; a reader gets (L, N, ...) all the same.
    """

    def __init__(self, memory_limit: float, directory=None):
        self.memory_limit, self.directory = memory_limit, directory
        self.chunks: dict[str, list[Tensor]] = {name: [] for name in _FIELDS}
        self.sizes: dict[str, tuple[int, int]] = {}  # (L, E) or (L, K) of the fields per layer
        self.length = self.resident_bytes = 0
        self.folder: tempfile.TemporaryDirectory | None = None  # is deleted when the trace is
        self.closed = False

    def append(self, chunk: dict[str, Tensor]) -> None:
        sizes = {name: (chunk[name].shape[0], chunk[name].shape[2]) for name in _PER_LAYER}
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
            raise ValueError("this trace was closed; read it before, or keep it with trace.save(path)")
        if self.length == 0:
            raise ValueError(
                "nothing was recorded: call the model that you gave to record_routing, inside the `with` block, on at "
                "least one token that is not padding (a function compiled before does not run the hooks)"
            )
        if self.folder is None:
            if len(self.chunks[name]) > 1:
                self.chunks[name] = [torch.cat(self.chunks[name], dim=1 if name in _PER_LAYER else 0)]
            return self.chunks[name][0]
        self._flush()
        layers, size = self.sizes.get(name, (None, None))
        shape = (self.length,) if layers is None else (self.length, layers, size)
        dtype = np.float32 if _FIELDS[name] is torch.float32 else np.int64
        # "c": what a reader writes into its tensor stays in its memory and never reaches the file
        mapped = torch.from_numpy(np.memmap(self._file(name), dtype=dtype, mode="c", shape=shape))
        return mapped if layers is None else mapped.transpose(0, 1)

    def close(self) -> None:
        self.closed = True
        self.chunks = {name: [] for name in _FIELDS}
        if self.folder is not None:
            self.folder.cleanup()

    def _flush(self) -> None:
        """Move the chunks in memory to the files."""
        try:
            if self.folder is None:
                if self.directory is not None:
                    Path(self.directory).mkdir(parents=True, exist_ok=True)
                self.folder = tempfile.TemporaryDirectory(
                    prefix="upcycling-trace-", dir=self.directory, ignore_cleanup_errors=True
                )
            for name in _FIELDS:
                with open(self._file(name), "ab") as file:
                    for tensor in self.chunks[name]:
                        (tensor.transpose(0, 1) if name in _PER_LAYER else tensor).contiguous().numpy().tofile(file)
                self.chunks[name] = []
        except OSError as error:
            raise OSError(
                f"the trace could not be written to {self.folder.name if self.folder else self.directory} ({error}): "
                "free disk space, choose another `directory`, or raise `memory_limit`"
            ) from error
        self.resident_bytes = 0

    def _file(self, name: str) -> Path:
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

    def __init__(self, *, layers, logits, probabilities, expert_ids, weights, tokens, sequence, position):
        """A trace from arrays or tensors with the shapes and dtypes of the fields; `layers` are the L block indices.

        Raises ValueError when shapes do not fit each other.
        """
        given = dict(logits=logits, probabilities=probabilities, expert_ids=expert_ids, weights=weights)
        given |= dict(tokens=tokens, sequence=sequence, position=position)
        fields = {name: torch.as_tensor(value).detach().to("cpu", _FIELDS[name]) for name, value in given.items()}
        self.layers = tuple(int(layer) for layer in layers)
        n = len(fields["tokens"])
        for name, tensor in fields.items():
            like = {"probabilities": "logits", "weights": "expert_ids"}.get(name)
            shape = (
                (len(self.layers), n, tensor.shape[-1] if tensor.dim() == 3 else "*") if name in _PER_LAYER else (n,)
            )
            if tuple(tensor.shape) != shape or (like and tensor.shape != fields[like].shape):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} but there are {len(self.layers)} layers and {n} tokens: "
                    "logits and probabilities are (L, N, E), expert_ids and weights (L, N, K), the others (N,)"
                )
        self._store = _Store(float("inf"))
        self._store.append(fields)

    @classmethod
    def _recording(cls, layers, store: _Store) -> RoutingTrace:
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

    def select(self, keep_N) -> RoutingTrace:
        """The trace, in memory, of some tokens: `keep_N` is a mask of N booleans, or token indices."""
        keep = torch.as_tensor(keep_N)
        if keep.dtype == torch.bool and keep.shape != (len(self),):
            raise ValueError(f"the mask has shape {tuple(keep.shape)} but the trace has {len(self)} tokens")
        keep = keep.nonzero().flatten() if keep.dtype == torch.bool else keep.flatten().long()
        if len(keep) == 0:
            raise ValueError(f"this selects none of the trace's {len(self)} tokens")
        fields = {name: getattr(self, name)[:, keep] for name in _PER_LAYER}
        return RoutingTrace(layers=self.layers, **fields, **{name: getattr(self, name)[keep] for name in _PER_TOKEN})

    def save(self, path) -> None:
        """Write one safetensors file, atomically. Raises ValueError for an empty trace, OSError for a full disk."""
        _write(path, {name: getattr(self, name) for name in _FIELDS}, {"routing_trace": 1, "layers": self.layers})

    @classmethod
    def load(cls, path) -> RoutingTrace:
        """Read a file of `save`. Raises FileNotFoundError, and ValueError for a damaged or foreign file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no trace {path}; trace.save(path) writes one")
        try:
            with safe_open(path, framework="pt") as file:
                layers = json.loads((file.metadata() or {})["upcycling"])["layers"]
                return cls(layers=layers, **{name: file.get_tensor(name).clone() for name in _FIELDS})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): it is damaged or not a trace of RoutingTrace.save"
            ) from error

    def close(self) -> None:
        """Free the memory and delete the temporary files; happens by itself when the trace is garbage-collected."""
        self._store.close()

    def __enter__(self) -> RoutingTrace:
        return self

    def __exit__(self, *_) -> None:
        self.close()

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
        title = html.escape(repr(self))
        if self._store.closed or not len(self):
            return f"<p>{title}</p>"
        rows = []
        for layer, expert_ids_NK in zip(self.layers, self.expert_ids, strict=True):
            counts_E = torch.bincount(expert_ids_NK.flatten(), minlength=self.num_experts)
            ratio, dead = counts_E.max() / counts_E.float().mean(), int((counts_E == 0).sum())
            rows.append(f"<tr><td>{layer}</td><td>{ratio:.2f}</td><td>{dead}</td></tr>")
        head = "<tr><th>layer</th><th>largest load / mean</th><th>experts without a token</th></tr>"
        return f"<table><caption>{title}</caption><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


# ---------------------------------------------------------------------------------------------------------- recording


@contextmanager
def record_routing(model: nn.Module, *, memory_limit: int = 256 * MIB, directory=None) -> Iterator[RoutingTrace]:
    """Record the routing of every forward of `model` inside the context; the yielded trace grows with each.

    Works for `DecoderLM` and the transformers classes of `RULES`, also wrapped, in training and evaluation, in any
    dtype and on any device; changes no output. Tokens whose `attention_mask` (B, T) is 0 are left out. Forwards with a
    key/value cache continue their sequences. A trace of more than `memory_limit` bytes moves to a temporary folder
    (inside `directory`, if given) that is deleted with it. A `DecoderLM` compiled by `torch.compile(model)` is
    recorded when that compiled model is what is given here.

    Raises ValueError for a model that is dense, of an unknown class or compiled in another way, and, from inside the
    forward, when layers differ in their number of experts or of experts per token.
    """
    routers = find_routers(model)
    store = _Store(memory_limit, directory)
    trace = RoutingTrace._recording([router.layer for router in routers], store)
    with ExitStack() as hooks:
        record = _record_decoder_lm if isinstance(routers[0].holder, MoELayer) else _record_transformers
        for handle in record(model, routers, store):
            hooks.callback(handle.remove)
        yield trace


def _record_decoder_lm(model: nn.Module, routers: list[Router], store: _Store) -> list:
    """One hook on the model's output, which carries a Routing per layer; outside of what torch.compile has compiled."""
    _refuse_compiled(model)
    names = list(inspect.signature(DecoderLM.forward).parameters)[1:]  # a wrapper's own are (*args, **kwargs)
    sequences = _Sequences()

    @_outside_of_autograd
    def record(module, args, kwargs, output):
        if not isinstance(output, LMOutput):
            raise ValueError(f"{type(module).__name__} returned no LMOutput; give record_routing the DecoderLM itself")
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens_BT, cache = given["tokens_BT"], given.get("cache")
        past = 0 if cache is None else cache.length - tokens_BT.shape[1]  # the forward has advanced the cache
        first = sequences.first_of(cache, past, len(tokens_BT))
        decisions = [(r.logits_NE, r.probabilities_NE, r.expert_ids_NK, r.weights_NK) for r in output.routings]
        _append(store, routers, decisions, tokens_BT, tokens_BT.shape, None, first, past)

    return [model.register_forward_hook(record, with_kwargs=True)]


def _record_transformers(model: nn.Module, routers: list[Router], store: _Store) -> list:
    """Hooks on the routers, and on each module that contains all layers: the outermost one called is the forward."""
    for module in model.modules():
        _refuse_compiled(module, also="OptimizedModule")
    forward = _Forward()
    sequences = _Sequences()

    def enter(module, args, kwargs):
        if forward.module in (None, module):  # or left over from a forward that did not end
            forward.begin(module)
            for router, handle in zip(routers, collectors, strict=True):  # behind hooks that came later and change it
                router.module._forward_hooks.move_to_end(handle.id)
        names = inspect.signature(module.forward).parameters
        forward.see(dict(zip(names, args, strict=False)) | kwargs)

    def collect(router):
        def hook(module, args, output):
            if forward.module is not None:
                if router.layer in forward.decisions:
                    raise ValueError(f"{router.name} was called twice in one forward; such models cannot be recorded")
                forward.decisions[router.layer] = _unpack(router, output)

        return hook

    @_outside_of_autograd
    def leave(module, args, kwargs, output):
        if forward.module is not module:
            return
        forward.module = None
        if output is None:  # the forward raised
            return
        if forward.shape is None:
            raise ValueError(
                f"{type(module).__name__} was given neither input_ids nor inputs_embeds; record the language model"
            )
        missing = [router.layer for router in routers if router.layer not in forward.decisions]
        if missing:
            raise ValueError(
                f"layer {missing[0]} made no routing: what was called is a compiled copy of the model, or uses a "
                f"kernel in place of {type(routers[0].module).__name__}; call the plain model inside the context"
            )
        tokens_BT, shape, cache = forward.tokens_BT, forward.shape, forward.cache
        first = sequences.first_of(cache, forward.past, shape[0])
        sequences.remember(getattr(output, "past_key_values", None), first, shape[0])
        decisions = []
        for router in routers:
            logits_NE, weights_NK, expert_ids_NK = forward.decisions.pop(router.layer)
            decisions.append((logits_NE, router.probabilities(logits_NE), expert_ids_NK, weights_NK))
        _append(store, routers, decisions, tokens_BT, shape, forward.mask_BS, first, forward.past)

    containers = _containers(model, routers)
    collectors = [router.module.register_forward_hook(collect(router)) for router in routers]
    return [
        *collectors,
        *[module.register_forward_pre_hook(enter, with_kwargs=True) for module in containers],
        *[module.register_forward_hook(leave, with_kwargs=True, always_call=True) for module in containers],
    ]


class _Forward:
    """What is known of the forward in progress; `module` is None between forwards."""

    module = None

    def begin(self, module: nn.Module) -> None:
        self.module = module
        self.decisions, self.past = {}, 0
        self.tokens_BT = self.shape = self.mask_BS = self.cache = None

    def see(self, given: dict) -> None:
        """Take from one module's arguments what no outer one was given."""
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if self.tokens_BT is None and ids is not None:
            self.tokens_BT, self.shape = ids, ids.shape
        if self.shape is None and embeddings is not None:
            self.shape = embeddings.shape[:2]
        if self.mask_BS is None and isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask_BS = mask
        if self.cache is None and cache is not None:
            self.cache, self.past = cache, int(cache.get_seq_length())


class _Sequences:
    """Numbers the sequences: a forward that continues a cache has the numbers of the forward that filled it."""

    def __init__(self):
        self.count = 0
        self.of_cache = weakref.WeakKeyDictionary()  # cache -> (number of its first row, rows)

    def first_of(self, cache, past: int, rows: int) -> int:
        """The number of the first of `rows` sequences, of which `past` tokens lie in the cache."""
        first, known_rows = self.of_cache.get(cache, (0, 0)) if past else (0, 0)
        if known_rows != rows:
            first = self.count
            self.count += rows
        self.remember(cache, first, rows)
        return first

    def remember(self, cache, first: int, rows: int) -> None:
        if cache is not None:
            self.of_cache[cache] = (first, rows)


def _append(store, routers, decisions, tokens_BT, shape, mask_BS, first: int, past: int) -> None:
    """Store one forward: `decisions` has (logits, probabilities, expert ids, weights) of each layer."""
    batch, length = shape
    sizes = [(logits_NE.shape[0], logits_NE.shape[1], ids_NK.shape[1]) for logits_NE, _, ids_NK, _ in decisions]
    for router, (rows, experts, top_k) in zip(routers, sizes, strict=True):
        if rows != batch * length:
            raise ValueError(f"{router.name} saw {rows} tokens but the model was given {batch} x {length}")
        if (experts, top_k) != sizes[0][1:]:
            raise ValueError(
                f"layer {router.layer} takes {top_k} of {experts} experts but layer {routers[0].layer} takes "
                f"{sizes[0][2]} of {sizes[0][1]}; a trace holds layers of one shape"
            )
    device = decisions[0][0].device
    real_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
    position_BT = torch.arange(past, past + length, device=device).expand(batch, length)
    if mask_BS is not None:
        seen_BS = mask_BS[:, : past + length].to(device).bool()  # all tokens so far, or the new ones alone
        real_BT = seen_BS[:, -length:]
        position_BT = (seen_BS.long().cumsum(1) - 1)[:, -length:] + (past + length - seen_BS.shape[1])
    sequence_BT = torch.arange(first, first + batch, device=device)[:, None].expand(batch, length)
    if tokens_BT is None:
        tokens_BT = torch.full((batch, length), -1)
    keep_N = real_BT.flatten().nonzero().flatten() if mask_BS is not None else slice(None)
    per_layer = zip(_PER_LAYER, zip(*decisions, strict=True), strict=True)
    per_token = zip(_PER_TOKEN, (tokens_BT, sequence_BT, position_BT), strict=True)
    chunk = {name: torch.stack(layers)[:, keep_N] for name, layers in per_layer}
    chunk |= {name: values_BT.to(device).flatten()[keep_N] for name, values_BT in per_token}
    # stack made copies, and so must the fields per token be: nobody's tensor is kept
    store.append({name: values.to("cpu", _FIELDS[name], copy=name in _PER_TOKEN) for name, values in chunk.items()})


def _containers(model: nn.Module, routers: list[Router]) -> list[nn.Module]:
    """The modules around the list of blocks: the model, and inside it what a user may call instead."""
    path = routers[0].name.split(".")
    depth = next((i for i, part in enumerate(path) if part.isdigit()), 0)
    names = [".".join(path[:i]) for i in range(depth + 1)]
    return [model.get_submodule(name) for name in names if all(r.name.startswith(name) for r in routers)]


def _outside_of_autograd(hook: Callable) -> Callable:
    """Run a hook without gradients and outside of inference mode, whose tensors could not be used freely later."""
    return torch.inference_mode(False)(torch.no_grad()(hook))


def _refuse_compiled(module: nn.Module, also: str = "") -> None:
    """Compiled code may leave out hooks that were registered after it was made."""
    if module._compiled_call_impl is not None or type(module).__name__ == also:
        raise ValueError(
            f"{type(module).__name__} is compiled, and hooks inside it may be left out: record and call the model that "
            "is not compiled, or a DecoderLM compiled as a whole by torch.compile(model)"
        )
