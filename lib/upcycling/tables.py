"""One table: it prints as text, shows itself as HTML in a notebook, is written as Markdown and becomes a DataFrame.

    Table(rows)                                       # rows are dicts; every column right-aligned, two blanks between
    Table(rows, left=["arm"], formats={"loss": ".4f", "documents": ","})
    Table(rows, above=["a headline"], below=notes)    # lines around it, a paragraph each in HTML
    Table(rows, left=True, strip=True)                # all to the left, no blanks at the ends of lines
    Table(rows, left=[""], width={"": 27, "MoE": 14}, gap="")     # columns of a fixed width, nothing between them

A class whose result is a table derives from `ShownAsTable` and says which one in `_as_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


class Table(list):
    """A list of rows, each a dict of column -> value, with a way to be shown.

    columns: their names in order (default: those of the rows as they appear); what a row lacks is left empty.
    left: the columns that are aligned to the left, or True for all.
    width: the least number of characters of a column, one for all or {column: number}.
    formats: {column: a format specification, or a function that turns any value into a str}; without, a str is shown
    as it is, None as a dash, a bool as yes or no, and a float has three decimals.
    gap: what stands between columns. strip: whether lines lose the blanks at their end. above, below: lines around.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]] = (),
        columns: Sequence[str] | None = None,
        *,
        left: Iterable[str] | bool = (),
        width: int | Mapping[str, int] = 0,
        formats: Mapping[str, str | Callable[[Any], str]] | None = None,
        gap: str = "  ",
        strip: bool = False,
        above: Sequence[str] = (),
        below: Sequence[str] = (),
    ):
        super().__init__(rows)
        self.columns = list(dict.fromkeys(name for row in self for name in row) if columns is None else columns)
        self.left = set(self.columns if left is True else left or ())
        self.width = {name: width if isinstance(width, int) else width.get(name, 0) for name in self.columns}
        self.formats, self.gap, self.strip = dict(formats or {}), gap, strip
        self.above, self.below = list(above), list(below)

    def __str__(self) -> str:
        lines = map(self.gap.join, self._aligned(self.left))
        return "\n".join([*self.above, *(line.rstrip() if self.strip else line for line in lines), *self.below])

    __repr__ = __str__

    def markdown(self) -> str:
        """The table as Markdown, columns padded so that it can be read as it is, without the lines around it."""
        header, *body = self._aligned(set(self.columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["-" * len(cell) for cell in header], *body])

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

        def paragraphs(texts: Iterable[str]) -> str:
            return "".join(f"<p>{escape(text)}</p>" for text in texts)

        body = "".join(line("td", cells) for cells in self._cells())
        table = f"<table><thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>"
        return paragraphs(self.above) + table + paragraphs(self.below)

    def frame(self) -> DataFrame:
        """The rows as a pandas.DataFrame, with the values as they are, not as they are shown."""
        from pandas import DataFrame

        return DataFrame(list(self), columns=self.columns)

    def _cells(self) -> list[list[str]]:
        return [[self._cell(name, row[name]) if name in row else "" for name in self.columns] for row in self]

    def _cell(self, column: str, value: Any) -> str:
        how = self.formats.get(column)
        if callable(how):
            return how(value)
        if value is None or isinstance(value, str):
            return "–" if value is None else value
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, how or (".3f" if isinstance(value, float) else ""))

    def _aligned(self, left: set[str]) -> list[list[str]]:
        """The header and the rows, each column padded to one width."""
        lines = [self.columns, *self._cells()]
        widths = [max(self.width[name], *map(len, column)) for name, column in zip(self.columns, zip(*lines))]
        align = [str.ljust if name in left else str.rjust for name in self.columns]
        return [[pad(cell, width) for pad, cell, width in zip(align, line, widths)] for line in lines]


class ShownAsTable:
    """A result that is shown as a table: in text, in a notebook, and as a DataFrame (a dataclass needs repr=False)."""

    def _as_table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self._as_table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._as_table()._repr_html_()

    def frame(self) -> DataFrame:
        """The table as a pandas.DataFrame, with the values as they are, not as they are shown."""
        return self._as_table().frame()
