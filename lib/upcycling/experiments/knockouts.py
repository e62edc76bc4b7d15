"""What did the experts learn? Specialisation, and what each expert's removal costs each domain, over several seeds.

For each seed's MoE of the series (trained if need be), on the whole validation split, domain by domain:

    share       the fraction of a domain's tokens that an expert serves, and how far domains differ (JSD), with what is
                left of it when the windows' labels are shuffled; the JSD during training, too
    alone       each expert of each layer removed: the loss it costs each domain, with standard errors
    together    a domain's main experts of all layers removed at once; beside it random experts, one a layer

Expert 3 of one seed has nothing to do with expert 3 of another, so seeds are compared by what an expert is for: a
domain's *main expert* of a layer is the one whose share of that domain exceeds most its mean share of the others. It is
named by what the router does alone, before anything is removed; whether its removal hurts that domain is then a test.

The result is written after each seed; an interrupted run goes on where it stopped.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import IGNORE
from ..routing.intervention import domain_losses, intervene, knockout
from ..routing.metrics import domain_divergence, domain_specialization, shuffled_baseline
from ..routing.record import record_routing
from ..tables import Table
from .results import mean_and_spread, plus_minus
from .series import Series
from .store import begin, save
from .workers import torch_threads

RANDOM_DRAWS = 12  # sets of random experts, one a layer


def main_experts(share_LCE: Tensor) -> Tensor:
    """expert_LC: for each domain the expert whose share of it exceeds most its mean share of the other domains."""
    others_LCE = (share_LCE.sum(1, keepdim=True) - share_LCE) / (share_LCE.shape[1] - 1)
    return (share_LCE - others_LCE).argmax(-1)


def study(series: Series, seed: int, windows: int | None = None) -> dict:
    """Everything about one seed's MoE, as lists and numbers; `windows` limits the windows per domain.

    Raises ValueError for a corpus without domains.
    """
    windows_by_domain = series.domain_windows(windows)
    if len(windows_by_domain) < 2:
        raise ValueError(f"corpus {series.name!r} has no domains to compare; use worlds, or one with a column 'domain'")
    model, result = series.moe(seed, verbose=False)
    costs = knockout(model, windows_by_domain)
    layers, num_experts, num_domains = costs.layers, costs.deltas_LEC.shape[1], len(costs.domains)

    with record_routing(model) as trace:
        base = domain_losses(model, windows_by_domain)
    real_N = torch.cat([(targets_BT != IGNORE).flatten() for _, targets_BT in windows_by_domain.values()])
    sizes_C = torch.tensor([tokens_BT.numel() for tokens_BT, _ in windows_by_domain.values()])
    labels_N = torch.arange(num_domains).repeat_interleave(sizes_C)[real_N]
    expert_ids_LNK, windows_N = trace.expert_ids[:, real_N], trace.sequence[real_N]

    def divergence(expert_ids_LNK: Tensor, labels_N: Tensor) -> Tensor:
        return domain_divergence(domain_specialization(expert_ids_LNK, labels_N, num_experts, num_domains))

    def cost_of(experts_L: list[int]) -> list[float]:
        """Nats per token that each domain loses without these experts, one a layer."""
        with intervene(model, remove={layer: [expert] for layer, expert in zip(layers, experts_L)}):
            return [loss - base[name] for name, loss in domain_losses(model, windows_by_domain).items()]

    share_LCE = domain_specialization(expert_ids_LNK, labels_N, num_experts)
    expert_LC = main_experts(share_LCE)
    random_RL = np.random.default_rng(0).integers(num_experts, size=(RANDOM_DRAWS, len(layers)))
    seen = series.moe_snapshots(seed, verbose=False)
    chance = shuffled_baseline(divergence, expert_ids_LNK, labels_N, repeats=100, groups_N=windows_N)
    return {
        "seed": seed,
        "val_loss": result.final_loss,
        "layers": layers,
        "domains": costs.domains,
        "tokens": costs.tokens_C.tolist(),
        "base_loss": _round(costs.base_loss_C),
        "share": _round(share_LCE),
        "divergence": _round(divergence(expert_ids_LNK, labels_N)),
        "divergence_shuffled": {"mean": _round(chance.mean), "spread": _round(chance.standard_deviation)},
        "main_experts": expert_LC.tolist(),
        "cost": _round(costs.deltas_LEC),
        "chance_spreads": costs.chance_spreads,
        "worst": costs.worst(),
        "cost_together": _round([cost_of(expert_L) for expert_L in expert_LC.T.tolist()]),
        "cost_random_together": _round([cost_of(expert_L) for expert_L in random_RL.tolist()]),
        "training": {
            "steps": seen.steps.tolist(),
            "divergence": _round(torch.stack([divergence(ids, seen.labels) for ids in seen.expert_ids])),
        },
    }


def _round(values) -> list:
    return np.round(np.asarray(values, dtype=float), 6).tolist()


def measure(series: Series, seeds: Iterable[int], windows: int | None = None, *, out: Path | None = None) -> dict:
    """`study` of each seed, with date and setting; written to `out` after each; the seeds already there are kept."""
    result = begin(series, out, "seeds", windows=windows)
    with torch_threads():
        for seed in seeds:
            if seed not in [one["seed"] for one in result["seeds"]]:
                result["seeds"].append(study(series, seed, windows))
                save(result, out)
    return result


def summarize(result: dict) -> list[dict]:
    """One row per domain: (mean, standard deviation over seeds) of what removing experts costs that domain, in nats.

    `own`: its own main experts, all layers at once. `other`: the other domains' main experts, their mean. `random`:
    random experts, one a layer. `own_alone`: its main expert of one layer, mean over layers; `random_alone` likewise.
    """
    of_seeds = []
    for one in result["seeds"]:
        together_CC, cost_LEC = np.array(one["cost_together"]), np.array(one["cost"])
        expert_LC, count = np.array(one["main_experts"]), len(together_CC)
        own_C = together_CC.diagonal()
        of_seeds.append({
            "own": own_C,
            "other": (together_CC.sum(0) - own_C) / (count - 1),
            "random": np.mean(one["cost_random_together"], 0),
            "own_alone": cost_LEC[np.arange(len(expert_LC))[:, None], expert_LC, np.arange(count)].mean(0),
            "random_alone": cost_LEC.mean((0, 1)),
        })  # fmt: skip
    return [
        {"domain": domain} | {name: mean_and_spread([float(one[name][c]) for one in of_seeds]) for name in of_seeds[0]}
        for c, domain in enumerate(result["seeds"][0]["domains"])
    ]


def table(result: dict) -> str:
    """The result as text: specialisation against chance, the clearest experts, what removal costs each domain."""
    lines = []
    for one in result["seeds"]:
        value_L, chance = np.array(one["divergence"]), one["divergence_shuffled"]
        spreads_L = (value_L - chance["mean"]) / np.array(chance["spread"])
        lines.append(
            f"seed {one['seed']}: domains differ by {_numbers(value_L)} bits (layer by layer; shuffled "
            f"{_numbers(chance['mean'])}), {_numbers(spreads_L, 1)} spreads above chance"
        )
        first_L, *_, last_L = one["training"]["divergence"]
        lines.append(
            f"    on the probe {_numbers(first_L)} before any update (the experts are copies), "
            f"{_numbers(last_L)} at the end"
        )
        clear = [row for row in one["worst"] if row["spreads"] > one["chance_spreads"]]
        served = Counter(row["domain"] for row in clear)
        lines.append(
            f"    {len(clear)} of {len(one['worst'])} experts serve one domain more than chance allows "
            f"({one['chance_spreads']:.1f} spreads): {', '.join(f'{name} {n}' for name, n in served.most_common())}"
        )
        for row in clear[:3]:
            lines.append(
                f"    without expert {row['expert']} of layer {row['layer']} {row['domain']} loses {row['delta']:.4f} "
                f"nats, {row['margin']:.4f} ± {row['error']:.4f} more than the next domain"
            )
    costs = [
        {name.replace("_", " "): value if name == "domain" else plus_minus(*value) for name, value in row.items()}
        for row in summarize(result)
    ]
    lines += ["", "what removal costs, nats per token, mean ± standard deviation over seeds:"]
    widths = dict.fromkeys(costs[0], 20) | {"domain": 12}
    return str(Table(costs, left=["domain"], width=widths, gap="", above=lines))


def _numbers(values, digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
