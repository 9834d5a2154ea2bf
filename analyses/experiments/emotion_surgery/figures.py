"""The figures of experiment 10, drawn from its frames alone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from reflowlens.figures.builders import line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.figures.table import table

_CONTROLS = ("shuffled_labels", "random_direction", "untrained")
_LEAST_COST = 1e-3  # what a logarithmic axis shows of a cost at or below it


def emotion_figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """``sweep``, ``layers``, ``frontier`` and ``generations``, from the frames of the experiment."""
    frontier = frames["frontier"]
    return {
        "sweep": heatmap(
            frames["sweep"],
            "strength",
            "layer",
            "flip_rate",
            z_range=(0, 1),
            hover=["alpha", "log_odds_shift", "perplexity_cost", "kl"],
            title="Continuations that change their pole",
            x_title="strength (of the stream's rms)",
        ),
        "layers": line_with_band(
            frames["layers"],
            "layer",
            "flip_rate",
            "low",
            "high",
            color="series",
            controls=_CONTROLS,
            hover=["strength", "log_odds_shift", "p_holm", "perplexity_cost"],
            title="Flip rate at equal cost",
            y_title="share of carriers",
        ),
        "frontier": line_with_band(
            frontier.assign(cost=frontier["perplexity_cost"].clip(lower=_LEAST_COST)),
            "cost",
            "flip_rate",
            color="series",
            controls=_CONTROLS,
            hover=["layer", "strength", "log_odds_shift", "perplexity_cost"],
            title="Flip rate against damage",
            x_title="relative rise of the perplexity",
            y_title="share of carriers",
        )
        .update_xaxes(type="log")
        .update_layout(hovermode="closest"),
        "generations": table(
            frames["generations"],
            ["prompt", "toward", "strength", "text", "valence"],
            widths=[2, 1.2, 1.2, 4.6, 1.1],
            title="Continued from the same seeds, without and with steering",
        ),
    }
