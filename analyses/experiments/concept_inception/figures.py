"""The figures of experiment 11, drawn from its frames alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.claims import UNTRAINED
from reflowlens.figures.builders import line_with_band

_CONTROLS = (*UNTRAINED, *(f"{name}_long" for name in UNTRAINED), "random_recipe")


def inception_figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """``critical``, ``alpha``, ``reachable`` and ``trace``, from the frames of the experiment."""
    layers, trace = frames["layers"], frames["trace"]
    told = np.linspace(0, trace["layer"].max(), 4).round()  # more curves would be hard to tell apart
    shown = trace[(trace["strength"] > 0) & trace["layer"].isin(told)]
    tried = shown.assign(layer=shown["layer"].map("layer {}".format))
    concept, prompt = trace["concept"].iloc[0], trace["prompt"].iloc[0]
    figures = {
        name: line_with_band(
            layers,
            "layer",
            column,
            f"{column}_low",
            f"{column}_high",
            color="series",
            controls=_CONTROLS,
            hover=["alpha", "strength", "reachable"],
            title=title,
            y_title=y_title,
        )
        for name, column, title, y_title in (
            (
                "critical",
                "strength",
                "How strongly a concept must be injected",
                "critical strength (of the stream's rms)",
            ),
            ("alpha", "alpha", "The same as the factor of the word's own recipe", "critical α"),
            ("reachable", "reachable", "Concepts that some strength implants", "share of concepts and prompts"),
        )
    }
    figures["trace"] = line_with_band(
        tried,
        "step",
        "strength",
        color="layer",
        log_y=True,
        hover=["reached", "alpha"],
        title=f"The search for “{concept}” after “{prompt}”",
        x_title="trial",
        y_title="strength tried, filled where it suffices",
    )
    for curve, (_, rows) in zip(figures["trace"].data, tried.groupby("layer", sort=False), strict=True):
        curve.marker.symbol = np.where(rows["reached"], "circle", "circle-open")
        curve.marker.size = 8
    return figures
