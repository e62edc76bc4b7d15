"""What if this expert were gone? Change a router's choice for a while, without touching a weight, and read the losses.

    with intervene(model, remove={2: [5]}):          # without expert 5 of layer 2; the next best take over
        losses_BT = token_losses(model, tokens_BT, targets_BT)
    table = knockout(model, windows_by_domain)       # remove each expert in turn: what does it cost which domain?

Shapes: B windows, T tokens of a window, L MoE layers, E experts, C domains, W windows of all domains together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import IGNORE, whole_number
from ..core.model import DecoderLM, evaluating
from ..core.moe import MoELayer
from .adapter import logits_of
from .hf_routers import FoundRouter, find_routers
from .record import refuse_compiled

_ROWS = 16  # windows per forward pass: their logits are what needs memory
Experts = Mapping[int, Sequence[int]] | Sequence[int]
Windows = Mapping[str, tuple[Tensor, Tensor]]  # domain -> (tokens_BT, targets_BT)


class _Rerouting:
    """A forward hook of a router: the model's own rule on logits / temperature, with -inf where an expert is barred.

    In a DecoderLM the output is the logits; in transformers it is (logits, weights, expert ids).
    """

    def __init__(self, router: FoundRouter, allowed_E: Tensor, temperature: float):
        self.router, self.allowed_E, self.temperature = router, allowed_E, temperature

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        logits_NE = self.router.logits(output)
        allowed_E = self.allowed_E.to(logits_NE.device)
        changed = self.router.rerouted(output, (logits_NE / self.temperature).masked_fill(~allowed_E, -torch.inf))
        if isinstance(changed, tuple) and not allowed_E[changed[2]].all():
            raise ValueError(
                f"in layer {self.router.layer} a token's best groups of experts hold fewer than "
                f"top_k={self.router.holder.top_k} of those that remain; leave more experts of each group in"
            )
        return changed


@contextmanager
def intervene(
    model: nn.Module, *, remove: Experts = (), top_k: int | None = None, temperature: float = 1.0
) -> Iterator[nn.Module]:
    """Inside this context the routers choose otherwise; every weight stays, and all is as before on the way out.

    `remove` takes experts out of the choice: {layer: [experts]}, or [experts] for every MoE layer (layers count
    blocks from 0, dense ones too). A removed expert's logit becomes -inf before the softmax, so
    the next best take over and the model's own rule makes the combine weights of what is left. `top_k` experts
    compute each token; `temperature` divides the logits, which above 1 makes the weights more alike. Contexts nest:
    what an outer one removed stays removed, temperatures multiply, the inner `top_k` holds.
    `model` is a DecoderLM or a transformers MoE that `record_routing` knows.

    Raises ValueError for a dense or compiled model, a layer or an expert that does not exist, a choice that leaves
    fewer than `top_k` experts, a `top_k` or `temperature` out of range, and a routing rule that would not heed it.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r} must be a finite number above 0; 1 changes nothing")
    refuse_compiled(*model.modules())
    routers = {router.layer: router for router in find_routers(model)}
    removed = _per_layer(remove, routers)
    _refuse_deaf_rules(routers, top_k, any(removed.values()) or temperature != 1)
    if top_k is not None:
        top_k = whole_number("top_k", top_k)
    with ExitStack() as undo:
        for layer, router in routers.items():
            num_experts = router.num_experts
            if top_k is not None and not 1 <= top_k <= num_experts:
                raise ValueError(f"top_k={top_k} but layer {layer} has {num_experts} experts; choose 1..{num_experts}")
            chosen = router.holder.top_k if top_k is None else top_k
            allowed_E = torch.ones(num_experts, dtype=torch.bool)
            allowed_E[removed.get(layer, [])] = False
            for outer in router.module._forward_hooks.values():
                if isinstance(outer, _Rerouting):
                    allowed_E &= outer.allowed_E
            remaining = int(allowed_E.sum())
            if remaining < chosen:
                raise ValueError(
                    f"of the {num_experts} experts of layer {layer} only {remaining} would remain, but each token "
                    f"needs top_k={chosen}; leave more of them in or choose top_k={max(remaining, 1)}"
                )
            undo.callback(setattr, router.holder, "top_k", router.holder.top_k)
            router.holder.top_k = chosen
            if temperature != 1 or not allowed_E.all():
                hook = _Rerouting(router, allowed_E, temperature)
                undo.callback(router.module.register_forward_hook(hook).remove)
        yield model


