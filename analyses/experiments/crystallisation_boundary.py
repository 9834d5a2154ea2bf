"""Across experiments: readings of the depth at which a prediction is settled, on one axis.

Experiment 7 asks from which layer on the logit lens shows the final token, 8 from which layer on the signals lead that
lead at the end, 10 up to which layer a steering direction still turns a prediction, 11 from which layer on no strength
implants a concept. If a model decides at one depth, they agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.result.finding import Finding
from analyses.result.result import Result
from reflowlens.figures.builders import dots
from reflowlens.figures.style import label

BOUNDARY = "crystallisation_boundary"
UNTRAINED = "untrained"
_READINGS = {
    ("layer_evolution", "crystallisation_share"): "the lens shows the final token",
    ("signal_flow", "leading_since"): "the signals that lead at the end lead",
    ("emotion_surgery", "last_effective_share"): "last layer where steering turns the prediction",
    ("concept_inception", "point_of_no_return"): "no strength implants a concept any more",
}


def crystallisation_boundary(results: Mapping[str, Result]) -> Result | None:
    """The boundary by lens, signals, steering and injection as shares of the depth (0: the embedding, 1: the end).

    `results`: by the experiments' names; None unless two of `layer_evolution`, `signal_flow`, `emotion_surgery` and
    `concept_inception` are there. The frame `boundaries` has a row for each of these: share, 95% interval, published
    value and that of the untrained model, NaN where there is none, for a boundary may not exist: a model that can be
    steered up to its end has no point of no return.

    Example: `crystallisation_boundary(run_suite(model, [7, 10, 11]).results).frames["boundaries"]`
    """
    run = {place: text for place, text in _READINGS.items() if place[0] in results}
    if len(run) < 2:
        return None
    frame = pd.DataFrame([_reading(results[name], metric, text) for (name, metric), text in run.items()])
    absent = frame.loc[frame["share"].isna(), "reading"].tolist()
    return Result(
        name=BOUNDARY,
        title="Crystallisation Boundary",
        params={"experiments": [name for name, _ in run]} | _shared([results[name].params for name, _ in run]),
        frames={"boundaries": frame},
        figures={"boundary": boundary_figure({"model": frame})} if len(absent) < len(frame) else {},
        notes=[f"no boundary found: {text}" for text in absent],
    )


def compared_boundaries(comparison: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of each model in a table of `analyses.compare_models` a frame as `boundaries` above, through its native view;
    models without any boundary are left out.

    Example: `boundary_figure(compared_boundaries(compare_models(["reflow-nano", "untrained"], experiments=[7, 8])))`
    """
    native = comparison[comparison["view"].isin(["", "native"])]
    found: dict[str, list[dict[str, object]]] = {}
    for place, rows in native.groupby(["model", "experiment", "metric"], sort=False):
        model, experiment, metric = map(str, place)
        if (experiment, metric) in _READINGS:
            first = rows.iloc[0]
            untrained = rows.loc[rows["control"] == UNTRAINED, "control_value"]
            row = {"reading": _READINGS[experiment, metric], "metric": metric, "share": first["value"]}
            row |= {name: first[name] for name in ("low", "high", "published")}
            row[UNTRAINED] = untrained.iloc[0] if len(untrained) else math.nan
            found.setdefault(model, []).append(row)
    return {model: pd.DataFrame(rows) for model, rows in found.items()}


def boundary_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """The boundaries of one or several models: model's name -> its frame `boundaries`. Of one model alone the untrained
    one's stand beside it."""
    shown = [frame.dropna(subset=["share"]).assign(model=name) for name, frame in frames.items()]
    if len(shown) == 1:
        (frame,) = shown
        control = frame.assign(model=UNTRAINED, share=frame[UNTRAINED], low=math.nan, high=math.nan)
        shown.append(control.dropna(subset=["share"]))
    rows = pd.concat([frame for frame in shown if len(frame)], ignore_index=True)
    figure = dots(
        rows,
        "share",
        "reading",
        "model",
        reference="published",
        controls=[UNTRAINED],
        hover=["low", "high"],
        title="Where predictions are settled",
        x_title="share of the depth",
    )
    by_model = {label(name): part for name, part in rows.groupby("model", sort=False)}
    for trace in figure.data:
        if trace.name in by_model:
            part = by_model[trace.name]
            trace.error_x = {
                "symmetric": False,
                "array": part["high"] - part["share"],
                "arrayminus": part["share"] - part["low"],
                "color": trace.marker.color,
                "thickness": 1.5,
                "width": 4,
            }
    return figure.update_xaxes(range=[-0.03, 1.03])


def _shared(params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments that all of them were called with alike."""
    first = {name: params[0][name] for name in ("seed", "quick", "model_hash") if name in params[0]}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in params)}


def _reading(result: Result, metric: str, text: str) -> dict[str, object]:
    finding = result.findings.get(metric, Finding(math.nan))
    low, high = finding.interval or (math.nan, math.nan)
    place = {"reading": text, "metric": metric, "share": finding.value, "low": low, "high": high}
    untrained = finding.controls.get(UNTRAINED, math.nan)
    return place | {"published": result.published.get(metric, math.nan), UNTRAINED: untrained}
