"""Byte-level BPE tokenizers: train, load, save; documents and prompts to ids."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..files import write_text

UNKNOWN, START, END = SPECIAL_TOKENS = ("<|unknown|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2

# (bos, eos) of the vocabularies we meet: ours and SmolLM's, Llama's, GPT-2's.
_BOS_EOS = ((START, END), ("<s>", "</s>"), (None, "<|endoftext|>"))

# A batch ends at whichever comes first. It bounds the memory of an encoding (tens of bytes a character) and what a
# kill can cost (a fraction of a second's work).
_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens on `texts`, read once and in batches; same texts, same tokenizer.

    Pass the training split only. Any Unicode text survives `decode(encode(text))`, because the 256 bytes are tokens.
    Raises ValueError if `vocab_size` leaves no room for merges, or if the texts do not yield that many tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256 + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens, 256 bytes and at least one "
            f"merge need {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(in_batches(texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} cannot be reached: these texts yield only {tokenizer.get_vocab_size()} tokens; "
            "give more text or choose a smaller vocab_size"
        )
    return for_plain_text(tokenizer)


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer from a folder, from a `tokenizer.json`, or by its name on the Hugging Face hub ("gpt2").

    A hub tokenizer that is already in the local cache needs no network. Raises FileNotFoundError if nothing is found
    under that name, ValueError if the file is not a tokenizer.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.json)", str(name_or_path)):
        path = _from_hub(str(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: save one there with save_tokenizer, or load 'gpt2'")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library reads ({error})") from None
    return for_plain_text(tokenizer)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository = "openai-community/gpt2" if name == "gpt2" else name
    try:
        with contextlib.suppress(OSError):  # not in the local cache
            return Path(hf_hub_download(repository, "tokenizer.json", local_files_only=True))
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder or file {name!r} here, and its tokenizer.json did not come from the Hugging Face hub "
            f"({type(error).__name__}); connect once so that it is cached, or pass a folder that holds tokenizer.json"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, from which `AutoTokenizer.from_pretrained(folder)` gives
    the same ids as `tokenizer`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bos_id, eos_id = bos_eos(tokenizer)
    eos = tokenizer.id_to_token(eos_id)
    unknown = UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else eos
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos if bos_id is None else tokenizer.id_to_token(bos_id),
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": unknown,  # ours never occurs in a text; a collator that masks pads then leaves eos alone
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special strings in a text are text, as in encode_documents
    }
    write_text(folder / "tokenizer.json", for_plain_text(tokenizer).to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def bos_eos(tokenizer: Tokenizer) -> tuple[int | None, int]:
    """The ids that begin and end a document; GPT-2 has no beginning, hence (None, id of `<|endoftext|>`).

    Raises ValueError if the vocabulary has none of the pairs known here.
    """
    for bos, eos in _BOS_EOS:
        bos_id = None if bos is None else tokenizer.token_to_id(bos)
        eos_id = tokenizer.token_to_id(eos)
        if eos_id is not None and (bos is None or bos_id is not None):
            return bos_id, eos_id
    known = ", ".join(f"{bos or 'nothing'}…{eos}" for bos, eos in _BOS_EOS)
    raise ValueError(f"the tokenizer has no tokens that begin and end a document; known pairs: {known}")


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids `bos + ids + eos` of each text, as they stand in a stream; no text can produce a special token.

    (The tokenizer is switched to `encode_special_tokens`, and truncation and padding are switched off.)
    """
    return framed(tokenizer, encode_plain(tokenizer, list(texts)))


def encode_plain(tokenizer: Tokenizer, texts: list[str]) -> list:
    """The encodings of texts as they are, nothing before or after them."""
    return for_plain_text(tokenizer).encode_batch_fast(texts, add_special_tokens=False)


def framed(tokenizer: Tokenizer, encodings: Iterable) -> list[list[int]]:
    """`bos + ids + eos` of each encoding."""
    bos_id, eos_id = bos_eos(tokenizer)
    before = [] if bos_id is None else [bos_id]
    return [before + encoding.ids + [eos_id] for encoding in encodings]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids that a continuation of `text` starts from: what precedes a document in a stream, and no end.

    That is `bos`, or, where there is none (GPT-2), the `eos` of the document before.
    """
    bos_id, eos_id = bos_eos(tokenizer)
    ids = for_plain_text(tokenizer).encode(text, add_special_tokens=False).ids
    return [eos_id if bos_id is None else bos_id] + ids


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes that one token of `texts` stands for on average; bos and eos are not counted."""
    size = tokens = 0
    for batch in in_batches(texts):
        size += sum(len(text.encode()) for text in batch)
        tokens += sum(map(len, encode_plain(tokenizer, batch)))
    if tokens == 0:
        raise ValueError("bytes_per_token needs at least one text that is not empty")
    return size / tokens


def for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself, switched to take special strings in a text as text, whole and without padding.

    None of the three survives in, or is wanted from, a tokenizer.json: special strings in a text would become special
    tokens, and a truncation that a model's authors left in the file would cut documents silently.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts, bounded in number and in characters; TypeError for what is no text."""
    if isinstance(texts, str):
        raise TypeError("texts is one str; pass a list of them, or the text column of a data set")
    batch, characters = [], 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is {type(text).__name__}, not str; pass the text column of a data set")
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
