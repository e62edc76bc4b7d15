"""Rows of documents, read from whatever holds them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Rows = Any  # a datasets.Dataset, a streamed IterableDataset, or an iterable of dicts


def _plain_tokenizer(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` of a transformers tokenizer: a copy, because encoding a stream's way sets it up so."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    return tokenizer


def _texts(rows: Rows, column: str, numbers: list[int]) -> Iterator[str]:
    """The texts of the rows with these ascending numbers; raises TypeError for one that is not a str."""
    if hasattr(rows, "select"):
        texts = (text for batch in _read(rows.select(numbers), [column]) for text in batch[column])
    else:
        wanted = set(numbers)
        everything = (text for batch in _read(rows, [column]) for text in batch[column])
        texts = (text for number, text in enumerate(everything) if number in wanted)
    for number, text in zip(numbers, texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is {type(text).__name__}, not str; give the text column as column=…")
        yield text


def _read(rows: Rows, columns: Sequence[str], size: int = 1000) -> Iterator[dict[str, list]]:
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
