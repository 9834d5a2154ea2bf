"""Bootstrap intervals, and exact ones of rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analyses.statistics.checks import finite, several
from reflowlens.errors import ReflowlensError

Statistic = Callable[..., Any]
"""A reduction such as `np.mean` or `np.median`: called as `statistic(values, axis=-1)`."""


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of `values` [units], units drawn with replacement.

    It knows only the spread that the sample shows: of identical values it is a single point, however few they are,
    which is why a verdict asks for a minimum number of units as well, and why a rate has `rate_interval`. Raises
    ReflowlensError for fewer than 2 units or values that are not finite.

    >>> bootstrap_interval([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).high
    1.0
    """
    sample = finite(values, "values", dimensions=1)
    ends = bootstrap_band(sample, statistic, confidence=confidence, resamples=resamples, seed=seed)
    low, high = sorted(map(float, ends))  # of values all alike, rounding can put the low end above the high one
    return Interval(low, high)


def bootstrap_band(
    values: ArrayLike,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`bootstrap_interval` of every column of `values` [units, ...], for example a curve over layers for each prompt.

    Returns the low and the high ends, each of shape [...]. A resample takes whole units, so that the columns stay
    together; the band is pointwise.
    """
    result = stats.bootstrap(
        (several(finite(values, "values"), "values"),),
        statistic,
        axis=0,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=100,  # 100 resamples at a time: memory stays at 100 times the sample
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(result.confidence_interval.low), np.asarray(result.confidence_interval.high)


def rate_interval(values: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Interval of a rate, the mean of `values` [units] that are 0 or 1: Clopper and Pearson's (1934), which is exact
    for independent units and does not collapse where all of them agree.

    Units may also be shares of several trials of one unit, between 0 and 1: then `bootstrap_interval`, unless all are 0
    or 1. (Where all are 1 Clopper and Pearson's end holds for shares too: their mean is at least the chance of a 1.)
    Raises ReflowlensError for fewer than 2 units or values outside [0, 1].

    >>> [round(end, 3) for end in rate_interval([1, 1, 1, 1, 1, 1])]
    [0.541, 1.0]
    """
    low, high = rate_band(finite(values, "values", dimensions=1), confidence=confidence, seed=seed)
    return Interval(float(low), float(high))


def rate_band(
    values: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`rate_interval` of every column of `values` [units, ...]: the low and the high ends, each [...]."""
    table = several(finite(values, "values"), "values")
    if table.min() < 0 or table.max() > 1:
        raise ReflowlensError(f"a rate is a mean of values from 0 to 1, got {table.min():g} to {table.max():g}")
    n, hits, tail = len(table), table.sum(axis=0), (1 - confidence) / 2
    low = np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), n - hits + 1), 0.0)
    high = np.where(hits < n, stats.beta.ppf(1 - tail, hits + 1, np.maximum(n - hits, 1)), 1.0)
    counted = ((table == 0) | (table == 1)).all(axis=0)
    if counted.all():
        return low, high
    resampled = bootstrap_band(table, confidence=confidence, seed=seed)
    return np.where(counted, low, resampled[0]), np.where(counted, high, resampled[1])


def t_interval(values: ArrayLike) -> tuple[Interval, float]:
    """Student's 95% interval of the mean of `values` [units], and the two-sided p-value of its being 0: for a few units
    whose values are near normal, such as training runs. Raises ReflowlensError for fewer than 2 units.

    A value that is not finite leaves nothing to say: all three are NaN, of which no rule makes a verdict. Values all
    alike have what ever smaller spreads come to: a point, and p = 0, or 1 where they are 0. Two runs may well agree by
    chance, which is why a verdict asks for a minimum number of them too.

    >>> t_interval([1.0, 2.0, 3.0])[0].low
    -0.484...
    """
    sample = several(np.asarray(values, dtype=float), "values")
    if not np.isfinite(sample).all():
        return Interval(math.nan, math.nan), math.nan
    if sample.min() == sample.max():  # whose mean can differ from them by rounding
        return Interval(float(sample[0]), float(sample[0])), float(sample[0] == 0)
    mean, error, student = float(sample.mean()), float(stats.sem(sample)), stats.t(len(sample) - 1)
    half = error * float(student.ppf(0.975))
    return Interval(mean - half, mean + half), 2 * float(student.sf(abs(mean) / error))
