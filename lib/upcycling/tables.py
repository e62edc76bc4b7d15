"""Tables that print as text, render as HTML and become data frames."""

from __future__ import annotations

from html import escape


class Table(list):
    """Rows, each a dict of the same keys, that print as a table in text and in a notebook."""

    def __str__(self) -> str:
        return render_text(self, [])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_html(self, [])


# ----------------------------------------------------------------------------------------------------------- tables


def render_text(rows: list[dict], notes: list[str]) -> str:
    """A table of `rows`, the keys as header, right-aligned, with the notes below it."""
    lines = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines] + notes)


def render_html(rows: list[dict], notes: list[str]) -> str:
    """The same as an HTML table."""

    def line(tag: str, cells) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(_cell(cell))}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line("td", row.values()) for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead>{line('th', rows[0])}</thead><tbody>{body}</tbody></table>{below}"


def _cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
