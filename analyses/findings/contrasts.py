"""Contrasts over seeds against the smallest effect that matters: what a question's rule is made of.

The rule of a contrast, decided beforehand: *supported* if its 95% interval over seeds (Student's t) lies above the
smallest effect and the p of its being that effect, adjusted where several are read together, is below 0.05; *not
supported* if the interval lies below it; otherwise, and with fewer than three seeds, *underpowered*.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analyses.statistics.intervals import t_interval
from analyses.statistics.verdicts import SIGNIFICANCE, Verdict

MINIMUM_SEEDS = 3


class Contrast(NamedTuple):
    """Mean over seeds, its 95% interval and the two-sided p of its being `smallest`, both NaN of one seed or if a value
    is NaN."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    smallest: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval, or None if there is none."""
        return None if math.isnan(self.low) else (self.low, self.high)

    def verdict(self, p: float | None = None) -> Verdict:
        """The rule of this module; `p` in place of the contrast's own where it was adjusted."""
        if self.seeds < MINIMUM_SEEDS:
            return "underpowered"
        if self.low > self.smallest and (self.p if p is None else p) < SIGNIFICANCE:
            return "supported"
        return "not supported" if self.high < self.smallest else "underpowered"


def contrast(values: ArrayLike, smallest: float = 0.0) -> Contrast:
    """The contrast whose value in each seed is given.

    >>> contrast([0.5, 0.6, 0.7], smallest=0.1).verdict()
    'supported'
    """
    each = np.asarray(values, dtype=float)
    if len(each) < 2:
        only = float(each.sum()) if len(each) else math.nan
        return Contrast(only, math.nan, math.nan, math.nan, len(each), smallest)
    (low, high), p = t_interval(each - smallest)
    return Contrast(float(each.mean()), low + smallest, high + smallest, p, len(each), smallest)


def by_seed(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """A row a seed and a column an arm, in the order of the arms; NaN where a seed was not trained or measured."""
    return runs.pivot(index="seed", columns="arm", values=value)[list(dict.fromkeys(runs["arm"]))]
