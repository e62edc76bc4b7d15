"""AdamW's memory carried over from the dense run to its MoE, so that training goes on rather than starts again.

    moe = upcycle(dense, config)
    train(moe, ..., optimizer_state=carry_moments("dense/latest.safetensors", dense, moe))

Adam divides each step by the root of the mean squared gradient. Without that memory the first update moves every weight
by the full learning rate, whatever its gradient, and can undo an exact start.

How large are an expert's gradients? It sees a share a of the tokens, each with the combine weight w, on average a = K/E
and w = 1/K (1/E where the weights do not sum to 1). Its mean gradient is a * w of the dense FFN's, and what varies from
batch to batch, which at the usual batch sizes is nearly all of it, has a * w^2 of the dense variance. So exp_avg is
multiplied by a * w and exp_avg_sq by a * w^2. Where a recipe multiplied a unit's down column by s, its gate and up
gradients are s times as large. Shapes: E experts, D width, F hidden units of the dense FFN, G of an expert.
"""

import os

import torch
from torch import Tensor

from ..core.experts import Experts
from ..core.initialisation import weights_sum_to_1
from ..core.model import DecoderLM, FeedForward
from ..files import read_tensors
from ..training.checkpoint import part


def carry_moments(source: str | os.PathLike, dense: DecoderLM, moe: DecoderLM) -> dict[str, dict[str, Tensor]]:
    """AdamW's state for `moe` by parameter name: {name: {"step", "exp_avg", "exp_avg_sq"}}, for `train`.

    `source` is the dense run's `latest.safetensors`. `moe` must be as `upcycle(dense, …)` made it. Outside experts
    everything is carried as it is, the step count everywhere. A hidden unit is recognised by its row of the up matrix;
    one that is not found in the dense FFN (drawn anew, or noised) starts with exp_avg 0 and the exp_avg_sq of the unit
    at its place. Routers are not in the result: they start fresh. With `dense` itself as `moe` the result continues the
    dense run.

    Raises ValueError for a source without AdamW's moments of every parameter, or experts of another width whose units
    are not the dense FFN's (the cube-root rule, say).
    """
    state = _by_name(source, dense)
    carried = {name: dict(state[name]) for name, _ in moe.named_parameters() if name in state}
    for layer in moe.config.moe_layers:
        prefix = f"blocks.{layer}.ffn."
        ffn, sparse = dense.blocks[layer].ffn, moe.blocks[layer].ffn
        values = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        share = sparse.moe.top_k / sparse.moe.num_experts
        weight = 1 / (sparse.moe.top_k if weights_sum_to_1(sparse.moe) else sparse.moe.num_experts)
        for name, experts, a, w in (("experts", sparse.experts, share, weight), ("shared", sparse.shared, 1.0, 1.0)):
            if experts is not None:
                for key, moments in _expert_moments(ffn, experts, values, a, w).items():
                    carried[f"{prefix}{name}.{key}"] = moments
    return carried


def _expert_moments(ffn: FeedForward, experts: Experts, state: dict, a: float, w: float) -> dict[str, dict]:
    units_EG, found_EG = _units(ffn, experts)
    scale_EG = torch.where(found_EG, _down_scale(ffn, experts, units_EG), 1.0)
    names = {"w_up_EFD": "up.weight", "w_gate_EFD": "gate.weight", "w_down_EDF": "down.weight"}
    names |= {"b_up_EF": "up.bias", "b_gate_EF": "gate.bias", "b_down_ED": "down.bias"}
    moments = {}
    for name, parameter in experts.named_parameters():
        old = state[names[name]]
        moments[name] = {"step": old["step"].clone()}
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            factor = a * w**power
            outer_EG = factor * (found_EG if power == 1 else torch.ones_like(scale_EG))
            inner_EG = outer_EG * scale_EG**power
            if name == "b_down_ED":  # belongs to no unit
                new = (factor * old[key]).expand_as(parameter)
            elif name == "w_down_EDF":
                new = old[key][:, units_EG].transpose(0, 1) * outer_EG.unsqueeze(1)
            elif parameter.ndim == 3:
                new = old[key][units_EG] * inner_EG.unsqueeze(-1)
            else:
                new = old[key][units_EG] * inner_EG
            moments[name][key] = new.to(old[key].dtype).contiguous()
    return moments


def _units(ffn: FeedForward, experts: Experts) -> tuple[Tensor, Tensor]:
    """units_EG, each expert's units as indices of the dense ones, and found_EG, whether they were recognised."""
    place = {row: index for index, row in enumerate(_rows(ffn.up.weight))}
    num_experts, width, _ = experts.w_up_EFD.shape
    found = [place.get(row, -1) for row in _rows(experts.w_up_EFD.flatten(0, 1))]
    units_EG = torch.tensor(found, device=experts.w_up_EFD.device).view(num_experts, width)
    found_EG = units_EG >= 0
    dense_width = len(ffn.up.weight)
    if width % dense_width and not found_EG.all():
        raise ValueError(
            f"the experts are {width} units wide, the dense FFN {dense_width}, and not all their units are among its; "
            "moments can be carried to copies and to shards whose up matrix was not scaled"
        )
    at_place_G = torch.arange(width, device=units_EG.device) % dense_width
    return torch.where(found_EG, units_EG, at_place_G), found_EG


def _rows(weight_RD: Tensor) -> list[bytes]:
    raw = weight_RD.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in raw]


def _down_scale(ffn: FeedForward, experts: Experts, units_EG: Tensor) -> Tensor:
    """scale_EG: how many times as long each down column is as the dense unit's."""
    dense_EG = ffn.down.weight.detach().float().norm(dim=0)[units_EG]
    ours_EG = experts.w_down_EDF.detach().float().norm(dim=1)
    return torch.where(dense_EG > 0, ours_EG / dense_EG.clamp(min=1e-30), torch.ones_like(ours_EG))


def _by_name(source: str | os.PathLike, dense: DecoderLM) -> dict[str, dict[str, Tensor]]:
    tensors, state = read_tensors(source)[0], {}
    for name, parameter in dense.named_parameters():
        found = part(tensors, f"optimizer.{name}.")
        if not {"step", "exp_avg", "exp_avg_sq"} <= found.keys():
            raise ValueError(f"{source} has no AdamW moments of {name}: give the checkpoint of its AdamW run")
        if found["exp_avg"].shape != parameter.shape:
            raise ValueError(
                f"{source} has moments of shape {tuple(found['exp_avg'].shape)} for {name}, which is "
                f"{tuple(parameter.shape)}: they belong to another model"
            )
        state[name] = {key: found[key].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")}
    return state
