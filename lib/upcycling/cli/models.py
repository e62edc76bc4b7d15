"""The verbs for a model of one's own: convert, inspect, continue."""

import sys
from collections.abc import Iterable
from typing import Any

import typer

from ..training.config import OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig
from .options import argument, between, finite, flag, layers, numbers, one_of, option, verb, whole

DTYPES = ("float32", "bfloat16", "float16")
SIZE = between(1e-9, 1e9, "size in GB: give a number above 0, such as 2 or 0.5")


@verb("convert", resumes=True)
def convert(
    model: str = argument("MODEL", "folder with safetensors weights, or a name on the Hugging Face hub"),
    out: str = argument("OUT", "the new folder"),
    experts: int = option(8, whole(), "E", "experts in a layer"),
    top_k: int = option(2, whole(), "K", "experts that a token uses"),
    which: Any = option(
        "all", layers, "LAYERS", "which become MoE: all, even, odd, or 0,2,4; 8-15 is a range", "--layers"
    ),
    init: str = option(
        "copy", one_of("copy", "noise"), "INIT", "copy (the function does not change) or noise (a little)"
    ),
    noise: float = option(0.05, finite, "STD", "of --init noise, in units of a weight matrix's own standard deviation"),
    router_std: float = option(0.02, finite, "STD", "of the routers' random weights"),
    dtype: str = option(None, one_of(*DTYPES), "DTYPE", f"of the weights: {', '.join(DTYPES)} (default: as they are)"),
    seed: int = option(0, whole(), "N", "of the routers and the noise"),
    max_shard_size: float = option(2.0, SIZE, "GB", "largest weight file"),
    no_verify: bool = flag("--no-verify", "do not compare the result with the dense model"),
    dry_run: bool = flag("--dry-run", "print plan, sizes, memory and disk; write nothing (but download from the hub)"),
) -> int:
    """Upcycle a pretrained dense language model.

    It becomes a Mixture-of-Experts of a stock transformers class with the same logits, file to file, in the memory of
    one layer.
    """
    import torch

    from ..hf.convert import prepare

    job = prepare(
        model, out, experts, top_k, layers=_indices(which, model), init=init, noise=noise, router_std=router_std,
        seed=seed, dtype=getattr(torch, dtype) if dtype else None, max_shard_size=int(max_shard_size * 1e9),
        verify=not no_verify,
    )  # fmt: skip
    print(job, flush=True)
    if dry_run:
        job.check_disk()
        return 0
    receipt = job.run(verify=not no_verify, progress=sys.stderr.isatty())
    print(receipt or "not verified (--no-verify)")
    print(f"wrote {job.out}")
    return 0


def _indices(which: str | list[int], model: str) -> Iterable[int] | None:
    """The indices of the MoE layers; None for all."""
    if which not in ("even", "odd"):
        return None if which == "all" else which
    from ..hf.sources import naming, open_source, read_config

    folder = open_source(model)
    with naming(folder / "config.json"):
        return range(which == "odd", read_config(folder).num_hidden_layers, 2)


@verb("inspect")
def inspect(
    folder: str = argument("FOLDER", "the model's folder, or a name on the Hugging Face hub"),
    text: str = option(None, str, "TEXT", "route this text (default: a few sentences of several kinds)"),
    text_file: str = option(None, str, "FILE", "route this file's text (UTF-8)"),
    ids: Any = option(None, numbers("token ids", "5,17,3"), "IDS", "route these token ids, such as 5,17,3"),
) -> int:
    """Print what an MoE is made of, and check its routers on a text.

    Its parameters, the router's class and settings, the receipt of its conversion, the load of each layer: has it
    collapsed?
    """
    from ..hf.inspection import inspect_folder

    if [text, text_file, ids].count(None) < 2:
        raise typer.BadParameter("give one of --text, --text-file and --ids", param_hint="the text to route")
    if text_file is not None:
        try:
            with open(text_file, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text_file} is not a text in UTF-8 ({error})") from error
    for line in inspect_folder(folder, text=text, ids=ids):
        print(line, flush=True)
    return 0


@verb("continue", resumes=True)
def continue_(
    model: str = argument("MODEL", "folder with safetensors weights and tokenizer.json"),
    out: str = argument("OUT", "the new folder; what an interrupted run needs is kept in OUT/training"),
    steps: int = option(..., whole(), "N", "optimizer updates"),
    corpus: str = option("worlds", str, "TEXTS", "file, folder or name, see load_corpus; it is split by document"),
    documents: int = option(None, whole(1), "N", "take the corpus's first N documents only"),
    parameters: str = option("all", one_of("all", "router", "experts"), "WHICH", "to train: all, router or experts"),
    block: int = option(None, whole(1), "T", "tokens in a sequence (default: 256, or the context if shorter)"),
    aux_weight: float = option(None, finite, "W", "of the balance loss of each layer (default: 0.01)"),
    beta: float = option(1.0, finite, "X", "weight of imbalance in the balanced perplexity"),
    optimizer: str = option(TrainConfig.optimizer, one_of(*OPTIMIZERS), "NAME", " or ".join(OPTIMIZERS)),
    schedule: str = option(TrainConfig.schedule, one_of(*SCHEDULES), "NAME", ", ".join(SCHEDULES)),
    learning_rate: float = option(TrainConfig.learning_rate, finite, "X", "at its highest"),
    warmup_steps: int = option(TrainConfig.warmup_steps, whole(), "N", "updates in which the learning rate rises"),
    batch_size: int = option(TrainConfig.batch_size, whole(), "N", "sequences in a batch"),
    accumulation: int = option(TrainConfig.accumulation, whole(), "N", "batches in an update"),
    weight_decay: float = option(TrainConfig.weight_decay, finite, "X", "of the weight matrices"),
    precision: str = option(TrainConfig.precision, one_of(*PRECISIONS), "NAME", ", ".join(PRECISIONS)),
    eval_every: int = option(TrainConfig.eval_every, whole(), "N", "updates between evaluations; 0: none but the last"),
    checkpoint_every: int = option(100, whole(), "N", "updates between checkpoints; 0: none"),
    seed: int = option(TrainConfig.seed, whole(), "N", "of the windows' order"),
) -> int:
    """Train an MoE on, and report loss and balance before and after.

    MODEL is a folder of a transformers MoE, for instance one made by the verb convert. Loss, perplexity and the balance
    of each layer are those of the whole validation split.
    """
    from ..hf.continued import continue_folder

    config = TrainConfig(
        steps, optimizer=optimizer, schedule=schedule, learning_rate=learning_rate, warmup_steps=warmup_steps,
        batch_size=batch_size, accumulation=accumulation, weight_decay=weight_decay, precision=precision,
        eval_every=eval_every, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    print(
        continue_folder(
            model, out, corpus, config, documents, parameters=parameters, block=block, aux_weight=aux_weight, beta=beta
        )
    )
    print(f"wrote {out}")
    return 0
