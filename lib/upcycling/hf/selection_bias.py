"""Move the selection bias of transformers' MoE classes, which carry it and never change it.

    mover = SelectionBiasMover(model)            # hooks; once, before training
    ...; optimizer.step(); mover.step()          # in a loop of your own
    Trainer(model, ..., callbacks=[mover.callback()])

DeepSeek-V3's balancing without a loss (arXiv:2412.19437, section 2.1.2): an expert is chosen by its score plus a bias,
and after each update the bias of those with less than the mean load rises by `rate`, that of the others falls. In
transformers 5.23 the bias is there (`e_score_correction_bias`, `expert_bias`), is added, and stays as it was loaded.
A `DecoderLM` needs none of this: MoEConfig(router="selection_bias").

Shapes: B batch, T sequence, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.model import DecoderLM
from ..core.routing import count_ids
from ..routing.hf_routers import unpack
from ..routing.record import Forward, refuse_compiled

if TYPE_CHECKING:
    from transformers import TrainerCallback

BIASES = ("e_score_correction_bias", "expert_bias")
ROUTERS = ("gate", "router")  # what the layer that holds the bias calls its router


@dataclass(frozen=True)
class _Biased:
    """One layer's router, the bias that its choice depends on, and how often each expert was chosen."""

    name: str
    module: nn.Module
    holder: nn.Module  # the bias is looked up there each time: a model that moves to a GPU gets new tensors
    bias_name: str
    counts_E: Tensor

    @property
    def bias(self) -> Tensor:
        return getattr(self.holder, self.bias_name)


class SelectionBiasMover(AbstractContextManager):
    """Counts each expert's choices in training forwards and moves the biases of `model` by `rate` in `step()`.

    Counted is what happens in training mode, over any number of micro-batches; evaluation, blocks that gradient
    checkpointing computes again, and padding (`attention_mask` 0) are not. Where torch.distributed runs, the counts of
    all processes are added. A bias in half precision is made float32, which would lose steps this small.

    Raises ValueError for a model without such a bias, a DecoderLM, a compiled model, and a negative `rate`.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        if not rate >= 0:
            raise ValueError(f"rate={rate!r} is negative; DeepSeek-V3 uses 0.001")
        for module in model.modules():
            if isinstance(module, DecoderLM):
                raise ValueError('a DecoderLM\'s rule moves by itself: upcycle with MoEConfig(router="selection_bias")')
        refuse_compiled(*model.modules())
        self.rate = rate
        self._layers = _find_biased(model)
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(BIASES)}; classes that have one are, among others, "
                "DeepseekV3, Glm4Moe, Dots1, Lfm2Moe, Ernie4_5_Moe"
            )
        self._forward = Forward()
        self._handles = [layer.module.register_forward_hook(self._collect(layer)) for layer in self._layers]
        self._handles += self._forward.hooks(model, [layer.name for layer in self._layers])

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Move every bias once and forget the counts; returns the counts_E that were used, by the routers' names.

        Call it after `optimizer.step()`. Raises RuntimeError when nothing was counted since the last call.
        """
        counted = {}
        for layer in self._layers:
            counts_E = layer.counts_E.to(layer.bias.device)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts_E)
            if not counts_E.any():
                raise RuntimeError(
                    f"{layer.name} chose no expert since the last step: call model(...) in training mode between them"
                )
            layer.bias.add_(self.rate * (counts_E.float().mean() - counts_E).sign().view_as(layer.bias))
            counted[layer.name] = counts_E.clone()
            layer.counts_E.zero_()
        return counted

    def callback(self) -> TrainerCallback:
        """A transformers TrainerCallback that takes the step after each of the optimizer's."""
        from transformers import TrainerCallback

        mover = self

        class MoveSelectionBias(TrainerCallback):
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                mover.step()

        return MoveSelectionBias()

    def __exit__(self, *_: object) -> None:
        """Take the hooks off; the biases stay where they are."""
        for handle in self._handles:
            handle.remove()

    def _collect(self, layer: _Biased) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._forward.module is None or not module.training:
                return
            ids_NK = unpack(module, output)[2].detach()
            if self._forward.mask_BS is not None and self._forward.tokens_BT is not None:
                real_BT = self._forward.mask_BS[:, -self._forward.tokens_BT.shape[1] :]
                ids_NK = ids_NK[real_BT.flatten().to(ids_NK.device).bool()]
            layer.counts_E.add_(count_ids(ids_NK, layer.bias.numel()).to(layer.counts_E))

        return hook


def _find_biased(model: nn.Module) -> list[_Biased]:
    """Every bias with the router that it steers: the module that holds it, that one's router, or the one around it."""
    modules, layers = dict(model.named_modules()), []
    for name, holder in modules.items():
        for bias_name in BIASES:
            bias = getattr(holder, bias_name, None)
            if not isinstance(bias, Tensor):
                continue
            if bias.dtype in (torch.float16, torch.bfloat16):
                bias.data = bias.data.float()
            router = next((part for part in ROUTERS if hasattr(holder, part)), None)
            path = f"{name}.{router}" if router else name
            if not hasattr(modules[path], "top_k"):  # Ernie keeps the bias in a module inside its router
                path = path.rpartition(".")[0]
            layers.append(_Biased(path, modules[path], holder, bias_name, torch.zeros(bias.numel(), dtype=torch.long)))
    return layers
