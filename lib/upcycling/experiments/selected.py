"""Is a chosen quarter of the corpus worth more than a random one? Every score against random, over several seeds.

An arm chooses documents for a budget of tokens (by default a quarter of the training split), shared over the strata
(`selection.STRATA`, those of them that the corpus has). The series' parent, upcycled as in `Series.moe`, is trained on
them and on nothing else, for as many updates as reading the budget once takes; the dense control stays dense. All arms
have the same budget and updates. A seed draws the router, the order of the windows, and the random choice; the parent
is that of seed 0, and so is the MoE whose gain over it is the score `excess`.

The parent was trained on this corpus before, so this is *continued* pretraining: what an arm can win is what the parent
has not yet learned of it. The result is written after each run; an interrupted study goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..core.transfer import upcycle
from ..routing.load import evaluate_routing
from ..selection.choose import STRATA, Selection, documents_read, select
from ..selection.scores import score_documents
from ..tables import Table
from ..training.evaluation import evaluate
from .results import mean_and_spread, paired, plus_minus, values
from .series import Series, artifacts_dir
from .store import begin, save
from .workers import torch_threads

REFERENCE = "random"


@dataclass(frozen=True)
class Choice:
    """How an arm chooses its documents: `score` None is at random; `dense` trains the parent on as it is."""

    name: str
    score: str | None = None
    order: str = "highest"
    allocation: str = "proportional"
    dense: bool = False


CHOICES = (
    Choice("random"),
    Choice("random, strata alike", allocation="uniform"),
    Choice("highest cross-entropy", "cross_entropy"),
    Choice("lowest cross-entropy", "cross_entropy", "lowest"),
    Choice("highest excess", "excess"),
    Choice("highest count entropy", "count_entropy"),
    Choice("highest normalized entropy", "normalized_entropy"),
    Choice("dense control, random", dense=True),
)


def budget_of(series: Series, fraction: float = 0.25) -> tuple[int, int]:
    """(tokens, updates): `fraction` of the training split, and the updates that read so many tokens once.

    Raises ValueError for a fraction that is not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} of the training tokens; choose a number above 0 and up to 1")
    config, tokens = series.preset.sparse, int(fraction * len(series.train_stream))
    return tokens, -(-tokens // (config.batch_size * config.accumulation * series.preset.model.seq_len))


def choose(series: Series, choice: Choice, budget: int, seed: int, scores=None) -> Selection:
    """The documents of the training split that `choice` takes for `budget` tokens; `scores` as its score gives them."""
    rows = series.corpus["train"]
    strata = [name for name in STRATA if name in rows.column_names]
    return select(
        rows, scores, budget=budget, unit="tokens", strata=strata, allocation=choice.allocation,
        order="random" if choice.score is None else choice.order, seed=seed,
        tokens_per_document=series.train_stream.document_lengths,
    )  # fmt: skip


def run(series: Series, choice: Choice, selection: Selection, seed: int, updates: int, progress: bool = False) -> dict:
    """Train on `selection` alone (or load that run); losses and balance on the whole validation split."""
    rows = series.corpus["train"]
    stream = selection.stream(rows, series.tokenizer, artifacts_dir() / "streams", progress=False)
    config = replace(series.preset.sparse, steps=updates, seed=seed + 1000, eval_every=max(updates // 4, 1))
    read = documents_read(stream, config, series.preset.model.seq_len)
    if foreign := read.difference(selection.indices.tolist()):
        raise AssertionError(f"{len(foreign)} documents that were not selected are read")

    model, _ = series.dense_parent(progress=progress, verbose=False)
    if not choice.dense:
        model = upcycle(model, series.preset.moe, seed=seed)
    result = series.trained(model, config, "selected", train_stream=stream, progress=progress, verbose=False)
    row = {
        "arm": choice.name,
        "seed": seed,
        "val_loss": result.final_loss,
        "history": [[row["step"], row["val_loss"]] for row in result.history if row["val_loss"] is not None],
        "per_domain": {name: evaluate(model, stream) for name, stream in series.domain_streams().items()},
        "documents": len(selection),
        "documents_read": len(read),
        "tokens": selection.tokens,
        "chosen_by_stratum": [stratum["chosen"] for stratum in selection.table],
        "cpu_seconds": result.history[-1]["cpu_seconds"],
    }
    if "domain" in rows.column_names:
        domains = np.array(rows["domain"])
        row["tokens_by_domain"] = {
            name: int(stream.document_lengths[domains[selection.indices] == name].sum())
            for name in np.unique(domains).tolist()
        }
    if not choice.dense:
        row["balance"] = evaluate_routing(model, series.validation_stream).balance
    return row


def study(
    series: Series,
    seeds: Sequence[int] = (0, 1, 2),
    choices: Sequence[Choice] = CHOICES,
    *,
    fraction: float = 0.25,
    out: Path | None = None,
    progress: bool = True,
) -> dict:
    """All `choices` for all `seeds`, with date and setting; written to `out` after each run, whose rows are kept."""
    budget, updates = budget_of(series, fraction)
    with torch_threads():
        parent, parent_run = series.dense_parent(progress=progress, verbose=False)
        result = begin(series, out, "rows", fraction=fraction, budget=budget, updates=updates)
        result["parent_loss"] = parent_run.final_loss
        done = {(row["arm"], row["seed"]) for row in result["rows"]}
        scores = {None: None}
        for seed, choice in ((seed, choice) for seed in seeds for choice in choices if (choice.name, seed) not in done):
            if choice.score not in scores:
                models = {"model": parent}
                if choice.score == "excess":
                    models["moe"] = series.moe(0, progress=progress, verbose=False)[0]
                rows, name = series.corpus["train"], choice.score
                scores[name] = score_documents(rows, series.tokenizer, name, progress=progress, **models)
            selection = choose(series, choice, budget, seed, scores[choice.score])
            result["rows"].append(run(series, choice, selection, seed, updates, progress))
            loss = result["rows"][-1]["val_loss"]
            print(f"seed {seed}  {choice.name}: {len(selection):,} documents, {loss:.4f}", flush=True)
            save(result, out)
    return result


# ---------------------------------------------------------------------------------------------------------- tables


def summarize(result: dict) -> list[dict]:
    """One row per arm: documents, and (mean, spread over seeds) of the loss, of B (None for a dense arm), and of what

    they (`difference`) and each domain's loss (`per_domain`) differ from random at the same seed.
    """

    def mean(arm: str, measure: str) -> tuple[float, float]:
        return mean_and_spread(list(values(result, arm, measure).values()))

    def difference(arm: str, measure: str = "val_loss") -> tuple[float, float]:
        return paired(values(result, arm, measure), values(result, REFERENCE, measure))

    return [
        {
            "arm": arm,
            "documents": mean(arm, "documents")[0],
            "loss": mean(arm, "val_loss"),
            "balance": None if None in values(result, arm, "balance").values() else mean(arm, "balance"),
            "difference": difference(arm),
            "per_domain": {name: difference(arm, name) for name in result["rows"][0]["per_domain"]},
        }
        for arm in dict.fromkeys(row["arm"] for row in result["rows"])
    ]


def table(result: dict) -> str:
    """The result as text: a line for each arm, then what each domain's loss differs from random."""
    setting, summary, seeds = result["setting"], summarize(result), {row["seed"] for row in result["rows"]}
    rows, by_domain = [], []
    for row in summary:
        line = {"arm": row["arm"], "documents": row["documents"], "val loss": row["loss"][0], "± seeds": row["loss"][1]}
        if row["arm"] != REFERENCE:
            line["less random  ± seeds"] = "{:+.4f}  {:>7.4f}".format(*row["difference"])
            by_domain.append({"": row["arm"]} | {k: plus_minus(*v, "+") for k, v in row["per_domain"].items()})
        rows.append(line | ({} if row["balance"] is None else {"B": row["balance"][0]}))
    columns = ["arm", "documents", "val loss", "± seeds", "less random  ± seeds", "B"]
    formats = {"documents": ",.0f", "val loss": ".4f", "± seeds": ".4f", "B": ".4f"}
    budget = f"{setting['budget']:,} tokens chosen, {setting['updates']} updates, {len(seeds)} seeds"
    above = [f"{budget}; the parent's loss {result['parent_loss']:.4f}"]
    text = str(Table(rows, columns, left=["arm"], width={"B": 6}, formats=formats, strip=True, above=above))
    if domains := summary[0]["per_domain"]:
        width = {"": max(len(row["arm"]) for row in rows)} | dict.fromkeys(domains, 19)
        above = ["\n\nloss less random's, nats per token, mean ± spread over seeds:"]
        text += str(Table(by_domain, ["", *domains], left=[""], width=width, gap="", above=above))
    return text
