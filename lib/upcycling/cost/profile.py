"""Where does the time go? Torch's profile of a step, added up by kind of operation.

    time_by_kind({"MoE": moe_step, "dense": dense_step})      # {"MoE": {"matrix products": seconds, ...}, ...}

The profiler names each operation that torch runs and the time spent in it, less that of the operations it calls. Its
clock is the wall's, and it writes down every one of thousands, which takes time itself, most where operations are
small: read shares from it, and take times from `upcycling.bench`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.resources import files

from ..tables import Table

_DATA = json.loads((files(__package__) / "profile.json").read_text(encoding="utf-8"))
KINDS: tuple[str, ...] = tuple(_DATA["kinds"])
# The first that is found in an operation's name decides; views, allocations, Python and autograd's bookkeeping are
# "between operations", and what no pattern finds computes elementwise.
_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in _DATA["patterns"]]


def kind_of(operation: str) -> str:
    """Which of `KINDS` a name of torch's profile belongs to; Python, views and bookkeeping are "between operations"."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(operation)), "norms and elementwise")


def time_by_kind(functions: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of a call of each function, by kind of operation, on the CPU: {name: {kind: seconds}}.

    All run in turn, `rounds` times after one call that is not counted; of each function its fastest call is kept, the
    one that other work disturbed least. A row adds up to that whole call.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines to stderr for each profile
    for function in functions.values():
        function()
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds = dict.fromkeys(KINDS, 0.0)
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
                with record_function("the whole call"):
                    function()
            for event in recorded.key_averages():
                seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            calls[name].append(seconds)
    return {name: min(of, key=lambda seconds: sum(seconds.values())) for name, of in calls.items()}


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
