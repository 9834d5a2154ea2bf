"""Why is an axis privileged? Native minus rotated gaps of the same models under several optimisers.

AdamW divides each coordinate by its own root mean square, and so knows of axes; other optimisers commute with rotations
(`pretraining.optimizers` says which with which). If single signals, or axes of the stream, say more than those of a
random rotation because of the optimiser, the gap between the two is there under AdamW and gone in an arm that is
equivariant as a whole. By symmetry it has to be gone there; what is open is whether it is there otherwise, how large it
is, and which part of the model has to know of axes: embedding and basis, matrices, or norms' weights.

The gap of a run is what its own coordinates say beyond random rotations of them, positive where they are privileged:

* `hoyer` and `kurtosis` of recipes (experiment 2), `ten_signals`, their share of positive contributions (8), and
  `knockout`, the probability left without the first signal, rotated less native (9);
* those of `analyses.measures.axis_privilege` over predictions within the lexicon's texts, in the signals
  (`signals_MEASURE`) and in the axes of the residual stream (`axes_MEASURE`, which an embedding that is not factored
  has alone).

The rule, decided beforehand (`analyses.findings.contrasts`; the unit is the seed, arms of a seed are paired). For each
family, the arms whose names share a prefix (`adamw`, `equivariant`, ...; `gpt2_adamw`, `gpt2_equivariant`, ...), and
each of `DECIDING`:

* `adamw` is *privileged* if its gap exceeds the smallest effect that matters;
* an arm *loses* the privilege if the gap of `adamw` exceeds its own by more than that effect.

Axes are the optimiser's if under AdamW they are privileged in every deciding measure of some family, `equivariant`
loses that, and itself is nowhere privileged, p Holm-adjusted over all of these; they are not if in every family `adamw`
is refuted in every deciding measure, or `equivariant` is privileged in any. Otherwise it is undecided.

The study `rerandomised` is asked the same of training that goes on: runs whose residual stream, or signals, were
rotated at random, so that no axis of theirs is privileged at first, continue under AdamW (`stream`, `signals`) and
under what commutes with that rotation (`stream_equivariant`, `signals_equivariant`). `stream` and `signals` stand in
the place of `adamw` there, and the gap is in the coordinates that were rotated: the optimiser makes axes anew, or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.controls.bases import QUICK_ROTATIONS, ROTATIONS, check_rotations, rotated_views
from analyses.findings.contrasts import Contrast, by_seed, contrast
from analyses.findings.runs import TrainedRun, measured, measured_by, trained_runs
from analyses.findings.seeds import measures_over_seeds
from analyses.measures.axis_privilege import PRIVILEGED, axis_measures
from analyses.measures.knockout import real_tokens
from analyses.measures.lens import residual_points, residual_stack
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import holm, predictive_pvalue
from analyses.statistics.verdicts import Verdict
from analyses.words.lexicon import load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, signal_view

BASELINE, EQUIVARIANT = "adamw", "equivariant"
ROTATED = {"stream": "axes", "signals": "signals"}
"""What a run of the study `rerandomised` begins with rotated, and its arm -> whose gaps are read then."""
EXPERIMENTS = {
    "hoyer": ("sparsity_profile", "hoyer", 1),
    "kurtosis": ("sparsity_profile", "signal_kurtosis", 1),
    "ten_signals": ("signal_flow", "leading_share", 1),
    "knockout": ("causal_ablation", "remaining_after_one", -1),
}
"""Gap -> experiment, its metric, and the side on which it lies where signals are privileged."""
DECIDING = {"readout_kurtosis": 0.3, "ten_signal_share": 0.05, "remaining_after_one": 0.05}
"""Measure -> smallest effect: a tenth of a Gaussian's kurtosis, and as of the claims of experiments 8 and 9."""
PREDICTIONS, QUICK_PREDICTIONS = 400, 100
_OWN = "signals"


