"""The result of `analyses.units.firing` as text for a terminal."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.units.firing import SHOWN

_LEVELS = ["model", "kind", "level", "firing_rate", "near_silent", "never", "selectivity", "max_over_active"]
_SPARSITY = ["active_mean", "gini", "hoyer", "participation"]


def unit_report(result: Result, top: int = 10) -> str:
    """A result as text: a table of levels, the metrics with intervals and controls, and the strongest contexts.

    Args:
        result: of `analyses.units.firing.unit_statistics`.
        top: units of each kind whose context is shown.

    Example: ``print(unit_report(unit_statistics(model, text)))``
    """
    levels = result.frames["levels"]
    levels = levels[levels["model"].isin(SHOWN)]
    lines = [f"{result.params['positions']:,} positions", "", table(levels[[*_LEVELS, *_SPARSITY]]), ""]
    lines += [_metric_line(metric, finding) for metric, finding in result.findings.items()]
    if "alike" in result.frames:
        lines += ["", "the same unit at two levels", table(result.frames["alike"])]
    for kind, units in result.frames["top_units"].groupby("kind", sort=False):
        lines += ["", f"{kind}: the most selective units with at least {result.params['minimum_events']} events"]
        lines += [_unit_line(unit) for unit in units.head(top).to_dict("records")]
    return "\n".join(lines)


def table(frame: pd.DataFrame) -> str:
    """A frame without its index, numbers to four digits, missing values as ``-``."""
    return frame.to_string(index=False, float_format=lambda x: f"{x:.4g}", na_rep="-")


def _metric_line(metric: str, finding: Finding) -> str:
    said = ["[{:.4g}, {:.4g}]".format(*finding.interval)] if finding.interval else []
    said += [f"{name} {control:.4g}" for name, control in finding.controls.items()]
    said += [f"published {finding.published:.4g}"] if finding.published is not None else []
    said += [finding.verdict] if finding.verdict else []
    return f"{metric:<32}{finding.value:>12.4g}  {', '.join(said)}".rstrip()


def _unit_line(unit: dict[Any, Any]) -> str:
    head = f" head {unit['head']}" if unit["head"] >= 0 else ""
    where = f"level {unit['level']}{head} unit {unit['unit']}"
    return (
        f"  {where:<32} s {unit['selectivity']:>8.1f}  max/active {unit['max_over_active']:>6.1f}  "
        f"events {unit['events']:>6}  {unit['context']}"
    )
