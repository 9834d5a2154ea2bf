"""Experiment 2, Sparsity Profile: how many signals does a token use, and are all signals used?

The published figures, 11.38% of the signals active and a Gini coefficient of usage of 0.085, are what a dense Gaussian
recipe gives as well. So everything stands beside ``gaussian``, a recipe of independent normal entries; beside
``rotated_basis``, the same model in random rotations of its signals, whose mean is the floor of any claim that the
trained signals are sparse; beside ``varimax``, the sparsest rotation of them and so the ceiling; and beside
``untrained``. Of a reFlow-TopK ``topk`` is the share that its architecture allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from analyses.claims import CLAIMS
from analyses.controls.bases import (
    QUICK_ROTATIONS,
    ROTATIONS,
    Bases,
    basis_verdicts,
    by_metric,
    in_bases,
)
from analyses.controls.carried import recipe_error
from analyses.controls.nulls import gaussian_view, over_untrained
from analyses.experiments.sparsity_profile.figures import sparsity_figures, sparsity_frames
from analyses.experiments.sparsity_profile.measure import SUPPORT_TOKENS, Profile, measure_profile, support_tokens
from analyses.measures.knockout import real_tokens
from analyses.measures.sparsity import Rule, active_signals, check_rule, gini
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import Interval, bootstrap_interval
from analyses.statistics.resampling import percentile_interval, resampled_means
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.models.base import HookedModel
from reflowlens.signals import AnyView, SignalView, view_of

MINIMUM_UNITS = 20
PUBLISHED = {"active_signals": 116.6, "active_share": 0.1138, "usage_gini": 0.085}


def definitions(rule: str) -> dict[str, str]:
    """What each metric means, with the rule of activity that was used."""
    usage = "Gini coefficient over signals of the number of tokens for which each is active"
    return {
        "active_signals": f"active signals of a token, mean over the vocabulary; active where {rule}",
        "active_share": "the same as a share of S",
        "active_share_text": "the same over running text: over a text's tokens, then over texts",
        "usage_gini": f"{usage}, over the vocabulary",
        "usage_gini_text": f"{usage}, over the tokens of the texts. Few tokens make it large by chance: see gaussian",
        "hoyer": "(√S - ‖x‖₁ / ‖x‖₂) / (√S - 1) of a token's recipe, mean over the vocabulary",
        "participation": "(Σx²)² / Σx⁴ / S of a token's recipe, mean over the vocabulary; of a Gaussian 1/3",
        "signal_kurtosis": "kurtosis of a signal over the vocabulary, median over signals; of a Gaussian 3. A basis "
        "chosen for it, varimax, has about S² / V more by chance: a signal can point at one token",
        "support_share": "smallest share of signals, largest |R_vs| ‖B_s‖ first, that mixes 90% of ‖R_v B‖² from there "
        f"on; mean over {SUPPORT_TOKENS} tokens drawn from the vocabulary",
        "dead_signals": "signals that are active for no token",
    }


@torch.no_grad()
def sparsity_profile(
    model: HookedModel,
    rule: Rule = "abs_gt_2mean",
    threshold: float | None = None,
    *,
    view: AnyView = None,
    lexicon: Lexicon | None = None,
    texts: Sequence[str] | None = None,
    rotations: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Count active signals by a rule, and measure sparsity without one.

    Args:
        rule: when a signal is active for a token, one of `analyses.measures.sparsity.RULES`.
        threshold: of the rule; default `analyses.measures.sparsity.DEFAULT_THRESHOLDS`.
        view: whose recipe; default the model's native one, or its embedding where it has none.
        texts: running text, whose tokens weigh by how often they occur; default the lexicon's neutral texts.
        rotations: random rotations in the ``rotated_basis`` null, at least 2; default 10, of a quick run 4.
        seed: of draws, rotations, untrained model and bootstrap.

    Returns:
        A Result with frames ``tokens`` (a row a token), ``signals`` (a row a signal with its codebook), ``counts``,
        ``usage`` and ``density`` (distributions in every basis) and ``recipes`` (recipes of the lexicon's words), and
        figures ``active``, ``usage``, ``lorenz``, ``density``, ``recipes``.

    Raises:
        ReflowlensError: the rule, its threshold or the number of rotations is out of range.

    Example: ``sparsity_profile(model, "std", 1.5).metrics["active_share"]``
    """
    rule, threshold, rule_text = check_rule(rule, threshold)
    chosen = real_tokens(view_of(model, view, seed=seed))
    lexicon = lexicon or load_lexicon()
    rotations = (QUICK_ROTATIONS if quick else ROTATIONS) if rotations is None else rotations
    read = [model.tokenizer.encode(text) for text in (lexicon.neutral_texts if texts is None else texts)]
    read = [ids for ids in read if ids]
    own = derive_seed(seed, "sparsity_profile")
    drawn = support_tokens(len(chosen.recipe), own)

    def measured(each: SignalView) -> Profile:
        return measure_profile(real_tokens(each), rule, threshold, read, drawn=drawn)

    fresh = over_untrained(measured, chosen, seed, "sparsity_profile", quick=quick)
    profiles = in_bases(
        measured,
        chosen,
        {"gaussian": measured(gaussian_view(chosen, own)), **fresh},
        rotations=rotations,
        seed=seed,
        experiment="sparsity_profile",
        progress=progress,
    )
    frames, notes = sparsity_frames(chosen, profiles, read, lexicon)
    if not read:
        notes.append("active_share_text and usage_gini_text are absent: there is no running text")
    intervals = _intervals(profiles.own, active_signals(chosen.recipe.float(), rule, threshold), seed)
    kept = None if model.cfg.topk_ends == "input" else model.cfg.topk  # of the recipe that a view is of, the readout's
    findings, told = _findings(profiles, intervals, kept)
    return Result(
        name="sparsity_profile",
        title="Sparsity Profile",
        params={
            "rule": rule,
            "threshold": threshold,
            "texts": len(read),
            "text_tokens": sum(map(len, read)),
            "rotations": rotations,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings | recipe_error(chosen),
        frames=frames,
        figures=sparsity_figures(frames),
        definitions=definitions(rule_text),
        published=PUBLISHED,
        notes=[*notes, *told],
    )


def _findings(
    profiles: Bases[Profile], intervals: Mapping[str, Interval], topk: int | None
) -> tuple[dict[str, Finding], list[str]]:
    """Every metric beside its value in the other bases, judged, and notes: recipes are sparse, and all signals are used
    evenly."""
    trained, values = profiles.own, by_metric(profiles.map(Profile.headline))
    controls = {metric: found.controls() for metric, found in values.items()}
    if topk is not None:
        controls["active_signals"]["topk"] = topk
        controls["active_share"]["topk"] = topk / len(trained.usage)
    units = dict.fromkeys(CLAIMS["sparsity_profile"], len(trained.active)) | {
        "signal_kurtosis": int(np.isfinite(trained.kurtosis).sum()),
        "support_share": len(trained.support),
    }
    findings = {m: Finding(found.own, intervals.get(m), controls[m]) for m, found in values.items()}
    return basis_verdicts(findings, values, units, minimum_units=MINIMUM_UNITS, experiment="sparsity_profile")


def _intervals(profile: Profile, active: Bool[Tensor, "token S"], seed: int) -> dict[str, Interval]:
    """Over tokens, signals or texts, whichever the metric is a mean of."""
    S = len(profile.usage)
    over_tokens = {"active_share": profile.active / S, "hoyer": profile.hoyer, "participation": profile.participation}
    found = {
        metric: percentile_interval(resampled_means(values[np.isfinite(values)][:, None], seed=seed))
        for metric, values in over_tokens.items()
    }
    low, high = found["active_share"]
    found["active_signals"] = Interval(low * S, high * S)
    found["usage_gini"] = percentile_interval(gini(resampled_means(active.cpu().numpy(), seed=seed)))
    kurtosis = profile.kurtosis[np.isfinite(profile.kurtosis)]
    found["signal_kurtosis"] = bootstrap_interval(kurtosis, np.median, seed=seed)
    found["support_share"] = bootstrap_interval(profile.support / S, seed=seed)
    if len(profile.text_shares) > 1:
        found["active_share_text"] = bootstrap_interval(profile.text_shares, seed=seed)
    return found
