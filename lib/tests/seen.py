"""What a reader sees of a figure or of a panel: words, values, marks, pictures and what they are called."""

import base64
import html
import re

import ipywidgets as W
import numpy as np
from matplotlib.colors import to_hex


def runs(axes):
    """The strings of each artist of `draw_strings`, in the order in which they were drawn."""
    return [artist for artist in axes.collections if hasattr(artist, "strings")]


def words(axes):
    """All that is written inside the axes."""
    return {text for run in runs(axes) for text in run.strings} | {text.get_text() for text in axes.texts}


def written(axes):
    """{(x, y): text} of the short strings, at the places where they stand; of cells (expert, row)."""
    inside = [run for run in runs(axes) if run.get_clip_on()]
    return {tuple(place): text for run in inside for text, place in zip(run.strings, run.get_offsets().tolist())}


def curves(axes):
    """{name: {x: y}} of the lines that have a name."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in named}


def levels(axes, direction="y"):
    """Where lines cross the axes from one side to the other: at which y (or x)."""
    at = ("x", "y").index(direction)
    return [line.get_data()[at][0] for line in axes.lines if list(line.get_data()[1 - at]) == [0, 1]]


def names(axes, direction="y"):
    """The names along an axis."""
    return [label.get_text() for label in getattr(axes, f"get_{direction}ticklabels")()]


def dots(axes):
    """{height of the line that they belong to, rounded: values} of what was scattered."""
    found = {}
    for scatter in axes.collections:
        if not hasattr(scatter, "strings") and not hasattr(scatter, "get_segments"):
            for x, y in scatter.get_offsets().tolist():
                found.setdefault(round(y), []).append(x)
    return found


def means(axes):
    """{line: value} of the marks that stand for means: bars across a line, or squares on it."""
    bars = [segment for c in axes.collections if hasattr(c, "get_segments") for segment in c.get_segments()]
    upright = {round(float(np.mean(bar[:, 1]))): float(bar[0, 0]) for bar in bars if np.ptp(bar[:, 0]) == 0}
    squares = {round(float(c[0].get_ydata()[0])): float(c[0].get_xdata()[0]) for c in axes.containers}
    return upright | squares


def intervals(axes):
    """{line: (low, high)} of the intervals around the means."""
    return {
        round(float(bar[0, 1])): (float(bar[0, 0]), float(bar[-1, 0]))
        for container in axes.containers
        for bars in container[2]
        for bar in bars.get_segments()
    }


def frames(axes):
    """(expert, row) of the cells that are framed in black."""
    boxes = [c for c in axes.collections if not hasattr(c, "strings") and "#000000" in map(to_hex, c.get_edgecolor())]
    extents = [path.get_extents() for c in boxes for path in c.get_paths()]
    return {(round((b.x0 + b.x1) / 2), round((b.y0 + b.y1) / 2)) for b in extents}


class Reader:
    """What somebody sees who looks at a panel: read from the widgets in its box, whatever they are called."""

    def __init__(self, panel):
        self.panel = panel

    @property
    def markup(self):
        """Everything that is shown as HTML, from top to bottom."""
        return "\n".join(widget.value for widget in _widgets(self.panel.box) if isinstance(widget, W.HTML))

    @property
    def sentence(self):
        return self._part('<p role="status"[^>]*>(.*?)</p>')

    @property
    def problem(self):
        return self._part('<p role="alert"[^>]*>(.*?)</p>')

    @property
    def alternative(self):
        return self._part('<img alt="([^"]*)"')

    @property
    def picture(self):
        """The bytes of the picture."""
        return base64.b64decode(re.search('src="data:image/png;base64,([^"]+)', self.markup)[1])

    @property
    def tokens(self):
        """The labels of the buttons of the first strip."""
        return [label for label, _ in self.panel.strips[0].buttons.options]

    @property
    def cards(self):
        """What is seen below each strip of the token that is followed."""
        return re.findall('<pre class="card"[^>]*>(.*?)</pre>', self.markup, re.DOTALL)

    @property
    def sheets(self):
        """The widgets that hold the colours and cards of strips."""
        return [widget for widget in _widgets(self.panel.box) if "linear-gradient" in str(getattr(widget, "value", ""))]

    def buttons(self, name):
        """The buttons of class `name`."""
        return next(widget for widget in _widgets(self.panel.box) if name in getattr(widget, "_dom_classes", ()))

    @property
    def legends(self):
        return [html.unescape(text) for text in re.findall('<span style="font-size:90%">(.*?)</span>', self.markup)]

    def _part(self, pattern):
        found = re.findall(pattern, self.markup, re.DOTALL)
        assert len(found) <= 1, found
        return html.unescape(found[0]) if found else ""


def _widgets(box):
    for child in getattr(box, "children", ()):
        yield child
        yield from _widgets(child)
