"""The routers inside a model: where they are, what they return, and the rule by which each class decides.

One table, class name -> rule, is used both to record what a router did (`routing`) and to change it (`intervention`).
In transformers' MoE classes (release 5) a router is a module that returns (logits, weights, expert ids); here the layer
does the rest. In a `DecoderLM` the router is a linear layer, and `moe.route` the rule.

Shapes: N tokens, G groups of experts, E experts, K experts per token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model import DecoderLM
from ..core.moe import MoELayer
from ..core.routing import route

Rule = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # (the router, logits_NE) -> (weights_NK, expert_ids_NK)


def softmax_then_top_k(router: Any, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(weights_NK, expert_ids_NK): Mixtral's and Qwen's rule; divided by their sum unless `norm_topk_prob` is False."""
    routing = route(logits_NE.float(), router.top_k, getattr(router, "norm_topk_prob", True))
    return routing.weights_NK, routing.expert_ids_NK


def top_k_then_softmax(router: Any, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(weights_NK, expert_ids_NK): GraniteMoe's and GPT-OSS's rule, softmax over the chosen logits alone."""
    chosen_NK, expert_ids_NK = logits_NE.topk(router.top_k, dim=-1)
    return chosen_NK.float().softmax(-1), expert_ids_NK


def grouped_sigmoid(router: Any, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
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


# The classes of routers that have each rule, by their names less "Router": nothing of transformers is imported here.
_KNOWN = json.loads((files(__package__) / "routers.json").read_text(encoding="utf-8"))
_RULES: tuple[Rule, ...] = (softmax_then_top_k, top_k_then_softmax, grouped_sigmoid)
RULES = {f"{name}Router": rule for rule in _RULES for name in _KNOWN[rule.__name__]}


@dataclass(frozen=True)
class FoundRouter:
    """One MoE layer's router, for reading and for changing what it decides.

    `layer` is the block's index, `name` the path inside the model. `module` is what to hook: its forward's output holds
    the logits. `holder` has the attribute `top_k` that the layer reads (set it to use another number of experts).
    To intervene, register a forward hook on `module` that returns `router.rerouted(output, new_logits_NE)`; a logit of
    -inf removes an expert. With `holder.top_k` unchanged and the logits `router.logits(output)`, the output is the same
    as before, bit for bit. In a `DecoderLM` the logits are those before the noise of a noisy router.
    """

    layer: int
    name: str
    module: Any
    holder: Any

    @property
    def num_experts(self) -> int:
        return len(self.module.weight)

    def logits(self, output: Any) -> Tensor:
        """logits_NE in `output`, what `module` returned."""
        return output if isinstance(self.holder, MoELayer) else unpack(self.module, output)[0]

    def rerouted(self, output: Any, logits_NE: Tensor) -> Any:
        """What `module` would have returned for these logits, in the layout and dtypes of `output`."""
        if isinstance(self.holder, MoELayer):
            return logits_NE  # the layer itself takes softmax, top-k and weights from here
        _, weights_NK, _ = unpack(self.module, output)
        rule = _rule(self.holder) or softmax_then_top_k  # one of these it has, or it would not have been found
        new_weights_NK, expert_ids_NK = rule(self.holder, logits_NE)
        return logits_NE, new_weights_NK.to(weights_NK.dtype), expert_ids_NK

    def probabilities(self, logits_NE: Tensor) -> Tensor:
        """probabilities_NE in float32: softmax over all experts; sigmoid(logit) where the class's rule is a sigmoid."""
        scored_by_sigmoid = _rule(self.holder) is grouped_sigmoid
        return logits_NE.float().sigmoid() if scored_by_sigmoid else logits_NE.float().softmax(-1)


def find_routers(model: nn.Module) -> list[FoundRouter]:
    """The routers of `model`, a `DecoderLM` or a transformers MoE (also wrapped), in the order of their layers.

    Raises ValueError for a model without MoE layers, and for an MoE whose router class is not in the table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is not a model; give the torch module itself")
    routers = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            routers.append(FoundRouter(_layer_of(name), name, module.router, module))
        elif _rule(module) is not None:
            routers.append(FoundRouter(_layer_of(name), name, module, module))
    if not routers:
        raise ValueError(_why_no_router(model))
    routers.sort(key=lambda router: router.layer)
    for first, second in pairwise(routers):
        if first.layer == second.layer:
            raise ValueError(
                f"{first.name} and {second.name} are both in layer {first.layer}: this model has more than one stack "
                "of MoE layers; pass one of its sub-models"
            )
    return routers


def _rule(module: nn.Module) -> Rule | None:
    return next((RULES[base.__name__] for base in type(module).__mro__ if base.__name__ in RULES), None)


def unpack(router: nn.Module, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits_NE, weights_NK, expert_ids_NK) that a transformers router returned; ValueError for another layout."""
    fits = isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point()
    if not fits or output[1].shape != output[2].shape:
        raise ValueError(
            f"{type(router).__name__} did not return (logits, weights, expert ids), as it does in transformers "
            f"5.23; {version('transformers')} is installed"
        )
    return output


def looks_like_moe(module: nn.Module) -> bool:
    """Whether a module's class, known here or not, has the name of a router or of a layer with experts."""
    return bool(re.search(r"(Router|Experts|MoE|Moe|SparseMoeBlock|SparseMLP)$", type(module).__name__))


def _layer_of(name: str) -> int:
    """The block's index: the first number in a module's path (model.layers.3.mlp.gate -> 3)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _why_no_router(model: nn.Module) -> str:
    kind = type(model).__name__
    for module in model.modules():
        if looks_like_moe(module):
            known = sorted({re.sub(r"(Text)?Top[Kk]Router$", "", name) for name in RULES})
            return (
                f"{kind} holds {type(module).__name__}, whose routing rule is not known here; known are DecoderLM and, "
                f"from transformers 5, {', '.join(known)}"
            )
    how = "upcycling.upcycle" if isinstance(model, DecoderLM) else "upcycling.upcycle_pretrained"
    return f"{kind} has no MoE layer; upcycle it first, for instance with {how}"


def check_model(model: Any, asking: str, or_else: str = "") -> None:
    """TypeError unless `model` is a transformers model, ValueError where its weights are on the meta device."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{asking} takes a transformers model{or_else}, not a {type(model).__name__}; of one that is compiled or "
            "wrapped give the model inside"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"the weights of this {type(model).__name__} are on the meta device: load them first")
