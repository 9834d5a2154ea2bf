"""P-values of many tests that are read together, by the largest of them in each draw of a null."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analyses.statistics.checks import finite
from reflowlens.errors import ReflowlensError


def max_statistic_pvalues(observed: ArrayLike, null: ArrayLike) -> NDArray[np.float64]:
    """Family-wise p-values of `observed` [test] against `null` [draw, test], two-sided (Westfall and Young, 1993).

    Each test is measured in standard deviations of its own null from that null's mean; p is the share of draws in which
    any test lies as far, (1 + count) / (1 + draws). Rejecting p < 0.05 keeps the chance of any false rejection below
    0.05 whatever the dependence between tests, and needs no more draws for more tests, as Holm's correction would.
    Raises ReflowlensError for fewer than 2 draws or values that are not finite.

    >>> null = np.random.default_rng(0).standard_normal((99, 3))
    >>> (max_statistic_pvalues([0.0, 9.0, 0.1], null) < 0.05).tolist()
    [False, True, False]
    """
    values, draws = finite(observed, "observed", dimensions=1), finite(null, "null", dimensions=2)
    if len(draws) < 2 or draws.shape[1:] != values.shape:
        raise ReflowlensError(f"two draws or more of {len(values)} tests are needed, got {list(draws.shape)}")
    mean, sd = draws.mean(axis=0), draws.std(axis=0, ddof=1)
    distance, largest = _distance(values, mean, sd), _distance(draws, mean, sd).max(axis=1)
    beyond = (largest[:, None] >= distance - 1e-9 * np.abs(distance)).sum(axis=0)
    return np.asarray((1 + beyond) / (1 + len(draws)))


def _distance(values: NDArray[np.float64], mean: NDArray[np.float64], sd: NDArray[np.float64]) -> NDArray[np.float64]:
    """|values - mean| in units of sd; of a null without spread 0 at its value, and otherwise as good as infinite."""
    off = np.abs(values - mean)
    rounding = 1e-6 * np.abs(mean).max(initial=0.0)
    return np.where(off <= rounding, 0.0, off / np.maximum(sd, np.finfo(float).tiny ** 0.5))
