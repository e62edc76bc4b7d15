"""What all figures share: colours, text that any font can show, strings as one artist, axes, and the bytes of a PNG.

The palette is Okabe and Ito's, made for colour-blind readers; lines differ in dash as well as colour, so that they can
be told apart in print. Panels redraw a figure at every move of a slider, so their layout is computed, not solved for,
and short strings are one artist: matplotlib's texts take half a millisecond each.
"""

import io
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import ScaledTranslation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
# experts have the palette's hues and two more; 8-15 have them lighter, 16-23 darker, then they repeat
_HUES = (*(COLOURS[i] for i in (0, 4, 2, 3, 5, 1)), "#F0E442", "#8C8C8C")
# both perceptually uniform; 0 is paper-white, and in the middle of the second
MEASURE, DIFFERENCE = "magma_r", "RdBu_r"
MONO, ADVANCE = "DejaVu Sans Mono", 0.602  # comes with matplotlib; width of its characters / size


def expert_colour(expert: int) -> str:
    """The colour of an expert, as #rrggbb."""
    tint = ((1, 0), (0.5, 128), (0.55, 0))[expert // 8 % 3]
    hue = _HUES[expert % 8]
    return "#" + "".join(f"{int(int(hue[i : i + 2], 16) * tint[0] + tint[1]):02x}" for i in (1, 3, 5))


def ink(colour: str | Sequence[float]) -> str:
    """The one of "black" and "white" that can be read on `colour` (#rrggbb, or red, green and blue in 0..1)."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] if isinstance(colour, str) else colour[:3]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # relative luminance, WCAG 2.2
    return "black" if luminance > 0.179 else "white"


def scale_end(values: np.ndarray) -> float:
    """The largest finite value, or 1 where there is none above 0: the end of a colour scale."""
    return float(max(values[np.isfinite(values)], default=0)) or 1.0


def visible(text: str) -> str:
    r"""`text` so that a browser shows all of it: line breaks as ↵, invisible characters as \u{0}, spaces alone as ␣."""
    shown = "".join(_shown(character) for character in text)
    return shown if shown.strip() else "␣" * len(shown)


def printable(text: str, limit: int = 24) -> str:
    r"""`visible` text for a figure, cut at `limit`; what the font cannot show is \u{1F600}, no text at all is ∅."""
    text = str(text)
    shown = "".join(_shown(character, in_figure=True) for character in text[:limit])
    if len(text) > limit or len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return visible(shown) or "∅"


@lru_cache(maxsize=4096)
def _shown(character: str, in_figure: bool = False) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    if in_figure and not hidden:
        hidden = not get_font(findfont(FontProperties(family=MONO))).get_char_index(ord(character))
    return {"\n": "↵", "\r": "↤", "\t": "⇥"}.get(character, f"\\u{{{ord(character):X}}}" if hidden else character)


def label_text(text: str, limit: int = 120) -> str:
    """Text for a title, axis or tick: printable, and no dollar sign starts a formula."""
    return printable(text, limit).replace("$", r"\$") if text else ""


def signed(value: float) -> str:
    """A difference with its sign and two decimals; – where there is none."""
    if not np.isfinite(value):
        return "–"
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0"


def row_of_axes(
    count: int, size: tuple[float, float], *, title: str = "", grid: str | None = None, rows: int = 1, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """figure, axes: panels of `size` inches together, without a line above and to the right; the title is over all."""
    figure, panels = plt.subplots(rows, count, figsize=size, layout="constrained", squeeze=False, **shared)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(axis=grid, alpha=0.25)
    if title:
        figure.suptitle(title)
    return figure, list(panels.flat)


def new_axes(width: float, height: float, *, margins: Sequence[float], title: str) -> tuple[Figure, Axes]:
    """figure, axes: `width` x `height` inches for the axes; margins are left, right, bottom and top."""
    left, right, bottom, top = margins
    top += 0.28 if title else 0
    size = (width + left + right, height + bottom + top)
    figure = plt.figure(figsize=size)
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axes.set_title(label_text(title), fontsize=10, loc="left")
    return figure, axes


def png(figure: Figure, dpi: int = 90) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def note(axes: Axes, text: str, place: tuple, offset: tuple, coordinates: Any = "data", **look: Any) -> None:
    """Words beside a place of the figure, `offset` points away from it."""
    look = {"fontsize": 9, "color": "0.25"} | look
    axes.annotate(text, place, xycoords=coordinates, xytext=offset, textcoords="offset points", **look)


def draw_boxes(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], **look: Any) -> None:
    """Rectangles of (x, y, width, height) as one artist."""
    axes.add_collection(PatchCollection([Rectangle((x, y), width, height) for x, y, width, height in boxes], **look))


def draw_strings(
    axes: Axes, strings: Iterable[str], places: Any, size: float, *, on: Sequence | None = None, colour: str = "black",
    turned: bool = False, below: bool = False,
) -> None:  # fmt: skip
    """Short strings, each centred at its place, as one artist that keeps them in `strings`; a text each takes too long.

    `on` are colours, on each of which its string shall be readable; `turned` by a quarter; `below`: under the x axis,
    at the places' x.
    """
    figure, strings = axes.figure, tuple(strings)
    position = axes.transData
    if below:
        position = axes.get_xaxis_transform() + ScaledTranslation(0, -0.1, figure.dpi_scale_trans)
    collection = PathCollection(
        [_string_path(string, size / 72, turned) for string in strings],
        offsets=np.asarray(places, dtype=float).reshape(-1, 2), offset_transform=position,
        facecolors=colour if on is None else [ink(face) for face in on],
        linewidths=0, zorder=3, clip_on=not below, snap=False,
    )  # fmt: skip
    collection.set_transform(figure.dpi_scale_trans)
    collection.strings = strings
    axes.add_collection(collection, autolim=False)


@lru_cache(maxsize=4096)
def _string_path(string: str, size: float, turned: bool) -> Path:
    """The outline of `string`, `size` inches high, its middle at 0: of its glyphs, for a layout takes milliseconds."""
    places = enumerate(string) if string.isascii() else [(0, string)]  # other scripts need shaping
    parts = [(i * ADVANCE, _outline(part)) for i, part in places if part.strip()]
    vertices = np.concatenate([np.zeros((0, 2))] + [path.vertices + (x, 0) for x, path in parts])
    codes = np.concatenate([np.zeros(0, Path.code_type)] + [path.codes for _, path in parts])
    vertices = (vertices - (len(string) * ADVANCE / 2, 0.365)) * size
    return Path(vertices[:, ::-1] * (-1, 1) if turned else vertices, codes)


@lru_cache(maxsize=4096)
def _outline(text: str) -> TextPath:
    return TextPath((0, 0), text.replace("$", r"\$"), size=1, prop=FontProperties(family=MONO))


def checked_matrix(values: Any, wanted: tuple[int | None, int | None], what: str) -> np.ndarray:
    """`values` as a matrix of the `wanted` shape, None for experts. Raises ValueError where it has another, or none."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or any(n not in (None, m) for n, m in zip(wanted, values.shape)):
        give = ", ".join("experts" if n is None else str(n) for n in wanted)
        raise ValueError(f"the values have shape {values.shape} but there are {what}; give ({give})")
    return values


def shaped_like(values: np.ndarray, value: Any, name: str) -> np.ndarray:
    """`value` with the shape of `values`. Raises ValueError, which calls it `name`, where it does not broadcast."""
    try:
        return np.broadcast_to(np.asarray(value, dtype=float), values.shape)
    except ValueError:
        raise ValueError(f"{name} has shape {np.shape(value)}, which does not fit {values.shape}") from None
