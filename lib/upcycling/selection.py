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

import html
import inspect
import json
import math
import operator
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import write_text
from .config import whole_number
from .intervention import token_losses
from .tokens import TokenStream, _batches, bos_eos, encode_documents, padded_batch

STRATA = ("audience", "format", "seed_data")
ALLOCATIONS = ("proportional", "uniform", "sqrt")
ORDERS = ("highest", "lowest", "middle", "random")
WINDOW = 64  # tokens, of `normalized_entropy`
LONGEST_CONTEXT = 1024  # tokens; a model that could read more is given windows of this length
SHINGLE = 5  # words
PERMUTATIONS = 64  # of a MinHash: the standard error of a similarity of 0.8 is 0.05

# ---------------------------------------------------------------------------------------------------------- scores


def count_entropy(documents: Sequence[Sequence[int]]) -> np.ndarray:
    """Entropy of a document's own token counts, in nats: -sum_v (n_v / n) log(n_v / n), bos and eos left out.

    Range 0 (one token repeated) .. log n. Shannon 1948, section 6; knows no model and no order of words. Known bias: to
    long texts, because n tokens cannot have more than log n (rank correlation with length about 0.7 on this series'
    corpora; `length_correlation` measures it on yours).
    """
    return np.array([_entropy(np.unique(ids, return_counts=True)[1]) for ids in documents])


def normalized_entropy(documents: Sequence[Sequence[int]]) -> np.ndarray:
    """Count entropy of windows of 64 tokens (each half over the last one), their mean, divided by log 64: 0..1.

    Every window has the same length, so the length of the document drops out; the idea is that of the moving-average
    type-token ratio (Covington and McFall 2010). Dividing the whole text's entropy by log n does not do: it turns the
    bias around (rank correlation with length -0.45 on TinyStories, here +0.27). A text of n < 64 tokens is one window
    and is divided by log n, 0 for a single token. Known bias: those short texts score high; and what repeats at a
    distance of more than 64 tokens is not seen.
    """
    return np.array([_windowed_entropy(np.asarray(ids)) for ids in documents])


def cross_entropy(documents: Sequence[Sequence[int]], model, seq_len: int, batch_size: int) -> np.ndarray:
    """Mean nats per token that `model` needs for a document, its eos included; the first token has no prediction.

    The cross-entropy of Shannon 1948; as a score for choosing training data: perplexity in Marion et al. 2023
    (arXiv:2309.04564). Known bias: to what is hard for any model (noise, random names, digits) as much as to what
    could still be learned, and to documents longer than `seq_len`, whose later windows begin without what went before.
    """
    # Each token but the first is a target in exactly one window; windows of like length share a batch.
    windows = [
        (d, ids[i : i + seq_len + 1]) for d, ids in enumerate(documents) for i in range(0, len(ids) - 1, seq_len)
    ]
    windows.sort(key=lambda window: -len(window[1]))
    sums = np.zeros(len(documents))
    for start in range(0, len(windows), batch_size):
        numbers, pieces = zip(*windows[start : start + batch_size])
        tokens_BT, targets_BT = padded_batch(pieces, pad_id=0)
        losses_BT = token_losses(model, tokens_BT[:, :-1], targets_BT[:, :-1])
        np.add.at(sums, list(numbers), losses_BT.double().nansum(1).numpy())
    return sums / (np.array([len(ids) for ids in documents]) - 1)


def excess(documents: Sequence[Sequence[int]], model, moe, seq_len: int, batch_size: int) -> np.ndarray:
    """Cross-entropy under the dense `model` minus that under the `moe`, in nats per token: what the experts gained.

    Above 0 where the MoE predicts better. The reducible loss of Mindermann et al. 2022 (arXiv:2206.07137), with the MoE
    in place of a model trained on held-out data. Known bias: to what the MoE was trained on after it left its parent.
    """
    dense, sparse = (cross_entropy(documents, each, seq_len, batch_size) for each in (model, moe))
    return dense - sparse


SCORES = {
    "count_entropy": count_entropy,
    "normalized_entropy": normalized_entropy,
    "cross_entropy": cross_entropy,
    "excess": excess,
}


