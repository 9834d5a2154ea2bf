"""Points in the plane or in space, a colour and a symbol for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from reflowlens.figures.style import PALETTE, check_columns, hover_texts, series_of, words
from reflowlens.figures.template import blank_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SYMBOLS = ("circle", "diamond", "square", "cross", "x", "diamond-open", "circle-open", "square-open")


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    color: str,
    z: str | None = None,
    *,
    hover: Sequence[str] = (),
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    z_title: str | None = None,
) -> go.Figure:
    """A point a row, at ``x`` and ``y``, and at the height ``z`` in a figure that can be turned.

    Args:
        color: the column that tells groups apart. More of them than the palette has colours take another symbol each
            time round; pointing at the legend's entries and clicking hides and shows them.
        hover: further columns shown when pointing at a point, its group among them.
        x_title, y_title, z_title: default the columns' names.

    Raises:
        ReflowlensError: the frame is empty or lacks a column.

    Example: ``scatter(words, "pc1", "pc2", "category", hover=["word", "signals"])``
    """
    check_columns(frame, [x, y, color, z, *hover])
    titles = {"x": x_title or words(x), "y": y_title or words(y)}
    figure = blank_figure(title, titles["x"], titles["y"])
    groups = list(series_of(frame, color, ()))
    for i, series in enumerate(groups):
        shared = {
            "mode": "markers",
            "name": series.name,
            "marker": {
                "color": series.color,
                "symbol": _SYMBOLS[i // len(PALETTE) % len(_SYMBOLS)],
                "size": 7 if z is None else 4,
                "opacity": 0.8,
            },
            "customdata": hover_texts(series.rows, list(hover) or [color]),
            "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
        }
        if z is None:
            figure.add_scatter(x=series.rows[x], y=series.rows[y], **shared)
        else:
            figure.add_scatter3d(x=series.rows[x], y=series.rows[y], z=series.rows[z], **shared)
    legend = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}  # beside the points, each group on its line
    figure.update_layout(height=max(620, 80 + 20 * len(groups)), meta={"min_width": 640}, legend=legend)
    if z is not None:
        titles["z"] = z_title or words(z)
        axis = {"showbackground": False, "gridcolor": "rgba(128, 128, 128, 0.3)", "zeroline": False}
        axes = {f"{name}axis": axis | {"title": {"text": text}} for name, text in titles.items()}
        figure.update_layout(scene=axes | {"aspectmode": "cube"})
    return figure