def _refuse_deaf_rules(routers: Mapping[int, FoundRouter], top_k: int | None, scores: bool) -> None:
    """ValueError where a DecoderLM's routing rule would not do what is asked, or do something else."""
    for router in routers.values():
        moe = router.holder.moe if isinstance(router.holder, MoELayer) else None
        rule = None if moe is None or moe.router is None else moe.router.kind
        if rule == "hash":
            raise ValueError("hash routing follows the token ids and no score, so there is nothing to intervene in")
        if top_k is not None and rule in ("top_p", "relu"):
            raise ValueError(
                f"router={rule!r} does not choose a fixed number of experts, so top_k would change nothing"
            )
        if scores and moe is not None and moe.logit_norm is not None:
            raise ValueError(
                f"logit_norm={moe.logit_norm} standardises the scores after they are changed, which would undo it; "
                "only top_k can be changed here"
            )


def _per_layer(remove: Experts, routers: Mapping[int, FoundRouter]) -> dict[int, list[int]]:
    """{layer: [experts]} of what is to be removed; layers that keep all of theirs may be left out."""
    if not isinstance(remove, Mapping):
        remove = dict.fromkeys(routers, remove)
    removed = {}
    for layer, ids in remove.items():
        if layer not in routers:
            raise ValueError(f"remove names layer {layer}, but the layers with experts are {[*routers]}")
        num_experts = routers[layer].num_experts
        removed[layer] = [whole_number(f"remove of layer {layer}: expert", expert) for expert in ids]
        for expert in removed[layer]:
            if not 0 <= expert < num_experts:
                raise ValueError(f"remove names expert {expert} of layer {layer}; choose 0..{num_experts - 1}")
    return removed


