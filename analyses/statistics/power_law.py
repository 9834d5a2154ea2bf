"""Power laws of a loss in the size of a model, L = c + a·N^-b, and what they say of sizes that were not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from analyses.statistics.checks import finite
from analyses.statistics.intervals import Interval
from reflowlens.errors import ReflowlensError

FEWEST_FOR_FLOOR = 4


class Line(NamedTuple):
    """y = intercept + slope·x by least squares: `interval` is the slope's 95% one (Student's t), `p` two-sided of its
    being 0, `df` the degrees of freedom left, `sigma` the residual standard deviation, `mean` and `spread` of x."""

    intercept: float
    slope: float
    interval: Interval
    p: float
    df: int
    sigma: float
    mean: float
    spread: float

    def at(self, x: float) -> tuple[float, Interval]:
        """What another run at x would have: the prediction and its 95% prediction interval."""
        value = self.intercept + self.slope * x
        n = self.df + 2
        half = stats.t(self.df).ppf(0.975) * self.sigma * (1 + 1 / n + (x - self.mean) ** 2 / self.spread) ** 0.5
        return value, Interval(value - half, value + half)


def fit_line(x: ArrayLike, y: ArrayLike) -> Line:
    """A straight line through runs. Raises ReflowlensError for fewer than 3 of them, or a single x.

    >>> fit_line([0, 1, 2], [1.0, 3.0, 5.0]).slope
    2.0
    """
    x, y = finite(x, "x", dimensions=1), finite(y, "y", dimensions=1)
    if len(x) < 3 or len(x) != len(y) or len(np.unique(x)) < 2:
        raise ReflowlensError(f"a line needs at least 3 runs of at least 2 sizes, got {len(x)} of {len(np.unique(x))}")
    found, df = stats.linregress(x, y), len(x) - 2
    half = float(stats.t(df).ppf(0.975) * found.stderr)
    residuals = y - found.intercept - found.slope * x
    return Line(
        float(found.intercept),
        float(found.slope),
        Interval(float(found.slope) - half, float(found.slope) + half),
        float(found.pvalue),
        df,
        float((residuals @ residuals / df) ** 0.5),
        float(x.mean()),
        float(((x - x.mean()) ** 2).sum()),
    )


@dataclass(frozen=True)
class PowerLaw:
    """L = floor + factor·N^-exponent. `interval`: of the exponent, 95%, Student's t with `df` = runs - parameters.

    `bootstrap`: the same by drawing runs within each size. Of two runs it knows half of their variance, and nothing of
    a law that does not hold: it stands beside, and is no substitute.
    """

    factor: float
    exponent: float
    floor: float
    interval: Interval
    bootstrap: Interval
    df: int
    sigma: float
    covariance: NDArray[np.float64]

    def at(self, size: float) -> tuple[float, Interval]:
        """The loss of another run of that size and its 95% prediction interval, as far as the law holds."""
        above = self.factor * size**-self.exponent
        loss = self.floor + above
        slopes = np.array([above / loss, -np.log(size) * above / loss, 1 / loss])[: len(self.covariance)]
        half = stats.t(self.df).ppf(0.975) * (self.sigma**2 + slopes @ self.covariance @ slopes) ** 0.5
        return loss, Interval(float(loss * np.exp(-half)), float(loss * np.exp(half)))


def fit_power_law(sizes: ArrayLike, losses: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> PowerLaw:
    """Least squares in log L. A floor, at least 0, is fitted from four sizes on: three have no more to say than its
    three parameters ask for, and without a floor the law is a straight line in log N.

    Raises ReflowlensError for sizes or losses that are not positive, fewer than two sizes, and no more runs than
    parameters.

    >>> round(fit_power_law([1e5, 1e6, 1e7], [4.0, 2.0, 1.0]).exponent, 3)
    0.301
    """
    sizes, losses = finite(sizes, "sizes", dimensions=1), finite(losses, "losses", dimensions=1)
    distinct = np.unique(sizes)
    if len(distinct) < 2 or (sizes <= 0).any() or (losses <= 0).any():
        raise ReflowlensError("a power law needs at least two sizes, and sizes and losses above 0")
    n_parameters = 3 if len(distinct) >= FEWEST_FOR_FLOOR else 2
    if (df := len(sizes) - n_parameters) < 1:
        raise ReflowlensError(f"a power law of {n_parameters} parameters needs more runs than that, got {len(sizes)}")
    best, covariance, sigma = _fitted(sizes, losses, n_parameters)
    half = float(stats.t(df).ppf(0.975) * covariance[1, 1] ** 0.5)
    rng, groups = np.random.default_rng(seed), [np.flatnonzero(sizes == size) for size in distinct]
    drawn = [np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(resamples)]
    exponents = [_fitted(sizes[rows], losses[rows], n_parameters)[0][1] for rows in drawn]
    return PowerLaw(
        factor=float(np.exp(best[0])),
        exponent=float(best[1]),
        floor=float(best[2]) if n_parameters == 3 else 0.0,
        interval=Interval(float(best[1]) - half, float(best[1]) + half),
        bootstrap=Interval(*map(float, np.percentile(exponents, [2.5, 97.5]))),
        df=df,
        sigma=sigma,
        covariance=covariance,
    )


def _fitted(
    sizes: NDArray[np.float64], losses: NDArray[np.float64], n_parameters: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """log factor, exponent and, of three parameters, floor; their covariance, and the residual standard deviation."""
    x, y = np.log(sizes), np.log(losses)

    def line(floor: float) -> NDArray[np.float64]:
        slope, intercept = np.polyfit(x, np.log(losses - floor), 1)
        return np.array([intercept, -slope, floor])

    def residuals(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.log(p[2] + np.exp(p[0] - p[1] * x)) - y)

    start = line(0.0)
    if n_parameters == 3:
        starts = [line(floor) for floor in np.linspace(0, 0.999 * losses.min(), 100)]
        start = min(starts, key=lambda p: float(residuals(p) @ residuals(p)))
        bounds = ([-np.inf, -np.inf, 0.0], [np.inf, np.inf, losses.min()])
        start = optimize.least_squares(residuals, start, bounds=bounds, x_scale="jac").x
    above = np.exp(start[0] - start[1] * x)
    slopes = np.stack([above, -x * above, np.ones_like(x)], axis=1)[:, :n_parameters] / (start[2] + above)[:, None]
    left = residuals(start)
    variance = float(left @ left) / max(1, len(x) - n_parameters)
    return start[:n_parameters], variance * np.linalg.pinv(slopes.T @ slopes), variance**0.5