def score_documents(
    rows,
    tokenizer,
    score: str = "cross_entropy",
    *,
    model=None,
    moe=None,
    column: str = "text",
    seq_len: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> np.ndarray:
    """scores_N: one of `SCORES` for each row, float64, in row order; `print(SCORES[score].__doc__)` says what it means.

    rows: a Dataset, an IterableDataset, or an iterable of dicts, read once; memory holds one batch of texts.
    tokenizer: ours (`tokenizers.Tokenizer`) or a transformers one that has a fast backend. A model sees a document as
    it stands in a stream (bos + ids + eos); the entropies count its own tokens alone.
    model, moe: DecoderLMs or transformers causal LMs, where the score needs them; on their own device.
    seq_len: a longer document is scored in windows of so many tokens (default: the models' context, at most 1,024).
    batch_size: windows per forward pass.
    A text without tokens has no score: NaN. Raises ValueError for an unknown score, a missing model, a missing column
    (naming those there are) or a vocabulary that does not fit, TypeError for a text that is not a str.
    """
    from tqdm.auto import tqdm

    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; choose one of {', '.join(SCORES)}")
    models = {"model": model, "moe": moe}
    needed = [name for name in inspect.signature(SCORES[score]).parameters if name != "documents"]
    for name in needed:
        if name in models and models[name] is None:
            raise ValueError(f"score={score!r} needs {name}=…, a DecoderLM or a transformers causal LM")
    seq_len = seq_len or min([_context(models[name]) for name in needed if name in models], default=LONGEST_CONTEXT)
    options = models | {"seq_len": seq_len, "batch_size": batch_size}
    options = {name: options[name] for name in needed}
    tokenizer = _plain_tokenizer(tokenizer)
    own = slice(0 if bos_eos(tokenizer)[0] is None else 1, -1)

    scores = [np.zeros(0)]
    texts = (text for batch in _read(rows, [column]) for text in batch[column])
    with tqdm(total=_length(rows), desc=score, unit="doc", disable=not progress) as bar:
        for batch in _batches(texts):
            for start in range(0, len(batch), 128):
                documents = encode_documents(tokenizer, batch[start : start + 128])
                has_tokens = np.array([len(ids[own]) > 0 for ids in documents])
                documents = [ids if "model" in needed else ids[own] for ids in documents if ids[own]]
                scores.append(np.full(len(has_tokens), np.nan))
                if documents:
                    scores[-1][has_tokens] = SCORES[score](documents, **options)
                bar.update(len(has_tokens))
    return np.concatenate(scores)


def length_correlation(scores: Sequence[float], lengths: Sequence[int]) -> float:
    """Spearman's rank correlation of scores and document lengths, -1..1: how far a score only measures length.

    Documents without a score are left out; NaN where all scores or all lengths are equal.
    """
    scores, lengths = np.asarray(scores, np.float64), np.asarray(lengths)
    if scores.shape != lengths.shape:
        raise ValueError(f"{len(scores)} scores for {len(lengths)} lengths; give one of each for every document")
    scored = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(scores[scored]), _ranks(lengths[scored]))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]  # equal values share their mean rank


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def _windowed_entropy(ids: np.ndarray) -> float:
    if len(ids) < 2:
        return 0.0
    width = min(WINDOW, len(ids))
    starts = np.append(np.arange(0, len(ids) - width, WINDOW // 2), len(ids) - width)
    windows = ids[starts[:, None] + np.arange(width)]
    # The entropy is log width minus the mean, over a window's tokens, of the log of how often each occurs in it.
    counts = (windows[:, :, None] == windows[:, None, :]).sum(-1)
    return float(1 - np.log(counts).mean() / math.log(width))


def _context(model) -> int:
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    longest = getattr(config, "seq_len", None) or getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
    return min(longest, LONGEST_CONTEXT)


def _plain_tokenizer(tokenizer):
    """The `tokenizers.Tokenizer` of a transformers tokenizer: a copy, because encoding a stream's way sets it up so."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    return tokenizer


# ---------------------------------------------------------------------------------------------------------- quotas


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


# --------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True, eq=False)
class Selection:
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

    def documents(self, rows):
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

    def stream(self, rows, tokenizer, directory, *, column: str = "text", progress: bool = True) -> TokenStream:
        """The token stream to train on: the chosen documents alone, each with its row number as its document id."""
        stream = TokenStream.build(
            self.documents(rows), _plain_tokenizer(tokenizer), directory, column=column, progress=progress
        )
        return TokenStream(stream.tokens, stream.document_lengths, stream.vocab_size, stream.key, self.indices)

    def save(self, path) -> None:
        """Write all of it to a JSON file, atomically. Raises OSError."""
        content = {"settings": self.settings, "table": self.table, "indices": self.indices.tolist()}
        write_text(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path) -> Selection:
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

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        names = len(self.settings["strata"])
        lines = [
            "  ".join(
                cell.ljust(width) if i < names else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([self._headline(), *lines])

    def _repr_html_(self) -> str:
        header, *body = [[html.escape(cell) for cell in line] for line in self._cells()]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body)
        return (
            f"<p>{html.escape(self._headline())}</p><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        )

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

    def _cells(self) -> list[list[str]]:
        """The table as text, at most the 20 largest strata and a line for the rest."""
        columns = ["documents", "available", "quota", "chosen", "tokens", "duplicates", "mean_score"]
        strata = list(self.settings["strata"])
        lines = [strata + columns]
        by_size = sorted(self.table, key=lambda row: -row["documents"])
        for row in by_size[:20]:
            lines.append([str(row[name]) for name in strata] + [_cell(row[name]) for name in columns])
        if rest := by_size[20:]:
            sums = [None if rest[0][name] is None else sum(row[name] for row in rest) for name in columns[:-1]]
            label = [f"and {len(rest)} more"] + [""] * (len(strata) - 1)
            lines.append(label[: len(strata)] + [_cell(value) for value in sums] + [""])
        return lines


def _cell(value) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def select(
    rows,
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
    cost_N = tokens_N if unit == "tokens" else np.ones(count, np.int64)
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


def documents_read(stream: TokenStream, config, seq_len: int, *, processes: int = 1) -> set[int]:
    """The ids of all documents that `train(model, stream, _, config)` reads, or `continue_pretraining`.

    `seq_len` is the model's context, or the block; `processes` as many as torchrun started. It asks the stream for the
    windows that training asks it for, so an assertion on it catches a selection that was made and then never trained
    on. Ids are row numbers (`TokenStream.document_ids`).
    """
    batch_size = config.batch_size * config.accumulation * processes
    read = set()
    for step in range(config.steps):
        read.update(stream.random_document_ids(batch_size, seq_len, seed=config.seed, step=step).tolist())
    return read


def _check_choice(rows, scores, budget, unit, order, near_duplicates, tokens_per_document) -> None:
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


def _numbers(name: str, values, count: int, dtype) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {values.shape}, but there are {count:,} documents; give one for each")
    if dtype is np.int64 and (values.dtype.kind not in "iu" or values.min() < 0):
        raise ValueError(f"{name} must be whole numbers, none negative, not {values.dtype} from {values.min()}")
    return values.astype(dtype)


def _strata_of(rows, strata: tuple[str, ...], column: str) -> tuple[list[tuple], np.ndarray]:
    """(the strata that occur, sorted by name; the number of each row's stratum)."""
    codes, numbers = {}, [np.zeros(0, np.int32)]
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


def _queue(documents, scores_N, tie_N, order: str) -> np.ndarray:
    """The documents of a stratum in the order in which they will be taken."""
    scores = scores_N[documents]
    if order == "highest":
        scores = -scores
    elif order == "middle" and len(scores):
        scores = np.abs(scores - np.median(scores))
    elif order == "random":
        scores = np.zeros(len(scores))
    return documents[np.lexsort((tie_N[documents], scores))]


def _fill(queues, cost_N, budget: int, allocation: str, unique) -> tuple[list[list[int]], list[int], dict]:
    """Take documents from the queues until the budget is spent: (chosen, near-duplicates passed over, first quotas)."""
    strata = range(len(queues))
    up_to = [np.concatenate([[0], np.cumsum(cost_N[queue])]) for queue in queues]  # cost of the first i of a queue
    place, chosen, passed_over = [0 for _ in strata], [[] for _ in strata], [0 for _ in strata]
    owed = [0 for _ in strata]  # granted and not yet spent
    left, first_quotas = budget, None

    def prepare():
        """Hash what strata can reach now and a tenth more, so that a stream is not read again for each duplicate."""
        if unique is not None:
            reach = [np.searchsorted(up_to[s], up_to[s][place[s]] + 1.1 * max(owed[s], 0), "right") for s in strata]
            unique.prepare(int(n) for s in strata for n in queues[s][place[s] : reach[s] + 10])

    def take(s: int, limit: int, look_at: int) -> int:
        """Take the next documents of a stratum while they cost no more than `limit`; returns what they cost."""
        spent, stop = 0, min(place[s] + look_at, len(queues[s]))
        while place[s] < stop:
            document = int(queues[s][place[s]])
            if spent + cost_N[document] > limit or not (unique is None or unique.is_prepared(document)):
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


# --------------------------------------------------------------------------------------------------- near-duplicates


class _Unique:
    """Which documents are not nearly the same as one added before, by datasketch's MinHash and its LSH index."""

    def __init__(self, rows, column: str, threshold: float):
        from datasketch import MinHashLSH

        self.rows, self.column, self.threshold = rows, column, threshold
        # Few false negatives: what the index finds is compared again, so that false positives cost only time.
        self.index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self.prepared, self.added = {}, {}

    def prepare(self, numbers: Iterable[int]) -> None:
        """Read and hash the texts of these rows, in one pass."""
        from datasketch import MinHash

        wanted = sorted(number for number in numbers if number not in self.prepared)
        texts = _texts(self.rows, self.column, wanted)
        hashes = MinHash.generator(map(_shingles, texts), num_perm=PERMUTATIONS, hashfunc=operator.index)
        self.prepared.update(zip(wanted, hashes))

    def is_prepared(self, number: int) -> bool:
        return number in self.prepared

    def add(self, number: int) -> bool:
        """Add the document unless it is a near-duplicate; returns whether it was added."""
        minhash = self.prepared.pop(number)
        for other in self.index.query(minhash):
            if (self.added[other] == minhash.hashvalues).mean() >= self.threshold:
                return False
        self.index.insert(number, minhash, check_duplication=False)
        self.added[number] = minhash.hashvalues
        return True


def _shingles(text: str) -> list[int]:
    """A 32-bit hash of each run of 5 words (of a shorter text: of all its words), in lower case."""
    words = np.array([zlib.crc32(word) for word in text.lower().encode("utf-8", "surrogatepass").split()], np.uint32)
    if len(words) < SHINGLE:
        words = np.append(words, np.zeros(SHINGLE - len(words), np.uint32))
    runs = len(words) - SHINGLE + 1
    hashes = np.zeros(runs, np.uint32)
    for i in range(SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + words[i : i + runs]  # FNV's prime; uint32 wraps around
    return hashes.tolist()


def _texts(rows, column: str, numbers: list[int]) -> Iterator[str]:
    """The texts of the rows with these ascending numbers; raises TypeError for one that is not a str."""
    if hasattr(rows, "select"):
        texts = (text for batch in _read(rows.select(numbers), [column]) for text in batch[column])
    elif isinstance(rows, Sequence):
        texts = (batch[column][0] for number in numbers for batch in _read([rows[number]], [column]))
    else:
        wanted = set(numbers)
        everything = (text for batch in _read(rows, [column]) for text in batch[column])
        texts = (text for number, text in enumerate(everything) if number in wanted)
    for number, text in zip(numbers, texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is {type(text).__name__}, not str; give the text column as column=…")
        yield text


# -------------------------------------------------------------------------------------------------------------- rows


def _read(rows, columns: Sequence[str], size: int = 1000) -> Iterator[dict[str, list]]:
    """The columns of rows, whatever kind of rows they are, in batches {column: values}."""
    if isinstance(rows, Mapping):
        raise ValueError(f"rows has splits, {', '.join(map(str, rows))}: give one of them, as in corpus['train']")
    if hasattr(rows, "iter"):  # a Dataset or an IterableDataset
        if rows.column_names is not None:
            _check_columns(columns, rows.column_names)
            rows = rows.select_columns(list(columns))
        for batch in rows.with_format(None).iter(batch_size=size):
            _check_columns(columns, batch)
            yield batch
        return
    batch = {name: [] for name in columns}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is {type(row).__name__}, not a dict; give rows with columns, not bare texts")
        _check_columns(columns, row)
        for name in columns:
            batch[name].append(row[name])
        if len(batch[columns[0]]) == size:
            yield batch
            batch = {name: [] for name in columns}
    if batch[columns[0]]:
        yield batch


def _check_columns(columns: Iterable[str], there: Iterable[str]) -> None:
    if missing := [name for name in columns if name not in there]:
        raise ValueError(f"there is no column {missing[0]!r}; the columns are {', '.join(there)}")


def _length(rows) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None
