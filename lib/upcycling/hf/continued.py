"""Continued pretraining of an upcycled model: train it on, and report loss and balance over the whole validation set.

    model (a DecoderLM with experts, or a transformers causal MoE), two token streams, a TrainConfig
      -> can its routers learn? -> evaluate -> train the chosen parameters -> evaluate -> ContinuedResult

The loop is `training.train` for both kinds of model; a transformers MoE enters it as a `TransformersLM`.
Shapes: L MoE layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checks import _one_of
from ..routing.adapter import TransformersLM, as_decoder_lm, block_size
from ..routing.gradient import Diagnosis, diagnose_router, expert_weights, router_weights
from ..routing.hf_routers import find_routers
from ..routing.load import RoutingEvaluation, evaluate_routing
from ..tables import ShownAsTable, Table
from ..text.stream import TokenStream
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.records import TrainResult

PARAMETERS = ("all", "router", "experts")


@dataclass(frozen=True, repr=False)
class ContinuedResult(ShownAsTable):
    """What continued pretraining did; renders as a table of before and after over the whole validation set."""

    before: RoutingEvaluation
    after: RoutingEvaluation
    training: TrainResult
    diagnosis: Diagnosis  # of the routers as they were given
    parameters: str
    trained: int  # parameters that were trained,
    total: int  # of so many
    block: int  # tokens in a sequence

    def rows(self) -> list[dict]:
        """One dict a measure, with its values before and after: the rows of the table."""
        names = {
            "cross-entropy (nats)": "cross_entropy",
            "perplexity": "perplexity",
            "balance B": "balance",
            "balanced perplexity": "balanced_perplexity",
        }
        found = {label: (getattr(self.before, name), getattr(self.after, name)) for label, name in names.items()}
        for what, name in (("balance loss", "aux_loss_L"), ("B", "balance_L")):
            pairs = zip(self.after.load.layers, getattr(self.before, name), getattr(self.after, name), strict=True)
            found |= {f"layer {layer}: {what}": (float(before), float(after)) for layer, before, after in pairs}
        return [{"": label, "before": f"{a:.4f}", "after": f"{b:.4f}"} for label, (a, b) in found.items()]

    def _notes(self) -> list[str]:
        last, load = self.training.history[-1], self.after.load
        notes = [
            f"trained {self.parameters}: {self.trained:,} of {self.total:,} parameters, {last['step']} updates, "
            f"{last['tokens']:,} tokens in blocks of {self.block}",
            f"validation: {load.num_tokens:,} targets, beta {self.after.beta:g}; balance loss and B are 1 where even",
        ]
        return notes + ([load.alarm] if load.alarm else [])

    def _as_table(self) -> Table:
        return Table(self.rows(), below=self._notes())


def continue_pretraining(
    model: nn.Module, train_stream: TokenStream, validation_stream: TokenStream, config: TrainConfig, *,
    parameters: str = "all", block: int | None = None, aux_weight: float | None = None, beta: float = 1.0,
    directory: str | os.PathLike | None = None, resume: bool = True, progress: bool = True,
    callbacks: Sequence[Callable] = (), verbose: bool = True,
) -> ContinuedResult:  # fmt: skip
    """Train an MoE, a `DecoderLM` or a transformers causal MoE, in place, and leave it in eval mode where it was.

    - config: `TrainConfig(steps, optimizer="adafactor", schedule="inverse_sqrt", …)` or "adamw" and "cosine", batch
      size, accumulation, precision, checkpoints: see `train`, which does it.
    - parameters: "all", "router" (with the learned noise of a noisy one), or "experts" (the routed ones). What the
      caller has frozen stays frozen.
    - block: tokens in a sequence; by default 256, or the model's context if that is shorter. Training draws blocks at
      uniformly random positions of the packed stream, so a document's tail is as likely to be seen as its head;
      evaluation reads the stream from end to end in consecutive blocks, each target once. Nothing is cut off.
    - aux_weight: of the balance loss; the default is a DecoderLM's own `config.moe.aux_weight`, and 0.01 for a
      transformers MoE, whose layers are balanced each by itself and differentiably (its own, pooled loss is not used).
    - beta: weight of the imbalance in the balanced perplexity, exp(CE) * exp(beta * (1 - B)). B, between 0 and 1
      (even), is the entropy of a layer's load over log E, of choices counted over the whole validation set, averaged
      over the layers (`metrics.balance_score`).
    - directory, resume, progress, callbacks, verbose: as in `train`; a callback gets a transformers model as the
      `TransformersLM` whose `model` it is.

    A transformers model can be saved by its own `save_pretrained` afterwards. A selection bias that it has
    (`e_score_correction_bias`) stays as it is, unless a callback moves it (`selection_bias`).

    Warns where the loss can never move a router (top-1 with renormalised weights, say). Raises ValueError for a dense
    model, streams that do not fit the model or share documents, a stream shorter than a block, weights that are not
    float32; TypeError for what is no model; and what `train` raises.
    """
    from accelerate import PartialState

    _one_of("parameters", parameters, PARAMETERS)
    wrapped = as_decoder_lm(model, block)
    chosen = _chosen(model, parameters)
    block = block_size(model, block)
    _check_weights(chosen, parameters)
    _check_streams(wrapped, train_stream, validation_stream)
    tokens_BT, targets_BT = train_stream.random_windows(1, block, seed=config.seed, step=0)

    home = next(model.parameters()).device
    options: dict[str, Any] = dict(seq_len=block, batch_size=config.eval_batch_size, beta=beta)
    try:
        device = PartialState(cpu=not torch.accelerator.is_available()).device  # where `train` will compute
        model.to(device)
        diagnosis = diagnose_router(model, tokens_BT.to(device), targets_BT.to(device))
        _warn_if_stuck(diagnosis, parameters)
        before = evaluate_routing(wrapped, validation_stream, **options)
        with _changed(model, wrapped, chosen, aux_weight):
            training = train(
                wrapped, train_stream, validation_stream, config, seq_len=block, directory=directory, resume=resume,
                progress=progress, callbacks=callbacks, verbose=verbose,
            )  # fmt: skip
        after = evaluate_routing(wrapped, validation_stream, **options)
    finally:
        model.to(home)
    return ContinuedResult(
        before, after, training, diagnosis, parameters, block=block,
        trained=sum(weight.numel() for weight in chosen), total=sum(weight.numel() for weight in model.parameters()),
    )  # fmt: skip


def _chosen(model: nn.Module, parameters: str) -> list[nn.Parameter]:
    """The weights to train: those that `parameters` names, without the ones that are frozen."""
    routers = find_routers(model)  # ValueError for a dense model
    if parameters == "all":
        weights = list(model.parameters())
    elif parameters == "experts":
        weights = [weight for router in routers for weight in expert_weights(model, router)]
    else:
        weights = [weight for router in routers for weight in router_weights(router)]
    return [weight for weight in weights if weight.requires_grad]


def _check_weights(chosen: list[nn.Parameter], parameters: str) -> None:
    if not chosen:
        raise ValueError(f"nothing to train: all of parameters={parameters!r} is frozen (requires_grad=False)")
    for weight in chosen:
        if weight.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"the weights are {weight.dtype}, in which small updates are rounded away: call model.float() first; "
                "TrainConfig(precision='bf16') computes in bfloat16 and keeps the weights exact"
            )


def _check_streams(model: Any, train_stream: TokenStream, validation_stream: TokenStream) -> None:
    for name, stream in (("training", train_stream), ("validation", validation_stream)):
        if stream.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the {name} stream has a vocabulary of {stream.vocab_size} tokens, the model one of "
                f"{model.config.vocab_size}: tokenize the text with this model's own tokenizer"
            )
    held_out = set(_documents(validation_stream))
    shared = sum(document in held_out for document in _documents(train_stream))
    if shared:
        raise ValueError(
            f"{shared} documents of the training stream are in the validation stream, too: split by document, as "
            "load_corpus does, or leave them out of one"
        )


def _documents(stream: TokenStream) -> Iterator[bytes]:
    ends = np.cumsum(stream.document_lengths)
    for start, end in zip(ends - stream.document_lengths, ends):
        yield stream.tokens[start:end].tobytes()


def _warn_if_stuck(diagnosis: Diagnosis, parameters: str) -> None:
    """Copies that are trained drift apart, and then the loss reaches their router; the causes below do not pass."""
    if parameters == "experts":
        return
    stuck = [
        layer
        for layer in diagnosis.layers
        if layer.silent
        and layer.num_experts > 1
        and (layer.tied or parameters == "router" or (layer.top_k == 1 and layer.constant_weight_sum))
    ]
    if stuck:
        findings = "; ".join(Diagnosis(tuple(stuck)).findings)
        only = " With parameters='router' the experts stay as they are." if parameters == "router" else ""
        warnings.warn(f"only the balance loss will move these routers: {findings}.{only}", stacklevel=3)


@contextmanager
def _changed(model: nn.Module, wrapped: Any, chosen: list[nn.Parameter], aux_weight: float | None) -> Iterator[None]:
    """Freeze all but the chosen weights and set the weight of the balance loss; on the way out all is as before."""
    asked, config = [weight for weight in model.parameters() if weight.requires_grad], wrapped.config
    keep = {id(weight) for weight in chosen}
    try:
        for weight in asked:
            weight.requires_grad_(id(weight) in keep)
        if aux_weight is not None and isinstance(wrapped, TransformersLM):
            config.moe.aux_weight = aux_weight
        elif aux_weight is not None:
            wrapped.config = replace(config, moe=replace(config.moe, aux_weight=aux_weight))
        yield
    finally:
        wrapped.config = config
        for weight in asked:
            weight.requires_grad_(True)


def continue_folder(
    folder: str, out: str, corpus: str, config: TrainConfig, documents: int | None = None, **options: Any
) -> ContinuedResult:
    """Train a folder's transformers MoE on a corpus, split by document, and write it to another folder.

    The weights are trained in float32 and saved in the dtype that they came in; `options` are those of
    `continue_pretraining`. What an interrupted run needs is kept in `out`/training. Raises ValueError if `out` is the
    model's own folder, and what `load_corpus` and `continue_pretraining` raise.
    """
    from ..text.corpus import load_corpus
    from ..text.tokenizer import load_tokenizer
    from .sources import folder_tokenizer, load_dense, read_config

    into = Path(out)
    if into.resolve() == Path(folder).resolve():
        raise ValueError(f"{out} is the model's own folder; give a new one")
    model = load_dense(folder, torch.float32)  # any causal model's folder
    dtype = read_config(folder).dtype
    splits = load_corpus(corpus, documents=documents)
    tokenizer = load_tokenizer(folder)
    train_stream = TokenStream.build(splits["train"], tokenizer, into / "training")
    validation_stream = TokenStream.build(splits["validation"], tokenizer, into / "training")
    result = continue_pretraining(
        model, train_stream, validation_stream, config, directory=into / "training", **options
    )
    model.to(dtype or torch.float32).save_pretrained(out)
    if (words := folder_tokenizer(folder)) is not None:
        words.save_pretrained(out)
    return result
