"""What the data say of a claim that a metric exceeds its control."""

from __future__ import annotations

from typing import Literal

from analyses.statistics.checks import finite
from reflowlens.errors import ReflowlensError

Verdict = Literal["supported", "not supported", "underpowered"]

SIGNIFICANCE = 0.05


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
    finite(numbers, "the interval, control, p and published value", dimensions=1)
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
