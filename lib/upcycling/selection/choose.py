"""Which documents are worth training on? Score them, share a budget over strata, choose, and prove what training reads.

    scores = score_documents(rows, tokenizer, "cross_entropy", model=dense)
    selection = select(rows, scores, budget=100_000, unit="tokens", tokens_per_document=stream.document_lengths)
    chosen = selection.stream(rows, tokenizer, directory)             # a TokenStream that knows its rows
    assert documents_read(chosen, config, seq_len) <= set(selection.indices)

`rows` is a `datasets.Dataset`, a streamed `IterableDataset`, or a list of dicts. A document is named by its row number,
counted from 0. What is kept in memory for each document of the corpus: its score, its cost, its stratum, its place
(about 50 bytes together), and 1 to 4 kB for each that was chosen where near-duplicates are removed; never the texts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import whole_number
from ..files import write_text
from ..tables import ShownAsTable, Table
from ..text.stream import TokenStream
from ..training.config import TrainConfig
from .near_duplicates import _Unique
from .quotas import quotas
from .rows import Rows, _plain_tokenizer, _read

STRATA = ("audience", "format", "seed_data")
ORDERS = ("highest", "lowest", "middle", "random")


@dataclass(frozen=True, eq=False, repr=False)
class Selection(ShownAsTable):
    """The rows that were chosen, and how. Prints as a table, in a notebook too.

    indices: row numbers, sorted, int64. table: one dict per stratum, in the order of their names: the strata's columns,
    documents (all of the corpus), available (those with a score), quota (in the budget's unit), chosen (documents),
    tokens (None without `tokens_per_document`), duplicates (near-duplicates of a chosen document, passed over),
    mean_score (of the chosen ones; None where there are none). settings: the arguments of `select`, and `rows`, the
    corpus's size.
    """

    indices: np.ndarray
    table: list[dict]
    settings: dict

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def tokens(self) -> int | None:
        """Tokens of the chosen documents together; None without `tokens_per_document`."""
        known = all(row["tokens"] is not None for row in self.table)
        return sum(row["tokens"] for row in self.table) if known else None

    @property
    def shortfall(self) -> int:
        """What of the budget was not spent, in its unit."""
        return self.settings["budget"] - (self.tokens if self.settings["unit"] == "tokens" else len(self))

    def documents(self, rows: Rows) -> Any:
        """The chosen rows, in row order, as a `datasets.Dataset`; those of a stream are held in memory.

        Raises ValueError if `rows` are not as many as the selection was made from.
        """
        if hasattr(rows, "select"):
            chosen, count = rows, len(rows)
        else:
            wanted, chosen, count = set(self.indices.tolist()), [], 0
            for row in rows:
                if count in wanted:
                    chosen.append(row)
                count += 1
        if count != self.settings["rows"]:
            raise ValueError(
                f"rows are {count}, but the selection was made from {self.settings['rows']}: give the same"
            )
        if hasattr(rows, "select"):
            return chosen.select(self.indices)
        from datasets import Dataset

        return Dataset.from_list(chosen)

    def stream(
        self, rows: Rows, tokenizer: Any, directory: Path | str, *, column: str = "text", progress: bool = True
    ) -> TokenStream:
        """The token stream to train on: the chosen documents alone, each with its row number as its document id."""
        stream = TokenStream.build(
            self.documents(rows), _plain_tokenizer(tokenizer), directory, column=column, progress=progress
        )
        return TokenStream(stream.tokens, stream.document_lengths, stream.vocab_size, stream.key, self.indices)

    def save(self, path: Path | str) -> None:
        """Write all of it to a JSON file, atomically. Raises OSError."""
        content = {"settings": self.settings, "table": self.table, "indices": self.indices.tolist()}
        write_text(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Selection:
        """Read a file of `save`. Raises FileNotFoundError, and ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(np.array(content["indices"], np.int64), content["table"], content["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a selection that Selection.save wrote ({error!r}); select again"
            ) from error

    def __repr__(self) -> str:
        return f"Selection({self._headline()})"

    def _headline(self) -> str:
        s = self.settings
        tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
        text = (
            f"{len(self):,} of {s['rows']:,} documents{tokens}; budget {s['budget']:,} {s['unit']}, "
            f"{s['allocation']} over {len(self.table):,} strata, order {s['order']}, seed {s['seed']}"
        )
        if self.shortfall:
            text += f"; {self.shortfall:,} {s['unit']} not spent"
        return text

    def _as_table(self) -> Table:
        """At most the 20 largest strata, and a line for the rest."""
        strata = list(self.settings["strata"])
        columns = dict.fromkeys(["documents", "available", "quota", "chosen", "tokens", "duplicates"], ",")
        rows = sorted(self.table, key=lambda row: -row["documents"])
        if rest := rows[20:]:
            sums = {name: None if rest[0][name] is None else sum(row[name] for row in rest) for name in columns}
            rows = [*rows[:20], dict.fromkeys(strata, "") | dict(zip(strata, [f"and {len(rest)} more"])) | sums]
        shown = [*strata, *columns, "mean_score"]
        formats = dict.fromkeys(strata, str) | columns
        return Table(rows, shown, left=strata, formats=formats, strip=True, above=[self._headline()])


def select(
    rows: Rows,
    scores: Sequence[float] | None,
    *,
    budget: int,
    unit: str = "documents",
    strata: Sequence[str] = STRATA,
    allocation: str = "proportional",
    order: str = "highest",
    near_duplicates: float | None = 0.8,
    tokens_per_document: Sequence[int] | None = None,
    column: str = "text",
    seed: int = 0,
) -> Selection:
    """Choose documents for `budget`, in documents or in tokens, shared over the strata that occur (`quotas`).

    order: in each stratum the documents with the highest score come first, the lowest, those nearest to the stratum's
    median (middle), or any (random; `scores` may then be None). Ties, and random, by `seed`; all else is fixed.
    near_duplicates: a document is passed over when its Jaccard similarity to a chosen one, over 5-word shingles in
    lower case and estimated by MinHash, is at least this (Broder 1997); None: not checked, and no text is read.
    unit="tokens": a stratum takes documents while the next one fits into its quota; then the strata furthest below
    theirs take one more each, until no stratum's next document fits into what is left. The budget is never exceeded,
    and falls short by less than the shortest of those. `tokens_per_document`: `TokenStream.document_lengths`, say.
    Stated fallbacks: a score that is not finite is none, and its document is never chosen; None in a stratum's column
    is a stratum of its own; a stratum that runs short gives what it has, the others the rest; a budget larger than the
    corpus takes all of it, with a warning.
    Streams are read once for the strata and then, where near-duplicates are removed, usually one to three times more
    (each pass hashes only documents that can be chosen).
    Raises ValueError for no rows, missing columns, numbers that do not fit, unknown names; TypeError for texts that are
    not str, and for rows that cannot be read a second time.
    """
    strata = (strata,) if isinstance(strata, str) else tuple(strata)
    budget = whole_number("budget", budget)
    _check_choice(rows, scores, budget, unit, order, near_duplicates, tokens_per_document)
    quotas({}, 0, allocation)  # an unknown name is said before the corpus is read
    names, stratum_N = _strata_of(rows, strata, column)
    count = len(stratum_N)
    scores_N = np.zeros(count) if scores is None else _numbers("scores", scores, count, np.float64)
    tokens_N = None
    if tokens_per_document is not None:
        tokens_N = _numbers("tokens_per_document", tokens_per_document, count, np.int64)
    cost_N = np.ones(count, np.int64) if tokens_N is None or unit != "tokens" else tokens_N
    scored_N = np.isfinite(scores_N)
    if not scored_N.any():
        raise ValueError("no document has a finite score; score the texts again, or check that they are not empty")
    if budget > cost_N[scored_N].sum():
        warnings.warn(
            f"budget={budget:,} is more than the corpus has ({cost_N[scored_N].sum():,} {unit}): all of it is taken",
            stacklevel=2,
        )

    by_stratum = np.split(np.argsort(stratum_N, kind="stable"), np.cumsum(np.bincount(stratum_N))[:-1])
    tie_N = np.random.default_rng(seed).permutation(count)
    queues = [_queue(documents[scored_N[documents]], scores_N, tie_N, order) for documents in by_stratum]
    unique = None if near_duplicates is None else _Unique(rows, column, near_duplicates)
    chosen, passed_over, first_quotas = _fill(queues, cost_N, budget, allocation, unique)
    table = []
    for s, name in enumerate(names):
        documents = np.array(chosen[s], np.int64)
        table.append(
            dict(zip(strata, name))
            | {
                "documents": len(by_stratum[s]),
                "available": len(queues[s]),
                "quota": first_quotas[s],
                "chosen": len(documents),
                "tokens": None if tokens_N is None else int(tokens_N[documents].sum()),
                "duplicates": passed_over[s],
                "mean_score": float(scores_N[documents].mean()) if len(documents) and scores is not None else None,
            }
        )
    settings = {"rows": count, "budget": budget, "unit": unit, "strata": list(strata), "allocation": allocation}
    settings |= {"order": order, "near_duplicates": near_duplicates, "seed": seed}
    return Selection(np.sort(np.concatenate(chosen).astype(np.int64)), table, settings)


def documents_read(stream: TokenStream, config: TrainConfig, seq_len: int) -> set[int]:
    """The ids of all documents that `train(model, stream, _, config)` reads in one process, or `continue_pretraining`.

    `seq_len` is the model's context, or the block. It asks the stream for the windows that training asks it for, so an
    assertion on it catches a selection that was made and then never trained on. Ids are row numbers
    (`TokenStream.document_ids`).
    """
    batch_size = config.batch_size * config.accumulation
    read = set()
    for step in range(config.steps):
        read.update(stream.random_document_ids(batch_size, seq_len, seed=config.seed, step=step).tolist())
    return read


def _check_choice(
    rows: Rows, scores: Any, budget: int, unit: str, order: str, near_duplicates: float | None, tokens_per_document: Any
) -> None:
    if budget < 1:
        raise ValueError(f"budget={budget} {unit}: nothing could be chosen; give at least 1")
    for name, value, known in (("unit", unit, ("documents", "tokens")), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if scores is None and order != "random":
        raise ValueError(f"order={order!r} needs scores, one for each document; only 'random' does without")
    if unit == "tokens" and tokens_per_document is None:
        raise ValueError(
            "unit='tokens' needs tokens_per_document, the length of each document: "
            "TokenStream.document_lengths, or Cosmopedia's column text_token_length"
        )
    if near_duplicates is not None and not 0 < near_duplicates <= 1:
        raise ValueError(f"near_duplicates={near_duplicates!r}: give a similarity above 0 and up to 1, or None")
    if near_duplicates is not None and isinstance(rows, Iterator):
        raise TypeError(
            "rows can be read only once, and finding near-duplicates reads them again: give a Dataset, an "
            "IterableDataset or a list, or near_duplicates=None"
        )


def _numbers(name: str, values: Any, count: int, dtype: type) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {values.shape}, but there are {count:,} documents; give one for each")
    if dtype is np.int64 and (values.dtype.kind not in "iu" or values.min() < 0):
        raise ValueError(f"{name} must be whole numbers, none negative, not {values.dtype} from {values.min()}")
    return values.astype(dtype)


def _strata_of(rows: Rows, strata: tuple[str, ...], column: str) -> tuple[list[tuple], np.ndarray]:
    """(the strata that occur, sorted by name; the number of each row's stratum)."""
    codes: dict[tuple, int] = {}
    numbers = [np.zeros(0, np.int32)]
    for batch in _read(rows, strata or (column,)):
        size = len(next(iter(batch.values())))
        keys = zip(*(batch[name] for name in strata)) if strata else [()] * size
        numbers.append(np.array([codes.setdefault(key, len(codes)) for key in keys], np.int32))
    if not codes:
        raise ValueError("rows are empty; there is nothing to select from")
    names = sorted(codes, key=lambda key: tuple(map(str, key)))
    place = np.empty(len(names), np.int32)
    place[[codes[name] for name in names]] = np.arange(len(names))
    return names, place[np.concatenate(numbers)]


def _queue(documents: np.ndarray, scores_N: np.ndarray, tie_N: np.ndarray, order: str) -> np.ndarray:
    """The documents of a stratum in the order in which they will be taken."""
    scores = scores_N[documents]
    if order == "highest":
        scores = -scores
    elif order == "middle" and len(scores):
        scores = np.abs(scores - np.median(scores))
    elif order == "random":
        scores = np.zeros(len(scores))
    return documents[np.lexsort((tie_N[documents], scores))]


def _fill(
    queues: list[np.ndarray], cost_N: np.ndarray, budget: int, allocation: str, unique: _Unique | None
) -> tuple[list[list[int]], list[int], dict]:
    """Take documents from the queues until the budget is spent: (chosen, near-duplicates passed over, first quotas)."""
    strata = range(len(queues))
    up_to = [np.concatenate([[0], np.cumsum(cost_N[queue])]) for queue in queues]  # cost of the first i of a queue
    chosen: list[list[int]] = [[] for _ in strata]
    place, passed_over, owed = ([0 for _ in strata] for _ in range(3))  # owed: granted and not yet spent
    left = budget
    first_quotas: dict[int, int] = {}

    def prepare() -> None:
        """Hash what strata can reach now and a tenth more, so that a stream is not read again for each duplicate."""
        if unique is not None:
            reach = [np.searchsorted(up_to[s], up_to[s][place[s]] + 1.1 * max(owed[s], 0), "right") for s in strata]
            unique.prepare(int(n) for s in strata for n in queues[s][place[s] : reach[s] + 10])

    def take(s: int, limit: int, look_at: int) -> int:
        """Take the next documents of a stratum while they cost no more than `limit`; returns what they cost."""
        spent, stop = 0, min(place[s] + look_at, len(queues[s]))
        while place[s] < stop:
            document = int(queues[s][place[s]])
            if spent + cost_N[document] > limit or not (unique is None or document in unique.prepared):
                break
            place[s] += 1
            if unique is None or unique.add(document):
                chosen[s].append(document)
                spent += int(cost_N[document])
            else:
                passed_over[s] += 1
        owed[s] -= spent
        return spent

    while True:
        # A stratum is owed no more than it still has: what it could not spend is granted to the others.
        remaining = [int(up_to[s][-1] - up_to[s][place[s]]) for s in strata]
        owed = [min(owed[s], remaining[s]) for s in strata]
        grants = quotas({s: remaining[s] - owed[s] for s in strata}, left - sum(owed), allocation)
        first_quotas = first_quotas or grants
        owed = [owed[s] + grants[s] for s in strata]
        before = list(place)
        prepare()
        left -= sum(take(s, owed[s], len(queues[s])) for s in strata)
        if place == before:
            break
    while True:  # in tokens: no next document fits into what its stratum is owed; those that are owed most come first
        before = list(place)
        prepare()
        for s in sorted(strata, key=lambda s: -owed[s]):
            left -= take(s, left, 1)
        if place == before:
            return chosen, passed_over, first_quotas