class Family(NamedTuple):
    """Arms that are compared: whether the axes of `baseline` are privileged and those of `equivariant` are not, in
    `coordinates` ("signals" or "axes")."""

    baseline: str
    equivariant: str
    arms: list[str]
    coordinates: str


def privilege(
    view: SignalView, streams: Float[Tensor, "prompt d_model"], *, rotations: int = ROTATIONS, seed: int = 0
) -> pd.DataFrame:
    """How far the coordinates of a view lie above random rotations of them, by measure.

    Args:
        streams: residual streams that predictions are read off.
        rotations: at least 2.

    Returns a row a measure of `PRIVILEGED`: `measure`, `native` and `rotated`, means over tokens or prompts, the latter
    over rotations too; `gap`, positive where the coordinates are privileged, with its interval `low` to `high` over
    tokens or prompts; and `p` of the native value as one more rotation.

    Raises ReflowlensError for fewer than 2 rotations or 2 streams.

    Example: `privilege(rl.signal_view(model, "identity"), residual_stack(model, prompts)[-1])`
    """
    check_rotations(rotations)
    view = real_tokens(view)
    own = axis_measures(view, streams)
    rotated = [axis_measures(other, streams) for _, other in rotated_views(view, rotations, seed, "axis_privilege")]
    rows = []
    for measure, sign in PRIVILEGED.items():
        floors = np.stack([each[measure] for each in rotated])
        gaps = sign * (own[measure] - floors.mean(axis=0))
        low, high = bootstrap_interval(gaps, seed=seed)
        native, null = float(own[measure].mean()), floors.mean(axis=1)
        p = predictive_pvalue(native, null, "greater" if sign > 0 else "less")
        ends = {"gap": float(gaps.mean()), "low": low, "high": high, "p": p}
        rows.append({"measure": measure, "native": native, "rotated": float(null.mean()), **ends})
    return pd.DataFrame(rows)


def axis_privilege(
    study: str | Path, *, quick: bool = True, experiments: bool = True, progress: bool | None = None
) -> Result:
    """Whether axes are privileged by the optimiser.

    Args:
        study: what `reflowlens study optimisers` or `rerandomised` wrote; it has an arm `adamw`, `stream` or `signals`.
        quick: a quarter of the predictions, fewer rotations, and experiments in their quick form.
        experiments: the gaps of experiments 2, 8 and 9 too, which decide nothing and take longest.

    Returns a Result with the metrics `optimiser_decides` (in how many families; `families` beside it) and, for each
    deciding measure M, `privileged_ARM_M` and `lost_ARM_M`; frames `runs` (a row a run with every gap), `by_arm` (means
    over seeds with intervals) and `contrasts` (`p`, and `p_adjusted`, which the verdict is by); and the figure `gaps`.

    Raises ReflowlensError if there is no such arm, or as `measured` does.

    Example: `axis_privilege("out/optimisers").frames["by_arm"]`
    """
    runs = gaps(study, quick=quick, experiments=experiments, progress=progress)
    return answer(runs, {"quick": quick, "experiments": experiments, "seed": 0})


def gaps(study: str | Path, *, quick: bool, experiments: bool, progress: bool | None = None) -> pd.DataFrame:
    """A row a run: `arm`, `seed`, `loss` and its gaps, NaN where an experiment refuses the model."""
    name = f"axis_privilege_{'quick' if quick else 'full'}"
    runs = measured_by(study, name, partial(_gaps_of, quick=quick), progress=progress)
    losses = {(run.arm, run.seed): run.val_loss for run in trained_runs(study)}
    runs["loss"] = [losses[key] for key in zip(runs["arm"], runs["seed"], strict=True)]
    if experiments:
        found = measured(study, sorted({each for each, *_ in EXPERIMENTS.values()}), quick=quick, progress=progress)
        places = pd.MultiIndex.from_frame(runs[["arm", "seed"]])
        for gap, (experiment, metric, sign) in EXPERIMENTS.items():
            rows = found[(found["experiment"] == experiment) & (found["metric"] == metric)].set_index(["arm", "seed"])
            runs[gap] = (sign * (rows["value"] - rows["control_rotated_basis"])).reindex(places).to_numpy()
    return runs


