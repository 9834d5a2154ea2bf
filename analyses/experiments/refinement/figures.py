"""The figures of the refinement experiment, drawn from its frames alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.experiments.refinement.inner import AS_IS, CONTROLS, SHUFFLED
from analyses.experiments.refinement.velocity import ELSEWHERE
from reflowlens.figures.builders import bars, line_with_band

OTHER_TEXT = "other_text"


def refinement_figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Those whose frames there are: `inner` and `gains` make two each, and others one."""
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
        figures["updates"] = line_with_band(
            _updates(frames["inner"]),
            "mini_batch",
            "cosine",
            color="steps",
            controls=(OTHER_TEXT, SHUFFLED),
            title="How alike successive steps of the inner learner are",
            x_title="mini-batch",
            y_title="cosine",
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
    figures["tokens"] = _gains_of_tokens(frames["gains"])
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
    if "untying" in frames:
        figures["untying"] = bars(
            frames["untying"],
            "part",
            "value",
            "low",
            "high",
            title="What parts of the flow take off the loss",
            x_title="",
            y_title="nats a token",
        )
        figures["directions"] = _directions(frames["directions"])
        figures["jacobian"] = line_with_band(
            frames["jacobian"],
            "component",
            "singular_value",
            "low",
            "high",
            color="input",
            controls=ELSEWHERE,
            title="Singular values of the velocity’s Jacobian",
            x_title="by size",
            y_title="mean over tokens",
        )
    return figures


def _updates(inner: pd.DataFrame) -> pd.DataFrame:
    """Means over heads behind the first step, a row `steps` and mini-batch."""
    of_model, shuffled = (inner[(inner["control"] == name) & (inner["mini_batch"] > 1)] for name in (AS_IS, SHUFFLED))
    other = of_model.assign(cosine=of_model["cosine_other"])
    named = {AS_IS: of_model, OTHER_TEXT: other, SHUFFLED: shuffled}
    rows = pd.concat([rows.assign(steps=name) for name, rows in named.items()])
    return rows.groupby(["steps", "mini_batch"], sort=False)[["cosine"]].mean().reset_index()


def _gains_of_tokens(gains: pd.DataFrame) -> go.Figure:
    """By what was seen and by frequency, the control of each bin beside it."""
    own = gains[(gains["by"] != "position") & gains["refiner"].isin(["ttt", "flow", "learning"])]
    control = own.drop(columns=["value", "low", "high"])
    control = control.rename(columns={"control": "value", "control_low": "low", "control_high": "high"})
    rows = pd.concat([own, control.assign(refiner=control["refiner"] + " (control)")], ignore_index=True)
    return bars(
        rows,
        "bin",
        "value",
        "low",
        "high",
        color="refiner",
        controls=[name for name in rows["refiner"].unique() if name.endswith("(control)")],
        title="Gain by token, and what other tokens or bins at random say",
        x_title="",
        y_title="nats a token",
    )


def _directions(directions: pd.DataFrame) -> go.Figure:
    """Of the velocity at all points, and of the points themselves."""
    names = directions["input"].where(directions["of"] == "velocity", "latent")
    own = directions[(directions["of"] == "velocity") | (directions["input"] == AS_IS)]
    return line_with_band(
        own.assign(points=names),
        "component",
        "cumulative",
        color="points",
        controls=(*ELSEWHERE, "latent"),
        title="In how many directions the velocity points",
        x_title="principal components",
        y_title="share of the variance",
    )


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
