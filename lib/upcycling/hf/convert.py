"""A folder with a pretrained dense model in, a folder with an MoE out, one tensor in memory at a time.

    open_source    a folder, or a name on the Hugging Face hub, whose safetensors files are read tensor by tensor
    prepare        everything that can be refused is refused here, and everything that will be written is counted
    convert        prepare, write, verify, rename

Everything is written into `<out>.partial`, next to `out`, and renamed at the end. Until then the configuration in it
has a name that nothing loads, so whoever is killed, and whenever, leaves no folder that loads; the next run with the
same settings keeps the weight files that are complete (their SHA-256 is in the folder's manifest).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..files import write_text
from .families.engine import hub_shapes
from .layerwise import WHOLE_ONLY, verify_layerwise
from .output.card import model_card, receipt_record
from .output.partial import (
    MANIFEST,
    PENDING,
    RECEIPT,
    alone,
    check_place,
    open_partial,
    partial_of,
    read_manifest,
    write_companions,
    write_manifest,
)  # fmt: skip
from .output.shards import MAX_SHARD_SIZE, Shard, made, plan_shards
from .plan import MOST_EXPERTS, Plan, plan
from .receipt import Receipt, verify as verify_models
from .sources import COMPANIONS, folder_tokenizer, in_bytes, naming, on_one_line, open_source, quiet, read_config
from .weight_files import WeightFiles, as_bytes, read_json

if TYPE_CHECKING:
    from tqdm import tqdm

VERIFY_MEMORY = 2 * 10**9  # bytes; a pair of models that needs more in float32 is verified layer by layer


@dataclass(frozen=True)
class Conversion:
    """What `convert` is about to do, with nothing written yet; prints as the dry run's text."""

    name: str  # the source as it was given
    source: WeightFiles
    out: Path
    plan: Plan
    shards: tuple[Shard, ...]
    settings: dict[str, Any]  # what a resumed run must share

    @property
    def from_hub(self) -> bool:
        return Path(self.name).expanduser() != self.source.folder

    @property
    def title(self) -> str:
        """The dense model's name for receipt and card, without the folders of this computer."""
        return self.name if self.from_hub else on_one_line(self.source.folder.resolve().name)

    @property
    def partial(self) -> Path:
        return partial_of(self.out)

    @property
    def bytes(self) -> int:
        """Bytes that will be on the disk in the end, companions and reports included."""
        return sum(shard.bytes for shard in self.shards) + sum(path.stat().st_size for path in self.companions) + 2**20

    @property
    def memory_to_write(self) -> int:
        """Bytes for the largest tensor and what it is made from, beside Python and torch."""
        return max(
            2 * entry.bytes + sum(math.prod(self.source.shapes[name]) * 4 for name in entry.sources)
            for shard in self.shards for entry in shard.entries
        )  # fmt: skip

    @property
    def float32_bytes(self) -> int:
        """Bytes of the dense model and the MoE together, loaded in float32."""
        return 4 * (self.plan.sizes.dense + self.plan.sizes.moe)

    @property
    def verified_whole(self) -> bool:
        return self.float32_bytes <= VERIFY_MEMORY or self.plan.target in WHOLE_ONLY

    @property
    def memory_to_verify(self) -> int:
        """About as many bytes as the comparison takes: both models, or one layer while it is being loaded."""
        if self.verified_whole:
            return self.float32_bytes
        layers: Counter[int | None] = Counter()
        for tensor in self.plan.tensors:
            layers[tensor.layer] += math.prod(tensor.shape)
        return 8 * max(layers.values())

    @property
    def companions(self) -> list[Path]:
        return sorted({path for pattern in COMPANIONS for path in self.source.folder.glob(pattern) if path.is_file()})

    @property
    def finished(self) -> dict[str, str]:
        """Weight files of an interrupted run with these settings: name -> SHA-256 as recorded, not checked yet."""
        manifest = read_manifest(self.partial)
        return manifest["shards"] if manifest and manifest["settings"] == self.settings else {}

    @property
    def needed(self) -> int:
        """Bytes that still have to be written (what a run with other settings left behind is deleted first)."""
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        return self.bytes - there

    @property
    def free(self) -> int:
        """Bytes free on the disk that `out` will be on."""
        folder = self.out.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def __str__(self) -> str:
        files = "1 weight file" if len(self.shards) == 1 else f"{len(self.shards)} weight files"
        resumed = f", {len(self.finished)} of them there from an interrupted run" if self.finished else ""
        return "\n".join([
            str(self.plan),
            f"writes: {in_bytes(self.bytes)} to {self.out}, {files}{resumed}",
            f"disk: {in_bytes(self.needed)} needed, {in_bytes(self.free)} free",
            f"memory: {in_bytes(self.memory_to_write)} to write, {in_bytes(self.memory_to_verify)} to verify, beside "
            "what Python and torch take",
        ])  # fmt: skip

    def check_disk(self) -> None:
        """Raises OSError when the disk is too small for what still has to be written."""
        if self.needed > self.free:
            raise OSError(
                f"{self.out} needs {in_bytes(self.needed)} but the disk has {in_bytes(self.free)} free; free some, or "
                "choose another folder, fewer experts or layers, or a smaller dtype"
            )

    def run(self, *, verify: bool = True, progress: bool = True) -> Receipt | None:
        """Carry it out; see `convert`."""
        self.check_disk()
        with alone(self):
            check_place(self.out)  # once more: another conversion may have ended since
            digests = _write_weights(self, open_partial(self), progress)
            write_companions(self)
            receipt = _verify(self, progress) if verify else None
            broken = receipt and not math.isfinite(receipt.max_abs_diff)
            if receipt and (broken or (not receipt.passed and self.plan.init == "copy")):
                raise ValueError(f"{receipt.verdict}; {_remedy(self, receipt)}; delete {self.partial}, which holds it")
            write_text(self.partial / RECEIPT, json.dumps(receipt_record(self, receipt, digests), indent=2) + "\n")
            write_text(self.partial / "README.md", model_card(self, receipt))
            # From here on the folder loads, and may: it is complete and verified.
            os.replace(self.partial / PENDING, self.partial / "config.json")
            if self.out.exists():
                self.out.rmdir()  # empty, as checked
            os.replace(self.partial, self.out)
            (self.out / MANIFEST).unlink()
            return receipt


