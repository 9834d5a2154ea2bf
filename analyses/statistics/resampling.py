"""Bootstrap of many columns at once, for units by the ten thousand: a token is a row, and a resample a product.

Rows that stand behind one another in a text are alike, and drawing them one by one would hide how little they say: the
moving-block bootstrap (Künsch, 1989) draws runs of consecutive rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analyses.statistics.intervals import Interval
from reflowlens.errors import ReflowlensError

_BATCH = 50
_COLUMNS = 2048


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


def mean_band(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile intervals of the means of every column of ``values`` [unit, column], each end [column].

    The resamples of `resampled_means`, so many columns at a time that memory does not grow with their number.

    >>> low, high = mean_band(np.ones((5, 3)), resamples=20)
    >>> low.tolist(), high.tolist()
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """
    table, tail = np.asarray(values), (1 - confidence) / 2
    centre = table.mean(axis=0, dtype=np.float64)  # float32 keeps the spread, not the size
    parts = []
    for start in range(0, table.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        means = resampled_means(table[:, part] - centre[part], resamples=resamples, seed=seed)
        parts.append(np.quantile(means, [tail, 1 - tail], axis=0) + centre[part])
    low, high = np.concatenate(parts, axis=1) if parts else np.empty((2, 0))
    return low, high


def moving_block_weights(
    n: int, *, block: int | None = None, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float32]:
    """How often each of ``n`` consecutive rows is drawn, [resample, row], in runs of ``block`` rows.

    A resample is as many runs as cover ``n`` rows, each from a random place, the last one cut short. ``block``: by
    default the cube root of ``n``, rounded. Raises ReflowlensError for fewer than 2 rows or a block that is none.

    >>> moving_block_weights(5, resamples=3).sum(axis=1).tolist()
    [5.0, 5.0, 5.0]
    """
    if n < 2:
        raise ReflowlensError(f"at least 2 units of replication are needed to say how sure it is, got {n}")
    block = max(1, round(n ** (1 / 3))) if block is None else block
    if not 1 <= block <= n:
        raise ReflowlensError(f"a block of {n} rows is of 1 to {n} of them, got {block}")
    starts = np.random.default_rng(seed).integers(n - block + 1, size=(resamples, -(-n // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :n]
    return np.stack([np.bincount(rows, minlength=n) for rows in drawn]).astype(np.float32)


def percentile_interval(resampled: ArrayLike, confidence: float = 0.95) -> Interval:
    """The middle 95% of a resampled statistic [resample]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled, dtype=float), [tail, 1 - tail])
    return Interval(float(low), float(high))
