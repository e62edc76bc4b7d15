"""What the figures of the routing are drawn with: experts' colours, text that any font can show, strips of tokens.

Panels redraw a figure at every move of a slider, so the layout is computed, not solved for, and short strings are one
artist: matplotlib's texts take half a millisecond each.
"""

from __future__ import annotations

import io
import unicodedata
from functools import lru_cache

import numpy as np

# Okabe and Ito's hues, grey for black; experts 8-15 have them lighter, 16-23 darker, then they repeat
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C")
_MONO, _ADVANCE = "DejaVu Sans Mono", 0.602  # comes with matplotlib; width of its characters / size


def expert_colour(expert: int) -> str:
    """The colour of an expert, as #rrggbb."""
    tint = ((1, 0), (0.5, 128), (0.55, 0))[expert // 8 % 3]
    hue = _HUES[expert % 8]
    return "#" + "".join(f"{int(int(hue[i : i + 2], 16) * tint[0] + tint[1]):02x}" for i in (1, 3, 5))


def ink(colour) -> str:
    """The one of "black" and "white" that can be read on `colour` (#rrggbb, or red, green and blue in 0..1)."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] if isinstance(colour, str) else colour[:3]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # relative luminance, WCAG 2.2
    return "black" if luminance > 0.179 else "white"


def printable(text: str, limit: int = 24) -> str:
    r"""`text` for a figure, cut at `limit`: line breaks and tabs as ↵ and ⇥, what the font cannot show as \u{1F600}.

    Text without anything to see is shown as ␣ for each blank, or ∅.
    """
    text = str(text)
    shown = "".join(_shown(character) for character in text[:limit])
    if len(text) > limit or len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return shown if shown.strip() else "␣" * len(shown) or "∅"


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    seen = visible_character(character)
    return seen if seen != character or _font().get_char_index(ord(character)) else f"\\u{{{ord(character):X}}}"


def visible_character(character: str) -> str:
    r"""Line breaks and tabs as ↵, ↤ and ⇥, other characters that cannot be seen as \u{0}, the rest as it is."""
    invisible = unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    escape = f"\\u{{{ord(character):X}}}" if invisible else character
    return {"\n": "↵", "\r": "↤", "\t": "⇥"}.get(character, escape)


@lru_cache(maxsize=1)
def _font():
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties(family=_MONO)))


def label_text(text: str, limit: int = 120) -> str:
    """Text for a title, axis or tick: printable, and no dollar sign starts a formula."""
    return printable(text, limit).replace("$", r"\$") if text else ""


def png(figure, dpi: int = 90) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def strip_figure(texts, colours, notes, legend, followed, columns, max_tokens, title):
    """Boxes with a text and a small note below it, wrapped at `columns` characters and after a line break.

    `colours` and `notes` belong to the first `max_tokens` texts; `legend` stands below; `followed` is the index of a
    box to frame.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if len(texts) > max_tokens:
        title = f"{title} (first {max_tokens:,} of {len(texts):,} tokens)".strip()
    size, note_size = 8, 6  # points
    shown = [printable(text) for text in texts[:max_tokens]]
    places, x, line = [], 0.0, 0
    for text, note, original in zip(shown, notes, texts):
        width = max(len(text), len(note) * note_size / size) + 0.6
        if x and x + width > columns:
            x, line = 0.0, line + 1
        places.append((x, line, width))
        x += width + 0.15
        if "\n" in original:
            x, line = 0.0, line + 1
    lines = 1 + max((line for _, line, _ in places), default=0)
    _, axes = new_axes(columns * _ADVANCE * size / 72, lines * 0.36, margins=(0.1, 0.1, 0.3, 0.05), title=title)
    axes.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(legend, fontsize=8, loc="left")
    boxes = [Rectangle((x, line + 0.05), width, 0.9) for x, line, width in places]
    frames = [("black", 2.2) if i == followed else ("0.6", 0.4) for i in range(len(boxes))]
    edges, widths = zip(*frames) if frames else ((), ())
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors=edges, linewidths=widths))
    inks = [ink(colour) for colour in colours]
    plain = [i for i, text in enumerate(shown) if text.isascii()]
    middles = [(x + width / 2, line + 0.32) for x, line, width in places]
    draw_strings(axes, [shown[i] for i in plain], [middles[i] for i in plain], [inks[i] for i in plain], size)
    for i in set(range(len(shown))) - set(plain):  # other scripts need a text's shaping
        axes.text(
            *middles[i], shown[i], color=inks[i], fontsize=size, family=_MONO, ha="center", va="center_baseline",
            parse_math=False,
        )  # fmt: skip
    draw_strings(axes, notes, [(x + width / 2, line + 0.74) for x, line, width in places], inks, note_size)
    return axes.figure


def new_axes(width, height, *, margins, title):
    """figure, axes: `width` x `height` inches for the axes; margins are left, right, bottom and top."""
    import matplotlib.pyplot as plt

    left, right, bottom, top = margins
    top += 0.28 if title else 0
    size = (width + left + right, height + bottom + top)
    figure = plt.figure(figsize=size)
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    if title:
        axes.set_title(label_text(title), fontsize=10, loc="left")
    return figure, axes


def draw_strings(axes, strings, places, inks, size, *, turned=False, below=False, zorder=3):
    """Short strings, each centred at its place, as one artist that keeps them in `strings`; a text each takes too long.

    `turned` by a quarter; `below`: under the x axis, at the places' x.
    """
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import ScaledTranslation

    figure, strings = axes.figure, tuple(strings)
    position = axes.transData
    if below:
        position = axes.get_xaxis_transform() + ScaledTranslation(0, -0.1, figure.dpi_scale_trans)
    collection = PathCollection(
        [_string_path(string, size / 72, turned) for string in strings],
        offsets=np.asarray(places, dtype=float).reshape(-1, 2),
        offset_transform=position,
        facecolors=inks,
        linewidths=0,
        zorder=zorder,
        clip_on=not below,
        snap=False,
    )
    collection.set_transform(figure.dpi_scale_trans)
    collection.strings = strings
    axes.add_collection(collection, autolim=False)


@lru_cache(maxsize=4096)
def _string_path(string, size, turned):
    """The outline of `string`, `size` inches high, its middle at 0."""
    from matplotlib.path import Path

    glyphs = [(i, _glyph(character)) for i, character in enumerate(string) if character != " "]
    vertices = np.concatenate([np.zeros((0, 2))] + [glyph.vertices + (i * _ADVANCE, 0) for i, glyph in glyphs])
    codes = np.concatenate([np.zeros(0, Path.code_type)] + [glyph.codes for _, glyph in glyphs])
    vertices = (vertices - (len(string) * _ADVANCE / 2, 0.365)) * size
    return Path(vertices[:, ::-1] * (-1, 1) if turned else vertices, codes)


@lru_cache(maxsize=256)
def _glyph(character):
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), character, size=1, prop=FontProperties(family=_MONO))
