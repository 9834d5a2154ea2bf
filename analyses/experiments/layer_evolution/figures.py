"""Frames and figures of Layer Evolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.claims import UNTRAINED
from analyses.measures.lens import (
    LensReading,
    ResidualPoint,
    depths_of,
    lens_log_probabilities,
    point_name,
    readers,
    residual_points,
    residual_stack,
)
from analyses.statistics.intervals import bootstrap_band, rate_band
from reflowlens.figures.builders import histogram_with_control, line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView


def prompt_frame(model: HookedModel, view: SignalView, prompt: str, target: str | None) -> pd.DataFrame:
    """The target and the five finally most probable tokens at every point of one prompt."""
    stack = residual_stack(model, prompt)[:, 0]
    through = zip(readers(view, len(stack)), stack, strict=True)
    log_p = torch.stack([lens_log_probabilities(lens, resid) for lens, resid in through])
    followed = log_p[-1].topk(5).indices.tolist()
    target_id = model.to_single_token(target) if target is not None else followed[0]
    rows = []
    for point, values in zip(residual_points(model.cfg.n_layers), log_p, strict=True):
        entropy = float(-(values.exp() * values).sum())
        kl = float((log_p[-1].exp() * (log_p[-1] - values)).sum())
        for token in dict.fromkeys([target_id, *followed]):
            rows.append(
                {
                    "depth": point.depth,
                    "point": point.label,
                    "token": model.to_single_str_token(token),
                    "is_target": token == target_id,
                    "probability": float(values[token].exp()),
                    "rank": int((values > values[token]).sum()) + 1,
                    "entropy": entropy,
                    "kl_to_final": kl,
                }
            )
    return pd.DataFrame(rows)


def position_frame(model: HookedModel, view: SignalView, prompt: str) -> pd.DataFrame:
    """The lens's top-1 token at every point and position of one prompt."""
    texts = model.to_str_tokens(prompt)
    rows = []
    stack = residual_stack(model, prompt, last_only=False)[:, 0]
    for point, lens, resid in zip(residual_points(model.cfg.n_layers), readers(view, len(stack)), stack, strict=True):
        top = lens_log_probabilities(lens, resid).max(dim=-1)
        for position, (log_p, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            rows.append(
                {
                    "depth": point.depth,
                    "point": point.label,
                    "position": position,
                    "token": texts[position],
                    "top": model.to_single_str_token(token),
                    "probability": float(np.exp(log_p)),
                }
            )
    return pd.DataFrame(rows)


def prompts_frame(
    readings: Mapping[str, LensReading], prompts: Sequence[str], points: Sequence[ResidualPoint]
) -> pd.DataFrame:
    """A row a prompt and model."""
    depths, frames = depths_of(points), []
    for name, reading in readings.items():
        frames.append(
            pd.DataFrame(
                {
                    "model": name,
                    "prompt": prompts,
                    "crystallisation_layer": depths[reading.crystallisation],
                    "crystallisation_share": depths[reading.crystallisation] / depths[-1],
                    "target_probability": reading.probability[-1],
                    "target_rank": reading.rank[-1],
                    "target_logit": reading.logit[-1],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def depth_frame(readings: Mapping[str, LensReading], points: Sequence[ResidualPoint], seed: int) -> pd.DataFrame:
    """Means over prompts at every point, with pointwise bootstrap bands over prompts."""
    frames = []
    for name, reading in readings.items():
        quantities = {
            "final_top1": (reading.top == reading.top[-1]).astype(float),
            "target_probability": reading.probability,
            "entropy": reading.entropy,
            "kl_to_final": reading.kl,
        }
        for quantity, values in quantities.items():
            is_rate = quantity == "final_top1"
            low, high = rate_band(values.T, seed=seed) if is_rate else bootstrap_band(values.T, seed=seed)
            if is_rate:
                low[-1] = 1.0  # at the end it is 1 by definition
            frames.append(
                pd.DataFrame(
                    {
                        "model": name,
                        "quantity": quantity,
                        "depth": [point.depth for point in points],
                        "point": [point.label for point in points],
                        "mean": values.mean(axis=1),
                        "low": low,
                        "high": high,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def evolution_figures(frames: Mapping[str, pd.DataFrame], prompt: str) -> dict[str, go.Figure]:
    """``probability``, ``positions``, ``depth`` and ``crystallisation``; ``prompt`` is the one in detail."""
    depth = frames["depth"]
    settled = depth[depth["quantity"] == "final_top1"]
    controls = (*UNTRAINED, "shuffled_norm")
    return {
        "probability": line_with_band(
            frames["layers"],
            "depth",
            "probability",
            color="token",
            hover=["rank"],
            title=f"What the lens expects after “{prompt}”",
            x_title="depth (blocks)",
        ),
        "positions": heatmap(
            frames["positions"].assign(behind=frames["positions"]["point"].map(point_name)),
            "position",
            "point",
            "probability",
            text="top",
            x_labels="token",
            y_labels="behind",
            z_range=(0, 1),
            title="Most probable next token at every position",
            x_title="position",
            y_title="residual stream after",
        ),
        "depth": line_with_band(
            settled,
            "depth",
            "mean",
            "low",
            "high",
            color="model",
            controls=controls,
            title="Prompts whose lens already shows the final token",
            x_title="depth (blocks)",
            y_title="share of prompts",
        ),
        "crystallisation": histogram_with_control(
            frames["prompts"],
            "crystallisation_layer",
            "model",
            controls=controls,
            title="Where predictions crystallise",
            x_title="depth (blocks)",
        ),
    }
