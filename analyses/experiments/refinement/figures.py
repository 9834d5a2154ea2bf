"""The figures of the refinement experiment, drawn from its frames alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.experiments.refinement.inner import CONTROLS
from reflowlens.figures.builders import bars, line_with_band


def refinement_figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Those of `gates`, `retrained`, `inner`, `gains` and `steps` whose frames there are."""
    figures = {}
    if "effects" in frames:
        figures["gates"] = _effects(frames["effects"], "Refiners of one model, switched off", "nats a token")
    if "retrained_effects" in frames:
        figures["retrained"] = _effects(frames["retrained_effects"], "Models trained with and without", "bits a byte")
    if "inner" in frames:
        later = frames["inner"].query("mini_batch > 0")  # the first step is larger than all others together
        generalisation = later.assign(generalisation=later["next_before"] - later["next_after"])
        figures["inner"] = line_with_band(
            generalisation.groupby(["control", "mini_batch"], sort=False)[["generalisation"]].mean().reset_index(),
            "mini_batch",
            "generalisation",
            color="control",
            controls=CONTROLS,
            title="What a step of the inner learner takes off the next mini-batch's inner loss",
            x_title="mini-batch",
            y_title="inner loss before − after",
        )
    positions = frames["gains"].query("by == 'position'")
    figures["gains"] = line_with_band(
        positions,
        "first",
        "value",
        "low",
        "high",
        color="refiner",
        title="Gain by position in the text",
        x_title="first position of the bin",
        y_title="nats a token",
    )
    if "steps" in frames:
        steps = frames["steps"].query("kind == 'step'")
        figures["steps"] = line_with_band(
            steps,
            "size",
            "value",
            "low",
            "high",
            title="Loss by the size of the flow’s step, against a step of 1",
            x_title="τ",
            y_title="nats a token",
        )
    return figures


def _effects(frame: pd.DataFrame, title: str, y_title: str) -> go.Figure:
    return bars(
        frame,
        "effect",
        "value",
        "low",
        "high",
        color="weights",
        title=title,
        x_title="",
        y_title=f"{y_title} (below 0: better)",
    )
