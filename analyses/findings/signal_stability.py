"""Does another seed find the same signals?

Two runs of one arm differ in their first weights and the order of their data. Signals are paired one to one by their
recipe columns over one half of the frequent tokens, whatever their order and sign, and compared on the other half
(`analyses.findings.transfer`):

* `words`: the share of a signal's ten top words that its partner has;
* `recipes`: the absolute correlation of the two columns.

The control is the same of a second run whose signals were rotated at random: its recipes span the same space and its
predictions are the same, so that whatever remains of an agreement there comes from the space and from the pairing,
which is the best of many. The *gap* is what native signals have beyond it. Of an embedding that is not factored the
signals are the axes of the residual stream. Every run is compared with the next seed of its arm, the last with the
first. The unit is the run, of which each is in two pairs: intervals are Student's over the jackknife's pseudovalues
n m - (n - 1) m_i, with m the mean over pairs and m_i that over the pairs without run i (Miller, 1974), which of three
seeds are twice as wide as over pairs. Where a gap is the sum of what its two runs have, a pseudovalue of three seeds is
twice what one run has, and independent of the others', as values of pairs are not.

The rule, decided beforehand (`analyses.findings.contrasts`): an arm's signals are *found again* if the gap
of `words` exceeds 0.1, as for a teacher's signals in `analyses.findings.distillation`. With two seeds there is one
pair, which decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from analyses.controls.bases import QUICK_ROTATIONS, ROTATIONS, rotated_views
from analyses.findings.contrasts import contrast
from analyses.findings.runs import TrainedRun, measured_by, trained_runs
from analyses.findings.seeds import measures_over_seeds
from analyses.findings.transfer import by_recipe, codebook_agreement, recipe_agreement
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.pvalues import holm
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, signal_view

SMALLEST = 0.1
MEASURES = {"words": codebook_agreement, "recipes": recipe_agreement}
DEFINITIONS = {
    "words": "share of a signal's ten top words that its partner of the next seed has, mean over "
    "signals and pairs of seeds, less that with the second run's signals rotated",
    "recipes": "absolute correlation of paired recipe columns over tokens that they were not paired by, less the same "
    "with the second run's signals rotated",
}


def signal_stability(study: str | Path, *, quick: bool = True, progress: bool | None = None) -> Result:
    """Whether another seed finds the same signals.

    Args:
        study: what `reflowlens study` wrote, with two seeds of some arm.
        quick: fewer rotations.

    Returns a Result with metrics `words_ARM` and `recipes_ARM`, the gaps, the former judged; frames `pairs` (a row a
    pair of seeds: `arm`, `seed`, `next_seed`, each measure, its `_rotated` and its `_gap`) and `by_arm`; figure
    `agreement`.

    Raises ReflowlensError if no arm has two seeds, or as `measured_by` does.

    Example: `signal_stability("out/sparsity").frames["by_arm"]`
    """
    nexts = _nexts(trained_runs(study))
    if not nexts:
        raise ReflowlensError(f"no arm of {study} has two seeds, whose signals could be compared")
    name = f"signal_stability_{'quick' if quick else 'full'}"
    measure = partial(_agreement, nexts=nexts, rotations=QUICK_ROTATIONS if quick else ROTATIONS)
    pairs = measured_by(study, name, measure, partners=nexts, progress=progress)
    return answer(pairs.dropna(subset="next_seed"), {"quick": quick, "seed": 0})


def answer(pairs: pd.DataFrame, params: dict[str, object]) -> Result:
    """The `Result` of a table of pairs."""
    measures = [f"{measure}{what}" for measure in MEASURES for what in ("", "_rotated", "_gap")]
    runs = pseudovalues(pairs, measures)
    judged = {str(arm): contrast(own["words_gap"], SMALLEST) for arm, own in runs.groupby("arm", sort=False)}
    adjusted = holm([1.0 if np.isnan(each.p) else each.p for each in judged.values()])
    findings: dict[str, Finding] = {}
    definitions: dict[str, str] = {}
    for (arm, words), p in zip(judged.items(), adjusted.tolist(), strict=True):
        recipes = contrast(runs.loc[runs["arm"] == arm, "recipes_gap"])
        smallest = {"smallest_effect": words.smallest}
        findings[f"words_{arm}"] = Finding(words.mean, words.interval, smallest, words.verdict(p))
        findings[f"recipes_{arm}"] = Finding(recipes.mean, recipes.interval)
        definitions |= {f"{measure}_{arm}": said for measure, said in DEFINITIONS.items()}
    by_arm = measures_over_seeds(runs, measures)
    shown = by_arm[~by_arm["measure"].str.endswith("_gap")]
    return Result(
        name="signal_stability",
        title="Signals of another seed",
        params=params,
        findings=findings,
        frames={"pairs": pairs, "by_arm": by_arm},
        figures={
            "agreement": bars(
                shown.assign(what=shown["measure"].str.replace("_", ", ")),
                "arm",
                "mean",
                "low",
                "high",
                "what",
                horizontal=True,
                title="What two seeds' signals share",
                y_title="top words shared, and correlation of recipes",
            )
        },
        definitions=definitions,
    )


def pseudovalues(pairs: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """The jackknife's, a row a run: `arm`, `seed` and the measures. Their mean is that over pairs; of one pair, itself.

    >>> ring = pd.DataFrame({"arm": "a", "seed": [0, 1, 2], "next_seed": [1, 2, 0], "words": [0.1, 0.2, 0.6]})
    >>> pseudovalues(ring, ["words"])["words"].round(3).tolist()
    [0.5, -0.3, 0.7]
    """
    rows = []
    for arm, own in pairs.groupby("arm", sort=False):
        mean = own[list(measures)].mean()
        for seed in own["seed"]:
            without = own.loc[(own["seed"] != seed) & (own["next_seed"] != seed), list(measures)]
            values = len(own) * mean - (len(own) - 1) * without.mean() if len(own) > 1 else mean
            rows.append({"arm": arm, "seed": seed, **values})
    return pd.DataFrame(rows)


def agreement(one: SignalView, other: SignalView, *, rotations: int, seed: int = 0) -> dict[str, float]:
    """How far the signals of two views agree, and with the second rotated.

    Returns `words` and `recipes`, means over signals, the same with `_rotated`, means over rotations too, and the
    difference with `_gap`.

    Example: `agreement(rl.signal_view(a), rl.signal_view(b), rotations=4)["words_gap"]`
    """
    native = _measured(one, other)
    floors = [_measured(one, view) for _, view in rotated_views(other, rotations, seed, "signal_stability")]
    found = dict(native)
    for measure, value in native.items():
        rotated = float(np.mean([floor[measure] for floor in floors]))
        found |= {f"{measure}_rotated": rotated, f"{measure}_gap": value - rotated}
    return found


def _measured(one: SignalView, other: SignalView) -> dict[str, float]:
    pairing = by_recipe(one, other)
    return {name: float(measure(one, other, pairing).mean()) for name, measure in MEASURES.items()}


def _nexts(runs: list[TrainedRun]) -> dict[tuple[str, int], TrainedRun]:
    """The run that each is compared with: the next seed of its arm, of the last the first; two seeds are one pair."""
    found: dict[tuple[str, int], TrainedRun] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
        pairs = zip(own, [*own[1:], own[0]], strict=True) if len(own) > 2 else pairwise(own)
        found |= {(run.arm, run.seed): following for run, following in pairs}
    return found


def _agreement(
    model: HookedModel, run: TrainedRun, *, nexts: Mapping[tuple[str, int], TrainedRun], rotations: int
) -> dict[str, float]:
    """Of a run with the next seed of its arm; nothing of a run that is compared with none."""
    following = nexts.get((run.arm, run.seed))
    if following is None:
        return {"next_seed": float("nan")}
    views = signal_view(model), signal_view(following.load())
    return {"next_seed": float(following.seed), **agreement(*views, rotations=rotations)}
