"""How figures look: the palette, and how series and text from a frame are shown.

Okabe and Ito's palette (2008), which colour-blind readers can tell apart, for measurements; for controls tinted greys,
each with a dash, a hatch and a mark of its own; a transparent background under ink that can be read on a light and on a
dark page.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reflowlens.errors import ReflowlensError

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
