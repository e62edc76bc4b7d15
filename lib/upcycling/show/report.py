"""One HTML file with a token explorer: `save_report(trace, path)`, to send a routing result to a colleague.

The file needs no kernel and no network: style and script (`assets/report.*`) and data are in it, and its content
security policy forbids everything else. All text is data: it travels as JSON and reaches the page as text nodes, never
as markup.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from ..files import write_text
from ..routing.load import load_report
from ..routing.metrics import domain_specialization
from ..routing.typed_text import token_texts
from .style import expert_colour, ink

_MOST_VALUES = 3_000_000  # probabilities in one file: some 10 MB
_MOST_LABELS = 50


def save_report(
    trace,
    path,
    *,
    tokenizer=None,
    labels: Sequence | None = None,
    title: str = "Routing report",
    max_tokens: int = 2000,
) -> Path:
    """Write an explorer of `trace` (a `RoutingTrace`) to `path` as one self-contained HTML file; returns the path.

    `tokenizer` (of tokenizers or transformers) turns ids into text, without it the ids are shown. `labels` has a name
    (a domain, a token class) for each of the trace's N tokens, for the table expert x label. The first `max_tokens`
    tokens, in the order of the sequences, can be explored (fewer where layers x experts x tokens would exceed three
    million, and the page says so); loads and table count all.
    Probabilities and weights are rounded to thousandths. The file is replaced atomically.
    Raises ValueError for an empty trace, one with not-a-numbers, labels that do not fit, or `max_tokens` below 1;
    OSError from writing.
    """
    if len(trace) == 0:
        raise ValueError("the trace is empty; run the model inside `with record_routing(model) as trace`")
    if labels is not None and len(labels) != len(trace):
        raise ValueError(f"{len(labels)} labels but the trace has {len(trace)} tokens; give one for each")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} leaves nothing to explore; choose at least 1")
    data = _report_data(trace, tokenizer, labels, str(title), max_tokens)
    write_text(path, _page(data))
    return Path(path)


def _report_data(trace, tokenizer, labels, title: str, max_tokens: int) -> dict:
    """What the page shows, as JSON can hold it; the first indices of the nested lists are layer and token."""
    report = load_report(trace)
    layers, experts, count = list(trace.layers), trace.num_experts, len(trace)
    room = max(1, min(max_tokens, _MOST_VALUES // (len(layers) * experts)))
    # decoding with a cache records its sequences a token at a time, by turns
    order_N = np.lexsort((trace.position, trace.sequence))[:room]
    shown = trace.select(torch.from_numpy(order_N))
    ids = shown.tokens.tolist()
    data = {
        "title": title,
        "layers": layers,
        "experts": experts,
        "top_k": trace.top_k,
        "total": count,
        "ids": ids,
        "texts": [str(token) for token in ids] if tokenizer is None else token_texts(tokenizer, ids),
        "sequence": shown.sequence.tolist(),
        "position": shown.position.tolist(),
        "chosen": shown.expert_ids.tolist(),
        "weights": _thousandths(shown.weights),
        "probabilities": _thousandths(shown.probabilities),
        "loads": report.load_LE.tolist(),
        "collapsed": list(report.collapsed_layers),
        "alarm": report.alarm,
        "colours": [[expert_colour(e), ink(expert_colour(e))] for e in range(experts)],
    }
    if labels is not None:
        labels = labels.tolist() if hasattr(labels, "tolist") else labels
        data |= _label_data(trace, list(map(str, labels)), order_N)
    return data


def _label_data(trace, labels: list[str], order_N) -> dict:
    names = sorted(set(labels))
    if len(names) > _MOST_LABELS:
        raise ValueError(f"there are {len(names)} different labels; a table holds at most {_MOST_LABELS}")
    number = {name: i for i, name in enumerate(names)}
    numbers_N = torch.tensor([number[label] for label in labels])
    share_LCE = domain_specialization(trace.expert_ids, numbers_N, trace.num_experts, len(names))
    return {"labels": names, "label": numbers_N[order_N].tolist(), "shares": _thousandths(share_LCE)}


def _thousandths(values) -> list:
    return np.rint(np.asarray(values, dtype=np.float64) * 1000).astype(int).tolist()


def _page(data: dict) -> str:
    # in ASCII, so that U+2028 and lone surrogates are escaped; < > & as well, so that nothing ends the script element
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    frame, style, script = (
        files(__package__).joinpath("assets", f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    return (
        frame.replace("@STYLE-HASH@", _hash(style))
        .replace("@SCRIPT-HASH@", _hash(script))
        .replace("@STYLE@", style)
        .replace("@SCRIPT@", script)
        .replace("@DATA@", text)  # last: nothing is replaced inside it
    )


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
