"""A frame as a table that is a figure, for text before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reflowlens.figures.style import INK, cell, check_columns, words
from reflowlens.figures.template import blank_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CHARACTERS = 76  # that a line of a table of the least width holds, all columns together
_PADDING = 2  # characters that a cell leaves free


def table(
    frame: pd.DataFrame, columns: Sequence[str], *, widths: Sequence[float] | None = None, title: str = ""
) -> go.Figure:
    """Some columns of a frame as a table: numbers to four digits, text as it is, wrapped in its cell.

    Args:
        widths: of the columns, relative; default alike.

    Raises:
        ReflowlensError: the frame is empty or lacks a column.

    Example: ``table(texts, ["prompt", "beta", "text"], widths=[2, 1, 4])``
    """
    check_columns(frame, columns)
    cells = [[cell(value) for value in frame[column]] for column in columns]
    least = [
        max(len(word) for text in (words(name), *column) for word in (text.split() or [""])) + _PADDING
        for name, column in zip(columns, cells, strict=True)
    ]
    shares = np.ones(len(columns)) if widths is None else np.asarray(widths, dtype=float)
    shares = np.maximum(shares / shares.sum(), np.minimum(least, 0.4 * _CHARACTERS) / _CHARACTERS)
    shares = shares / shares.sum()
    rooms = [max(1, int(share * _CHARACTERS) - _PADDING) for share in shares]
    lines = [
        max(len(textwrap.wrap(text, room)) or 1 for text, room in zip(row, rooms, strict=True))
        for row in zip(*cells, strict=True)
    ]
    figure = blank_figure(title, "", "")
    plain = {"fill_color": "rgba(0, 0, 0, 0)", "line_color": "rgba(128, 128, 128, 0.22)", "align": "left", "height": 26}
    figure.add_table(
        columnwidth=shares.tolist(),
        header={"values": [words(column) for column in columns], "font": {"color": INK, "weight": 700}, **plain},
        cells={"values": cells, "font_color": INK, **plain},
    )
    figure.update_layout(height=150 + sum(8 + 18 * count for count in lines), meta={"min_width": 640})
    return figure
