"""The figures of experiment 13, drawn from its frames and findings alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.result.finding import Finding
from reflowlens.figures.builders import bars, line_with_band

_CONTROLS = ("size", "matched_unit", "random_unit", "random_direction", "shuffled_weights", "neurons", "untrained")


def tracing_figures(
    frames: Mapping[str, pd.DataFrame], findings: Mapping[str, Finding], prompt: str
) -> dict[str, go.Figure]:
    """``units``, ``paths``, ``lengths``, ``doses`` and ``lifting``."""
    units = frames["units"].query("chosen == 'influence'")
    named = units.assign(name=units["unit"] + ": " + units["promotes_most"])
    doses = frames["doses"].query("dose > 0")  # a logarithm has no 0
    return {
        "units": bars(
            named,
            "name",
            "influence",
            horizontal=True,
            hover=["activation", "size", "promotes"],
            title=f"Units of most influence behind “{prompt}”",
            x_title="unit: the token that it promotes most",
            y_title="influence",
        ),
        "paths": bars(
            frames["paths"],
            "path",
            "share",
            horizontal=True,
            hover=["edges", "sign", "promotes"],
            title=f"The strongest paths behind “{prompt}”",
            x_title="path",
            y_title="share of the influence",
        ),
        "lengths": line_with_band(
            frames["lengths"],
            "edges",
            "share",
            color="series",
            controls=_CONTROLS,
            title="Influence by the length of paths",
            x_title="edges of a path",
            y_title="share of the influence",
        ),
        "doses": line_with_band(
            doses,
            "dose",
            "probability",
            "low",
            "high",
            color="series",
            controls=_CONTROLS,
            title="Forcing a unit and watching its token",
            x_title="dose (of its largest activation)",
            y_title="probability",
        ).update_xaxes(type="log", tickvals=doses["dose"].unique()),
        "lifting": bars(
            lifting_frame(findings),
            "dose",
            "share",
            "low",
            "high",
            color="series",
            controls=_CONTROLS,
            title="Units that make the model say a token of theirs",
            x_title="doses up to (of its largest activation)",
            y_title="share of units",
        ),
    }


def lifting_frame(findings: Mapping[str, Finding]) -> pd.DataFrame:
    """A row a series and bound of the dose."""
    rows = []
    for metric, finding in findings.items():
        if metric.startswith("lifting_share_"):
            bound = metric.removeprefix("lifting_share_")
            low, high = finding.interval or (finding.value, finding.value)
            bound = "100, any token" if bound == "any" else bound
            rows.append({"series": "unit", "dose": bound, "share": finding.value, "low": low, "high": high})
            for name, value in finding.controls.items():
                rows.append({"series": name, "dose": bound, "share": value, "low": value, "high": value})
    return pd.DataFrame(rows)
