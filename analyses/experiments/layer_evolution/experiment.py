"""Experiment 7, Layer Evolution: from which layer on is the prediction decided?

The logit lens reads the residual stream of a prompt's last token at every point between embedding and end. A prediction
has *crystallised* at the first point from which the final most probable token stays the most probable one.

Two controls stand beside it. ``untrained``: the same architecture at initialisation, whose blocks change little, so
that it crystallises at once; an early crystallisation is therefore no finding unless the model also moves.
``shuffled_norm``: the same residuals read with the final norm's weights permuted, which says how much the lens owes to
reading in the right coordinates.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.controls.nulls import untrained_view
from analyses.experiments.layer_evolution.context_length import DEFINITION, DELAY, add_context_length
from analyses.measures.lens import (
    LensReading,
    lens_log_probabilities,
    point_name,
    read_lens,
    residual_points,
    residual_stack,
)
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval, rate_band, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict
from analyses.words.lexicon import FactualPrompt, Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import histogram_with_control, line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_PROMPTS = 20
RATES = ("lens_top1_at_half_depth", "target_accuracy")
DEFINITIONS = {
    "crystallisation_share": "first point from which the final top-1 token stays top-1, as a share of the depth (0: "
    "the embedding, 1: the end); mean over prompts, last token of each. Published: layer 18 of 36 at the latest for "
    "short prompts",
    "crystallisation_layer": "the same in blocks",
    "lens_top1_at_half_depth": "share of prompts whose lens after half of the blocks shows the final top-1 token",
    "kl_at_half_depth": "KL(final ‖ lens) in nats after half of the blocks, mean over prompts",
    "target_accuracy": "share of prompts whose expected continuation is the most probable token",
    "target_probability": "probability of the expected continuation, mean over prompts",
}


@torch.no_grad()
def layer_evolution(
    model: HookedModel,
    prompt: str | None = None,
    target: str | None = None,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Read the logit lens at every residual point: of one prompt in detail, and over the lexicon's factual prompts.

    Args:
        prompt: shown in detail; default the lexicon's first factual prompt whose target is one token.
        target: the continuation to follow, a single token; default the lexicon's for its prompt, else the model's own
            top-1.
        view: readout to look through; all exact views of one model give the same lens.
        quick: a third of the prompts.

    Returns:
        A Result with frames ``layers`` (prompt in detail, a row a point and token), ``positions`` (top-1 of every
        point and position), ``prompts`` (a row a prompt and model) and ``depth`` (means over prompts with intervals),
        and figures ``probability``, ``positions``, ``depth``, ``crystallisation``; and, where the lexicon has sentences
        behind long clauses, frame and figure ``context`` (`analyses.experiments.layer_evolution.context_length`).

    Raises:
        ReflowlensError: the prompt is empty or too long, the target several tokens, or fewer than two factual prompts
            of the lexicon can be used.

    Example: ``layer_evolution(model, "The capital of France is", target=" Paris").metrics["crystallisation_layer"]``
    """
    chosen = view_of(model, view, seed=seed)
    lexicon = lexicon or load_lexicon()
    usable, skipped = _usable_prompts(model, lexicon, quick)
    prompts, targets = [item.prompt for item in usable], [model.to_single_token(item.target) for item in usable]
    if prompt is None:
        prompt, target = usable[0].prompt, target or usable[0].target
    untrained = untrained_view(chosen, seed)
    stack = residual_stack(model, prompts)
    readings = {
        "model": read_lens(chosen, stack, targets),
        "untrained": read_lens(untrained, residual_stack(untrained.model, prompts), targets),
        "shuffled_norm": read_lens(_shuffled_norm(chosen, derive_seed(seed, "layer_evolution")), stack, targets),
    }
    frames = {
        "layers": _prompt_frame(model, chosen, prompt, target),
        "positions": _position_frame(model, chosen, prompt),
        "prompts": _prompts_frame(readings, prompts, model.cfg.n_layers),
        "depth": _depth_frame(readings, model.cfg.n_layers, seed),
    }
    result = Result(
        name="layer_evolution",
        title="Layer Evolution",
        params={
            "prompt": prompt,
            "target": target,
            "view": chosen.name,
            "seed": seed,
            "quick": quick,
            "lexicon": lexicon.version,
            "model_hash": hash_of(model),
        },
        frames=frames,
        figures=_figures(frames, prompt),
        definitions=DEFINITIONS | {DELAY: DEFINITION},
        published={"crystallisation_share": 0.5, DELAY: 10 / 36},
        notes=[f"skipped {len(skipped)} prompts whose target is several tokens: {', '.join(skipped)}"]
        if skipped
        else [],
    )
    result = _with_metrics(result, readings, model.cfg.n_layers, seed)
    return add_context_length(result, chosen, untrained, lexicon, seed)


