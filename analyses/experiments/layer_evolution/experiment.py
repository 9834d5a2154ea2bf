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
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from analyses.claims import UNTRAINED, bound_of, joined_draws
from analyses.controls.nulls import over_untrained
from analyses.experiments.layer_evolution.context_length import (
    DEFINITION,
    DELAY,
    context_figure,
    delay_finding,
    read_context,
)
from analyses.experiments.layer_evolution.figures import (
    depth_frame,
    evolution_figures,
    position_frame,
    prompt_frame,
    prompts_frame,
)
from analyses.measures.lens import (
    LensReading,
    ResidualPoint,
    depths_of,
    lens_points,
    read_lens,
    residual_stack,
    unread,
)
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict
from analyses.words.lexicon import FactualPrompt, Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
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
    chosen = view_of(model, view, seed=seed, exact_for="layer_evolution")
    lexicon = lexicon or load_lexicon()
    usable, skipped = _usable_prompts(model, lexicon, quick)
    prompts, targets = [item.prompt for item in usable], [model.to_single_token(item.target) for item in usable]
    if prompt is None:
        prompt, target = usable[0].prompt, target or usable[0].target
    points = lens_points(model.cfg.n_layers)
    stack = residual_stack(model, prompts, points=points)
    readings = {
        "model": read_lens(chosen, stack, targets),
        **over_untrained(
            lambda fresh: read_lens(fresh, residual_stack(fresh.model, prompts, points=points), targets),
            chosen,
            seed,
            "layer_evolution",
            quick=quick,
        ),
        "shuffled_norm": read_lens(_shuffled_norm(chosen, derive_seed(seed, "layer_evolution")), stack, targets),
    }
    frames = {
        "layers": prompt_frame(model, chosen, prompt, target),
        "positions": position_frame(model, chosen, prompt),
        "prompts": prompts_frame(readings, prompts, points),
        "depth": depth_frame(readings, points, seed),
    }
    figures = evolution_figures(frames, prompt)
    findings, told = _findings(readings, points, seed)
    context = read_context(chosen, lexicon, seed, quick=quick)
    if context is None:
        delay = f"{DELAY} is absent: the model cannot read two of the lexicon's sentences behind a clause"
    else:
        frames["context"], figures["context"] = context, context_figure(context, seed)
        findings[DELAY], delay = delay_finding(context, seed)
    skips = f"skipped {len(skipped)} prompts whose target is several tokens: {', '.join(skipped)}"
    return Result(
        name="layer_evolution",
        title="Layer Evolution",
        params={
            "prompt": prompt,
            "target": target,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings,
        frames=frames,
        figures=figures,
        definitions=DEFINITIONS | {DELAY: DEFINITION},
        published={"crystallisation_share": 0.5, DELAY: 10 / 36},
        notes=[*([skips] if skipped else []), told, delay, *unread(model.cfg.n_layers)],
    )


def crystallisation_verdict(shares: Sequence[float], interval: tuple[float, float], untrained: float) -> Verdict:
    """Claim: predictions are decided by half depth (published: layer 18 of 36 at the latest).

    Supported if the whole interval of the mean share lies at or below 0.5 and above the untrained model's by 0.05,
    which is early for want of any change: a model that changes even less has decided nothing. Underpowered with fewer
    than 20 prompts, or if the interval contains 0.5.
    """
    low, high = interval
    if len(shares) < MINIMUM_PROMPTS or low < 0.5 < high:
        return "underpowered"
    bound = bound_of("layer_evolution", "crystallisation_share", {"untrained": untrained})
    return "supported" if bound < low and high <= 0.5 else "not supported"


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
    if norm is None:
        return view
    order = torch.randperm(len(norm.w), generator=derive_generator(seed, "shuffled_norm"))
    with torch.no_grad():
        norm.w.copy_(norm.w[order.to(norm.w.device)])
    return dataclasses.replace(view, norm=norm)


def _findings(
    readings: Mapping[str, LensReading], points: Sequence[ResidualPoint], seed: int
) -> tuple[dict[str, Finding], str]:
    """The metrics of the model beside those of the other readings, and a note."""
    found = {name: headline(reading, points) for name, reading in readings.items()}
    ours = found.pop("model")
    findings = {}
    for metric, values in ours.items():
        interval = (rate_interval if metric in RATES else bootstrap_interval)(values, seed=seed)
        controls = {name: float(other[metric].mean()) for name, other in found.items()}
        is_claim = metric == "crystallisation_share"
        hardest = joined_draws("layer_evolution", metric, controls)["untrained"]
        judged = crystallisation_verdict(list(values), interval, hardest) if is_claim else None
        findings[metric] = Finding(values.mean(), interval, controls, judged)
    probability = ours["target_probability"]
    fresh = [other["target_probability"] for name, other in found.items() if name in UNTRAINED]
    p = max(paired_permutation_pvalue(probability - other, seed=seed) for other in fresh)
    return findings, f"target_probability against untrained: sign-flip p = {p:.2g}, {len(probability)} prompts"


def headline(reading: LensReading, points: Sequence[ResidualPoint]) -> dict[str, NDArray[np.floating]]:
    """The metrics, one value a prompt."""
    depths = depths_of(points)
    half = int(np.flatnonzero(depths == depths[-1] // 2)[0])
    return {
        "crystallisation_share": depths[reading.crystallisation] / depths[-1],
        "crystallisation_layer": depths[reading.crystallisation],
        "lens_top1_at_half_depth": (reading.top[half] == reading.top[-1]).astype(float),
        "kl_at_half_depth": reading.kl[half],
        "target_accuracy": (reading.rank[-1] == 1).astype(float),
        "target_probability": reading.probability[-1],
    }