@torch.no_grad()
def token_losses(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """losses_BT: the cross-entropy of each target in nats, in eval mode; NaN where there is no target (-100).

    Raises ValueError where the shapes differ, for no windows, and for ids outside the vocabulary.
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape != targets_BT.shape or not tokens_BT.numel():
        raise ValueError(
            f"tokens have shape {tuple(tokens_BT.shape)}, targets {tuple(targets_BT.shape)}; give both as "
            "(windows, tokens), at least one"
        )
    lm: Any = model
    embedding = lm.token_embedding if isinstance(model, DecoderLM) else lm.get_input_embeddings()
    vocab = embedding.num_embeddings
    for name, ids_N in (("tokens", tokens_BT.flatten()), ("targets", targets_BT[targets_BT != IGNORE])):
        wrong_N = ids_N[(ids_N < 0) | (ids_N >= vocab)]
        if len(wrong_N):
            raise ValueError(f"{name} have the id {int(wrong_N[0])}, but the model's ids are 0..{vocab - 1}")
    device = next(model.parameters()).device
    losses = []
    with evaluating(model):
        for rows_BT, wanted_BT in zip(tokens_BT.split(_ROWS), targets_BT.split(_ROWS)):
            logits_NV, wanted_N = logits_of(model(rows_BT.to(device))).flatten(0, 1), wanted_BT.to(device).flatten()
            losses_N = F.cross_entropy(logits_NV.float(), wanted_N, reduction="none")
            losses.append(losses_N.view(wanted_BT.shape).cpu())
    return torch.cat(losses).masked_fill(targets_BT.cpu() == IGNORE, torch.nan)


def domain_losses(model: nn.Module, windows_by_domain: Windows) -> dict[str, float]:
    """Mean nats per target of each domain; `windows_by_domain` maps names to (tokens_BT, targets_BT)."""
    return {name: float(token_losses(model, *windows).nanmean()) for name, windows in windows_by_domain.items()}


@dataclass(frozen=True)
class KnockoutTable:
    """What removing each expert, one at a time, costs each domain, in nats per target.

    `deltas_LEC` is the loss without the expert minus the loss with all, `errors_LEC` its standard error over the
    windows, `base_loss_C` the loss with all, `tokens_C` the targets it was measured on. `layers` are block numbers,
    `domains` names the last axis. `chance_spreads`: see `worst`.
    """

    deltas_LEC: Tensor
    errors_LEC: Tensor
    base_loss_C: Tensor
    tokens_C: Tensor
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    chance_spreads: float

    @property
    def random_expert_LC(self) -> Tensor:
        """The null baseline: what removing an expert of that layer costs that domain on average over the experts."""
        return self.deltas_LEC.mean(1)

    def worst(self) -> list[dict]:
        """One dict for each (layer, expert), named by the domain that its removal hurts most, the clearest case first.

        `delta` is what it costs that domain, `margin` how much more than the next one (or than nothing, where that
        gains), `error` the standard error of the margin and `spreads` their ratio. Chance gives margins, too: when the
        windows are dealt to the domains at random, the largest `spreads` of the table stays below `chance_spreads` in
        19 of 20 deals. Above it, the expert serves that domain; a large `delta` with few `spreads` is an expert that
        everybody needs.
        """
        measured = (*_margins(self.deltas_LEC, self.errors_LEC), self.deltas_LEC.amax(-1))
        rows = []
        places = product(self.layers, range(self.deltas_LEC.shape[1]))
        for key, *values in zip(places, *(column_LE.flatten() for column_LE in measured)):
            margin, error, spreads, worst, delta = (value.item() for value in values)
            row = dict(layer=key[0], expert=key[1], domain=self.domains[int(worst)], delta=delta)
            rows.append(row | dict(margin=margin, error=error, spreads=spreads))
        return sorted(rows, key=lambda row: -row["margin"])


def knockout(model: nn.Module, windows_by_domain: Windows) -> KnockoutTable:
    """Remove each expert of each layer in turn and measure what it costs each domain.

    `windows_by_domain` maps at least two domains to (tokens_BT, targets_BT), B at least 2. One forward pass per
    (layer, expert) and domain. For single tokens subtract two `token_losses`, without and with `intervene`. Raises
    ValueError for a dense model and for too few windows.
    """
    from tqdm.auto import tqdm

    routers = find_routers(model)
    layers, num_experts = tuple(router.layer for router in routers), routers[0].num_experts
    if len(windows_by_domain) < 2 or min(len(tokens_BT) for tokens_BT, _ in windows_by_domain.values()) < 2:
        raise ValueError("a knock-out compares domains: give at least 2 of them, each with at least 2 windows")
    for name, (_, targets_BT) in windows_by_domain.items():
        if bool((targets_BT == IGNORE).all()):
            raise ValueError(f"domain {name!r} has no target: all of them are {IGNORE}")

    def window_losses() -> Tensor:
        """Summed nats of each window, those of all domains one after the other."""
        return torch.cat([token_losses(model, *windows).nansum(1).double() for windows in windows_by_domain.values()])

    domain_W = torch.cat([torch.full((len(w[0]),), c) for c, w in enumerate(windows_by_domain.values())])
    tokens_W = torch.cat([(targets_BT != IGNORE).sum(1) for _, targets_BT in windows_by_domain.values()])
    base_W = window_losses()
    deltas_LEW = torch.zeros(len(layers), num_experts, len(base_W), dtype=torch.float64)
    for i, expert in tqdm([*product(range(len(layers)), range(num_experts))], desc="knock-out", unit="expert"):
        with intervene(model, remove={layers[i]: [expert]}):
            deltas_LEW[i, expert] = window_losses() - base_W
    deltas_LEC, errors_LEC = _by_domain(deltas_LEW, tokens_W, domain_W)
    return KnockoutTable(
        deltas_LEC=deltas_LEC,
        errors_LEC=errors_LEC,
        base_loss_C=_by_domain(base_W, tokens_W, domain_W)[0],
        tokens_C=torch.bincount(domain_W, weights=tokens_W).long(),
        layers=layers,
        domains=tuple(windows_by_domain),
        chance_spreads=_chance_spreads(deltas_LEW, tokens_W, domain_W),
    )


def _by_domain(sums_xW: Tensor, tokens_W: Tensor, domain_W: Tensor) -> tuple[Tensor, Tensor]:
    """(mean per target, its standard error over windows) of sums per window, for each domain: (..., C)."""
    means, errors = [], []
    for c in range(int(domain_W.max()) + 1):
        sums_xB, tokens_B = sums_xW[..., domain_W == c], tokens_W[domain_W == c]
        mean_x = sums_xB.sum(-1) / tokens_B.sum()
        # a ratio of two sums: its error comes from what each window adds beyond its share
        residual_xB = sums_xB - mean_x[..., None] * tokens_B
        means.append(mean_x)
        errors.append(residual_xB.std(-1) * len(tokens_B) ** 0.5 / tokens_B.sum())
    return torch.stack(means, -1), torch.stack(errors, -1)


def _margins(deltas_LEC: Tensor, errors_LEC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per expert: what the worst-hit domain loses beyond the next, its standard error, their ratio, that domain."""
    deltas_LE2, domains_LE2 = deltas_LEC.topk(2)
    margin_LE = deltas_LE2[..., 0] - deltas_LE2[..., 1].clamp_min(0)  # to gain from a removal is not to be spared
    error_LE = errors_LEC.gather(-1, domains_LE2).norm(dim=-1)
    return margin_LE, error_LE, (margin_LE / error_LE).nan_to_num(0.0), domains_LE2[..., 0]  # 0/0: nobody uses it


def _chance_spreads(deltas_LEW: Tensor, tokens_W: Tensor, domain_W: Tensor, deals: int = 200) -> float:
    """A permutation test of the whole table: the largest margin in standard errors, its 95th percentile over deals."""
    generator = np.random.default_rng(0)
    largest = []
    for _ in range(deals):
        dealt_W = domain_W[torch.from_numpy(generator.permutation(len(domain_W)))]
        spreads_LE = _margins(*_by_domain(deltas_LEW, tokens_W, dealt_W))[2]
        largest.append(float(spreads_LE.max()))
    return float(np.quantile(largest, 0.95))
