"""The figures of experiment 12, drawn from its frames alone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.controls.bases import as_one_basis
from reflowlens.figures.builders import dots, line_with_band
from reflowlens.figures.table import table

_EXAMPLES = 3  # carriers in the table


def hijack_figures(frames: dict[str, pd.DataFrame], beta: float) -> dict[str, go.Figure]:
    """``fluency``, ``log_odds``, ``generations`` and ``signals``, from the frames of the experiment.

    Args:
        beta: of the headline, which the table shows.
    """
    curves = _curves(frames["edits"])
    signals = as_one_basis(frames["signals"]).groupby(["edit", "basis", "signal"], sort=False)
    means = signals[["effect", "share_of_direction"]].mean().reset_index()
    hover = ["beta", "valence_low", "valence_high", "perplexity", "distinct_2", "locality_kl"]
    fluency = line_with_band(
        curves,
        "perplexity_ratio",
        "valence",
        color="series",
        controls=("random_direction",),
        hover=hover,
        title="Sentiment against fluency: subjects’ recipes shifted from −β to +β",
        x_title="perplexity under the unedited model, unedited texts being 1",
        y_title="mean valence of a word (VADER)",
    )
    for curve, (name, rows) in zip(fluency.data, curves.groupby("series", sort=False), strict=True):
        ends = {"array": rows["valence_high"] - rows["valence"], "arrayminus": rows["valence"] - rows["valence_low"]}
        curve.error_y = {"symmetric": False, "thickness": 1, "width": 3, **ends}
        if name == "edit":
            extremes = rows["beta"].isin([rows["beta"].min(), rows["beta"].max()])  # the others crowd around β = 0
            labels = rows["beta"].map("β = {:+g}".format).where(extremes, "")
            curve.update(mode="lines+markers+text", text=labels, textposition="top left")
    return {
        "fluency": fluency.update_layout(hovermode="closest").update_xaxes(type="log"),
        "log_odds": line_with_band(
            curves,
            "beta",
            "log_odds",
            "log_odds_low",
            "log_odds_high",
            color="series",
            controls=("random_direction",),
            hover=["perplexity_ratio", "locality_kl"],
            title="The next word after a carrier whose subject is shifted",
            x_title="β (of the mean norm of the edited recipes)",
            y_title="log odds of positive words, nats",
        ),
        "generations": table(
            _examples(frames["carriers"], beta),
            ["prompt", "edit", "beta", "text", "valence"],
            widths=[2, 1.2, 0.9, 4.8, 1.1],
            title="Continued from the same seeds, before and under an edit",
        ),
        "signals": dots(
            means,
            "effect",
            "edit",
            color="basis",
            controls=("rotated_basis",),
            hover=["signal", "share_of_direction"],
            title="One signal removed: the strongest of the direction in its basis",
            x_title="mean absolute change of the log odds, nats",
        ),
    }


def _curves(edits: pd.DataFrame) -> pd.DataFrame:
    """The shifts by series and ascending β, through the unedited model at β = 0; random directions averaged."""
    shifts = edits[edits["edit"] == "shift"]
    unedited = [edits[edits["edit"] == "unedited"].assign(series=name) for name in shifts["series"].unique()]
    rows = pd.concat([shifts, *unedited]).drop(columns="edit")
    order = {name: place for place, name in enumerate(shifts["series"].unique())}
    means = rows.groupby(["series", "beta"]).mean().reset_index()
    return means.assign(order=means["series"].map(order)).sort_values(["order", "beta"])


def _examples(carriers: pd.DataFrame, beta: float) -> pd.DataFrame:
    """A few carriers under each edit."""
    some = carriers["prompt"].drop_duplicates().head(_EXAMPLES)
    real = carriers["series"].isin(["unedited", "edit"]) & carriers["beta"].abs().isin([0.0, beta])
    rows = carriers[real & carriers["prompt"].isin(some)]
    return rows.sort_values("prompt", kind="stable")
