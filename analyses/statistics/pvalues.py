"""Permutation p-values, how far a value lies from the values of controls, and corrections for many tests."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analyses.statistics.checks import finite, several
from reflowlens.errors import ReflowlensError

_SIGNS_AT_ONCE, _COLUMNS_AT_ONCE = 512, 4096
Alternative = Literal["greater", "less", "two-sided"]


def permutation_pvalue(observed: float, null: ArrayLike, alternative: Alternative = "greater") -> float:
    """p = (1 + #{null ≥ observed}) / (1 + m) for m permutations (Phipson and Smyth 2010): never zero.

    `null` [m] holds the statistic of each permutation. "less" counts null ≤ observed; "two-sided" is twice the smaller
    of both, at most 1, which needs no symmetric null. A null value within 1e-12 (relative) of `observed` is a tie:
    the same sum taken in another order. Raises ReflowlensError if `null` is empty or anything is not finite.

    >>> permutation_pvalue(3.0, [0.0, 1.0, 2.0])
    0.25
    """
    _check_choice(alternative)
    values = finite(null, "null", dimensions=1)
    centre = float(finite(observed, "observed", dimensions=0))
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
        (several(finite(differences, "differences", dimensions=1), "differences"),),
        np.mean,
        permutation_type="samples",
        alternative=alternative,
        n_resamples=permutations,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def sign_flip_pvalues(
    differences: ArrayLike, alternative: Alternative = "two-sided", *, permutations: int = 9999, seed: int = 0
) -> NDArray[np.float64]:
    """`paired_permutation_pvalue` of every column of `differences` [units, column], by products with signs.

    Exact, over all 2^units signs, where these are no more than `permutations`; otherwise random signs, the same for
    every column, and the formula of `permutation_pvalue`. The null is symmetric, so "two-sided" counts means as far
    from 0 as the observed. A null mean within 1e-12 (relative) of the observed one is a tie. Memory stays at a few
    dozen MB, whatever the numbers of units and columns. Raises ReflowlensError for fewer than 2 units or values that
    are not finite.

    >>> sign_flip_pvalues(np.ones((5, 1))).tolist()
    [0.0625]
    """
    _check_choice(alternative)
    table = several(finite(differences, "differences", dimensions=2), "differences")
    n, is_exact = len(table), len(table) < 60 and 2 ** len(table) <= permutations
    total, rng = 2**n if is_exact else permutations, np.random.default_rng(seed)
    sums, hits = table.sum(axis=0), np.zeros(table.shape[1], dtype=np.int64)
    for start in range(0, total, _SIGNS_AT_ONCE):
        count = min(_SIGNS_AT_ONCE, total - start)
        if is_exact:
            flipped = np.arange(start, start + count)[:, None] >> np.arange(n) & 1
        else:
            flipped = rng.integers(2, size=(count, n))
        signs = 1.0 - 2.0 * flipped
        for first in range(0, table.shape[1], _COLUMNS_AT_ONCE):
            part = slice(first, first + _COLUMNS_AT_ONCE)
            hits[part] += _beyond(signs @ table[:, part], sums[part], alternative).sum(axis=0)
    return hits / total if is_exact else (1 + hits) / (1 + total)


def _beyond(null: NDArray[np.float64], observed: NDArray[np.float64], alternative: Alternative) -> NDArray[np.bool_]:
    """Which sums are at least as far out as the observed one."""
    if alternative == "two-sided":
        null, observed = np.abs(null), np.abs(observed)
    tolerance = 1e-12 * np.abs(observed)
    return null <= observed + tolerance if alternative == "less" else null >= observed - tolerance


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
    values = several(finite(null, "null", dimensions=1), "null")
    difference = float(finite(observed, "observed", dimensions=0)) - values.mean()
    spread = values.std(ddof=1) * np.sqrt(1 + 1 / len(values))
    if spread == 0:  # draws that cannot differ, as when every rotation gives the same: only a tie is compatible
        spread = np.finfo(float).tiny
    distribution = stats.t(len(values) - 1)
    greater, less = distribution.sf(difference / spread), distribution.cdf(difference / spread)
    return float({"greater": greater, "less": less, "two-sided": 2 * min(greater, less)}[alternative])


def holm(pvalues: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values (1979) of `pvalues` [tests], in the same order: rejecting those below 0.05 keeps the
    chance of any false rejection below 0.05, whatever the dependence between the tests.

    The i-th smallest of m becomes the largest of (m - j + 1)·p_j over j ≤ i, at most 1. Raises ReflowlensError for
    values outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p = _pvalues(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted


def benjamini_hochberg(pvalues: ArrayLike) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p-values (1995) of `pvalues` [tests], in the same order: of those below 0.05 no
    more than 5% are false on average, where tests are independent or positively dependent.

    The i-th smallest of m becomes the smallest of m/j · p_j over j ≥ i, at most 1. Raises ReflowlensError for values
    outside [0, 1].

    >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    p = _pvalues(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    scaled = len(p) / np.arange(1, len(p) + 1) * p[order]
    adjusted[order] = np.minimum(1, np.minimum.accumulate(scaled[::-1])[::-1])
    return adjusted


def _pvalues(pvalues: ArrayLike) -> NDArray[np.float64]:
    p = finite(pvalues, "pvalues", dimensions=1)
    if np.any((p < 0) | (p > 1)):
        raise ReflowlensError("p-values lie between 0 and 1; some of these do not")
    return p


def _check_choice(alternative: str) -> None:
    if alternative not in get_args(Alternative):
        raise ReflowlensError(f"no alternative {alternative!r}; there are {', '.join(get_args(Alternative))}")
