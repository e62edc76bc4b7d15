"""Scores of documents: entropies, cross-entropy, excess loss."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..routing.adapter import context_length
from ..routing.intervention import token_losses
from ..text.stream import padded_batch
from ..text.tokenizer import bos_eos, encode_documents, in_batches
from .rows import Rows, _plain_tokenizer, _read

Documents = Sequence[Sequence[int]]  # the token ids of each
WINDOW = 64  # tokens, of `normalized_entropy`
LONGEST_CONTEXT = 1024  # tokens; a model that could read more is given windows of this length


def count_entropy(documents: Documents) -> np.ndarray:
    """Entropy of a document's own token counts, in nats: -sum_v (n_v / n) log(n_v / n), bos and eos left out.

    Range 0 (one token repeated) .. log n. Shannon 1948, section 6; knows no model and no order of words. Known bias: to
    long texts, because n tokens cannot have more than log n (rank correlation with length about 0.7 on this series'
    corpora; `length_correlation` measures it on yours).
    """
    return np.array([_entropy(np.unique(ids, return_counts=True)[1]) for ids in documents])


def normalized_entropy(documents: Documents) -> np.ndarray:
    """Count entropy of windows of 64 tokens (each half over the last one), their mean, divided by log 64: 0..1.

    Every window has the same length, so the length of the document drops out; the idea is that of the moving-average
    type-token ratio (Covington and McFall 2010). Dividing the whole text's entropy by log n does not do: it turns the
    bias around (rank correlation with length -0.45 on TinyStories, here +0.27). A text of n < 64 tokens is one window
    and is divided by log n, 0 for a single token. Known bias: those short texts score high; and what repeats at a
    distance of more than 64 tokens is not seen.
    """
    return np.array([_windowed_entropy(np.asarray(ids)) for ids in documents])


def cross_entropy(documents: Documents, model: nn.Module, seq_len: int, batch_size: int) -> np.ndarray:
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


def excess(documents: Documents, model: nn.Module, moe: nn.Module, seq_len: int, batch_size: int) -> np.ndarray:
    """Cross-entropy under the dense `model` minus that under the `moe`, in nats per token: what the experts gained.

    Above 0 where the MoE predicts better. The reducible loss of Mindermann et al. 2022 (arXiv:2206.07137), with the MoE
    in place of a model trained on held-out data. Known bias: to what the MoE was trained on after it left its parent.
    """
    dense, sparse = (cross_entropy(documents, each, seq_len, batch_size) for each in (model, moe))
    return dense - sparse


_FUNCTIONS: tuple[Callable[..., np.ndarray], ...] = (count_entropy, normalized_entropy, cross_entropy, excess)
SCORES = {score.__name__: score for score in _FUNCTIONS}


def score_documents(
    rows: Rows,
    tokenizer: Any,
    score: str = "cross_entropy",
    *,
    model: nn.Module | None = None,
    moe: nn.Module | None = None,
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
    models: dict[str, Any] = {"model": model, "moe": moe}
    needed = [name for name in inspect.signature(SCORES[score]).parameters if name != "documents"]
    for name in needed:
        if name in models and models[name] is None:
            raise ValueError(f"score={score!r} needs {name}=…, a DecoderLM or a transformers causal LM")
    contexts = [context_length(models[name].config) for name in needed if name in models]
    seq_len = seq_len or min([LONGEST_CONTEXT, *contexts])
    options = models | {"seq_len": seq_len, "batch_size": batch_size}
    options = {name: options[name] for name in needed}
    tokenizer = _plain_tokenizer(tokenizer)
    own = slice(0 if bos_eos(tokenizer)[0] is None else 1, -1)

    scores = [np.zeros(0)]
    texts = (text for batch in _read(rows, [column]) for text in batch[column])
    total = len(rows) if hasattr(rows, "__len__") else None
    with tqdm(total=total, desc=score, unit="doc", disable=not progress) as bar:
        for batch in in_batches(texts):
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
    from pandas import Series

    scores_N, lengths_N = Series(np.asarray(scores, np.float64)), Series(np.asarray(lengths))
    if len(scores_N) != len(lengths_N):
        raise ValueError(f"{len(scores_N)} scores for {len(lengths_N)} lengths; give one of each for every document")
    scored_N = np.isfinite(scores_N)
    with np.errstate(invalid="ignore"):
        return float(scores_N[scored_N].rank().corr(lengths_N[scored_N].rank()))


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