def prepare(
    model: str | os.PathLike, out: str | os.PathLike, num_experts: int = 8, top_k: int = 2, *,
    dtype: torch.dtype | None = None, max_shard_size: int = MAX_SHARD_SIZE, verify: bool = True, **settings: Any,
) -> Conversion:  # fmt: skip
    """Check everything that can be checked before anything is written; arguments as for `convert`, same errors."""
    out = Path(out).expanduser()
    check_place(out)
    if num_experts > MOST_EXPERTS:  # before anything is read or downloaded
        raise ValueError(f"{num_experts} experts are more than {MOST_EXPERTS}; choose fewer")
    folder = open_source(model)
    source = WeightFiles(folder)
    with naming(folder / "config.json"):  # transformers raises a dozen kinds of errors for broken ones
        config = read_config(folder)
        if config.dtype is None and source.names:  # then transformers takes the weights' own, and so do we
            config.dtype = Counter(source.dtypes.values()).most_common(1)[0][0]
        chosen = plan(config, num_experts, top_k, dtype=dtype, **settings).or_refusal()
        shapes = hub_shapes(config, chosen.source)[0]
    chosen.check_sources(source.names)
    _check_tensors(source, shapes, chosen.tied)
    _check_companions(folder, with_tokenizer=verify)
    own = [source.dtypes[t.sources[0]] if t.sources else chosen.dtype for t in chosen.tensors]
    entries = [replace(t, dtype=dtype or its_own) for t, its_own in zip(chosen.tensors, own)]
    decided = {
        "version": __version__,
        "source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files},
        "config": json.loads(chosen.config.to_json_string(use_diff=False)),
        "dtype": None if dtype is None else str(dtype),
        "layers": list(chosen.layers),
        **{name: getattr(chosen, name) for name in ("init", "noise", "router_std", "seed")},
        "max_shard_size": max_shard_size,
    }
    return Conversion(str(model), source, out, chosen, plan_shards(entries, max_shard_size), decided)


def convert(
    model: str | os.PathLike, out: str | os.PathLike, num_experts: int = 8, top_k: int = 2, *,
    layers: Iterable[int] | None = None, init: str = "copy", noise: float = 0.05, router_std: float = 0.02,
    seed: int = 0, dtype: torch.dtype | None = None, verify: bool = True, max_shard_size: int = MAX_SHARD_SIZE,
    progress: bool = True,
) -> Receipt | None:  # fmt: skip
    """Write the MoE of a dense model, a folder or a hub name, to the new folder `out`; return the receipt.

    `num_experts` to `seed` are as for `plan`; `dtype` is that of every tensor (default: each keeps its own). Files have
    at most `max_shard_size` bytes. The result is read back and compared with the dense model in float32: loaded whole
    where both together take at most VERIFY_MEMORY bytes, else layer by layer; `verify=False` skips that and returns
    None. Raises FileNotFoundError, FileExistsError, and ValueError before anything is written; OSError when the disk is
    too small or fails; ValueError when the result is not the same function, and then there is no `out`.
    """
    job = prepare(
        model, out, num_experts, top_k, layers=layers, init=init, noise=noise, router_std=router_std, seed=seed,
        dtype=dtype, max_shard_size=max_shard_size, verify=verify,
    )  # fmt: skip
    return job.run(verify=verify, progress=progress)


