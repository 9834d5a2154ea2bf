"""The figures of `analyses.findings.sparsity`: loss against meaning and purity, a point a run, and published ones."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from reflowlens.figures.scatter import scatter

NANO = "packaged nano models, 21.8M tokens (docs/baselines.md)"
REFLOW = "published reFlow-1-Big and TopK, 515M parameters"
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


def frontier_figures(runs: pd.DataFrame) -> dict[str, go.Figure]:
    """`frontier` and `purity`: what a run loses to dense of its seed against meaning and against purity; `silhouette`
    and `cosine`: what is published, against the share of signals that a token keeps. Colours are k of S."""
    dense = runs[runs["arm"] == "dense"].set_index("seed")["loss"]
    points = runs.assign(
        more_loss=runs["loss"] - dense.reindex(runs["seed"]).to_numpy(),
        share=runs["kept"] / runs["n_signals"],
        source=[f"{kept:g} of {S:g}" for kept, S in zip(runs["kept"], runs["n_signals"], strict=True)],
        order=runs["kept"] / runs["n_signals"] + runs["n_signals"] / 1e6,
    ).sort_values("order", kind="stable")
    every = pd.concat([points, ELSEWHERE], ignore_index=True)

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
            if trace.name in (NANO, REFLOW):
                trace.marker.symbol, trace.marker.size = "star", 12
        return figure

    loss, share = "held-out loss less that of dense, nats", "share of signals that a token keeps"
    wanted = {
        "frontier": drawn("more_loss", "neighbours", "What meaning costs", loss, "neighbours beyond chance"),
        "purity": drawn("more_loss", "purity", "What pure signals cost", loss, "purity beyond rotations"),
        "silhouette": drawn("share", "silhouette", "Meaning against sparsity", share, "silhouette"),
        "cosine": drawn("share", "three_four", "Meaning against sparsity", share, "cosine of three and four"),
    }
    return {name: figure for name, figure in wanted.items() if figure is not None}
