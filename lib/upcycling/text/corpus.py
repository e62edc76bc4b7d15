"""`load_corpus`: the embedded corpus, two from the Hugging Face hub, or local files, all as a `datasets.DatasetDict`.

Whatever the source, a row is a document with at least the column `text`, and the two splits have no text in common.
Corpora from files and from the hub stay on disk: `datasets` maps them into memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .worlds import world as worlds
from .worlds.world import World, WorldConfig

if TYPE_CHECKING:
    from datasets import DatasetDict

WORLDS_DOCUMENTS = 8_000  # about 2M tokens of a 2,048-token BPE
HUB = {"tinystories": "roneneldan/TinyStories", "cosmopedia-100k": "HuggingFaceTB/cosmopedia-100k"}
FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
END_OF_TEXT = "<|endoftext|>"


def load_corpus(
    name: str | os.PathLike = "worlds",
    *,
    documents: int | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    world: World | WorldConfig | None = None,
) -> DatasetDict:
    """Load a corpus as a `datasets.DatasetDict` with the splits "train" and "validation".

    name: "worlds", generated here (columns: see `worlds.generate`; `world` chooses another world than the default);
    "tinystories" or "cosmopedia-100k", from the Hugging Face hub with all their columns; or the path of a .txt, .jsonl,
    .json, .parquet or .csv file, or of a folder of such. In a text file, documents are separated by <|endoftext|> if
    that occurs, else by blank lines; the other kinds have a column `text`. Mis-decoded quotes are mended in TinyStories
    and in local files.
    documents: the first so many (worlds: how many to write, default 8,000, about 2M tokens); None for all.
    A hub corpus's own validation split is used, or a folder's files with "valid" in their name; otherwise
    `validation_fraction` of the documents is chosen by a hash of their text and `seed`. Documents without text are
    dropped, and training documents that are also in the validation split.
    cache_dir: where generated and converted data is kept; None: nowhere (worlds), datasets' own cache (the rest).
    Raises ValueError, FileNotFoundError or ConnectionError, each with a sentence that names the remedy.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}; choose a number between 0 and 1")
    if documents is not None and documents < 2:
        raise ValueError(f"documents={documents}; at least 2 are needed, one to train on and one to validate")
    if world is not None and name != "worlds":
        raise ValueError(f"world is for the corpus 'worlds', not for {str(name)!r}")
    if name == "worlds":
        return _load_worlds(documents or WORLDS_DOCUMENTS, validation_fraction, seed, cache_dir, world)
    splits = _load_hub(name, cache_dir) if name in HUB else _load_local(Path(name).expanduser(), cache_dir)
    if name != "cosmopedia-100k":
        splits = {key: split.map(_mend_batch, batched=True, desc="mending quotes") for key, split in splits.items()}
    if documents is not None:
        splits = {key: split.select(range(min(documents, len(split)))) for key, split in splits.items()}
    return _as_train_and_validation(splits, validation_fraction, seed, str(name))


