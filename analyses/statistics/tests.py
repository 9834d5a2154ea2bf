"""The statistics every experiment shares: permutation p-values, bootstrap intervals, Holm's correction, verdicts.

Everything is a pure function of its arguments, the seed among them. "Unit" is the unit of replication: a word pair, a
prompt, a token; never one of several measurements of the same unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from reflowlens.errors import ReflowlensError

Alternative = Literal["greater", "less", "two-sided"]
Verdict = Literal["supported", "not supported", "underpowered"]
Statistic = Callable[..., Any]
"""A reduction such as `np.mean` or `np.median`: called as `statistic(values, axis=-1)`."""

SIGNIFICANCE = 0.05


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


def permutation_pvalue(observed: float, null: ArrayLike, alternative: Alternative = "greater") -> float:
    """p = (1 + #{null ≥ observed}) / (1 + m) for m permutations (Phipson and Smyth 2010): never zero.

    `null` [m] holds the statistic of each permutation. "less" counts null ≤ observed; "two-sided" is twice the smaller
    of both, at most 1, which needs no symmetric null. A null value within 1e-12 (relative) of `observed` is a tie:
    the same sum taken in another order. Raises ReflowlensError if `null` is empty or anything is not finite.

    >>> permutation_pvalue(3.0, [0.0, 1.0, 2.0])
    0.25
    """
    _check_choice(alternative)
    values = _finite(null, "null", dimensions=1)
    centre = float(_finite(observed, "observed", dimensions=0))
    if not len(values):
        raise ReflowlensError("a permutation p-value needs at least one permutation, got none")
    tolerance = 1e-12 * abs(centre)
    greater = float((1 + np.count_nonzero(values >= centre - tolerance)) / (1 + len(values)))
    less = float((1 + np.count_nonzero(values <= centre + tolerance)) / (1 + len(values)))
    return {"greater": greater, "less": less, "two-sided": min(1.0, 2 * min(greater, less))}[alternative]


def paired_permutation_pvalue(
    differences: ArrayLike, alternative: Alternative = "greater", *, permutations: int = 9999, seed: int = 0
) -> float:
    """p-value of the mean of `differences` [units] when the sign of each is a coin toss: a treatment and its control
    measured on the same units.

    Exact, over all 2^units signs, where these are no more than `permutations`; otherwise random signs and the formula
    of `permutation_pvalue`. Raises ReflowlensError for fewer than 2 units or values that are not finite.
    """
    _check_choice(alternative)
    result = stats.permutation_test(
        (_units(_finite(differences, "differences", dimensions=1), "differences"),),
        np.mean,
        permutation_type="samples",
        alternative=alternative,
        n_resamples=permutations,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def predictive_pvalue(observed: float, null: ArrayLike, alternative: Alternative = "greater") -> float:
    """p-value of `observed` as one more draw from where the `null` draws [m] came from, taken as normal.

    t = (observed - mean) / (sd · √(1 + 1/m)) with m - 1 degrees of freedom: the prediction interval of one new
    observation. For nulls of few expensive draws, such as random rotations of a basis, each a mean over many prompts,
    where counting the draws beyond (`permutation_pvalue`) could not go below 1/(1 + m). Raises ReflowlensError for
    fewer than 2 draws or values that are not finite.

    >>> round(predictive_pvalue(3.0, [0.0, 1.0, 2.0]), 3)
    0.113
    """
    _check_choice(alternative)
    values = _units(_finite(null, "null", dimensions=1), "null")
    difference = float(_finite(observed, "observed", dimensions=0)) - values.mean()
    spread = values.std(ddof=1) * np.sqrt(1 + 1 / len(values))
    if spread == 0:  # draws that cannot differ, as when every rotation gives the same: only a tie is compatible
        spread = np.finfo(float).tiny
    distribution = stats.t(len(values) - 1)
    greater, less = distribution.sf(difference / spread), distribution.cdf(difference / spread)
    return float({"greater": greater, "less": less, "two-sided": 2 * min(greater, less)}[alternative])


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
    sample = _finite(values, "values", dimensions=1)
    low, high = bootstrap_band(sample, statistic, confidence=confidence, resamples=resamples, seed=seed)
    return Interval(float(low), float(high))


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
        (_units(_finite(values, "values"), "values"),),
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
    low, high = rate_band(_finite(values, "values", dimensions=1), confidence=confidence, seed=seed)
    return Interval(float(low), float(high))


def rate_band(
    values: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`rate_interval` of every column of `values` [units, ...]: the low and the high ends, each [...]."""
    table = _units(_finite(values, "values"), "values")
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


def holm(pvalues: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values (1979) of `pvalues` [tests], in the same order: rejecting those below 0.05 keeps the
    chance of any false rejection below 0.05, whatever the dependence between the tests.

    The i-th smallest of m becomes the largest of (m - j + 1)·p_j over j ≤ i, at most 1. Raises ReflowlensError for
    values outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = _finite(pvalues, "pvalues", dimensions=1)
    if np.any((p < 0) | (p > 1)):
        raise ReflowlensError("p-values lie between 0 and 1; some of these do not")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted


def verdict(
    effect_interval: tuple[float, float],
    control: float,
    p: float,
    *,
    minimum_units: int,
    units: int,
    published: float | None = None,
) -> Verdict:
    """What the data say of a claim that a metric exceeds its control. The first of these that holds:

    1. `units` < `minimum_units`: "underpowered".
    2. p < 0.05 and the whole interval lies above the control's value: "supported".
    3. the interval contains both the control's value and the `published` one: "underpowered", for the data cannot tell
       the published effect from none.
    4. "not supported".

    `p` is Holm-adjusted where several tests are read together. For a claim that a metric falls below its control, pass
    all values negated. Raises ReflowlensError for a p outside [0, 1], an inverted interval or values that are not
    finite.

    >>> verdict((0.30, 0.40), control=0.05, p=0.001, minimum_units=20, units=300)
    'supported'
    """
    numbers = [*effect_interval, control, p] + ([] if published is None else [published])
    _finite(numbers, "the interval, control, p and published value", dimensions=1)
    low, high = effect_interval
    if low > high or not 0 <= p <= 1:
        raise ReflowlensError(f"an interval (low, high) and a p in [0, 1] were expected, got {(low, high)} and p = {p}")
    if units < minimum_units:
        return "underpowered"
    if p < SIGNIFICANCE and low > control:
        return "supported"
    if published is not None and low <= min(control, published) and max(control, published) <= high:
        return "underpowered"
    return "not supported"


def _check_choice(alternative: str) -> None:
    if alternative not in get_args(Alternative):
        raise ReflowlensError(f"no alternative {alternative!r}; there are {', '.join(get_args(Alternative))}")


def _finite(values: ArrayLike, name: str, dimensions: int | None = None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if dimensions is not None and array.ndim != dimensions:
        raise ReflowlensError(f"{name}: {dimensions} dimension(s) expected, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ReflowlensError(
            f"{name}: finite numbers expected, got {np.count_nonzero(~np.isfinite(array))} that are not"
        )
    return array


def _units(array: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    units = len(array) if array.ndim else 1
    if units < 2:
        raise ReflowlensError(f"{name}: at least 2 units of replication are needed to say how sure it is, got {units}")
    return array