def crystallisation_verdict(shares: Sequence[float], interval: tuple[float, float], untrained: float) -> Verdict:
    """Claim: predictions are decided by half depth (published: layer 18 of 36 at the latest).

    Supported if the whole interval of the mean share lies at or below 0.5 and above the untrained model's, which is
    early for want of any change: a model that changes even less has decided nothing. Underpowered with fewer than 20
    prompts, or if the interval contains 0.5.
    """
    low, high = interval
    if len(shares) < MINIMUM_PROMPTS or low < 0.5 < high:
        return "underpowered"
    return "supported" if untrained < low and high <= 0.5 else "not supported"


def _usable_prompts(model: HookedModel, lexicon: Lexicon, quick: bool) -> tuple[list[FactualPrompt], list[str]]:
    """The factual prompts whose target is one token, and the targets of the others."""
    usable = [item for item in lexicon.factual if model.tokenizer.is_single_token(item.target)]
    skipped = [item.target for item in lexicon.factual if not model.tokenizer.is_single_token(item.target)]
    if quick:
        usable = usable[::3]
    if len(usable) < 2:
        raise ReflowlensError("layer_evolution needs at least two factual prompts with single-token targets")
    return usable, skipped


def _shuffled_norm(view: SignalView, seed: int) -> SignalView:
    """The view read through the final norm with the entries of its weight permuted."""
    norm = copy.deepcopy(view.norm)
    order = torch.randperm(len(norm.w), generator=derive_generator(seed, "shuffled_norm"))
    with torch.no_grad():
        norm.w.copy_(view.norm.w[order.to(norm.w.device)])
    return dataclasses.replace(view, norm=norm)


def _with_metrics(result: Result, readings: dict[str, LensReading], n_layers: int, seed: int) -> Result:
    half = n_layers // 2 * 2
    for metric in DEFINITIONS:
        values = {name: _metric(metric, reading, n_layers, half) for name, reading in readings.items()}
        result.metrics[metric] = float(values["model"].mean())
        interval_of = rate_interval if metric in RATES else bootstrap_interval
        result.intervals[metric] = interval_of(values["model"], seed=seed)
        result.controls[metric] = {name: float(v.mean()) for name, v in values.items() if name != "model"}
    shares = _metric("crystallisation_share", readings["model"], n_layers, half)
    result.verdicts["crystallisation_share"] = crystallisation_verdict(
        list(shares), result.intervals["crystallisation_share"], result.controls["crystallisation_share"]["untrained"]
    )
    probability = _metric("target_probability", readings["model"], n_layers, half)
    chance = _metric("target_probability", readings["untrained"], n_layers, half)
    p = paired_permutation_pvalue(probability - chance, seed=seed)
    result.notes.append(f"target_probability against untrained: sign-flip p = {p:.2g}, {len(shares)} prompts")
    return result


def _metric(name: str, reading: LensReading, n_layers: int, half: int) -> np.ndarray:
    """One value a prompt."""
    if name.startswith("crystallisation"):
        return reading.crystallisation / 2 / (n_layers if name.endswith("share") else 1)
    if name == "lens_top1_at_half_depth":
        return (reading.top[half] == reading.top[-1]).astype(float)
    if name == "kl_at_half_depth":
        return reading.kl[half]
    return (reading.rank[-1] == 1).astype(float) if name == "target_accuracy" else reading.probability[-1]


def _prompt_frame(model: HookedModel, view: SignalView, prompt: str, target: str | None) -> pd.DataFrame:
    """The target and the five finally most probable tokens at every point of one prompt."""
    log_p = lens_log_probabilities(view, residual_stack(model, prompt)[:, 0])
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


def _position_frame(model: HookedModel, view: SignalView, prompt: str) -> pd.DataFrame:
    """The lens's top-1 token at every point and position of one prompt."""
    texts = model.to_str_tokens(prompt)
    rows = []
    stack = residual_stack(model, prompt, last_only=False)[:, 0]
    for point, resid in zip(residual_points(model.cfg.n_layers), stack, strict=True):
        top = lens_log_probabilities(view, resid).max(dim=-1)
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


def _prompts_frame(readings: dict[str, LensReading], prompts: list[str], n_layers: int) -> pd.DataFrame:
    frames = []
    for name, reading in readings.items():
        frames.append(
            pd.DataFrame(
                {
                    "model": name,
                    "prompt": prompts,
                    "crystallisation_layer": reading.crystallisation / 2,
                    "crystallisation_share": reading.crystallisation / 2 / n_layers,
                    "target_probability": reading.probability[-1],
                    "target_rank": reading.rank[-1],
                    "target_logit": reading.logit[-1],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _depth_frame(readings: dict[str, LensReading], n_layers: int, seed: int) -> pd.DataFrame:
    """Means over prompts at every point, with pointwise bootstrap bands over prompts."""
    points = residual_points(n_layers)
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


def _figures(frames: dict[str, pd.DataFrame], prompt: str) -> dict[str, go.Figure]:
    depth = frames["depth"]
    settled = depth[depth["quantity"] == "final_top1"]
    controls = ("untrained", "shuffled_norm")
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