def _load_worlds(documents: int, validation_fraction: float, seed: int, cache_dir, world) -> DatasetDict:
    from datasets import Dataset, load_from_disk

    if not isinstance(world, World):
        world = World(world)
    folder = None
    if cache_dir is not None:
        recipe = repr((documents, validation_fraction, seed, sorted(asdict(world.config).items())))
        folder = Path(cache_dir) / f"worlds-{hashlib.sha256(_worlds_sources() + recipe.encode()).hexdigest()[:16]}"
        if folder.is_dir():
            return load_from_disk(str(folder))
    rows = list(worlds.generate(documents, seed, world))
    dataset = Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]})
    splits = _as_train_and_validation({"train": dataset}, validation_fraction, seed, "worlds")
    if folder is None:
        return splits
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=folder.name, dir=folder.parent)
    try:
        splits.save_to_disk(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same folder in the meantime
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_from_disk(str(folder))


def _worlds_sources() -> bytes:
    """The generator's modules and data files, part of the cache's key: another version of it writes other texts."""
    package = files(worlds.__package__)
    sources = [file for folder in (package, package / "data") for file in folder.iterdir() if file.is_file()]
    return b"".join(file.name.encode() + file.read_bytes() for file in sorted(sources, key=lambda file: file.name))


def _load_hub(name: str, cache_dir) -> dict:
    from datasets import load_dataset

    try:
        # One quick question first: without a connection, `load_dataset` would try for half a minute.
        if not _is_cached(name, cache_dir):
            from huggingface_hub import HfApi

            HfApi().dataset_info(HUB[name], timeout=10)
        return dict(load_dataset(HUB[name], cache_dir=None if cache_dir is None else str(cache_dir)))
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
        raise ConnectionError(
            f"could not load {HUB[name]} from the Hugging Face hub ({type(error).__name__}: {reason}); connect to the "
            f"internet, give load_corpus the path of a local copy, or use the embedded default, load_corpus('worlds')"
        ) from error


def _is_cached(name: str, cache_dir) -> bool:
    from datasets import config

    root = Path(config.HF_DATASETS_CACHE if cache_dir is None else cache_dir)
    return any(root.glob("*___" + {"tinystories": "tiny_stories"}.get(name, name)))


def _load_local(path: Path, cache_dir) -> dict:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_KINDS and file.name[0] != ".")
        if not files:
            raise FileNotFoundError(f"folder {path} has no {', '.join(FILE_KINDS)} file; put the corpus there")
        validation = [file for file in files if "valid" in file.stem.lower()]
        train = [file for file in files if file not in validation]
        if not train:
            raise FileNotFoundError(f"folder {path} has only validation files; put the files to train on there, too")
        splits = {"train": train, "validation": validation} if validation else {"train": train}
    elif path.is_file():
        if path.suffix.lower() not in FILE_KINDS:
            raise ValueError(f"{path} is not a {', '.join(FILE_KINDS)} file; convert it, or rename a text file to .txt")
        splits = {"train": [path]}
    else:
        corpora = ", ".join(["worlds", *HUB])
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}; give an existing path, or one of {corpora}")
    return {key: _load_files(files, cache_dir) for key, files in splits.items()}


