"""A grid of effects with what is known of each: its interval, and whether it is more than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reflowlens.figures.heatmap import heatmap
from reflowlens.figures.style import check_columns

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIGNIFICANT = "●"


def effect_grid(
    frame: pd.DataFrame,
    x: str,
    y: str,
    z: str = "mean",
    *,
    low: str = "low",
    high: str = "high",
    p: str = "p_adjusted",
    level: float = 0.05,
    absent: str = "no such position",
    title: str = "",
    z_title: str | None = None,
) -> go.Figure:
    """A cell for each row of the frame, coloured by an effect around 0; ● where its p value is below a level.

    Args:
        x, y: columns that place the cell.
        low, high: ends of the interval, told on pointing at a cell.
        p: of the test that there is no effect.
        level: below which a p value is marked.
        absent: what is said of a row whose effect is NaN; its cell is grey.

    Raises:
        ReflowlensError: the frame is empty, lacks a column, or has two rows for one cell: choose one group.

    Example: ``effect_grid(summary[summary.group == "all"], "role", "layer", title="Patching the residual stream")``
    """
    check_columns(frame, [x, y, z, low, high, p])
    size = np.nanmax(frame[z].abs()) if frame[z].notna().any() else 1.0
    marked = frame.assign(mark=np.where(frame[p] < level, SIGNIFICANT, ""))
    hover = [column for column in (low, high, p, "prompts") if column in frame]
    return heatmap(
        marked, x, y, z, text="mark", z_range=(-size, size), hover=hover, title=title, z_title=z_title,
        diverging=True, absent=absent,
    )  # fmt: skip
