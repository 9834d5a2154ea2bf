"""What a measure finds in each group of prompts, where prompts have a column ``group``.

A mean over all prompts can be that of one template, or hide two that go opposite ways.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from analyses.statistics.intervals import bootstrap_interval, rate_interval
from reflowlens.figures.builders import bars
from reflowlens.prompts import Prompts


def group_frames(
    prompts: Prompts,
    values: Mapping[str, NDArray[np.float64]],
    seed: int,
    *,
    rows: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    rates: Collection[str] = (),
) -> dict[str, pd.DataFrame]:
    """The frame ``groups``, by its name; none where the prompts have no groups.

    Args:
        values: metric -> one value a prompt.
        rows: the prompts that the values are of, in their order; default all. A prompt may have several values.
        units: of each value the number of what it is averaged over first, and intervals are of then; default each is by
            itself.
        rates: metrics whose values are 0 and 1, which have exact intervals; others are resampled.

    Returns:
        A row a group, ``all`` first, and metric: ``group``, ``metric``, ``prompts`` (of several values a unit, units),
        mean ``value``, ``low`` and ``high``, NaN of a single one.

    Example: ``group_frames(prompts, {"accuracy": correct}, seed=0, rates=["accuracy"])["groups"]``
    """
    if "group" not in prompts.frame:
        return {}
    every = list(map(str, prompts.groups))
    groups = np.array(every if rows is None else [every[row] for row in rows])
    found = []
    for group in ["all", *dict.fromkeys(groups.tolist())]:
        here = np.ones(len(groups), dtype=bool) if group == "all" else groups == group
        for metric, each in values.items():
            own = np.asarray(each, dtype=float)[here]
            if units is not None:
                own = pd.Series(own).groupby(np.asarray(units)[here]).mean().to_numpy()
            interval = rate_interval if metric in rates else bootstrap_interval
            low, high = interval(own, seed=seed) if len(own) > 1 else (np.nan, np.nan)
            found.append((group, metric, len(own), own.mean(), low, high))
    return {"groups": pd.DataFrame(found, columns=["group", "metric", "prompts", "value", "low", "high"])}


def group_figures(frames: Mapping[str, pd.DataFrame], title: str) -> dict[str, go.Figure]:
    """The figure ``groups`` of the frame of that name, where there is one."""
    if "groups" not in frames:
        return {}
    figure = bars(
        frames["groups"],
        "group",
        "value",
        "low",
        "high",
        color="metric",
        horizontal=True,
        hover=["prompts"],
        title=f"{title}, by group of prompts",
    )
    return {"groups": figure}
