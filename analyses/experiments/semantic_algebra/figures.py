"""The figures of experiment 5, drawn from its frames alone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.experiments.semantic_algebra.measure import NULLS, OTHER_WEIGHTS
from reflowlens.figures.builders import bars, dots


def algebra_figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """``accuracy``, ``sections`` and, where there is its frame, ``published``."""
    low, high, y = "accuracy_at_1_low", "accuracy_at_1_high", "accuracy_at_1"
    trained = frames["overall"][~frames["overall"]["series"].isin(["rotated_basis"])]
    figures = {
        "accuracy": bars(
            trained,
            "series",
            y,
            low,
            high,
            "space",
            title="Analogies answered, by ranking and null",
            x_title="ranking",
            y_title="accuracy@1",
        ),
        "sections": bars(
            frames["sections"],
            "relation",
            y,
            low,
            high,
            "series",
            controls=NULLS,
            horizontal=True,
            title="Analogies answered, by relation",
            y_title="accuracy@1",
        ),
    }
    if "published" in frames:
        figures["published"] = dots(
            frames["published"].query("weights == 'trained' or (space == 'R' and weights != 'rotated_basis')"),
            "rank_add",
            "analogy",
            "series",
            reference="published_rank",
            controls=OTHER_WEIGHTS,
            log_x=True,
            hover=["predicted", "rank_mul", "rank_with_inputs"],
            title="The three published analogies",
            x_title="rank of the expected word",
        )
    return figures
