"""Router rows from texts: what each router sees, on average, in each domain.

Shapes: L layers, C domains, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import IGNORE
from ..core.model import DecoderLM, evaluating


@torch.no_grad()
def router_rows(dense: DecoderLM, texts: Mapping[str, tuple[Tensor, Tensor]], router_std: float = 0.02) -> Tensor:
    """rows_LCD for `upcycle(router_rows=…)`: what each router sees, on average, in the texts of each domain.

    `texts` holds, for each expert or domain by name, (tokens_BT, targets_BT), whose ignored targets mark padding
    (`Series.domain_windows()`). The row of domain c in layer l is the mean of
    the FFN's inputs (after the norm) over the domain's tokens, less the mean over the domains, which would add the same
    to all scores; a layer's rows are scaled to the standard deviation `router_std`, that of a drawn router. The idea is
    mergekit's "hidden" gates (Goddard et al. 2024, arXiv:2403.13257).

    Raises ValueError for fewer than two domains, one without tokens, or domains that do not differ.
    """
    if len(texts) < 2:
        raise ValueError(f"router rows tell domains apart, but there are {len(texts)}; give at least 2")
    means_LCD = torch.stack([_mean_ffn_inputs(dense, *windows) for windows in texts.values()], dim=1)
    rows_LCD = means_LCD - means_LCD.mean(1, keepdim=True)
    std_L11 = rows_LCD.std(dim=(1, 2), correction=0, keepdim=True)
    if not (std_L11 > 0).all():
        raise ValueError("the domains' mean hidden states are equal in some layer; give texts that differ")
    return router_std * rows_LCD / std_L11


def _mean_ffn_inputs(dense: DecoderLM, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """means_LD over a domain's tokens, in float64."""
    real_BT = targets_BT != IGNORE
    if not real_BT.any():
        raise ValueError("a domain has no tokens; leave it out or give it texts")
    device = dense.token_embedding.weight.device
    sums_LD = torch.zeros(dense.config.n_layers, dense.config.d_model, dtype=torch.float64)
    seen: list[Tensor] = []
    hooks = [block.ffn_norm.register_forward_hook(lambda *call: seen.append(call[-1])) for block in dense.blocks]
    try:
        with evaluating(dense):
            for tokens, real in zip(tokens_BT.split(32), real_BT.split(32), strict=True):
                seen.clear()
                dense(tokens.to(device))
                sums_LD += torch.stack([x_BTD[real.to(device)].double().sum(0).cpu() for x_BTD in seen])
    finally:
        for hook in hooks:
            hook.remove()
    return sums_LD / real_BT.sum()
