"""What is known of one metric, and the tables that many of them make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, get_args

from analyses.statistics.intervals import Interval
from analyses.statistics.verdicts import Verdict
from reflowlens.errors import ReflowlensError

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What is known of one headline metric.

    `value`: finite. `interval`: its 95% interval. `controls`: control's name -> its value. `verdict`: "supported", "not
    supported" or "underpowered" (`analyses.statistics.verdict`). `definition`: how the metric was computed.
    `published`: its value in the reFlow documents.
    """

    value: float
    interval: tuple[float, float] | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    definition: str = ""
    published: float | None = None


class Table(dict[str, T]):
    """What the findings of a result say, by metric; for reading, as it is made of them anew each time."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise ReflowlensError("a table of a result is made of its findings: set result.findings[metric] = Finding(...)")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse


def joined(
    metrics: Mapping[str, float],
    controls: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, tuple[float, float]],
    verdicts: Mapping[str, Verdict],
) -> dict[str, Finding]:
    """The findings of tables by metric."""
    for table, entries in {"controls": controls, "intervals": intervals, "verdicts": verdicts}.items():
        for metric in entries:
            if metric not in metrics:
                known = ", ".join(metrics) or "none"
                raise ReflowlensError(f"{table}[{metric!r}]: no such metric; the metrics are {known}")
    return {
        metric: Finding(value, intervals.get(metric), controls.get(metric, {}), verdicts.get(metric))
        for metric, value in metrics.items()
    }


def entries(findings: Mapping[str, Finding], name: str) -> dict[str, Any]:
    """What the findings have in one field, those that have nothing there left out."""
    entries = {metric: getattr(finding, name) for metric, finding in findings.items()}
    return {metric: entry for metric, entry in entries.items() if entry is not None and entry not in ("", {})}


def checked(finding: Finding, metric: str, definition: str, published: float | None) -> Finding:
    """A finding with plain floats, and what its experiment says of the metric; ReflowlensError for numbers that are not
    finite, an interval out of order and a verdict there is not."""
    if finding.verdict is not None and finding.verdict not in get_args(Verdict):
        allowed = ", ".join(get_args(Verdict))
        raise ReflowlensError(f"verdicts[{metric!r}]: no verdict {finding.verdict!r}; there are {allowed}")
    value = finite_floats({metric: finding.value}, "metrics")[metric]
    controls = finite_floats(finding.controls, f"controls[{metric!r}]")
    interval = None if finding.interval is None else _interval(finding.interval, metric)
    return Finding(value, interval, controls, finding.verdict, definition, published)


def finite_floats(values: Mapping[str, float], where: str) -> dict[str, float]:
    """Plain floats; ReflowlensError for one that is not finite."""
    numbers = {name: float(value) for name, value in values.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ReflowlensError(
                f"{where}[{name!r}] is {number}: leave out what could not be computed, and say why in the notes"
            )
    return numbers


def _interval(ends: tuple[float, float], metric: str) -> Interval:
    interval = Interval(*(float(end) for end in ends))
    if not (math.isfinite(interval.low) and math.isfinite(interval.high) and interval.low <= interval.high):
        raise ReflowlensError(
            f"intervals[{metric!r}]: finite ends with low ≤ high were expected, got {tuple(interval)}"
        )
    return interval
