"""What several seeds say: means with intervals over runs, and differences between arms whose runs share a seed.

The unit of replication is the run: a run is one draw of weights and of the order of data, however many prompts it was
measured on. Of a few runs the interval is Student's; a bootstrap of three values knows ten resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from analyses.statistics.intervals import Interval, t_interval
from reflowlens.errors import ReflowlensError


class Difference(NamedTuple):
    """How much one arm exceeds another, over runs of the same seed.

    `mean` with its 95% interval `low` to `high`, `p` of a two-sided paired t test, and how many `seeds` there were;
    NaN for what one seed cannot tell.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def over_seeds(frame: pd.DataFrame, value: str = "value", by: str = "arm") -> pd.DataFrame:
    """Mean over seeds, by arm: columns `by`, `seeds`, `mean`, `low`, `high` (`t_interval`) and `sd`; arms in their
    order in the frame, values that are NaN left out.

    Example: `over_seeds(runs_table("out/sparsity"), "val_loss")`
    """
    rows = []
    for name, own in frame.dropna(subset=[value]).groupby(by, sort=False):
        values = own[value].to_numpy(float)
        sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        ends = _over_runs(values)[0]._asdict()
        rows.append({by: name, "seeds": len(values), "mean": values.mean(), **ends, "sd": sd})
    return pd.DataFrame(rows, columns=[by, "seeds", "mean", "low", "high", "sd"])


def measures_over_seeds(frame: pd.DataFrame, measures: Iterable[str]) -> pd.DataFrame:
    """`over_seeds` of several columns, one below the other, with a column `measure` that names each.

    Example: `measures_over_seeds(runs_table("out/sparsity"), ["val_loss", "seconds"])`
    """
    return pd.concat([over_seeds(frame, name).assign(measure=name) for name in measures], ignore_index=True)


def paired_difference(frame: pd.DataFrame, arm: str, against: str, value: str = "value") -> Difference:
    """How much `arm` exceeds `against`: runs of one seed read the same data in the same order, and are a pair.

    Raises ReflowlensError where an arm is unknown, has a seed twice (a frame of several metrics: choose one first), or
    no seed is in both.
    """
    columns = []
    for name in (arm, against):
        own = frame[frame["arm"] == name].dropna(subset=[value]).set_index("seed")[value]
        if own.empty:
            raise ReflowlensError(f"no run of an arm {name!r}; there are {', '.join(frame['arm'].unique())}")
        if own.index.has_duplicates:
            raise ReflowlensError(f"arm {name!r} has several values a seed: choose one metric first")
        columns.append(own)
    pairs = pd.concat(columns, axis=1, join="inner").to_numpy(float)
    if not len(pairs):
        raise ReflowlensError(f"no seed was trained in both {arm!r} and {against!r}")
    differences = pairs[:, 0] - pairs[:, 1]
    (low, high), p = _over_runs(differences)
    return Difference(float(differences.mean()), low, high, p, len(differences))


def gap(
    measured: pd.DataFrame, metric: str, control: str = "rotated_basis", experiment: str | None = None
) -> pd.DataFrame:
    """How far a metric lies above one of its controls in each run: `arm`, `seed` and `value`, value minus control.

    Args:
        measured: of `analyses.findings.runs.measured`.
        experiment: of the metric, where several have one of that name.

    Raises ReflowlensError for an unknown metric or control.
    """
    rows = measured[measured["metric"] == metric]
    if experiment is not None:
        rows = rows[rows["experiment"] == experiment]
    column = f"control_{control}"
    if rows.empty or column not in rows or rows[column].isna().all():
        what = f"metric {metric!r}" if rows.empty else f"control {control!r} of {metric}"
        raise ReflowlensError(f"no {what} was measured")
    return rows[["arm", "seed"]].assign(value=rows["value"] - rows[column]).reset_index(drop=True)


def _over_runs(values: np.ndarray) -> tuple[Interval, float]:
    """`t_interval`, which one run does not have."""
    return t_interval(values) if len(values) > 1 else (Interval(math.nan, math.nan), math.nan)
