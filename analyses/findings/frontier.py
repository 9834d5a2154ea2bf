"""The figures of `analyses.findings.sparsity`: loss, meaning and purity, a point a run, and published ones."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from reflowlens.figures.scatter import scatter
from reflowlens.figures.style import CONTROL_GREYS

NANO = "packaged nano models"
"""21.8M tokens (docs/baselines.md)."""
REFLOW = "published models"
"""reFlow-1-Big and TopK, 515M parameters."""
ELSEWHERE = pd.DataFrame(
    [
        {"source": NANO, "arm": "dense", "more_loss": 0.0, "neighbours": 0.728, "purity": -0.004, "share": 1.0},
        {"source": NANO, "arm": "top 16 of 256", "more_loss": 0.503, "neighbours": 0.148, "purity": 0.044,
         "share": 16 / 256},
        {"source": NANO, "arm": "unfactored", "more_loss": -0.006, "neighbours": 0.734, "purity": -0.006, "share": 1.0},
        {"source": REFLOW, "arm": "dense", "silhouette": 0.1052, "three_four": 0.7551, "share": 1.0},
        {"source": REFLOW, "arm": "top 64 of 1024", "silhouette": -0.02, "three_four": 0.30, "share": 64 / 1024},
    ]
)  # fmt: skip
"""Points of other models, each with its source; of the published ones the loss under top-k is not known."""


def frontier_figures(runs: pd.DataFrame, kept: float, pure: float) -> dict[str, go.Figure]:
    """Points are runs, a colour an arm, and published or packaged models.

    `frontier`: pure signals against the share of dense's neighbours that is left, with the corner in which both are
    more than `pure` and `kept`; `meaning` and `purity`: either against what a run loses to dense of its seed;
    `silhouette` and `cosine`: what is published, against the share of signals that a token keeps.
    """
    dense = runs[runs["arm"] == "dense"].set_index("seed").reindex(runs["seed"])
    points = runs.assign(
        more_loss=runs["loss"] - dense["loss"].to_numpy(),
        meaning=runs["neighbours"] / dense["neighbours"].to_numpy(),
        share=runs["kept"] / runs["n_signals"],
        source=runs["arm"],
        order=runs["kept"] / runs["n_signals"] + runs["n_signals"] / 1e6,
    ).sort_values(["order", "arm"], kind="stable")
    elsewhere = ELSEWHERE.assign(meaning=ELSEWHERE["neighbours"] / ELSEWHERE["neighbours"].iloc[0])
    every = pd.concat([points, elsewhere], ignore_index=True)

    def drawn(x: str, y: str, title: str, x_title: str, y_title: str) -> go.Figure | None:
        rows = every.dropna(subset=[x, y])
        if rows["seed"].isna().all():
            return None
        hover = ["source", "arm", "seed"]
        figure = scatter(
            rows.fillna({"seed": -1}), x, y, "source", hover=hover, title=title, x_title=x_title, y_title=y_title
        )
        if x == "share":
            figure.update_xaxes(type="log")
        for trace in figure.data:
            if trace.name in (NANO, REFLOW):  # no arms: none of their colours
                trace.marker.update(symbol="star", size=12, color=CONTROL_GREYS[trace.name == REFLOW])
        return figure

    loss, share = "held-out loss less that of dense, nats", "share of signals that a token keeps"
    left, purer = "neighbours, of those of dense", "purity of codebooks beyond rotations"
    wanted = {
        "frontier": drawn("purity", "meaning", "Meaning against pure signals", purer, left),
        "meaning": drawn("more_loss", "meaning", "What meaning costs", loss, left),
        "purity": drawn("more_loss", "purity", "What pure signals cost", loss, purer),
        "silhouette": drawn("share", "silhouette", "Meaning against sparsity", share, "silhouette"),
        "cosine": drawn("share", "three_four", "Meaning against sparsity", share, "cosine of three and four"),
    }
    figures = {name: figure for name, figure in wanted.items() if figure is not None}
    if "frontier" in figures:
        right, top = 0.06 + max(pure, points["purity"].max()), max(1.2, 0.1 + points["meaning"].max())
        corner = {"x0": pure, "x1": right, "y0": kept, "y1": top}
        figures["frontier"].add_shape(
            type="rect", layer="below", line_width=0, fillcolor="gray", opacity=0.12, **corner
        )
        figures["frontier"].update_xaxes(range=[-0.02, right]).update_yaxes(range=[0, top])
    return figures