def _check_tensors(source: WeightFiles, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
    """Raises ValueError naming a tensor that is not what the configuration says."""
    for name, shape in shapes.items():
        if source.shapes[name] != shape:
            raise ValueError(
                f"{name} is {source.shapes[name]} in the weights but {shape} by the configuration of {source.folder}"
            )
        if not source.dtypes[name].is_floating_point:
            raise ValueError(f"{name} has type {str(source.dtypes[name])[6:]}; give a model that is not quantised")
    for name, twin in tied.items():
        if name in source.names and twin in source.names and not source.same(name, twin):
            raise ValueError(
                f"{name} is not {twin}, although the configuration ties them: set tie_word_embeddings to false in "
                f"{source.folder / 'config.json'}, or delete {name} from the weights"
            )


def _check_companions(folder: Path, with_tokenizer: bool) -> None:
    """Raises ValueError naming a file that would come along but that transformers does not load."""
    from transformers import GenerationConfig

    if with_tokenizer:
        folder_tokenizer(folder)
    path = folder / "generation_config.json"
    if path.is_file():
        read_json(path)
        with naming(path, understood=()):
            GenerationConfig.from_pretrained(folder)


def _write_weights(job: Conversion, finished: dict[str, str], progress: bool) -> dict[str, str]:
    """Write the weight files that are not finished; return the SHA-256 of all."""
    with _bar(job, "writing", progress) as bar:
        for shard in job.shards:
            if shard.file in finished:
                bar.update(shard.bytes)
            else:
                finished = finished | {shard.file: shard.write(job.partial, job.source, bar)}
                write_manifest(job, finished)
    return {shard.file: finished[shard.file] for shard in job.shards}


def _bar(job: Conversion, what: str, progress: bool) -> tqdm:
    from tqdm.auto import tqdm

    total = sum(shard.bytes for shard in job.shards)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress)


def _verify(job: Conversion, progress: bool) -> Receipt:
    """Read back what was written: every tensor's bytes, then the function, as a whole or layer by layer."""
    written = WeightFiles(job.partial)
    with _bar(job, "verifying tensors", progress) as bar:
        for shard in job.shards:
            for entry in shard.entries:
                if not torch.equal(as_bytes(made(entry, job.source)), as_bytes(written[entry.name])):
                    raise OSError(
                        f"{entry.name} was not read back from {shard.file} as it was written: is the disk broken?"
                    )
                bar.update(entry.bytes)
    if job.verified_whole:
        receipt = _verify_whole(job)
    else:
        config = read_config(job.source.folder)
        config.architectures = [job.plan.source]
        receipt = verify_layerwise(job.source, written, config, job.plan.config, job.plan.dtype, progress=progress)
        why = f"compared layer by layer, because both models together take {in_bytes(job.float32_bytes)} in float32"
        receipt = replace(receipt, notes=(*receipt.notes, why))
    if job.plan.init != "copy":
        receipt = replace(receipt, notes=(*receipt.notes, f"init={job.plan.init!r} is meant to change the function"))
    return receipt


def _verify_whole(job: Conversion) -> Receipt:
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    options = dict(dtype=job.plan.dtype, trust_remote_code=False)
    with quiet():
        dense = load(job.source.folder, **options).float()
        moe = load(job.partial, config=read_config(job.partial / PENDING), **options).float()
    return verify_models(dense, moe, folder_tokenizer(job.source.folder))


def _remedy(job: Conversion, receipt: Receipt) -> str:
    if not math.isfinite(receipt.max_abs_diff):
        return "weights are not finite, in the dense model or in the type and with the noise that were asked for"
    if receipt.max_abs_diff <= receipt.tolerance:
        return f"the logits agree, but greedy generation does not ({receipt.greedy!r} is the dense model's)"
    changed = any(entry.rule.transform is not None for shard in job.shards for entry in shard.entries)
    if changed and job.plan.dtype != torch.float32:
        return f"some weights had to be changed and {str(job.plan.dtype)[6:]} rounds them: convert to dtype float32"
    return "the conversion's rules do not fit this model: report its config.json"
