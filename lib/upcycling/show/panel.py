"""What the panels of `explorer` are made of: controls over strips of tokens and a picture, and their still twin.

A panel is a function from the controls' values to a `View`; everything else (widgets, the still picture, problems with
what was typed) is here. The browser shows the view's strips as real buttons: they can be clicked, focused and read out.
How they look is in `assets/panels.css`.
"""

import base64
import html
import io
import textwrap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import ipywidgets as W
from matplotlib.figure import Figure

from .strips import strip_figure
from .style import MONO, expert_colour, ink, png, printable, visible


@dataclass(frozen=True)
class Strip:
    """A text as tokens: how each looks, and the probabilities that its card shows.

    `colours` are #rrggbb, `notes` short (an expert's number), `chosen` the experts that compute each token; `legend`
    says what colours and notes mean.
    """

    title: str
    legend: str
    texts: Sequence[str]
    colours: Sequence[str]
    notes: Sequence[str]
    probabilities: Sequence[Sequence[float]]  # tokens x experts
    chosen: Sequence[Sequence[int]]

    def figure(self, followed: int) -> Figure:
        return strip_figure(self.texts, self.colours, self.notes, self.legend, followed, title=self.title)


@dataclass(frozen=True)
class View:
    """What a panel shows for one setting of its controls."""

    sentence: str  # what there is to see; also the picture's alternative text
    figure: Figure
    strips: Sequence[Strip] = ()
    followed: int = 0  # the token that is framed in each strip
    words: str = ""  # HTML, escaped by who made it
    lines: Sequence[str] = ()  # what `words` say, without HTML, for the still picture

    def png(self) -> bytes:
        """Everything as one picture, from top to bottom: sentence and lines, strips, figure."""
        figures = [_text_figure([self.sentence, *self.lines])]
        figures += [strip.figure(self.followed) for strip in self.strips]
        return _stacked([png(figure) for figure in [*figures, self.figure]])


class Panel:
    """Controls over a view; a subclass has `view()`, and `_follow(change)` where controls depend on each other.

    Every control can be set from a cell: `panel.layer.value = 2`. A ValueError from `_follow` (a text does not fit)
    or from `view` is shown as one sentence, above the last view that worked.
    """

    def __init__(self, strips: int = 0, **controls: W.Widget):
        self.controls = controls
        for name, control in controls.items():
            setattr(self, name, control)
            control.description = control.description or name
            control.style.description_width = "initial"
        self.strips = [_StripWidget() for _ in range(strips)]
        self._problem, self._sentence, self._words, self._picture = (W.HTML() for _ in range(4))
        self._words.add_class("upcycling-words")
        self._updating, self._lock = False, threading.RLock()

    def _start(self, *rows: Sequence[W.Widget]) -> None:
        """Draw for the first time (here a ValueError is the caller's) and lay out; `rows` are rows of controls."""
        self._follow(None)
        self._show(self.view())
        for control in [*self.controls.values(), *(strip.buttons for strip in self.strips)]:
            control.observe(self._update, "value")
        lines = [W.HBox(list(row), layout=W.Layout(flex_flow="row wrap", align_items="center")) for row in rows]
        parts = [self._problem, *(strip.box for strip in self.strips), self._sentence, self._words, self._picture]
        # without a width of its own a box is as wide as its content, and nothing would wrap
        self.box = W.VBox([*lines, W.HTML(f"<style>{_rules()}</style>"), *parts], layout=W.Layout(width="100%"))

    def view(self) -> View:
        """What the controls ask for now."""
        raise NotImplementedError

    def _follow(self, change) -> None:
        """Bring the controls in line with what changed (None: at the start).

        A click follows its token; choosing an example types it, and typing something else chooses none.
        """
        owner, example = change and change["owner"], self.controls.get("example")
        if any(owner is strip.buttons for strip in self.strips):
            self.token.value = change["new"]
        if example and owner is example and example.value is not None:
            self.text.value = example.value
        elif example and owner is self.text and self.text.value != example.value:
            example.value = None

    def _update(self, change) -> None:
        # JupyterLab lets a kernel handle what widgets send in another thread, beside a running cell or another change
        with self._lock:
            if self._updating:  # a control that `_follow` or `_show` set
                return
            self._updating, problems = True, []
            try:
                for step in (lambda: self._follow(change), lambda: self._show(self.view())):
                    try:
                        step()
                    except ValueError as error:
                        problems.append(str(error))
            finally:
                self._updating = False
            said = html.escape(visible(" ".join(problems[:1])))
            self._problem.value = said and f'<p role="alert" style="color:#B00020;margin:2px">{said}</p>'

    def _show(self, view: View) -> None:
        for widget, strip in zip(self.strips, view.strips):
            widget.show(strip, view.followed)
        said = html.escape(visible(view.sentence))
        self._sentence.value = f'<p role="status" aria-live="polite" style="line-height:1.4;margin:2px">{said}</p>'
        self._words.value = view.words
        # not widgets.Image: that has no alternative text, and a tooltip breaks its view (ipywidgets 8.1)
        data = base64.b64encode(png(view.figure)).decode()
        self._picture.value = (
            f'<img alt="{said}" decoding="sync" style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
        )

    def still(self) -> Any:
        """The view as a picture without widgets (IPython's Image; its `data` are the PNG's bytes)."""
        from IPython.display import Image

        with self._lock:
            view = self.view()
        return Image(data=view.png(), format="png", alt=visible(view.sentence))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.controls)})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        if hasattr(self.box, "_repr_mimebundle_"):  # ipywidgets 8
            live = self.box._repr_mimebundle_()
        else:  # 7, as in Colab
            live = {"application/vnd.jupyter.widget-view+json": {
                "version_major": 2, "version_minor": 0, "model_id": self.box.model_id}}  # fmt: skip
        still = self.still()
        picture = base64.b64encode(still.data).decode()
        return {**live, "text/plain": repr(self), "image/png": picture}, {"image/png": {"alt": still.alt}}