def _gaps_of(model: HookedModel, run: TrainedRun, *, quick: bool) -> Mapping[str, float]:
    """The gaps of `privilege`, in signals where there are any and in axes."""
    streams = streams_of(model, QUICK_PREDICTIONS if quick else PREDICTIONS)
    own = signal_view(model)
    views = {_OWN: own, "axes": signal_view(model, "identity")} if own.name == "native" else {"axes": own}
    rotations = QUICK_ROTATIONS if quick else ROTATIONS
    return {
        f"{name}_{row['measure']}": float(row["gap"])
        for name, view in views.items()
        for row in privilege(view, streams, rotations=rotations).to_dict("records")
    }


@torch.no_grad()
def streams_of(model: HookedModel, n: int) -> Float[Tensor, "prompt d_model"]:
    """The residual streams of n predictions at most, evenly spread over the lexicon's factual prompts and neutral texts
    that the model's context holds.

    Unlike the last tokens of prompts alone, most of which are " is", they differ in models that have read little, too.
    """
    lexicon = load_lexicon()
    texts = [*(item.prompt for item in lexicon.factual), *lexicon.neutral_texts]
    texts = [text for text in texts if len(model.tokenizer.encode(text)) <= model.cfg.n_ctx]
    _, lengths = model.tokens_and_lengths(texts)
    stack = residual_stack(model, texts, last_only=False, points=residual_points(model.cfg.n_layers)[-1:])[-1]
    streams = torch.cat([own[:length] for own, length in zip(stack, lengths, strict=True)])
    chosen = torch.linspace(0, len(streams) - 1, min(n, len(streams))).round().long()
    return streams[chosen]


def answer(runs: pd.DataFrame, params: dict[str, object]) -> Result:
    """The `Result` of a table of `gaps`."""
    asked = families(runs)
    if not asked:
        wanted = ", ".join(map(repr, (BASELINE, *ROTATED)))
        raise ReflowlensError(f"the study has no arm {wanted}, which the others are compared with")
    found = [row for family in asked.values() for row in _contrasts(runs, family)]
    adjusted = holm([1.0 if np.isnan(each.p) else each.p for _, _, _, each in found])
    judged = {
        (claim, arm, measure): each.verdict(p)
        for (claim, arm, measure, each), p in zip(found, adjusted.tolist(), strict=True)
    }
    findings = {
        f"{claim}_{arm}_{measure}": Finding(
            each.mean, each.interval, {"smallest_effect": each.smallest}, judged[claim, arm, measure]
        )
        for claim, arm, measure, each in found
    }
    verdicts = {name: _verdict(judged, family) for name, family in asked.items()}
    decided = sum(each == "supported" for each in verdicts.values())
    overall: Verdict = "underpowered"
    if decided:
        overall = "supported"
    elif all(each == "not supported" for each in verdicts.values()):
        overall = "not supported"
    findings["optimiser_decides"] = Finding(decided, controls={"families": len(verdicts)}, verdict=overall)
    measures = [name for name in runs.columns if name not in ("arm", "seed")]
    by_arm = measures_over_seeds(runs, measures)
    table = [
        {"claim": claim, "arm": arm, "measure": measure, **each._asdict()}
        | {"p_adjusted": p, "verdict": judged[claim, arm, measure]}
        for (claim, arm, measure, each), p in zip(found, adjusted.tolist(), strict=True)
    ]
    shown = by_arm[by_arm["measure"].str.endswith(tuple(DECIDING))]
    return Result(
        name="axis_privilege",
        title="Why an axis is privileged",
        params=params,
        findings=findings,
        frames={"runs": runs, "by_arm": by_arm, "contrasts": pd.DataFrame(table)},
        figures={
            "gaps": bars(
                shown.assign(mean=shown["mean"], what=shown["measure"].str.replace("_", " ")),
                "arm",
                "mean",
                "low",
                "high",
                "what",
                horizontal=True,
                title="What native coordinates say beyond rotated ones",
                y_title="native minus rotated, positive where privileged",
            )
        },
        definitions=_definitions(findings),
        notes=[f"{name}: {verdict}" for name, verdict in verdicts.items()],
    )


