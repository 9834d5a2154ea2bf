"""The figures of experiment 9, drawn from its frames alone."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from analyses.claims import UNTRAINED
from analyses.controls.bases import as_one_basis
from analyses.statistics.intervals import bootstrap_interval
from reflowlens.figures.builders import bars, histogram_with_control, line_with_band
from reflowlens.figures.style import COUNTS_ON_A_LOGARITHM

_HOVER = ("contribution", "readout", "after_mean", "after_embed", "after_everywhere", "codebook")


def ablation_figures(frames: dict[str, pd.DataFrame], prompt: str, seed: int) -> dict[str, go.Figure]:
    """``knockout``, ``sufficiency``, ``signals``, ``sites`` and ``single``; the seed draws the intervals' resamples."""
    signals = frames["signals"]
    strongest = signals.nsmallest(20, "after_zero").assign(name=lambda frame: frame["signal"].map("signal {}".format))
    target, before = signals["target"].iloc[0], signals["probability_before"].iloc[0]
    sites = frames["sites"].groupby(["site", "group"], sort=False)["left"].apply(_mean_with_interval, seed).unstack()
    curves = frames["curves"].query("removed > 0")  # nothing is removed, or kept, at 0, which a logarithm cannot show
    kept = curves["order"].str.startswith("keep")
    knockout, sufficiency = (
        line_with_band(
            rows,
            "removed",
            "left",
            "low",
            "high",
            color="order",
            controls=controls,
            title=title,
            x_title=x_title,
            y_title="share of the probability",
        ).update_xaxes(COUNTS_ON_A_LOGARITHM)
        for rows, controls, title, x_title in (
            (
                curves[~kept],
                ("random", "matched", "contribution, rotated basis"),
                "Knocking signals out at the readout",
                "signals zeroed",
            ),
            (
                curves[kept],
                ("keep, rotated basis",),
                "Keeping only the largest contributions",
                "signals kept, all others zeroed",
            ),
        )
    )
    return {
        "knockout": knockout,
        "sufficiency": sufficiency,
        "signals": bars(
            strongest,
            "name",
            "after_zero",
            horizontal=True,
            hover=[name for name in _HOVER if name in strongest],
            title=f"“{prompt}” → “{target}” ({before:.2%}) without one signal",
            x_title="signal",
            y_title="probability left",
        ),
        "sites": bars(
            sites.reset_index(),
            "site",
            "left",
            "low",
            "high",
            color="group",
            controls=("random",),
            title="The same signals removed upstream",
            y_title="share of the probability left",
        ),
        "single": histogram_with_control(
            as_one_basis(frames["prompts"]),
            "remaining_after_one",
            "basis",
            controls=(*UNTRAINED, "varimax", "rotated_basis"),
            title="Probability left without the most damaging signal",
            x_title="share of the probability left",
        ),
    }


def _mean_with_interval(left: pd.Series, seed: int) -> pd.Series:
    """Over signals, which are the units here; the interval of a single one is not known."""
    low, high = bootstrap_interval(left, seed=seed) if len(left) > 1 else (math.nan, math.nan)
    return pd.Series({"left": left.mean(), "low": low, "high": high})
