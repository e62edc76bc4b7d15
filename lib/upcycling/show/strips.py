"""Figures of a text as its tokens: boxes in colours, a small note below each."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from . import style

COLUMNS, MOST_TOKENS = 100, 400  # characters of a line; tokens of a figure


def plot_token_strip(texts: Sequence[str], experts_N, *, followed: int | None = None, title: str = "") -> Figure:
    """The text as boxes in the colour of each token's first expert, whose number stands below it.

    `experts_N` may be (N, K): then all K numbers stand there, best first. `followed` is the index of a token to frame.
    Tokens after the first 400 are left out, and the title says so.
    Raises ValueError where texts and experts differ in length.
    """
    experts = np.asarray(experts_N)
    rows = experts.reshape(len(experts), -1 if experts.size else 1).astype(int).tolist()
    legend = "below each token: " + ("its experts, best first" if rows and len(rows[0]) > 1 else "its expert")
    colours, notes = [style.expert_colour(row[0]) for row in rows], [" ".join(map(str, row)) for row in rows]
    return strip_figure(texts, colours, notes, legend, followed, title, "rows of experts")


def plot_token_losses(texts: Sequence[str], change_N, *, limit: float | None = None, title: str = "") -> Figure:
    """The text as boxes coloured by the change of each token's loss (nats): red costs, blue gains, white is 0.

    The number below is the change. `limit` fixes the end of the colour scale, else the largest change is the end.
    Not-a-number (a token that was not predicted) is grey. Raises ValueError where texts and changes differ in length.
    """
    change_N = np.asarray(change_N, dtype=float)
    limit = style.scale_end(np.abs(change_N[:MOST_TOKENS])) if limit is None else limit
    colours_N4 = matplotlib.colormaps[style.DIFFERENCE](0.5 + 0.5 * np.nan_to_num(change_N) / limit)
    colours_N4[~np.isfinite(change_N)] = (0.8, 0.8, 0.8, 1)
    notes = [style.signed(value) for value in change_N]
    legend = f"below each token: change of its loss (nats); full red is +{limit:.2g}, full blue −{limit:.2g}"
    return strip_figure(texts, colours_N4.tolist(), notes, legend, None, title, "changes of loss")


def strip_figure(
    texts: Sequence[str], colours: Sequence, notes: Sequence[str], legend: str, followed: int | None = None,
    title: str = "", what: str = "notes",
) -> Figure:  # fmt: skip
    """Boxes with a text and a small note below it, wrapped at `COLUMNS` characters and after a line break.

    The first `MOST_TOKENS` are drawn; `legend` stands below; `followed` is the index of a box to frame.
    Raises ValueError where texts and notes (which are `what`) differ in number.
    """
    if len(texts) != len(notes):
        raise ValueError(f"{len(texts)} texts but {len(notes)} {what}; give one for each token")
    if len(texts) > MOST_TOKENS:
        title = f"{title} (first {MOST_TOKENS:,} of {len(texts):,} tokens)".strip()
    size, note_size = 8, 6  # points
    texts, colours, notes = texts[:MOST_TOKENS], colours[:MOST_TOKENS], notes[:MOST_TOKENS]
    shown = [style.printable(text) for text in texts]
    boxes, x, line = [], 0.0, 0
    for text, note, original in zip(shown, notes, texts):
        width = max(len(text), len(note) * note_size / size) + 0.6
        if x and x + width > COLUMNS:
            x, line = 0.0, line + 1
        boxes.append((x, line + 0.05, width, 0.9))
        x += width + 0.15
        if "\n" in original:
            x, line = 0.0, line + 1
    lines = 1 + int(boxes[-1][1]) if boxes else 1
    wide = COLUMNS * style.ADVANCE * size / 72
    figure, axes = style.new_axes(wide, lines * 0.36, margins=(0.1, 0.1, 0.3, 0.05), title=title)
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(legend, fontsize=8, loc="left")
    edges = ["black" if i == followed else "0.6" for i in range(len(boxes))]
    widths = [2.2 if i == followed else 0.4 for i in range(len(boxes))]
    style.draw_boxes(axes, boxes, facecolors=colours, edgecolors=edges, linewidths=widths)
    places = [(x + width / 2, y + 0.27) for x, y, width, _ in boxes]
    style.draw_strings(axes, shown, places, size, on=colours)
    style.draw_strings(axes, notes, [(x, y + 0.42) for x, y in places], note_size, on=colours)
    return figure
