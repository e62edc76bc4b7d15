"""A transformers causal MoE with the interface of a DecoderLM, so that one training loop and one evaluation serve both.

Shapes: B batch, T sequence, N tokens, V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import IGNORE
from ..core.config import ModelConfig
from ..core.model import DecoderLM, LMOutput
from ..core.routing import Routing
from .hf_routers import FoundRouter, check_model, find_routers, unpack

BLOCK = 256  # tokens in a sequence of training or evaluation where nobody asks for another number


def as_decoder_lm(model: nn.Module, seq_len: int | None = None) -> Any:
    """`model` itself if it is a `DecoderLM` (also compiled) or an adapter already, else its `TransformersLM`."""
    if isinstance(model, TransformersLM) or isinstance(getattr(model, "config", None), ModelConfig):
        return model
    return TransformersLM(model, seq_len)


def context_length(config: Any) -> int:
    """Tokens that a model takes at most, by its configuration (ours or transformers'); 2**31 where none is set."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "seq_len", None) or getattr(config, "max_position_embeddings", None) or 2**31


def logits_of(output: Any) -> Tensor:
    """logits_BTV in what a DecoderLM or a transformers model returned."""
    return getattr(output, "logits_BTV" if isinstance(output, LMOutput) else "logits")


def block_size(model: Any, wanted: int | None = None) -> int:
    """Tokens in a sequence: `wanted`, by default BLOCK or the context if that is shorter; ValueError if beyond it."""
    context = context_length(model.config)
    block = min(BLOCK, context) if wanted is None else wanted
    if not 1 <= block <= context:
        raise ValueError(f"blocks of {block} tokens do not fit the model's context; choose 1..{context}")
    return block


class TransformersLM(nn.Module):
    """Calls a transformers causal MoE as a `DecoderLM` is called; `model` is the one given, and shares its weights.

    `config` has what the loops read: seq_len (default: the model's context, at most BLOCK tokens), vocab_size,
    moe_layers, and moe with num_experts, top_k and aux_weight. Raises TypeError for what is no transformers model,
    ValueError for a dense model, an unknown router, a model without a language-model head, and a `seq_len` beyond the
    context.
    """

    def __init__(self, model: Any, seq_len: int | None = None, aux_weight: float = 0.01):
        super().__init__()
        check_model(model, "this", " or a DecoderLM")
        self.model, self.routers = model, find_routers(model)
        self.training = model.training
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM.from_pretrained"
            )
        holder = self.routers[0].holder
        self.config = SimpleNamespace(
            seq_len=block_size(model, seq_len),
            vocab_size=model.config.get_text_config().vocab_size,
            moe_layers=tuple(router.layer for router in self.routers),
            moe=SimpleNamespace(num_experts=self.routers[0].num_experts, top_k=holder.top_k, aux_weight=aux_weight),
            to_dict=self._description,
        )

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> LMOutput:
        """As `DecoderLM.forward`; each layer's Routing is made from the logits that its router returned.

        Its probabilities, which the balance loss pushes, are the softmax over all experts, also where the class takes
        the softmax over the chosen ones; where its scores are sigmoids, they are those divided by their sum, as in
        DeepSeek-V3's balance loss (arXiv:2412.19437, eq. 18). Both carry the gradient. Ids and weights are the model's.
        """
        DecoderLM._check(cast(DecoderLM, self), tokens_BT, 0)
        found: dict[nn.Module, Any] = {}  # no arithmetic in the hook: blocks that are recomputed would miss it
        with ExitStack() as hooks:  # for this call alone: a block that is recomputed in the backward pass calls none
            for router in self.routers:
                hook = router.module.register_forward_hook(lambda module, _, output: found.update({module: output}))
                hooks.callback(hook.remove)
            options = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
            logits_BTV = self.model(input_ids=tokens_BT, use_cache=False, **options).logits
        loss = None
        if targets_BT is not None:
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE)
        routings = [_routing(router, found[router.module]) for router in self.routers]
        return LMOutput(logits_BTV, loss, routings, len(tokens_BT))

    def objective(self, output: LMOutput) -> Tensor:
        """What training minimises: the loss plus aux_weight times the sum of the layers' balance losses."""
        return output.loss + self.config.moe.aux_weight * output.aux_losses_L.sum()

    def choices(self, output: LMOutput) -> None:
        """No counts: transformers' routers move nothing between updates (`SelectionBiasMover` does it for them)."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether transformers recomputes blocks in the backward pass."""
        return self.model.is_activation_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:  # the reentrant kind would compute the router's logits without a gradient
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        elif self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()

    def _description(self) -> dict:
        """The settings that a checkpoint of this model depends on."""
        settings = json.loads(self.model.config.to_json_string(use_diff=False))
        for name in ("transformers_version", "_name_or_path"):
            settings.pop(name, None)
        return settings | {"class": type(self.model).__name__, "aux_weight": self.config.moe.aux_weight}


def _routing(router: FoundRouter, output: Any) -> Routing:
    logits_NE, weights_NK, expert_ids_NK = unpack(router.module, output)
    probabilities_NE = router.probabilities(logits_NE)
    probabilities_NE = probabilities_NE / probabilities_NE.sum(-1, keepdim=True)
    return Routing(logits_NE.float(), probabilities_NE, expert_ids_NK, weights_NK)
