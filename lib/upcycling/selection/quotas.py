"""How a budget is shared among strata."""

import math
from collections.abc import Mapping

ALLOCATIONS = ("proportional", "uniform", "sqrt")


def quotas(stratum_sizes: Mapping, budget: int, allocation: str = "proportional") -> dict:
    """Share `budget` over strata: {stratum: quota}, whole numbers that add up to min(budget, all sizes together).

    allocation: weights are a stratum's size (proportional), 1 (uniform), or the square root of its size (sqrt, between
    the two). No quota exceeds its stratum's size; what a short stratum cannot give goes to the others by the same
    weights. Whole numbers by largest remainders (Hamilton's method); equal remainders go to the stratum named first.
    Raises ValueError for a negative size or budget and for an unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation={allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}")
    sizes = {stratum: int(size) for stratum, size in stratum_sizes.items()}
    if budget < 0 or min(sizes.values(), default=0) < 0:
        raise ValueError(f"budget={budget} and the sizes of strata must not be negative: {sizes}")
    weight = {"proportional": float, "uniform": lambda size: 1.0, "sqrt": math.sqrt}[allocation]
    weights = {stratum: weight(size) for stratum, size in sizes.items() if size}
    result, left = dict.fromkeys(sizes, 0), min(int(budget), sum(sizes.values()))
    while True:
        total = sum(weights.values())
        shares = {stratum: left * weights[stratum] / total for stratum in weights}
        full = [stratum for stratum, share in shares.items() if share >= sizes[stratum]]
        if not full:
            break
        for stratum in full:
            result[stratum] = sizes[stratum]
            left -= sizes[stratum]
            del weights[stratum]
    for stratum, share in shares.items():
        result[stratum] = int(share)
    left -= sum(int(share) for share in shares.values())
    for stratum in sorted(shares, key=lambda stratum: int(shares[stratum]) - shares[stratum])[:left]:
        result[stratum] += 1
    return result
