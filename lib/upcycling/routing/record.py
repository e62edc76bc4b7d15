"""Record what the routers of a model decide: `record_routing(model)`.

Shapes: L MoE layers, N tokens, E experts, K experts per token, B batch, T new tokens, S tokens with those in the cache.

    with record_routing(model) as trace:
        model(tokens_BT)                      # or generate, or evaluate: every forward inside is recorded
    trace.expert_ids                          # (L, N, K); see RoutingTrace

A `DecoderLM` returns its routings, so a hook on its output suffices. In transformers' MoE classes a hook on each router
collects what it returned, and hooks on the modules around the layers say where a forward begins and ends and which
tokens it saw. What happens outside a forward (a block recomputed by gradient checkpointing, a layer called by hand) is
not recorded.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model import DecoderLM, LMOutput
from ..core.moe import MoELayer
from ..core.routing import refuse_varying_choices
from .hf_routers import FoundRouter, find_routers, unpack
from .trace import FIELDS, PER_LAYER, PER_TOKEN, RoutingTrace

Decision = tuple[Tensor, Tensor, Tensor, Tensor]  # logits_NE, probabilities_NE, expert_ids_NK, weights_NK


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record the routing of every forward of `model` inside the context; the yielded trace grows with each.

    Works for `DecoderLM` and the transformers classes of `hf_routers.RULES`, also wrapped, in training and
    evaluation, in any dtype and on any device; changes no output. Tokens whose `attention_mask` (B, T) is 0 are left
    out. Forwards with a key/value cache continue their sequences. A `DecoderLM` compiled by
    `torch.compile(model)` is recorded when that compiled model is what is given here.

    What a `capacity_factor` dropped is recorded as chosen, with weight 0.

    Raises ValueError for a model that is dense, of an unknown class or compiled in another way, and, from inside the
    forward, when layers differ in their number of experts or of experts per token, and for routing rules under which
    that number varies from token to token.
    """
    routers = find_routers(model)
    trace = RoutingTrace._empty(router.layer for router in routers)
    with ExitStack() as hooks:
        record = _record_decoder_lm if isinstance(routers[0].holder, MoELayer) else _record_transformers
        for handle in record(model, routers, trace):
            hooks.callback(handle.remove)
        yield trace


def _record_decoder_lm(model: nn.Module, routers: list[FoundRouter], trace: RoutingTrace) -> list:
    """One hook on the model's output, which carries a Routing per layer; outside of what torch.compile has compiled."""
    refuse_compiled(getattr(model, "_orig_mod", model))
    names = list(inspect.signature(DecoderLM.forward).parameters)[1:]  # a wrapper's own are (*args, **kwargs)
    sequences = _Sequences()

    @_outside_of_autograd
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not isinstance(output, LMOutput):
            raise ValueError(f"{type(module).__name__} returned no LMOutput; give record_routing the DecoderLM itself")
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens_BT, cache = given["tokens_BT"], given.get("cache")
        past = 0 if cache is None else cache.length - tokens_BT.shape[1]  # the forward has advanced the cache
        first = sequences.first_of(cache, past, len(tokens_BT))
        for routing in output.routings:
            refuse_varying_choices(routing)
        decisions = [(r.logits_NE, r.probabilities_NE, r.expert_ids_NK, r.weights_NK) for r in output.routings]
        _append(trace, routers, decisions, tokens_BT, None, first, past)

    return [model.register_forward_hook(record, with_kwargs=True)]


def _record_transformers(model: nn.Module, routers: list[FoundRouter], trace: RoutingTrace) -> list:
    """Hooks on the routers, and on each module that contains all layers: the outermost one called is the forward."""
    refuse_compiled(*model.modules())
    forward = Forward()
    sequences = _Sequences()
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # layer -> what its router returned in this forward

    def begin() -> None:
        found.clear()
        for router, handle in zip(routers, collectors, strict=True):  # behind hooks that came later and change it
            router.module._forward_hooks.move_to_end(handle.id)

    def collect(router: FoundRouter) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if forward.module is not None:
                if router.layer in found:
                    raise ValueError(f"{router.name} was called twice in one forward; such models cannot be recorded")
                found[router.layer] = unpack(module, output)

        return hook

    @_outside_of_autograd
    def end(module: nn.Module, output: Any) -> None:
        if forward.tokens_BT is None:
            raise ValueError(
                f"{type(module).__name__} was given neither input_ids nor inputs_embeds; record the language model"
            )
        missing = [router.layer for router in routers if router.layer not in found]
        if missing:
            raise ValueError(
                f"layer {missing[0]} made no routing: what was called is a compiled copy of the model, or uses a "
                f"kernel in place of {type(routers[0].module).__name__}; call the plain model inside the context"
            )
        rows = len(forward.tokens_BT)
        first = sequences.first_of(forward.cache, forward.past, rows)
        sequences.remember(getattr(output, "past_key_values", None), first, rows)
        decisions = []
        for router in routers:
            logits_NE, weights_NK, expert_ids_NK = found.pop(router.layer)
            decisions.append((logits_NE, router.probabilities(logits_NE), expert_ids_NK, weights_NK))
        _append(trace, routers, decisions, forward.tokens_BT, forward.mask_BS, first, forward.past)

    collectors = [router.module.register_forward_hook(collect(router)) for router in routers]
    return [*collectors, *forward.hooks(model, [router.name for router in routers], begin, end)]


