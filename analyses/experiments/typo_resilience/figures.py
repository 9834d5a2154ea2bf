"""The figures of experiment 6, drawn from its frames alone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from reflowlens.figures.builders import bars, line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.figures.style import INK

_CONTROLS = ("unrelated_word", "unrelated_misspelling", "untrained")


def typo_figures(frames: dict[str, pd.DataFrame], threshold: float) -> dict[str, go.Figure]:
    """``readout``, ``residual``, ``kl``, ``kinds`` and ``pairs``, from the frames of the experiment."""
    layers = frames["layers"]
    curves = {
        name: line_with_band(
            layers[layers["quantity"] == quantity],
            "depth",
            "mean",
            "low",
            "high",
            color="comparison",
            controls=_CONTROLS,
            title=title,
            x_title="depth (blocks)",
            y_title=y_title,
        )
        for name, quantity, title, y_title in (
            (
                "readout",
                "cosine_readout",
                "How alike the readouts of a word and its misspelling are",
                "cosine of the readouts",
            ),
            ("residual", "cosine_resid", "How alike their residual streams are", "cosine of the residual streams"),
            ("kl", "kl", "How far apart their next-token distributions are", "KL(clean ‖ other) in nats"),
        )
    }
    curves["readout"].add_hline(
        threshold, line_dash="dot", line_width=1, line_color=INK, annotation_text="recovered", annotation_font_color=INK
    )
    return curves | {
        "kinds": bars(
            frames["kinds"],
            "kind",
            "final_cosine_readout",
            "low",
            "high",
            color="comparison",
            controls=_CONTROLS,
            title="By kind of misspelling",
            y_title="cosine of the readouts at the end",
        ),
        "pairs": heatmap(
            frames["cells"],
            "depth",
            "pair",
            "cosine_readout",
            hover=["kind", "kl"],
            title="Every pair",
            x_title="depth (blocks)",
            y_title="word and misspelling",
            z_title="cosine of the readouts",
        ).update_layout(height=130 + 16 * frames["cells"]["pair"].nunique()),
    }
