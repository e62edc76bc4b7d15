"""Where does the time go? Torch's profile of a step, added up by kind of operation.

    time_by_kind({"MoE": moe_step, "dense": dense_step})      # {"MoE": {"matrix products": seconds, ...}, ...}

The profiler names each operation that torch runs and the time spent in it, less that of the operations it calls. Its
clock is the wall's, and it writes down every one of thousands, which takes time itself, most where operations are
small: read shares from it, and take times from `upcycling.bench`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..tables import Table

_BETWEEN, _ELEMENTWISE = "between operations", "norms and elementwise"
KINDS = (
    "matrix products", "attention", _ELEMENTWISE, "loss", "routing and moving rows", "copying and clearing memory",
    "optimizer", _BETWEEN,
)  # fmt: skip
_PATTERNS = (  # the first that is found in an operation's name decides; what none of them finds computes elementwise
    ("optimizer", r"adam|Optimizer\.|foreach|_fused_sgd|_fused_adagrad"),
    ("attention", r"scaled_dot_product|flash_attention|efficient_attention"),
    (_BETWEEN, r"Backward\d*$|^(?!aten::|mkldnn::|mkl::|upcycling::)"),  # Python and autograd's bookkeeping
    (
        "matrix products",
        r"::(_?grouped_mm|mm|addmm|bmm|baddbmm|mv|addmv|dot|linear|matmul|_linear_pointwise|_mkl_linear|product)$",
    ),
    ("loss", r"log_softmax|nll_loss|cross_entropy"),
    ("routing and moving rows", r"sort|topk|bincount|index|gather|scatter|embedding|cumsum"),
    ("copying and clearing memory", r"::(copy_|_to_copy|clone|contiguous|cat|stack|fill_|zero_|zeros|zeros_like)$"),
    (  # views and allocations
        _BETWEEN,
        r"::(empty\w*|as_strided|view|_unsafe_view|reshape|t|transpose|permute|select|slice|narrow|expand|squeeze|"
        r"unsqueeze|split\w*|chunk|unbind|detach|alias|to|item|_local_scalar_dense|resize_|result_type|flatten)$",
    ),
)


def kind_of(operation: str) -> str:
    """Which of `KINDS` a name of torch's profile belongs to; Python, views and bookkeeping are "between operations"."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, operation):
            return kind
    return _ELEMENTWISE


def time_by_kind(functions: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of a call of each function, by kind of operation, on the CPU: {name: {kind: seconds}}.

    All run in turn, `rounds` times after one call that is not counted; of each function its fastest call is kept, the
    one that other work disturbed least. A row adds up to that whole call.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines to stderr for each profile
    for function in functions.values():
        function()
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds = dict.fromkeys(KINDS, 0.0)
            for event in _profile(function):
                seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            calls[name].append(seconds)
    return {name: min(of, key=lambda seconds: sum(seconds.values())) for name, of in calls.items()}


def _profile(function: Callable[[], object]) -> Any:
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded, record_function("the whole call"):
        function()
    return recorded.key_averages()


def as_text(seconds: Mapping[str, Mapping[str, float]], baseline: str) -> str:
    """The result of `time_by_kind` as a table: per cent of `baseline`'s whole call, and what the others add to it."""
    first, others = f"% of the {baseline}", [name for name in seconds if name != baseline]
    whole = sum(seconds[baseline].values())
    rows = []
    for kind in (*KINDS, "all"):
        spent = {name: sum(of.values()) if kind == "all" else of[kind] for name, of in seconds.items()}
        row = {first: kind} | {name: f"{100 * value / whole:.1f}" for name, value in spent.items()}
        more = {f"{name} adds": f"{100 * (spent[name] - spent[baseline]) / whole:+.1f}" for name in others}
        rows.append(row | more)
    width = dict.fromkeys(rows[0], 14) | {first: max(map(len, KINDS)) + 2}
    return str(Table(rows, left=[first], width=width, gap=""))