class Forward:
    """What is known of the forward in progress of a transformers model; `module` is None between forwards."""

    module: nn.Module | None = None

    def hooks(
        self, model: nn.Module, names: list[str], begin: Callable | None = None, end: Callable | None = None
    ) -> list:
        """Hooks that follow the forwards of `model`, on the modules around what has these names: its routers.

        `begin()` is called before each forward, `end(module, output)` after one that did not raise.
        """
        around = _around(model, names)
        parameters = {module: [*inspect.signature(module.forward).parameters] for module in around}

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.module in (None, module):  # or left over from a forward that did not end
                self._reset(module)
                if begin is not None:
                    begin()
            self._see(dict(zip(parameters[module], args, strict=False)) | kwargs)

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if self.module is module:
                self.module = None
                if end is not None and output is not None:  # None: the forward raised
                    end(module, output)

        return [
            *[module.register_forward_pre_hook(enter, with_kwargs=True) for module in around],
            *[module.register_forward_hook(leave, always_call=True) for module in around],
        ]

    def _reset(self, module: nn.Module) -> None:
        self.module = module
        self.tokens_BT: Tensor | None = None  # -1 where embeddings are given in place of ids
        self.mask_BS: Tensor | None = None
        self.cache: Any = None
        self.past = 0

    def _see(self, given: dict) -> None:
        """Take from one module's arguments what no outer one was given."""
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if self.tokens_BT is None and ids is not None:
            self.tokens_BT = ids
        if self.tokens_BT is None and embeddings is not None:
            self.tokens_BT = torch.full(embeddings.shape[:2], -1)
        if self.mask_BS is None and isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask_BS = mask
        if self.cache is None and cache is not None:
            self.cache, self.past = cache, int(cache.get_seq_length())


class _Sequences:
    """Numbers the sequences: a forward that continues a cache has the numbers of the forward that filled it."""

    def __init__(self):
        self.count = 0
        self.of_cache = weakref.WeakKeyDictionary()  # cache -> (number of its first row, rows)

    def first_of(self, cache: Any, past: int, rows: int) -> int:
        """The number of the first of `rows` sequences, of which `past` tokens lie in the cache."""
        first, known_rows = self.of_cache.get(cache, (0, 0)) if past else (0, 0)
        if known_rows != rows:
            first = self.count
            self.count += rows
        self.remember(cache, first, rows)
        return first

    def remember(self, cache: Any, first: int, rows: int) -> None:
        if cache is not None:
            self.of_cache[cache] = (first, rows)


def _append(
    trace: RoutingTrace,
    routers: list[FoundRouter],
    decisions: list[Decision],
    tokens_BT: Tensor,
    mask_BS: Tensor | None,
    first: int,
    past: int,
) -> None:
    """Store one forward, of which `decisions` has a Decision for each layer."""
    batch, length = tokens_BT.shape
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
    keep_N = real_BT.flatten().nonzero().flatten() if mask_BS is not None else slice(None)
    per_layer = zip(PER_LAYER, zip(*decisions, strict=True), strict=True)
    per_token = zip(PER_TOKEN, (tokens_BT, sequence_BT, position_BT), strict=True)
    chunk = {name: torch.stack([x.to(device) for x in layers])[:, keep_N] for name, layers in per_layer}
    chunk |= {name: values_BT.to(device).flatten()[keep_N] for name, values_BT in per_token}
    # stack made copies, and so must the fields per token be: nobody's tensor is kept
    trace._append({name: values.to("cpu", FIELDS[name], copy=name in PER_TOKEN) for name, values in chunk.items()})


def _around(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules around the blocks that hold modules of these names: the model, and what may be called instead."""
    path = names[0].split(".")
    depth = next((i for i, part in enumerate(path) if part.isdigit()), 0)
    around = [".".join(path[:i]) for i in range(depth + 1)]
    return [model.get_submodule(outer) for outer in around if all(name.startswith(outer) for name in names)]


def _outside_of_autograd(hook: Callable) -> Callable:
    """Run a hook without gradients and outside of inference mode, whose tensors could not be used freely later."""
    return torch.inference_mode(False)(torch.no_grad()(hook))


def refuse_compiled(*modules: nn.Module) -> None:
    """Compiled code may leave out hooks that were registered after it was made."""
    for module in modules:
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"{type(module).__name__} is compiled, and hooks inside it may be left out: give and call the model "
                "that is not compiled (record_routing also takes a DecoderLM compiled as a whole by "
                "torch.compile(model))"
            )
