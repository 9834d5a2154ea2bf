"""The figures of experiment 8, drawn from its frames alone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.claims import UNTRAINED
from analyses.measures.lens import point_name
from reflowlens.figures.builders import bars, line_with_band
from reflowlens.figures.heatmap import heatmap

SHOWN = 30
_DEPTH = "depth (blocks)"


def flow_figures(frames: dict[str, pd.DataFrame], prompt: str) -> dict[str, go.Figure]:
    """``signals``, ``tracks``, ``positions``, ``overlap``, ``split``, ``heads``, from the frames of the experiment."""
    tracks, signals, positions = frames["tracks"], frames["signals"], frames["positions"]
    target = tracks["target"].iloc[0]
    largest = signals.groupby("signal")["contribution"].max().nlargest(SHOWN).index
    shown = signals[signals["signal"].isin(largest)]
    order = [signal for signal in tracks["signal"][::-1] if signal in largest]  # a heatmap's first row is its lowest
    shown = shown.set_index("signal").loc[order].reset_index().sort_values("depth", kind="stable")
    leaders = tracks.dropna(subset="since").head(SHOWN)
    leaders = (leaders if len(leaders) else tracks.head(SHOWN)).assign(
        name=lambda frame: frame["signal"].map("{}: ".format) + frame["codebook"]
    )
    parts = frames["split"].query("model == 'model' and part in ['attention', 'mlp']")
    heads = frames["heads"].query("model == 'model'")
    return {
        "signals": heatmap(
            shown.assign(signal=shown["signal"].map("signal {}".format)),
            "depth",
            "signal",
            "contribution",
            hover=["rank", "readout", "codebook"],
            title=f"“{prompt}” → “{target}”: signals that lead at some depth",
            x_title=_DEPTH,
            z_title="contribution to the logit",
        ).update_layout(height=130 + 18 * len(order)),
        "tracks": bars(
            leaders,
            "name",
            "contribution",
            horizontal=True,
            hover=["born", "since"],
            title=f"Signals that lead at the end, towards “{target}”",
            x_title="signal: the tokens it speaks for",
            y_title="contribution to the logit",
        ),
        "positions": heatmap(
            positions.assign(behind=positions["point"].map(point_name)),
            "position",
            "point",
            "readout",
            x_labels="token",
            y_labels="behind",
            hover=["contribution"],
            title=f"Signal {positions['signal'].iloc[0]} at every position",
            x_title="position",
            y_title="residual stream after",
        ),
        "overlap": line_with_band(
            frames["layers"],
            "block",
            "overlap",
            "low",
            "high",
            color="basis",
            controls=(*UNTRAINED, "varimax", "rotated_basis"),
            hover=["births", "deaths"],
            title="Leading signals that a block leaves leading",
            y_title="Jaccard index before and after",
        ),
        "split": bars(
            parts.assign(block=parts["block"].map(str)),
            "block",
            "logit",
            "low",
            "high",
            color="part",
            title="Who writes the prediction",
            y_title="added to the top-1 token's logit",
        ),
        "heads": heatmap(
            heads,
            "head",
            "layer",
            "logit",
            hover=["low", "high"],
            title="What each head adds to the top-1 token's logit",
            z_title="logit",
        ),
    }