def _load_files(files: list[Path], cache_dir):
    """One dataset from files of one kind; checks what the user can get wrong."""
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    names = ", ".join(str(file) for file in files)
    kinds = {FILE_KINDS[file.suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{names}: files of different kinds; keep one kind in the folder")
    kind = kinds.pop()
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; give a file with documents in it")
        if kind != "parquet":
            _check_utf8(file)
    options = {"cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        if kind == "text":
            # The time of the last change is an argument so that an edited file is not taken from the cache.
            versions = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
            if next(_text_documents(versions), None) is None:
                raise ValueError("nothing but white space")
            dataset = Dataset.from_generator(_text_documents, gen_kwargs={"versions": versions}, **options)
        else:
            dataset = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0][:200]
        raise ValueError(f"found no documents in {names}, read as {kind} ({reason}); check the file") from error
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{names} has no column 'text', only {columns}; rename the one that holds the documents")
    # Lists and mixed values have a feature class of their own, without a dtype.
    held = getattr(dataset.features["text"], "dtype", "lists or mixed values")
    if held not in ("string", "large_string"):
        raise ValueError(f"column 'text' of {names} holds {held}, not strings; every row needs one text")
    return dataset


def _check_utf8(file: Path) -> None:
    with file.open(encoding="utf-8", newline="") as stream:
        try:
            while stream.read(1 << 20):
                pass
        except UnicodeDecodeError as error:
            position = stream.buffer.tell() - len(error.object) + error.start
            place = f"byte 0x{error.object[error.start]:02x} near position {position}"
            raise ValueError(f"{file} is not UTF-8 ({place}); save it as UTF-8") from None


def _text_documents(versions) -> Iterator[dict]:
    """The documents of text files, one after the other, without reading a whole file at once."""
    for path, _, _ in versions:
        with open(path, encoding="utf-8-sig") as stream:
            has_marks = any(END_OF_TEXT in line for line in stream)
            stream.seek(0)
            pending = []
            for line in stream:
                *ended, rest = line.split(END_OF_TEXT) if has_marks else ([line, ""] if line.isspace() else [line])
                for piece in ended:
                    yield from _document([*pending, piece])
                    pending = []
                pending.append(rest)
            yield from _document(pending)


def _document(lines: list[str]) -> Iterator[dict]:
    if text := "".join(lines).strip():
        yield {"text": text}


def _as_train_and_validation(splits: dict, validation_fraction: float, seed: int, name: str) -> DatasetDict:
    """Drop rows without text, choose the validation documents if there are none, drop them from the training ones."""
    from datasets import DatasetDict

    hashes = {key: _text_hashes(split, seed, name) for key, split in splits.items()}
    kept = {key: values != _NO_TEXT for key, values in hashes.items()}
    if "validation" not in splits:
        train = hashes["train"]
        distinct = np.unique(train[kept["train"]])
        if len(distinct) < 2:
            raise ValueError(f"{name} has {len(distinct)} different documents; at least 2 are needed to split them")
        # The smallest hashes: whatever the documents' order, and copies of a text always go together.
        n_validation = min(max(1, round(validation_fraction * len(distinct))), len(distinct) - 1)
        is_validation = train <= distinct[n_validation - 1]
        chosen = {"train": kept["train"] & ~is_validation, "validation": kept["train"] & is_validation}
        sources = {"train": splits["train"], "validation": splits["train"]}
    else:
        common = np.isin(hashes["train"], hashes["validation"])
        chosen = {"train": kept["train"] & ~common, "validation": kept["validation"]}
        sources = splits
    for key, mask in chosen.items():
        if not mask.any():
            raise ValueError(f"{name} has no documents for {key} that are not in the other split, too; add some")
    return DatasetDict({key: sources[key].select(np.flatnonzero(mask)) for key, mask in chosen.items()})


_NO_TEXT = np.uint64(2**64 - 1)


def _text_hashes(dataset, seed: int, name: str) -> np.ndarray:
    """8 bytes of hash for each document's text, the same on every platform; _NO_TEXT where there is none."""
    hashes, salt = np.empty(len(dataset), np.uint64), f"{seed} ".encode()
    position = 0
    for batch in dataset.select_columns("text").iter(batch_size=1_000):
        for text in batch["text"]:
            if text is None:
                raise ValueError(f"row {position + 1} of {name} has no text (null); every row needs a string in 'text'")
            digest = hashlib.blake2b(salt + text.encode(), digest_size=8).digest()
            hashes[position] = int.from_bytes(digest, "little") if text and not text.isspace() else _NO_TEXT
            position += 1
    return hashes


def _mend_batch(batch: dict) -> dict:
    return {"text": [mend_quotes(text) if text else text for text in batch["text"]]}


def _misread(character: str, encoding: str) -> str:
    """What a character becomes when its UTF-8 bytes are read as `encoding` (undefined bytes as control characters)."""
    return "".join(bytes([byte]).decode(encoding, errors="ignore") or chr(byte) for byte in character.encode())


_MENDED = {
    _misread(character, encoding): character for character in "“”‘’‚„–—…•" for encoding in ("cp1252", "latin-1")
} | {"â€": "”"}  # the third byte of a closing quote is undefined in cp1252, and often lost
_MISREAD = re.compile("|".join(sorted(map(re.escape, _MENDED), key=len, reverse=True)))


def mend_quotes(text: str) -> str:
    """Restore quotes, dashes and dots whose UTF-8 bytes were read as cp1252 or latin-1 (`â€œ` was “)."""
    if "â" not in text:
        return text
    return _MISREAD.sub(lambda match: _MENDED[match[0]], text)


@dataclass(frozen=True)
class EntropyFloor:
    """The least mean loss that any model can reach, in nats per token: overall, and for each domain."""

    overall: float
    by_domain: dict[str, float]


def entropy_floor(rows, token_counts: Iterable[int]) -> EntropyFloor:
    """The entropy floor of documents: their total surprisal divided by their total number of target tokens.

    rows: a split of `worlds`. token_counts: how many tokens each row has in the stream, with the tokens that begin and
    end it (`TokenStream.document_lengths`): each is a target once. A model that knows the world and reads whole
    documents reaches it on average; one that sees windows cut out of documents stays above it.
    Raises ValueError without `surprisal`, or if the lengths differ.
    """
    if "surprisal" not in rows.column_names:
        raise ValueError("this corpus has no column 'surprisal', so its entropy floor is unknown; only worlds has one")
    surprisals, domains = np.asarray(rows["surprisal"], np.float64), np.asarray(rows["domain"])
    counts = np.asarray(list(token_counts), np.int64)
    if len(counts) != len(surprisals):
        raise ValueError(f"{len(counts)} token counts for {len(surprisals)} documents; give one for each")

    def nats_per_token(mask):
        return float(surprisals[mask].sum() / counts[mask].sum())

    everything = np.ones(len(counts), bool)
    present = [domain for domain in worlds.DOMAINS if (domains == domain).any()]
    return EntropyFloor(nats_per_token(everything), {domain: nats_per_token(domains == domain) for domain in present})
