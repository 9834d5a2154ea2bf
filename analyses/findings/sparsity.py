"""Sparsity against semantics: is there a k where meaning survives and signals are pure?

A study of recipes under constraints (`pretraining/studies/sparsity.toml`): k of S signals a token from 1/32 to all of
them, the ReLU alone; S below, at and above d_model; an embedding that is not factored. `sparsity_training.toml` adds
one k trained otherwise: pruned at one end, with gradients to all entries, with a k that falls while it trains.

What the gauge allows. With S = d and no constraint (R A, A⁻¹ B) is the same model for every invertible A, so that
single signals are a choice of basis; ReLU and top-k fix the axes, up to their scale. With S < d E = R B has rank S at
most. With S > d a recipe is free along the null space of B (`null_space`: the share of ‖R‖² there): cosines between
recipes count it, logits do not.

What is measured of each run:

* `loss`: held-out, nats a token;
* `neighbours`: words whose nearest words share their category (experiment 4), less the same under permuted labels;
* `analogies`: accuracy@1 in the recipes (experiment 5), less the nearest word to c alone;
* `purity`: of codebooks (experiment 1), less that of random rotations;
* `ten_signals`: their share of the positive contributions (experiment 8), less that in random rotations;
* `knockout`: probability left without the first signal (experiment 9) in random rotations, less that in the signals;
* `active`: share of signals active a token (2); as published, `silhouette` in the plane (4) and the cosine
  `three_four` (1);
* `dead`, `null_space`, `embedding_rank`: `analyses.findings.recipes`.

The rule, decided beforehand (`analyses.findings.contrasts`; the unit is the seed, arms of a seed are paired):

* meaning *survives* in an arm if its `neighbours` keep more than half of what `dense` has; signals are *pure* if
  `purity` is above 0.02, the smallest effect of that claim. An arm *has both* if both hold, the larger of the two p,
  Holm-adjusted over the arms that prune, below 0.05; it is *refuted* if either is. There is such a k if any arm has
  both; there is none among those trained if all are refuted.
* an arm *costs* loss if it loses more than 0.02 nats to `dense`.
* training is to blame for a part of the damage if a variant that ends under the same constraint (annealed, straight
  through) is spared more than a tenth of what the published recipe loses to `dense`; the constraint at one end, if a
  model pruned at the other alone is.
* nothing is said of meaning where the `neighbours` of `dense` are not above 0.05 themselves, the smallest effect of
  that claim: such models have none to lose.

What would change the answer: pure signals in `dense` itself, or a larger model in which the frontier bends elsewhere.
`analogies` are reported beside, and decide nothing: of models of this size they may be near 0. Of an arm that prunes at
the input alone all measures are of the recipe that logits are read with, which is not pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from analyses.findings.contrasts import Contrast, by_seed, contrast
from analyses.findings.frontier import frontier_figures
from analyses.findings.recipes import recipe_measures
from analyses.findings.runs import TrainedRun, measured, measured_by, runs_table, trained_runs
from analyses.findings.seeds import measures_over_seeds
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.pvalues import holm
from analyses.statistics.verdicts import Verdict
from reflowlens.errors import ReflowlensError

DENSE = "dense"
KEPT, PURITY, LOSS, SHARE, MEANING = 0.5, 0.02, 0.02, 0.1, 0.05
GAPS = {
    "neighbours": ("semantic_galaxy", "knn_accuracy", "label_permutation", 1),
    "analogies": ("semantic_algebra", "accuracy_at_1", "c_alone", 1),
    "purity": ("recipe_atlas", "codebook_purity", "rotated_basis", 1),
    "ten_signals": ("signal_flow", "leading_share", "rotated_basis", 1),
    "knockout": ("causal_ablation", "remaining_after_one", "rotated_basis", -1),
    "active": ("sparsity_profile", "active_share", None, 1),
    "silhouette": ("semantic_galaxy", "silhouette_plane", None, 1),
    "three_four": ("recipe_atlas", "cosine_three_four", None, 1),
}
"""Measure -> experiment, its metric, the control that is taken away, and the sign of what is better."""
_TRAINING = {"model.topk_ends": "both", "model.topk_gradient": "kept", "run.topk_anneal_fraction": 0.0}
_ALIKE = ["topk", "n_signals", "d_model", "otherwise"]
_COMPUTED = ("run.compile", "run.dtype")  # how, and not what: an annealed k is not compiled


def sparsity(study: str | Path, *, quick: bool = True, progress: bool | None = None) -> Result:
    """Whether meaning survives hard sparsity, what it costs, and what of the cost is training.

    Args:
        study: what `reflowlens study sparsity` or `sparsity_training` wrote; it has an arm `dense`.
        quick: experiments in their quick form.

    Returns a Result with metrics `arms_with_both`, `kept_ARM`, `purity_ARM`, `cost_ARM` and `spared_ARM`; frames
    `runs` (a row a run with every measure), `by_arm` (means over seeds with intervals), `contrasts`; and figures
    `frontier`, `meaning`, `purity`, `silhouette` and `cosine`.

    Raises ReflowlensError if there is no arm `dense`, or as `measured` does.

    Example: `sparsity("out/sparsity").frames["by_arm"]`
    """
    runs = measured_runs(study, quick=quick, progress=progress)
    return answer(runs, {"quick": quick, "seed": 0}, _incomplete(study))


def measured_runs(study: str | Path, *, quick: bool = True, progress: bool | None = None) -> pd.DataFrame:
    """A row a run: `arm`, `seed`, its sizes and what prunes it (`recipe_measures` and the settings of `_TRAINING`; what
    else its arm sets, in `otherwise`), and every measure of this module, NaN where an experiment refuses the model."""
    found = measured(study, sorted({experiment for experiment, *_ in GAPS.values()}), quick=quick, progress=progress)
    runs = measured_by(study, "recipes", recipe_measures, progress=progress)
    trained = {(run.arm, run.seed): run for run in trained_runs(study)}
    own = [trained[arm, seed] for arm, seed in zip(runs["arm"], runs["seed"], strict=True)]
    runs["loss"] = [run.val_loss for run in own]
    for name, usual in _TRAINING.items():
        runs[name] = [run.settings.get(name, usual) for run in own]
    runs["otherwise"] = [_otherwise(run) for run in own]
    for name, (experiment, metric, control, sign) in GAPS.items():
        rows = found[(found["experiment"] == experiment) & (found["metric"] == metric)].set_index(["arm", "seed"])
        values = rows["value"] if control is None else sign * (rows["value"] - rows[f"control_{control}"])
        runs[name] = values.reindex(pd.MultiIndex.from_frame(runs[["arm", "seed"]])).to_numpy()
    return runs


def _otherwise(run: TrainedRun) -> str:
    """The settings of a run's arm that do not say how its recipe is pruned, in one text: equal of arms that differ in
    nothing else."""
    apart = {*_TRAINING, *_COMPUTED}
    return ", ".join(f"{name}={value}" for name, value in sorted(run.settings.items()) if name not in apart)


def answer(runs: pd.DataFrame, params: dict[str, object], notes: list[str]) -> Result:
    """The `Result` of a table of `measured_runs`."""
    if DENSE not in set(runs["arm"]):
        raise ReflowlensError(f"the study has no arm {DENSE!r}, which the others are compared with")
    contrasts = _both(runs) | _costs(runs) | _spared(runs)
    contrasts = {name: each for name, each in contrasts.items() if each.seeds}
    findings = {
        name: Finding(each.mean, each.interval, {"smallest_effect": each.smallest}, each.verdict())
        for name, each in contrasts.items()
    }
    if not any(name.startswith("kept_") for name in contrasts):
        notes = [*notes, f"{DENSE} has no neighbours beyond {MEANING} that could be lost: nothing is said of meaning"]
    pruned = [arm for arm in dict.fromkeys(runs["arm"]) if (runs.loc[runs["arm"] == arm, "prunes"] == 1).all()]
    if pruned:
        with_both = _arms_with_both(contrasts, pruned)
        refuted = [arm for arm in pruned if _is_refuted(contrasts, arm)]
        none: Verdict = "not supported" if len(refuted) == len(pruned) else "underpowered"
        findings["arms_with_both"] = Finding(len(with_both), verdict="supported" if with_both else none)
        told = {"has both": with_both, "refuted": refuted}
        told["undecided"] = [arm for arm in pruned if arm not in with_both and arm not in refuted]
        notes = [*notes, "; ".join(f"{what}: {', '.join(arms) or 'none'}" for what, arms in told.items())]
    measures = [name for name in ("loss", *GAPS, "dead", "null_space", "embedding_rank") if name in runs]
    by_arm = measures_over_seeds(runs, measures)
    table = [{"contrast": name, **each._asdict(), "verdict": findings[name].verdict or ""} for name, each in
             contrasts.items() if name in findings]  # fmt: skip
    return Result(
        name="sparsity",
        title="Sparsity against semantics",
        params=params,
        findings=findings,
        frames={"runs": runs, "by_arm": by_arm, "contrasts": pd.DataFrame(table)},
        figures=frontier_figures(runs, KEPT, PURITY),
        definitions=_definitions(findings),
        notes=notes,
    )


def _both(runs: pd.DataFrame) -> dict[str, Contrast]:
    """Of each arm: the share of dense's neighbours that it keeps, if dense has any, and how pure its signals are."""
    neighbours, purity = by_seed(runs, "neighbours"), by_seed(runs, "purity")
    meaning = contrast(neighbours[DENSE].dropna(), MEANING)
    found = {f"purity_{arm}": contrast(purity[arm].dropna(), PURITY) for arm in purity}
    if meaning.seeds and (meaning.low > MEANING or (math.isnan(meaning.low) and meaning.mean > MEANING)):
        shares = neighbours.div(neighbours[DENSE], axis=0)
        found |= {f"kept_{arm}": contrast(shares[arm].dropna(), KEPT) for arm in shares if arm != DENSE}
    return found


