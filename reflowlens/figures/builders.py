"""Bars, lines, dots and histograms from tidy frames."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reflowlens.errors import ReflowlensError
from reflowlens.figures.style import (
    COUNTS_ON_A_LOGARITHM,
    INK,
    check_columns,
    hover_texts,
    label,
    named,
    series_of,
    words,
)
from reflowlens.figures.template import blank_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def line_with_band(
    frame: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
    color: str | None = None,
    *,
    controls: Collection[str] = (),
    log_y: bool = False,
    hover: Sequence[str] = (),
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """Curves, each with the band between ``low`` and ``high`` around it where the frame has these.

    Args:
        color: the column that tells curves apart; None draws one.
        controls: values of ``color`` that are drawn as controls; those that do not occur are ignored.
        hover: further columns shown when pointing at a curve.
        x_title, y_title: default the columns' names.

    A row whose ``y`` is NaN breaks the curve; one whose ``low`` or ``high`` is NaN has no band.

    Raises:
        ReflowlensError: the frame is empty or lacks a column.

    Example: ``line_with_band(layers, "depth", "probability", "low", "high", "token", controls=["untrained"])``
    """
    check_columns(frame, [x, y, low, high, color, *hover])
    figure = blank_figure(title, x_title or words(x), y_title or words(y))
    numbers = frame[[column for column in (y, low, high) if column]]
    floor = (
        numbers[numbers > 0].min().min() if log_y else -np.inf
    )  # a logarithmic axis would tear a band that touches 0
    for series in series_of(frame, color, controls):
        shared = {"legendgroup": series.name, "name": series.name}
        if low is not None and high is not None:
            band = series.rows.dropna(subset=[low, high])
            figure.add_scatter(
                x=[*band[x], *band[x][::-1]],
                y=[*band[high].clip(floor), *band[low].clip(floor)[::-1]],
                fill="toself",
                fillcolor=series.faded(0.18),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                **shared,
            )
        figure.add_scatter(
            x=series.rows[x],
            y=series.rows[y],
            mode="lines+markers" if len(series.rows) <= 60 else "lines",
            line={"color": series.color, "width": 2, "dash": series.dash},
            marker={"size": 5 if series.symbol == "circle" else 7, "symbol": series.symbol},
            customdata=hover_texts(series.rows, hover, low, high),
            hovertemplate="%{y:.4~g}  %{customdata}",
            showlegend=color is not None,
            **shared,
        )
    figure.update_layout(hovermode="x unified")
    if log_y:
        figure.update_yaxes(type="log")
    return figure


def bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
    color: str | None = None,
    *,
    controls: Collection[str] = (),
    horizontal: bool = False,
    hover: Sequence[str] = (),
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """Bars of ``y`` over ``x``, side by side by ``color``, with the interval from ``low`` to ``high`` drawn on each.

    Args:
        horizontal: draw ``x`` downwards, for long names and many of them; ``y`` then grows to the right.
        color, controls, hover, x_title, y_title: as in :func:`line_with_band`.

    Raises:
        ReflowlensError: the frame is empty or lacks a column.

    Example: ``bars(sections, "section", "accuracy", "low", "high", "space", controls=["shuffled_recipe"])``
    """
    check_columns(frame, [x, y, low, high, color, *hover])
    y_title = y_title or words(y)
    titles = (y_title, x_title or "") if horizontal else (x_title or words(x), y_title)
    figure = blank_figure(title, *titles)
    groups = list(series_of(frame, color, controls))
    categories = _categories(frame[x])
    for series in groups:
        places = series.rows[x] if categories is None else series.rows[x].map(named)
        spread = {}
        if low is not None and high is not None:
            above, below = series.rows[high] - series.rows[y], series.rows[y] - series.rows[low]
            whiskers = {
                "symmetric": False,
                "array": above,
                "arrayminus": below,
                "color": series.color,
                "thickness": 1.2,
                "width": 2,
            }
            spread = {"error_x" if horizontal else "error_y": whiskers}
        figure.add_bar(
            x=series.rows[y] if horizontal else places,
            y=places if horizontal else series.rows[y],
            orientation="h" if horizontal else "v",
            name=series.name,
            marker={
                # pale, so that the whisker shows on it; bars over numbers may be hundreds, too thin for an edge
                "color": series.color if categories is None else series.faded(0.55),
                "line": {"color": series.color, "width": 0 if categories is None else 1},
                "pattern": {"shape": series.hatch, "fillmode": "overlay", "fgcolor": series.color},
            },
            customdata=hover_texts(series.rows, [x, y, *hover], low, high),
            hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
            showlegend=color is not None,
            **spread,
        )
    figure.update_layout({"xaxis" if horizontal else "yaxis": {"rangemode": "tozero"}})
    figure.update_layout(bargap=0.25 if categories is not None else 0.1)
    if categories is not None:
        axis = {"type": "category", "categoryorder": "array", "categoryarray": categories}
        if horizontal:
            figure.update_yaxes(**axis, autorange="reversed", showgrid=False)
            height = 120 + len(categories) * (14 * len(groups) + 10)
            figure.update_layout(height=height, meta=_room_for(categories))
        else:
            figure.update_xaxes(**axis, showgrid=False)
            figure.update_layout(meta={"min_width": 100 + len(categories) * max(12 * len(groups), 24)})
    return figure


def dots(
    frame: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    *,
    reference: str | None = None,
    reference_name: str = "published",
    controls: Collection[str] = (),
    log_x: bool = False,
    hover: Sequence[str] = (),
    title: str = "",
    x_title: str | None = None,
) -> go.Figure:
    """A dot a row: the number ``x`` on a common axis, one line for each value of ``y`` (ranks of a few analogies, say).

    Args:
        reference: a column whose number is marked by an open diamond on the same line; NaN for none.
        log_x: logarithmic axis, for ranks.
        color, controls, hover, x_title: as in :func:`line_with_band`.

    Raises:
        ReflowlensError: the frame is empty or lacks a column.

    Example: ``dots(published, "rank", "analogy", "space", reference="published_rank", log_x=True)``
    """
    check_columns(frame, [x, y, color, reference, *hover])
    figure = blank_figure(title, x_title or words(x), "")
    for i, series in enumerate(series_of(frame, color, controls)):
        figure.add_scatter(
            x=series.rows[x],
            y=series.rows[y].map(named),
            mode="markers",
            name=series.name,
            # smaller one after the other, so that of equal numbers every dot shows
            marker={"color": series.color, "size": max(6, 15 - 4 * i), "symbol": series.symbol},
            customdata=hover_texts(series.rows, [y, x, *hover]),
            hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
            showlegend=color is not None,
        )
    if reference is not None:
        marked = frame.dropna(subset=[reference]).drop_duplicates(y)
        figure.add_scatter(
            x=marked[reference],
            y=marked[y].map(named),
            mode="markers",
            name=label(reference_name),
            marker={"color": INK, "size": 22, "symbol": "diamond-open", "line": {"width": 2}},
            hovertemplate="%{x:.4g}<extra>%{fullData.name}</extra>",
        )
    lines = list(dict.fromkeys(frame[y].map(named)))
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=lines, range=[len(lines) - 0.5, -0.5])
    figure.update_layout(height=120 + 44 * len(lines), meta=_room_for(lines))
    if log_x:
        figure.update_xaxes(COUNTS_ON_A_LOGARITHM)
    return figure


def histogram_with_control(
    frame: pd.DataFrame,
    x: str,
    color: str,
    *,
    controls: Collection[str] = (),
    bins: int = 40,
    log_y: bool = False,
    title: str = "",
    x_title: str | None = None,
) -> go.Figure:
    """How ``x`` is distributed in each group of ``color``: over common bins, as a share of the group's rows.

    Args:
        bins: number of bins over the range of all groups together.
        color, controls, x_title: as in :func:`line_with_band`.

    Raises:
        ReflowlensError: the frame is empty, lacks a column, or holds a value that is not finite.

    Example: ``histogram_with_control(effects, "log_ratio", "basis", controls=["rotated_basis"])``
    """
    check_columns(frame, [x, color])
    values = frame[x].to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise ReflowlensError(f"a histogram of {x!r} needs finite numbers; leave out the others first")
    edges = np.histogram_bin_edges(values, bins=bins)
    figure = blank_figure(title, x_title or words(x), "share of rows")
    margin = (edges[-1] - edges[0]) / 100  # so that the frame does not cut the outermost lines
    figure.update_xaxes(range=[edges[0] - margin, edges[-1] + margin])
    for series in series_of(frame, color, controls):
        counts, _ = np.histogram(series.rows[x], bins=edges)
        figure.add_scatter(
            x=np.repeat(edges, 2),
            y=np.concatenate([[0], np.repeat(counts / len(series.rows), 2), [0]]),
            mode="lines",
            name=series.name,
            line={"color": series.color, "width": 1.5, "dash": series.dash},
            fill="tozeroy",
            fillcolor=series.faded(0.25),
            hovertemplate="%{x:.3g}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    if log_y:
        figure.update_yaxes(type="log")
    return figure


def _room_for(names: Sequence[str]) -> dict[str, int]:
    """The least width, for a page that reads it, at which names beside the axis leave the plot 300 pixels."""
    return {"min_width": 300 + 7 * max(map(len, names))}


def _categories(values: pd.Series) -> list[str] | None:
    """The labels of a text column in order of appearance; None for numbers."""
    return None if pd.api.types.is_numeric_dtype(values) else list(dict.fromkeys(values.map(named)))
