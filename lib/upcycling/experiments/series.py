"""The steps that the notebooks share: corpus -> tokenizer -> streams -> trained parent -> upcycled MoE.

Each step is made once, kept under `artifacts/` (or UPCYCLING_ARTIFACTS) in a folder named by a hash of all that went
into it, and loaded after that. Making and loading leave the caller's random numbers alike.
UPCYCLING_PRESET picks the sizes (quick, laptop, gpu), UPCYCLING_CORPUS another corpus (a name or a path).
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from ..core.config import ModelConfig
from ..core.initialisation import Copy
from ..core.model import DecoderLM
from ..core.transfer import initialisation, upcycle
from ..environment import project_folder
from ..routing.snapshots import RoutingSnapshots
from ..text.corpus import entropy_floor, load_corpus
from ..text.stream import TokenStream
from ..text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from ..training.config import TrainConfig
from ..training.loop import train
from ..training.records import TrainResult
from .arms import Arm
from .presets import PRESETS, Preset


def artifacts_dir() -> Path:
    """Where made things are kept: UPCYCLING_ARTIFACTS, or `artifacts/` in the checkout or folder one works in."""
    return Path(os.environ.get("UPCYCLING_ARTIFACTS") or project_folder() / "artifacts").expanduser().resolve()


def key_of(*parts) -> str:
    """Ten hexadecimal digits that stand for `parts` (anything JSON can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def new_model(config: ModelConfig, seed: int) -> DecoderLM:
    """A freshly initialised model drawn from `seed`; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DecoderLM(config)


@dataclass(frozen=True)
class Series:
    """One preset on one corpus, with everything that is made from it."""

    preset: Preset
    corpus_name: str

    @property
    def name(self) -> str:
        return Path(self.corpus_name).stem if {os.sep, "/"} & set(self.corpus_name) else self.corpus_name

    @cached_property
    def corpus(self):
        """The corpus as a DatasetDict with "train" and "validation"."""
        documents = self.preset.documents if self.corpus_name == self.preset.corpus else None
        folder = artifacts_dir() / "corpus"
        return load_corpus(_resolve(self.corpus_name), documents=documents, validation_fraction=0.02, cache_dir=folder)

    @cached_property
    def tokenizer(self):
        """The preset's tokenizer: GPT-2's, or a BPE trained on the training split."""
        if self.preset.tokenizer != "train":
            return load_tokenizer(os.environ.get("UPCYCLING_TOKENIZER", self.preset.tokenizer))
        training_rows = self.corpus["train"]
        folder = artifacts_dir() / f"tokenizer-{key_of(self.preset.model.vocab_size, _fingerprint(training_rows))}"
        with _only_one(folder):
            if not (folder / "tokenizer.json").exists():
                texts = (row["text"] for row in training_rows)
                save_tokenizer(train_tokenizer(texts, self.preset.model.vocab_size), folder)
        return load_tokenizer(folder)

    @cached_property
    def train_stream(self):
        return self._stream("train")

    @cached_property
    def validation_stream(self):
        return self._stream("validation")

    def _stream(self, split: str):
        return TokenStream.build(self.corpus[split], self.tokenizer, artifacts_dir() / "streams")

    @cached_property
    def floor(self):
        """The validation split's entropy floor (nats per token, overall and per domain), or None if it is not known."""
        rows = self.corpus["validation"]
        known = "surprisal" in rows.column_names
        return entropy_floor(rows, self.validation_stream.document_lengths) if known else None

    def domain_streams(self) -> dict:
        """A validation stream for each domain, for losses per domain; empty where the corpus has no domains."""
        rows = self.corpus["validation"]
        if "domain" not in rows.column_names:
            return {}
        domains, folder = np.array(rows["domain"]), artifacts_dir() / "streams"
        of_domain = {name: rows.select(np.flatnonzero(domains == name)) for name in np.unique(domains).tolist()}
        return {name: TokenStream.build(of_domain[name], self.tokenizer, folder, progress=False) for name in of_domain}

    def domain_windows(self, count: int | None = None) -> dict:
        """The first `count` windows (default: all) of each domain's validation stream: {name: (tokens_BT, targets_BT)}.

        They follow each other without overlap, so that means over them have honest errors; the last may be padded.
        """
        streams, context = self.domain_streams(), self.preset.model.seq_len
        return {name: next(stream.windows(count or len(stream), context)) for name, stream in streams.items()}

    def probe(self) -> tuple[torch.Tensor, list[str]]:
        """Some fixed windows of the validation split, for looking at: (tokens_BT, the domain of each window).

        Four windows of each domain, or 20 of "validation" where there are no domains.
        """
        context = self.preset.model.seq_len
        streams = {name: stream for name, stream in self.domain_streams().items() if len(stream) > context}
        streams = streams or {"validation": self.validation_stream}
        count, length = (4 if len(streams) > 1 else 20), min(context, len(self.validation_stream) - 1)
        windows = [stream.random_windows(count, length, seed=0, step=0)[0] for stream in streams.values()]
        return torch.cat(windows), [name for name in streams for _ in range(count)]

    def trained(
        self, model: DecoderLM, config: TrainConfig, label: str, *, train_stream=None, **options
    ) -> TrainResult:
        """Train `model` in place with `config`, or load the result where the same run was made before.

        `train_stream`: another one to train on than that of the whole training split, say of a selection.
        """
        stream = self.train_stream if train_stream is None else train_stream
        folder = self._folder(model, config, label, stream)
        with _only_one(folder):
            return train(model, stream, self.validation_stream, config, directory=folder, **options)

    def _folder(self, model: DecoderLM, config: TrainConfig, label: str, stream=None) -> Path:
        """Where the run of `config` that starts from these weights (on `stream`) lies."""
        stream = stream or self.train_stream
        start = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            start.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        key = key_of(model.config.to_dict(), asdict(config), stream.key, self.validation_stream.key, start.hexdigest())
        return artifacts_dir() / "runs" / f"{label}-{key}"

    def dense_parent(self, seed: int = 0, **options) -> tuple[DecoderLM, TrainResult]:
        """The dense model of notebook 02, trained on the preset's first budget."""
        model = new_model(self.preset.model, seed)
        return model, self.trained(model, replace(self.preset.dense, seed=seed), "dense-parent", **options)

    def parent_checkpoint(self, seed: int = 0) -> Path:
        """The file with which `dense_parent`'s run ended: weights and AdamW's memory, for `carry_moments`."""
        self.dense_parent(seed, verbose=False)
        config = replace(self.preset.dense, seed=seed)
        return self._folder(new_model(self.preset.model, seed), config, "dense-parent") / "latest.safetensors"

    def dense_control(self, seed: int = 0, steps: int | None = None, **options) -> tuple[DecoderLM, TrainResult]:
        """The parent trained on, still dense, for the MoE's budget (or `steps` updates): what an MoE must beat.

        `seed` orders the data, as for `moe`; both start from the parent of seed 0.
        """
        model, _ = self.dense_parent(verbose=False, progress=options.get("progress", True))
        return model, self.trained(model, self._second_phase(seed, steps), "dense-control", **options)

    def moe(self, seed: int = 0, **options) -> tuple[DecoderLM, TrainResult]:
        """The parent upcycled and trained on for the preset's second budget; `seed` draws the routers and the data."""
        model, result, _ = self._moe(seed, **options)
        return model, result

    def moe_snapshots(self, seed: int = 0, **options) -> RoutingSnapshots:
        """How the routing of `moe(seed)` came about: its decisions on `probe()` during training."""
        return self._moe(seed, **options)[2]

    def _moe(self, seed: int, callbacks=(), **options) -> tuple[DecoderLM, TrainResult, RoutingSnapshots]:
        dense, _ = self.dense_parent(verbose=False, progress=options.get("progress", True))
        model, config = upcycle(dense, self.preset.moe, seed=seed), self._second_phase(seed)
        tokens_BT, domains = self.probe()
        folder = self._folder(model, config, "moe")
        with _only_one(folder):
            snapshots = RoutingSnapshots(tokens_BT, folder / "snapshots.safetensors", labels=domains)
            # A run that was made without snapshots is made again; on the same machine it comes out the same.
            options = dict(resume=len(snapshots) > 0, callbacks=[*callbacks, snapshots]) | options
            result = train(model, self.train_stream, self.validation_stream, config, directory=folder, **options)
        return model, result, snapshots

    def arm(self, arm: Arm, seed: int = 0) -> DecoderLM:
        """The model that an arm of `experiments.compare` begins with; `seed` draws the routers, or all from scratch."""
        if arm.start == "scratch":
            return new_model(replace(self.preset.model, moe=arm.moe), seed)
        model, _ = self.dense_parent(verbose=False, progress=False)
        return model if arm.moe is None else upcycle(model, arm.moe, init=arm.init, seed=seed)

    def train_arm(self, arm: Arm, seed: int, steps: int, **options) -> tuple[DecoderLM, TrainResult]:
        """An arm trained for `steps` updates; the same runs as `moe` and `dense_control` make."""
        ours = (self.preset.moe, Copy(), "parent", self.preset.sparse.steps)
        if (arm.moe, initialisation(arm.init), arm.start, steps) == ours:
            return self.moe(seed, **options)  # which keeps the routing's snapshots, too
        model, config = self.arm(arm, seed), self._second_phase(seed, steps)
        label = "dense-control" if arm.moe is None else "moe"
        if arm.start == "scratch":
            config, label = replace(self.preset.dense, seed=seed, steps=steps), f"{label}-scratch"
        return model, self.trained(model, config, label, **options)

    def _second_phase(self, seed: int, steps: int | None = None) -> TrainConfig:
        # another data seed than the parent's, or the second phase would start with the windows of the first
        return replace(self.preset.sparse, seed=seed + 1000, steps=steps or self.preset.sparse.steps)


def load_series(preset: str | None = None, corpus: str | None = None) -> Series:
    """The series for a preset and corpus; both default to the environment's, then to `quick` on the embedded corpus.

    Raises ValueError for a preset that does not exist.
    """
    name = preset or os.environ.get("UPCYCLING_PRESET") or "quick"
    if name not in PRESETS:
        raise ValueError(f"UPCYCLING_PRESET={name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return Series(PRESETS[name], corpus or os.environ.get("UPCYCLING_CORPUS") or PRESETS[name].corpus)


def _resolve(corpus_name: str) -> str:
    """A relative path means relative to where the command was typed, or to the repository (notebooks run elsewhere)."""
    for base in (Path.cwd(), project_folder()):
        if (base / corpus_name).exists():
            return str((base / corpus_name).resolve())
    return corpus_name


def _fingerprint(rows) -> str:
    digest = hashlib.sha256()
    for batch in rows.select_columns(["text"]).iter(batch_size=1000):
        for text in batch["text"]:
            digest.update(len(text).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()


def _only_one(folder: Path) -> FileLock:
    """With this, one process at a time makes what lies in `folder`; the others wait and then load it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock")
