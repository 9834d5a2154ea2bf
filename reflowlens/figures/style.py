"""How figures look: the plotly template, the palette, and how text from a frame is shown.

Okabe and Ito's palette (2008), which colour-blind readers can tell apart, for measurements; for controls tinted greys,
each with a dash, a hatch and a mark of its own; a transparent background under ink that can be read on a light and on a
dark page.
"""

from __future__ import annotations

import functools
import html
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from reflowlens.figures.figure import Figure

TEMPLATE = "reflowlens"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # without black and yellow: they vanish
CONTROL_GREYS = ("#8C8C8C", "#A98467", "#6E83A3", "#A08CB0", "#8A9A5B")  # tinted, so that controls differ among them
INK = "#7A7A7A"  # contrast 4.3 against white, 4.2 against #14161A
COUNTS_ON_A_LOGARITHM = {
    "type": "log",
    "dtick": 1,
    "exponentformat": "none",
    "separatethousands": True,
    "minor": {"ticks": "outside", "ticklen": 2},
}
"""A logarithmic axis of ranks or counts: 1, 10, 100 written out, ticks alone between them."""
_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
_HATCHES = ("/", "x", ".", "\\", "-")
_MARKS = ("x", "square-open", "triangle-up-open", "diamond-open", "cross-open")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)+")


@functools.cache
def register_template() -> go.layout.Template:
    """Register the template with plotly as ``"reflowlens"`` and return it; the builders of figures do so by themselves.

    Example: ``register_template(); plotly.io.templates.default = "reflowlens"`` for a notebook's own figures.
    """
    import plotly.graph_objects as go
    import plotly.io as pio

    from reflowlens.figures.notebook import add_renderer

    axis = {
        "automargin": True,
        "exponentformat": "power",
        "gridcolor": "rgba(128, 128, 128, 0.22)",
        "linecolor": INK,
        "spikecolor": INK,
        "spikethickness": 1,
        "showline": True,
        "tickcolor": INK,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"standoff": 10, "font": {"size": 13}},
        "zeroline": False,
    }
    layout = {
        "colorway": PALETTE,
        "font": {"family": "Inter, system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "#24272D", "bordercolor": "#5A5F69", "font": {"color": "#F4F4F4"}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 20, "t": 16, "b": 50},
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": INK, "activecolor": PALETTE[0]},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "title": {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16}},
        "xaxis": axis,
        "yaxis": axis,
    }
    pio.templates[TEMPLATE] = go.layout.Template(layout=layout)
    add_renderer()
    return pio.templates[TEMPLATE]


def blank_figure(title: str, x_title: str, y_title: str) -> Figure:
    """An empty figure in the template, with a ``save``; the texts are shown as they are."""
    template = register_template()
    from reflowlens.figures.figure import Figure

    upright = "<br>".join(map(label, textwrap.wrap(y_title, 36)))  # plotly would let a long one run out of the figure
    figure = Figure(layout={"template": template, "xaxis_title": label(x_title), "yaxis_title": upright})
    if title:
        figure.update_layout(title_text=label(title), margin_t=90)
    return figure


@dataclass(frozen=True)
class Series:
    """One group of rows, its name as a legend shows it, and how it is drawn."""

    name: str
    rows: pd.DataFrame
    color: str = PALETTE[0]
    dash: str = "solid"
    hatch: str = ""
    symbol: str = "circle"

    def faded(self, opacity: float) -> str:
        """Its colour, transparent."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, {opacity})"


def series_of(frame: pd.DataFrame, color: str | None, controls: Collection[str]) -> Iterator[Series]:
    """The groups of the column ``color`` in order of appearance: controls in greys, the others in colours."""
    if color is None:
        yield Series("", frame)
        return
    names = list(dict.fromkeys(frame[color]))
    grey = [name for name in names if name in controls]
    coloured = [name for name in names if name not in controls]
    for name in names:
        rows = frame[frame[color] == name]
        if name in controls:
            i = grey.index(name) % len(CONTROL_GREYS)
            yield Series(named(name), rows, CONTROL_GREYS[i], _DASHES[i], _HATCHES[i], _MARKS[i])
        else:
            yield Series(named(name), rows, PALETTE[coloured.index(name) % len(PALETTE)])


def check_columns(frame: pd.DataFrame, columns: Sequence[str | None]) -> None:
    """Raise unless the frame has rows and every named column."""
    if frame.empty:
        raise ReflowlensError("a figure needs at least one row; this frame has none")
    for column in columns:
        if column is not None and column not in frame.columns:
            raise ReflowlensError(f"no column {column!r}; the frame has {', '.join(map(repr, frame.columns))}")


def hover_texts(
    frame: pd.DataFrame, columns: Sequence[str], low: str | None = None, high: str | None = None
) -> list[str]:
    """One text a row: the interval, where there is one, and a line "column: value" for each column."""
    texts = []
    for row in frame.to_dict("records"):
        lines = [f"{words(column)}: {_hover_cell(row[column])}" for column in columns]
        if low is not None and high is not None:
            lines.insert(0, f"({_hover_cell(row[low])} to {_hover_cell(row[high])})")
        texts.append("<br>".join(lines))
    return texts


def label(value: object) -> str:
    """A value as plotly shows it literally: markup escaped, blank tokens and line breaks made visible.

    >>> label("\\n"), label(" "), label(" Paris"), label("<b>")
    ('⏎', '␣', ' Paris', '&lt;b&gt;')
    """
    text = str(value)
    if text and not text.strip(" "):
        text = "␣" * len(text)
    for blank, sign in (("\n", "⏎"), ("\r", "⏎"), ("\t", "⇥")):
        text = text.replace(blank, sign)
    return html.escape(text, quote=False)


def named(value: object) -> str:
    """A series or a category as a legend or an axis shows it: a name of the code in words, any other text as it is.

    >>> named("c_alone"), named("_the"), named("a <b>")
    ('c alone', '_the', 'a &lt;b&gt;')
    """
    return words(value) if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else label(value)


def words(column: str) -> str:
    """A column's name for people."""
    return column.replace("_", " ")


def cell(value: object) -> str:
    """A value of a frame for people: numbers to four digits, text as plotly shows it literally.

    >>> cell(0.123456), cell(3), cell("a\\nb")
    ('0.1235', '3', 'a⏎b')
    """
    return f"{value:.4g}" if isinstance(value, float | np.floating) else label(value)


def _hover_cell(value: Any) -> str:
    """The same for a hover box: long text wrapped, which plotly does not do there."""
    if isinstance(value, float | np.floating):
        return cell(value)
    return "<br>".join(label(line) for line in textwrap.wrap(str(value), 60, replace_whitespace=False)) or label(value)
