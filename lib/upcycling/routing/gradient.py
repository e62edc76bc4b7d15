"""Does the gradient reach the router? Its norm, layer by layer, beside that of the experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import IGNORE
from ..core.model import evaluating
from ..core.moe import MoELayer
from ..tables import ShownAsTable, Table
from .adapter import logits_of
from .hf_routers import FoundRouter, find_routers
from .record import record_routing
from .trace import RoutingTrace

SILENT = 1e-5
"""A router gradient below this fraction of its experts' gradient is rounding: where it is 0 by construction, 3e-8 was
measured in float32 and in bfloat16; where the router learns, 0.02 and more."""
_FINDINGS = json.loads((files(__package__) / "findings.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RouterDiagnosis:
    """What `diagnose_router` found in one layer; gradients are norms of the cross-entropy's, without a balance loss."""

    layer: int
    num_experts: int
    top_k: int
    router_gradient: float
    expert_gradient: float
    tied: bool  # all rows of the router are equal: every token sees a tie
    experts_identical: bool
    constant_weight_sum: bool  # a token's combine weights add up to the same number, whatever was chosen
    frozen: bool  # the router's weights do not ask for a gradient
    experts_used: int  # experts that got at least one of these tokens

    @property
    def silent(self) -> bool:
        """Whether the cross-entropy leaves the router where it is."""
        return self.router_gradient <= SILENT * self.expert_gradient

    @property
    def finding(self) -> str:
        """What holds in this layer, what follows from it and what to do, in plain words."""
        always_one = self.top_k == 1 and self.constant_weight_sum and self.silent
        causes = {"frozen": self.frozen, "weight always 1": always_one, "tied": self.tied}
        found = [name for name, holds in causes.items() if holds]
        if self.num_experts == 1:
            found = ["one expert"]
        elif not found and self.experts_identical:
            found = ["identical, silent" if self.silent else "identical"]
        elif not found:
            found = ["silent" if self.silent else "learns"]
        return "; ".join(_FINDINGS[name].format(top_k=self.top_k, num_experts=self.num_experts) for name in found)


@dataclass(frozen=True, repr=False)
class Diagnosis(ShownAsTable):
    """A RouterDiagnosis per MoE layer; renders as a table with the findings below."""

    layers: tuple[RouterDiagnosis, ...]

    @property
    def can_learn(self) -> bool:
        """Whether the cross-entropy moves the router of every layer."""
        return not any(layer.silent for layer in self.layers)

    def rows(self) -> list[dict]:
        """One dict a layer: the columns of the table."""
        return [
            {
                "layer": found.layer,
                "router gradient": f"{found.router_gradient:.1e}",
                "experts' gradient": f"{found.expert_gradient:.1e}",
                "tied": found.tied,
                "identical experts": found.experts_identical,
                "constant weight sum": found.constant_weight_sum,
                "experts used": f"{found.experts_used} of {found.num_experts}",
            }
            for found in self.layers
        ]

    @property
    def findings(self) -> list[str]:
        """The sentences, those that hold in several layers once."""
        layers_of: dict[str, list[str]] = {}
        for found in self.layers:
            layers_of.setdefault(found.finding, []).append(str(found.layer))
        return [
            f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {finding}"
            for finding, layers in layers_of.items()
        ]

    def _as_table(self) -> Table:
        return Table(self.rows(), below=self.findings)


def diagnose_router(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Diagnosis:
    """What the cross-entropy of this batch tells each router, and if it tells it nothing, why.

    For a `DecoderLM` or a transformers MoE. `targets_BT[b, t]` follows `tokens_BT[b, t]`; IGNORE (-100) is not
    counted. In eval mode, on the cross-entropy alone: a balance loss moves even a router that learns nothing.
    Weights, their `.grad` and the training mode are left as they were. Raises ValueError for a dense model.
    """
    routers = find_routers(model)
    with evaluating(model):
        with torch.enable_grad(), record_routing(model) as trace:
            logits_NV = logits_of(model(tokens_BT)).flatten(0, 1).float()
            loss = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE)
        weights = [weight for router in routers for weight in router_weights(router) + expert_weights(model, router)]
        wanted = [weight for weight in weights if weight.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
    gradient_of = {id(weight): gradient for weight, gradient in zip(wanted, gradients) if gradient is not None}
    return Diagnosis(tuple(_diagnose(model, router, i, trace, gradient_of) for i, router in enumerate(routers)))


def _diagnose(model: nn.Module, router: FoundRouter, i: int, trace: RoutingTrace, gradient_of: dict) -> RouterDiagnosis:
    of_router, of_experts = list(router.module.parameters()), expert_weights(model, router)
    num_experts = trace.num_experts
    rows_EX = torch.cat([weight.detach().reshape(num_experts, -1) for weight in of_router], dim=1)
    sums_N = trace.weights[i].sum(-1)
    rounding = max(1e-5, 2 * torch.finfo(of_router[0].dtype).eps)
    return RouterDiagnosis(
        layer=router.layer,
        num_experts=num_experts,
        top_k=trace.top_k,
        router_gradient=_norm(of_router, gradient_of),
        expert_gradient=_norm(of_experts, gradient_of),
        tied=bool((rows_EX == rows_EX[0]).all()),
        experts_identical=all(bool((weight == weight[0]).all()) for weight in of_experts),
        constant_weight_sum=float(sums_N.max() - sums_N.min()) <= rounding * float(sums_N.mean()),
        frozen=not any(weight.requires_grad for weight in of_router),
        experts_used=len(trace.expert_ids[i].unique()),
    )


def router_weights(router: FoundRouter) -> list[nn.Parameter]:
    """The weights that turn a token into the router's logits, and those of the learned noise where it has some."""
    noise = getattr(router.holder, "noise", None)
    return [*router.module.parameters(), *(noise.parameters() if noise is not None else ())]


def expert_weights(model: nn.Module, router: FoundRouter) -> list[nn.Parameter]:
    """The stacked weights of the router's experts, each with E in front; shared experts are not among them."""
    in_decoder_lm = isinstance(router.holder, MoELayer)
    layer: Any = router.holder if in_decoder_lm else model.get_submodule(router.name.rpartition(".")[0])
    return list(layer.experts.parameters())


def _norm(weights: list[nn.Parameter], gradient_of: dict) -> float:
    """The norm of the weights' gradients together, 0 where there is none."""
    return sum(float(gradient_of[id(w)].float().square().sum()) for w in weights if id(w) in gradient_of) ** 0.5
