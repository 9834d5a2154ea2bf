"""Cells coloured by a number: large ones are kept small enough for a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from reflowlens.errors import ReflowlensError
from reflowlens.figures.style import check_columns, hover_texts, label, named, words
from reflowlens.figures.template import blank_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_BYTES = 4_000_000  # of a heatmap's numbers and texts, so that its file stays under 5 MB
_BYTES_A_CELL = 11  # eight in base64
_SAMPLE = 500  # rows, to tell how long the texts of all are
_MOST_LABELS, _FEW_LABELS = 80, 12
_ABSENT = "rgba(128,128,128,0.35)"
_MOST_GAPS = 100  # cells across, beyond which a gap between them would hide what it divides


def heatmap(
    frame: pd.DataFrame,
    x: str,
    y: str,
    z: str,
    *,
    text: str | None = None,
    x_labels: str | None = None,
    y_labels: str | None = None,
    z_range: tuple[float, float] | None = None,
    hover: Sequence[str] = (),
    diverging: bool = False,
    absent: str | None = None,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    z_title: str | None = None,
) -> go.Figure:
    """A cell for each row of the frame, coloured by ``z``, with ``text`` written in it; the first ``y`` below.

    A heatmap whose file would exceed 5 MB shows no texts, and above 360,000 cells means of neighbouring cells; a note
    below it and ``layout.meta["note"]`` say which.

    Args:
        x, y: columns that place the cell, in the order of their first appearance; a place no row names stays empty.
        x_labels, y_labels: columns shown on the axes instead of ``x`` and ``y``; their values may repeat (the tokens
            of a prompt over its positions).
        z_range: ends of the colour scale; default those of the data.
        hover, x_title, y_title: as in :func:`line_with_band`; ``z_title`` names the colour scale.
        diverging: two colours, that part in the middle of the scale.
        absent: what is said of a row whose ``z`` is NaN, on pointing at its cell, which is grey; None leaves it blank.

    Raises:
        ReflowlensError: the frame is empty, lacks a column, or has two rows for one cell.

    Example: ``heatmap(cells, "position", "layer", "probability", text="top", x_labels="token", z_range=(0, 1))``
    """
    check_columns(frame, [x, y, z, text, x_labels, y_labels, *hover])
    if (repeated := frame.duplicated([x, y])).any():
        row = frame[repeated].iloc[0]
        raise ReflowlensError(f"a heatmap needs one row a cell: {x} = {row[x]}, {y} = {row[y]} has several")
    columns, lines = _axis_labels(frame, x, x_labels), _axis_labels(frame, y, y_labels)

    def grid(values: pd.Series) -> np.ndarray:
        cells = frame.assign(_cell=values).pivot(index=y, columns=x, values="_cell")
        return cells.reindex(index=list(lines), columns=list(columns)).to_numpy()

    names = list(dict.fromkeys(name for name in (x, x_labels, y, y_labels, text, z, *hover) if name))
    n_cells = len(lines) * len(columns)
    text_length = np.mean([len(shown) for shown in hover_texts(frame.iloc[:: -(-len(frame) // _SAMPLE)], names)])
    down, across = block_of(len(lines), len(columns), MOST_BYTES // _BYTES_A_CELL)
    note = ""
    if n_cells * (text_length + _BYTES_A_CELL) > MOST_BYTES:
        note = "too large to tell each cell's values when pointing at it"
    if down * across > 1:
        note = f"too large to draw each cell: every one here is the mean of {down} × {across} (down × across)"
    figure = blank_figure(title, x_title or words(x_labels or x), y_title or words(y_labels or y))
    scale = {"text": label(z_title or words(z)), "side": "right", "font": {"size": 13}}
    texts: dict[str, Any] = {"hovertemplate": "%{z:.4g}<extra>%{x}, %{y}</extra>"}
    if not note:
        shown = pd.Series(hover_texts(frame, names), index=frame.index)
        texts = {"customdata": grid(shown), "hovertemplate": "%{customdata}<extra></extra>"}
        if text is not None:
            texts |= {"text": grid(frame[text].map(label)), "texttemplate": "%{text}"}
    values = block_means(grid(frame[z].astype(float)), down, across)
    placing = {
        # The axes count the frame's own rows and columns; a block is at the middle of those it stands for.
        "x0": (across - 1) / 2,
        "dx": across,
        "y0": (down - 1) / 2,
        "dy": down,
        "hoverongaps": False,
        "xgap": int(len(columns) <= _MOST_GAPS),
        "ygap": int(len(lines) <= _MOST_GAPS),
    }
    figure.add_heatmap(
        z=values,
        zmin=z_range[0] if z_range else None,
        zmax=z_range[1] if z_range else None,
        colorscale="RdBu_r" if diverging else "Cividis",
        textfont={"size": 11},
        colorbar={"title": scale, "thickness": 12, "outlinewidth": 0},
        **placing,
        **texts,
    )
    if absent is not None and frame[z].isna().any():
        is_absent = block_means(grid(frame[z].isna().astype(float).where(frame[z].isna())), down, across)
        figure.add_heatmap(
            z=np.where(np.isnan(values), is_absent, np.nan),
            colorscale=[[0, _ABSENT], [1, _ABSENT]],
            showscale=False,
            hovertemplate=f"{label(absent)}<extra>%{{x}}, %{{y}}</extra>",
            name=label(absent),
            **placing,
        )
    figure.update_xaxes(**_ticks(list(columns.values())), showgrid=False)
    figure.update_yaxes(**_ticks(list(lines.values())), showgrid=False)
    if note:
        figure.update_layout(meta={"note": note}, margin_b=110)
        place = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top", "yshift": -64}
        figure.add_annotation(
            text="<br>".join(textwrap.wrap(note, 52)), align="left", showarrow=False, font={"size": 11}, **place
        )
    elif text is not None:
        figure.update_layout(height=130 + 24 * len(lines), meta={"min_width": 160 + 76 * len(columns)})
    return figure


def block_of(rows: int, columns: int, most: int) -> tuple[int, int]:
    """How many rows and columns to take together so that at most ``most`` blocks are left, about as many each way.

    >>> block_of(10, 10, 100), block_of(2000, 10, 1000), block_of(300, 300, 10_000)
    ((1, 1), (20, 1), (3, 3))
    """
    down = across = 1
    while (height := math.ceil(rows / down)) * (width := math.ceil(columns / across)) > most:
        down, across = (down + 1, across) if height >= width else (down, across + 1)
    return down, across


def block_means(values: Float[np.ndarray, "row column"], down: int, across: int) -> Float[np.ndarray, "down across"]:
    """The mean of each block, over those of its cells that are not NaN; the last blocks may be smaller.

    >>> block_means(np.array([[1.0, 3.0, 5.0], [1.0, np.nan, 7.0]]), 2, 2).round(2).tolist()
    [[1.67, 6.0]]
    """
    if down * across == 1:
        return values
    short = [-values.shape[0] % down, -values.shape[1] % across]
    padded = np.pad(values, [(0, n) for n in short], constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // down, down, padded.shape[1] // across, across)
    counts = (~np.isnan(blocks)).sum(axis=(1, 3))
    return np.where(counts > 0, np.nansum(blocks, axis=(1, 3)) / np.maximum(counts, 1), np.nan)


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    """A label for each place, or for a few of them where there are more than can be read."""
    step = 1 if len(labels) <= _MOST_LABELS else math.ceil(len(labels) / _FEW_LABELS)
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": list(labels[::step])}


def _axis_labels(frame: pd.DataFrame, column: str, labels: str | None) -> dict[Any, str]:
    """The values of a column in order of appearance, each with what the axis shows for it."""
    first = frame.drop_duplicates(column)
    # labels of another column are tokens and words, shown as they are
    shown = first[labels].map(label) if labels else first[column].map(named)
    return dict(zip(first[column], shown, strict=True))