def families(runs: pd.DataFrame) -> dict[str, Family]:
    """What is compared with what in a study, by name: arms that share the prefix of an `adamw` ("reflow" without one),
    and the place that was rotated."""
    every = list(dict.fromkeys(runs["arm"]))
    rotated = {
        place: [arm for arm in every if f"{arm}_".startswith(f"{place}_")] for place in ROTATED if place in every
    }
    arms = [arm for arm in every if not any(arm in own for own in rotated.values())]
    prefixes = [arm.removesuffix(BASELINE) for arm in arms if arm.endswith(BASELINE)]
    found = {}
    for prefix in prefixes:
        own = [arm for arm in arms if arm.startswith(prefix) and prefix == _longest(prefixes, arm)]
        found[prefix.rstrip("_") or "reflow"] = Family(
            prefix + BASELINE, prefix + EQUIVARIANT, own, _coordinates(runs, own)
        )
    for place, own in rotated.items():
        found[place] = Family(place, f"{place}_{EQUIVARIANT}", own, ROTATED[place])
    return found


def _longest(prefixes: Sequence[str], arm: str) -> str:
    return max((prefix for prefix in prefixes if arm.startswith(prefix)), key=len)


def _coordinates(runs: pd.DataFrame, arms: Sequence[str]) -> str:
    """Signals where the arms have them, otherwise axes."""
    measure = next(iter(DECIDING))
    column = f"{_OWN}_{measure}"
    return _OWN if column in runs and runs.loc[runs["arm"].isin(arms), column].notna().any() else "axes"


def _contrasts(runs: pd.DataFrame, family: Family) -> list[tuple[str, str, str, Contrast]]:
    """Whether each arm is privileged, and whether it lost what the baseline has: claim, arm, measure and contrast."""
    found = []
    for measure, smallest in DECIDING.items():
        each = by_seed(runs[runs["arm"].isin(family.arms)], f"{family.coordinates}_{measure}")
        for arm in family.arms:
            found.append(("privileged", arm, measure, contrast(each[arm].dropna(), smallest)))
            if arm != family.baseline:
                lost = (each[family.baseline] - each[arm]).dropna()
                found.append(("lost", arm, measure, contrast(lost, smallest)))
    return [row for row in found if row[3].seeds]


def _verdict(judged: Mapping[tuple[str, str, str], Verdict], family: Family) -> Verdict:
    """The rule of this module, of one family."""

    def of(claim: str, arm: str) -> list[Verdict]:
        return [judged.get((claim, arm, measure), "underpowered") for measure in DECIDING]

    there, left = of("privileged", family.baseline), of("privileged", family.equivariant)
    lost = of("lost", family.equivariant)
    if "supported" in left or set(there) == {"not supported"}:
        return "not supported"
    if set(there) == set(lost) == {"supported"} and set(left) == {"not supported"}:
        return "supported"
    return "underpowered"


def _definitions(findings: Mapping[str, Finding]) -> dict[str, str]:
    said = {
        "privileged": "native minus rotated (for what is left of a probability, rotated minus native), mean over seeds",
        "lost": "the gap of `adamw`, `stream` or `signals` less that of this arm, mean over seeds",
        "optimiser": "families whose axes AdamW privileges and an equivariant optimiser does not",
    }
    return {metric: said[metric.split("_")[0]] for metric in findings}
