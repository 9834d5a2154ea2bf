"""Figures of unit statistics: each a distribution or a curve over levels, the controls in grey."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.units.counts import UnitCounts
from analyses.units.intervals import mean_interval
from reflowlens.figures.builders import histogram_with_control, line_with_band

CONTROLS = ("untrained", "shuffled_text")


def unit_figures(
    counts: Mapping[str, Mapping[str, UnitCounts]], kind_of: Callable[[str], str], minimum_events: int, seed: int = 0
) -> dict[str, go.Figure]:
    """Figures ``firing`` (rate by level), ``rates_<kind>`` and ``selectivity_<kind>`` (over units).

    Args:
        counts: by model, then by hook point.
        kind_of: gives the kind of units of a point.
        minimum_events: selectivity is of units with at least so many events.
    """
    figures = {"firing": firing_by_level(counts, kind_of, seed)}
    for kind in dict.fromkeys(kind_of(point) for point in counts["model"]):
        rates, selectivities = [], []
        for model, points in counts.items():
            for point, part in points.items():
                if kind_of(point) != kind:
                    continue
                rate = part.rate.numpy()
                rates.append(pd.DataFrame({"model": model, "log_rate": np.log10(np.maximum(rate, 0.5 / part.n))}))
                ranked = part.selectivity[part.events >= minimum_events].numpy()
                selectivities.append(pd.DataFrame({"model": model, "log_selectivity": np.log10(ranked)}))
        figures[f"rates_{kind}"] = _histogram(rates, "log_rate", "log₁₀ firing rate (never: at the left)")
        if sum(map(len, selectivities)):
            title = f"log₁₀ max / mean, units with at least {minimum_events} events"
            figures[f"selectivity_{kind}"] = _histogram(selectivities, "log_selectivity", title)
    return figures


def _histogram(parts: list[pd.DataFrame], x: str, x_title: str) -> go.Figure:
    return histogram_with_control(pd.concat(parts), x, "model", controls=CONTROLS, x_title=x_title)


def firing_by_level(
    counts: Mapping[str, Mapping[str, UnitCounts]], kind_of: Callable[[str], str], seed: int = 0
) -> go.Figure:
    """The mean firing rate of each kind of units at each level, with its 95% interval over the rows of the text."""
    rows = []
    for model, points in counts.items():
        for point, part in points.items():
            level = int(point.split(".")[1]) if point.startswith("blocks.") else -1
            series = kind_of(point) if model == "model" else f"{kind_of(point)}, {model}"
            several = len(part.row_rates) > 1
            low, high = mean_interval(part.row_rates.numpy(), seed) if several else (np.nan, np.nan)
            mean = float(part.row_rates.mean())
            rows.append({"level": level, "firing_rate": mean, "low": low, "high": high, "units": series})
    frame = pd.DataFrame(rows)
    controls = [name for name in frame["units"].unique() if name.endswith(CONTROLS)]
    return line_with_band(frame, "level", "firing_rate", "low", "high", "units", controls=controls, log_y=True)
