"""Experiment 9, Causal Ablation: knock signals out and watch the prediction.

A reFlow prediction is a sum over S signals, so single signals can be removed exactly and for free. Whether that says
anything about *these* signals is another matter: with S = d_model the same function can be written in any rotated
basis, (R A, Aᵀ B), and has S signals there too. Every figure therefore stands beside ``rotated_basis``, the same
measurement on the same predictions in random rotations, its floor; beside ``varimax``, the same in the rotation with
the sparsest recipes, its ceiling; beside ``random_signal``, a signal drawn at random; beside ``matched_signal``, the
signal that moves all logits together as much (``|a_s| ‖R_:s‖``) as the one chosen; and beside ``untrained``.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from analyses.claims import untrained_names
from analyses.controls.bases import ROTATIONS, Bases, basis_verdicts, by_metric, check_rotations, rotated_views
from analyses.controls.carried import logit_error
from analyses.controls.nulls import free_untrained, untrained_view
from analyses.experiments.causal_ablation.figures import ablation_figures
from analyses.experiments.causal_ablation.frames import curve_frame, prompts_frame, signal_frame, site_frame
from analyses.experiments.causal_ablation.measure import RECOVERED, Measured, measure_knockout
from analyses.measures.knockout import (
    real_tokens,
)
from analyses.measures.lens import lens_log_probabilities, residual_stack
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.ablations.closed_form import SingleAblations
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import AnyView, SignalView, varimax_view, view_of

MINIMUM_PROMPTS = 20
DEFINITIONS = {
    "probability_before": "probability of the target of the prompt shown in detail; untrained: of the same token",
    "probability_after_one": "the same after zeroing at the readout the one signal that lowers it most. random_signal: "
    "mean over all signals; rotated_basis, varimax: the most damaging signal of each such basis, mean over rotations",
    "remaining_after_one": "share of the top-1 token's probability that is left after zeroing the single most damaging "
    "signal at the readout, mean over prompts. matched_signal: the other signal nearest in |a_s| ‖R_:s‖; "
    "rotated_basis, varimax: the most damaging signal of each such basis",
    "knockout_area": "area between the curve of random order and the curve of contribution order: share of the top-1 "
    "token's probability against the share of signals zeroed at the readout; mean over prompts",
    "sufficient_share": "smallest share of signals, kept in order of contribution with all others zeroed, that "
    f"restores {RECOVERED:.0%} of the top-1 token's probability from there on, among the numbers of signals in the "
    "curves; mean over prompts",
}
PUBLISHED = {
    "probability_before": 0.0831,
    "probability_after_one": 0.0003,
    "remaining_after_one": 0.0003 / 0.0831,
}


@torch.no_grad()
def causal_ablation(
    model: HookedModel,
    prompt: str | None = None,
    target: str | None = None,
    *,
    view: AnyView = None,
    lexicon: Lexicon | None = None,
    rotations: int = ROTATIONS,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Single and progressive signal knock-out at the readout, and the same signals removed upstream.

    Args:
        prompt: shown in detail, at every site; default the lexicon's first factual prompt.
        target: the token to watch there; default the model's top-1. Over the prompts it is each prompt's top-1.
        view: whose signals to remove; default the model's own, or the residual axes of a model without any.
        rotations: random rotations in the ``rotated_basis`` null; at least 2.
        quick: a third of the prompts.

    Returns:
        A Result with frames ``signals`` (every signal of the prompt in detail: contribution, effects by site and kind
        of replacement, codebook), ``prompts`` (a row a prompt and control), ``curves`` (means over prompts) and
        ``sites`` (the most damaging signals removed at every site), and figures ``knockout``, ``sufficiency``,
        ``signals``, ``sites``, ``single``.

    Raises:
        ReflowlensError: the prompt is empty or too long, the target several tokens, or the lexicon has fewer than two
            prompts or no neutral texts.

    Example: ``causal_ablation(model, "The capital of France is").frames["signals"].head()``
    """
    chosen = real_tokens(view_of(model, view, seed=seed).final)
    lexicon = lexicon or load_lexicon()
    prompts = [item.prompt for item in lexicon.factual][:: 3 if quick else 1]
    if len(prompts) < 2:
        raise ReflowlensError("causal_ablation needs at least two factual prompts in the lexicon")
    if not lexicon.neutral_texts:
        raise ReflowlensError("causal_ablation needs neutral_texts in the lexicon: they are its reference text")
    check_rotations(rotations)
    prompt = prompt if prompt is not None else prompts[0]
    detail = residual_stack(model, prompt)[-1]
    target_id = _target_id(model, chosen, detail, target)
    final = residual_stack(model, prompts)[-1]
    own = derive_seed(seed, "causal_ablation")
    rotated = rotated_views(chosen, rotations, seed, "causal_ablation")
    bar = tqdm(rotated, total=rotations, desc="causal ablation", disable=not progress)

    def measured(view: SignalView, name: str, *, matched: bool = False) -> tuple[Measured, float]:
        knockout = measure_knockout(view, final, derive_seed(own, name), matched=matched)
        return knockout, _least_without_one(view, detail, target_id)

    in_bases = Bases(  # a rotated recipe is in memory while it is measured
        own=measured(chosen, "model", matched=True),
        rotated={name: measured(other, name) for name, other in bar},
        varimax=measured(varimax_view(chosen, seed=seed), "varimax"),
    )

    def untrained(number: int, name: str) -> tuple[Measured, float]:
        view = real_tokens(untrained_view(chosen, seed, number).final)
        knockout = measure_knockout(view, residual_stack(view.model, prompts)[-1], derive_seed(own, name))
        at_start = lens_log_probabilities(view, residual_stack(view.model, prompt)[-1])
        return knockout, float(at_start[0, target_id].exp())

    names = untrained_names("causal_ablation", quick)
    fresh = {name: untrained(number, name) for number, name in enumerate(names, start=1)}
    free_untrained(model)
    bases = replace(in_bases.map(itemgetter(0)), nulls={name: found[0] for name, found in fresh.items()})
    least = in_bases.map(itemgetter(1))
    frames = {
        "signals": signal_frame(model, chosen, prompt, target_id, lexicon, own),
        "prompts": prompts_frame(bases, prompts),
        "curves": curve_frame(bases, seed),
    }
    frames["sites"] = site_frame(model, chosen, prompt, target_id, frames["signals"], own)
    signals = frames["signals"]
    findings, notes = _findings(bases, seed)
    return Result(
        name="causal_ablation",
        title="Causal Ablation",
        params={
            "prompt": prompt,
            "target": frames["signals"]["target"].iloc[0],
            "rotations": rotations,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings={
            "probability_before": Finding(
                signals["probability_before"].iloc[0], controls={name: found[1] for name, found in fresh.items()}
            ),
            "probability_after_one": Finding(
                signals["after_zero"].min(),
                controls={"random_signal": signals["after_zero"].mean(), **least.controls()},
            ),
            **findings,
            **logit_error(chosen, final, seed),
        },
        frames=frames,
        figures=ablation_figures(frames, prompt, seed),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=notes,
    )


def _findings(bases: Bases[Measured], seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics over prompts, between their floor and their ceiling: in a privileged basis one removal leaves less,
    the order matters more, and fewer signals suffice."""
    native = bases.own
    beside: dict[str, dict[str, NDArray[np.float64]]] = {
        "remaining_after_one": {name: native.single[name] for name in ("random_signal", "matched_signal")},
        "knockout_area": {"matched_signal": native.area("matched")},
        "sufficient_share": {},
    }
    values = by_metric(bases.map(Measured.headline))
    means = {metric: found.map(lambda per_prompt: float(per_prompt.mean())) for metric, found in values.items()}
    findings = {}
    for metric, per_prompt in values.items():
        controls = {name: float(each.mean()) for name, each in beside[metric].items()} | means[metric].controls()
        findings[metric] = Finding(means[metric].own, bootstrap_interval(per_prompt.own, seed=seed), controls)
    units = dict.fromkeys(means, len(native.worst))
    return basis_verdicts(findings, means, units, minimum_units=MINIMUM_PROMPTS, experiment="causal_ablation")


def _target_id(model: HookedModel, view: SignalView, resid: Float[Tensor, "one d_model"], target: str | None) -> int:
    """The token to watch: the one given, else the most probable one."""
    return int(lens_log_probabilities(view, resid).argmax()) if target is None else model.to_single_token(target)


def _least_without_one(view: SignalView, resid: Float[Tensor, "one d_model"], target_id: int) -> float:
    """The target's probability without the signal whose removal lowers it most."""
    return float(SingleAblations(view, view.readout(resid), 0.0).probability(target_id).min())