def _costs(runs: pd.DataFrame) -> dict[str, Contrast]:
    losses = by_seed(runs, "loss")
    more = losses.sub(losses[DENSE], axis=0)
    return {f"cost_{arm}": contrast(more[arm].dropna(), LOSS) for arm in more if arm != DENSE}


def _spared(runs: pd.DataFrame) -> dict[str, Contrast]:
    """The share of the published recipe's damage that an arm trained otherwise does not have, of arms that are alike in
    all else: k, sizes and every other setting; only where there is damage in every seed, for it is divided by it."""
    losses, found = by_seed(runs, "loss"), {}
    arms = runs.drop_duplicates("arm").set_index("arm")
    usual = (arms[list(_TRAINING)] == pd.Series(_TRAINING)).all(axis=1) & (arms["topk"] > 0)
    for arm in arms.index[~usual & (arms["topk"] > 0)]:
        alike = (arms[_ALIKE] == arms.loc[arm, _ALIKE]).all(axis=1)
        for published in arms.index[usual & alike]:
            damage = (losses[published] - losses[DENSE]).dropna()
            if len(damage) and (damage > 0).all():
                found[f"spared_{arm}"] = contrast(((losses[published] - losses[arm]) / damage).dropna(), SHARE)
    return found


def _arms_with_both(contrasts: Mapping[str, Contrast], pruned: Sequence[str]) -> list[str]:
    """The arms that have both: the larger of the two p, Holm-adjusted over all that prune, and both intervals."""
    asked = {arm: [contrasts.get(f"{name}_{arm}") for name in ("kept", "purity")] for arm in pruned}
    p = {
        arm: max(1.0 if each is None or math.isnan(each.p) else each.p for each in both) for arm, both in asked.items()
    }
    adjusted = dict(zip(p, map(float, holm(list(p.values()))), strict=True))
    return [
        arm for arm, both in asked.items() if all(each and each.verdict(adjusted[arm]) == "supported" for each in both)
    ]


def _is_refuted(contrasts: Mapping[str, Contrast], arm: str) -> bool:
    names = [name for name in (f"kept_{arm}", f"purity_{arm}") if name in contrasts]
    return any(contrasts[name].verdict() == "not supported" for name in names)


def _definitions(findings: dict[str, Finding]) -> dict[str, str]:
    said = {
        "arms_with_both": "arms in which meaning survives and signals are pure",
        "kept": "share of dense's neighbours beyond permuted labels that the arm keeps",
        "purity": "purity of codebooks less that of random rotations",
        "cost": "held-out loss less that of dense, nats a token",
        "spared": "share of the published recipe's damage, in loss, that the arm does not have",
    }
    return {name: said.get(name) or f"{said[name.split('_')[0]]}; over seeds" for name in findings}


def _incomplete(study: str | Path) -> list[str]:
    complete = runs_table(study)["complete"]
    return [] if complete.all() else [f"{(~complete).sum()} of {len(complete)} runs are not complete and left out"]
