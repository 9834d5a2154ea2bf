"""Bootstrap of many columns at once, for units by the ten thousand: a token is a row, and a resample a product."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analyses.statistics import Interval
from reflowlens.errors import ReflowlensError

_BATCH = 50


def resampled_means(values: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> NDArray[np.float32]:
    """Means of every column of ``values`` [unit, column] over resamples of its rows with replacement.

    What `analyses.statistics.bootstrap_band` draws, but as weights times values, [resample, unit] by [unit, column], in
    float32: for statistics of all columns together, such as the Gini coefficient of column means, and for units so many
    that gathering every resample would be slow. Raises ReflowlensError for fewer than 2 units.

    >>> resampled_means(np.ones((5, 3)), resamples=2).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    table = np.asarray(values, dtype=np.float32)
    units = len(table)
    if units < 2:
        raise ReflowlensError(f"at least 2 units of replication are needed to say how sure it is, got {units}")
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _BATCH):
        draws = rng.integers(units, size=(min(_BATCH, resamples - start), units))
        weights = np.stack([np.bincount(row, minlength=units) for row in draws]).astype(np.float32) / np.float32(units)
        parts.append(weights @ table)
    return np.concatenate(parts)


def percentile_interval(resampled: ArrayLike, confidence: float = 0.95) -> Interval:
    """The middle 95% of a resampled statistic [resample]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled, dtype=float), [tail, 1 - tail])
    return Interval(float(low), float(high))