def wide(pixels: int) -> W.Layout:
    return W.Layout(width=f"{pixels}px")


def text_inputs(text: str, examples: Mapping[str, str] | None) -> dict[str, W.Widget]:
    """The controls `text` and, where there are examples, `example`, the first of which is typed in place of no text."""
    examples = dict(examples or {})
    if not text and examples:
        text = next(iter(examples.values()))
    chosen = next((name for name, example in examples.items() if example == text), None)
    inputs = {"example": W.Dropdown(options=examples, label=chosen)} if examples else {}
    return inputs | {"text": W.Textarea(text, layout=W.Layout(width="520px", height="56px"))}


def toggle_buttons(options: Sequence, *classes: str) -> W.ToggleButtons:
    """Buttons as wide as their labels, below the CSS `classes`."""
    buttons = W.ToggleButtons(options=options, layout=W.Layout(width="auto"))
    buttons.style.button_width = "auto"
    for name in classes:
        buttons.add_class(name)
    return buttons


class _StripWidget:
    """A strip in the browser: one widget makes all buttons, a style sheet colours them and holds their cards.

    Which card is seen is decided by the browser alone (:hover, :focus-visible); a click reaches the kernel as the new
    `buttons.value`. A button a token would be hundreds of widgets, and seconds for each new text.
    """

    def __init__(self):
        self.title, self.sheet, self.followed = W.HTML(), W.HTML(), W.HTML()
        self.buttons = toggle_buttons([])
        self.box = W.VBox([self.title, self.buttons, self.followed, self.sheet], layout=W.Layout(width="100%"))
        self.scope = f"strip-{self.box.model_id}"
        self.box.add_class("upcycling-strip").add_class(self.scope)

    def show(self, strip: Strip, followed: int) -> None:
        options = [(visible(text), i) for i, text in enumerate(strip.texts)]
        if list(self.buttons.options) != options:
            self.buttons.options = options
        self.buttons.value = followed
        heading = f"<b>{html.escape(visible(strip.title))}</b> " if strip.title else ""
        self.title.value = f'<span style="font-size:90%">{heading}{html.escape(strip.legend)}</span>'
        self.sheet.value = strip_style(strip, self.scope)
        followed_button = f".{self.scope} button:nth-child({followed + 1})"
        frame = f"{followed_button}{{box-shadow:0 0 0 2px var(--jp-ui-font-color0,#000)!important}}"
        card = html.escape(card_text(strip, followed))
        sizes = card_sizes(strip.probabilities[followed])
        self.followed.value = f'<style>{frame}</style><pre class="card" style="background-size:{sizes}">{card}</pre>'


@lru_cache(maxsize=1)
def _rules() -> str:
    return files(__package__).joinpath("assets", "panels.css").read_text(encoding="utf-8")


def strip_style(strip: Strip, scope: str) -> str:
    """The style sheet that colours the buttons below class `scope`, writes their notes and holds their cards.

    No text of a token is in it, and no :has(), which is slow: a card is generated content of its button.
    """
    rules = []
    for i, (colour, note, probabilities) in enumerate(zip(strip.colours, strip.notes, strip.probabilities)):
        card = card_text(strip, i).replace("\n", "\\a ")
        rules.append(
            f".{scope} button:nth-child({i + 1}){{background:{colour};color:{ink(colour)};"
            f'--note:"{note}";--read:", {note}";--card:"{card}";--sizes:{card_sizes(probabilities)}}}'
        )
    experts = range(len(strip.probabilities[0]))
    colours = ",".join(f"linear-gradient({expert_colour(e)},{expert_colour(e)})" for e in experts)
    places = ",".join(f"{5 * (e % 16) + 0.5}ch {14 * (3 * (e // 16) + 3) + 1}px" for e in experts)
    card = f".{scope} .card,.{scope} button:hover::before,.{scope} button:focus-visible::before"
    rules.append(f"{card}{{background-image:{colours};background-position:{places}}}")
    return f"<style>{''.join(rules)}</style>"


def card_text(strip: Strip, token: int) -> str:
    """The probabilities of all experts for one token, sixteen to a row; the chosen experts are in brackets."""
    lines = [f"token {token}: probability of each expert in %, the chosen ones in brackets"]
    shares, chosen = strip.probabilities[token], strip.chosen[token]
    for begin in range(0, len(shares), 16):
        row = range(begin, min(begin + 16, len(shares)))
        lines.append("".join(f"[{e}]".center(5) if e in chosen else str(e).center(5) for e in row).rstrip())
        lines.append("".join(f"{100 * shares[e]:.0f}".center(5) for e in row).rstrip())
        lines.append("")  # the bars are here
    return "\n".join(lines[:-1])


def card_sizes(probabilities: Sequence[float]) -> str:
    """The bars' sizes, in the order of the experts, as CSS has them."""
    return ",".join(f"{4 * p:.2f}ch 8px" for p in probabilities)


def _text_figure(lines: Sequence[str]) -> Figure:
    """Lines of plain text, wrapped, as a figure."""
    wrapped = [part for line in lines for part in textwrap.wrap(printable(line, 2000), 110)]
    figure = Figure(figsize=(9, 0.1 + 0.18 * len(wrapped)))
    figure.text(0.01, 0.5, "\n".join(wrapped), fontsize=9, va="center", family=MONO, parse_math=False)
    return figure


def _stacked(pictures: Sequence[bytes]) -> bytes:
    """PNG files below each other as one."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    buffer = io.BytesIO()
    whole.save(buffer, format="png")
    return buffer.getvalue()
