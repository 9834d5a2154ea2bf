"""Do the verdicts on the claims belong to a way of training, or to one run of it?

Every claim of `analyses.claims` is judged on every seed of one arm of a study, by the experiments as they stand. It is
*stable* where all seeds have the same verdict. Verdicts that agree by chance would agree as well after each seed's were
dealt out to the claims anew, which is the control ``shuffled_claims``: where four claims in five are supported on each
seed, most of them agree for that reason alone.

The rule, decided beforehand: that verdicts belong to the arm is supported where the exact interval of ``stable_share``
over claims lies above the control by 0.1 and its permutation p is below 0.05; underpowered with fewer than 3 seeds or
20 claims. A claim itself is called supported where it is on every seed.

The *margin* of a claim in one run is how far its value lies beyond the hardest of its controls and the smallest effect
that matters, in units of the metric, on the side that is claimed (`analyses.claims.Claim.bound`). Its interval is over
seeds: what is sure of one run, over its prompts, need not be sure of the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from analyses.claims import CLAIMS, bound_of, claim_of
from analyses.findings.runs import TrainedRun, measured, trained_runs
from analyses.findings.seeds import over_seeds
from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.result.finding import Finding
from analyses.result.kept import keep_result, may_be_kept, read_result, result_folder, result_key
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import rate_interval
from analyses.statistics.pvalues import permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.figures.heatmap import heatmap
from reflowlens.models import float32_by_default
from reflowlens.models.base import HookedModel

MINIMUM_SEEDS, MINIMUM_CLAIMS = 3, 20
NO_VERDICT, DIFFERS = "no verdict", "differs"
_PERMUTATIONS = 999
_SHADES = {"not supported": -1.0, "underpowered": 0.0, NO_VERDICT: 0.0, "supported": 1.0}
DEFINITIONS = {
    "stable_share": "share of claims with the same verdict on all seeds. shuffled_claims: the same after each seed's "
    "verdicts were dealt out to the claims anew, mean over permutations",
    "supported_on_all": "share of claims that are supported on every seed; control as of stable_share",
    "supported_on_some": "share of claims that are supported on some seeds and not on others; control as above",
}


def claims_over_seeds(
    study: str,
    *,
    arm: str | None = None,
    experiments: str | int | Sequence[str | int] = "all",
    models: Mapping[str, HookedModel] | None = None,
    quick: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Every claim's verdict on each seed of an arm, and which verdicts all seeds share.

    Args:
        study: the folder that `reflowlens study` wrote.
        arm: whose runs; may be left out of a study with one arm.
        experiments: whose claims (`analyses.registry.parse_selection`).
        models: others whose verdicts stand beside, by name.
        quick, seed: passed to the experiments: the same prompts and controls for every run.

    Returns:
        A Result with the metrics of ``DEFINITIONS`` and frames ``claims`` (a row a claim: ``verdict``, the one that all
        seeds share or "differs"; on how many seeds it is ``supported``; mean ``value`` over seeds with ``low`` and
        ``high`` of Student's t; ``margin`` with ``margin_low`` and ``margin_high``) and ``verdicts`` (a row a claim and
        run or model); figure ``verdicts``.

    Raises:
        ReflowlensError: there is no such arm or study, one must be named, or no claim was judged.

    Example: ``claims_over_seeds("out/sparsity", arm="dense").frames["claims"]``
    """
    seeds = _seeds(study, arm)
    chosen = seeds[0].arm
    selected = [EXPERIMENTS[number] for number in parse_selection(experiments)]
    names = [each.name for each in selected]
    rows = measured(study, names, quick=quick, seed=seed, arms=[chosen], progress=progress)
    rows = rows.assign(run=rows["seed"].astype(int).map("seed {}".format), is_seed=True)
    beside = [_of_model(each, name, model, quick, seed) for name, model in (models or {}).items() for each in selected]
    table = pd.concat([rows, *beside], ignore_index=True)
    judged = _judged(table, [f"seed {run.seed}" for run in seeds], list(models or {}))
    if judged.empty:
        raise ReflowlensError(f"no claim of {', '.join(names)} was judged on arm {chosen!r}")
    of_seeds = judged[judged["is_seed"]]
    claims, grid = _claim_frame(of_seeds), _grid(of_seeds)
    return Result(
        name="claims_over_seeds",
        title="Claims over Seeds",
        params={
            "study": str(study),
            "arm": chosen,
            "seeds": grid.shape[1],
            "experiments": names,
            "models": list(models or {}),
            "quick": quick,
            "seed": seed,
        },
        findings=_findings(grid, seed),
        frames={"claims": claims, "verdicts": judged.drop(columns="is_seed")},
        figures={"verdicts": _figure(judged)},
        definitions=DEFINITIONS,
        notes=_notes(claims, grid.shape[1]),
    )


def stability_verdict(interval: tuple[float, float], shuffled: float, p: float, claims: int, seeds: int) -> Verdict:
    """Claim: verdicts belong to the way of training and not to the single run.

    Supported if the interval of stable_share over claims lies above that of verdicts dealt out anew by 0.1 and its
    permutation p is below 0.05; underpowered with fewer than 3 seeds or 20 claims.
    """
    units = claims if seeds >= MINIMUM_SEEDS else 0
    bound = bound_of("claims_over_seeds", "stable_share", {"shuffled_claims": shuffled})
    return verdict(interval, bound, p, minimum_units=MINIMUM_CLAIMS, units=units)


def _seeds(study: str, arm: str | None) -> list[TrainedRun]:
    """The runs of an arm, or of the only one."""
    runs = trained_runs(study)
    arms = list(dict.fromkeys(run.arm for run in runs))
    if arm is None and len(arms) > 1:
        raise ReflowlensError(f"an arm has to be named: {study} has {', '.join(arms)}")
    if arm is not None and arm not in arms:
        raise ReflowlensError(f"no arm {arm!r}: {study} has {', '.join(arms)}")
    return [run for run in runs if arm is None or run.arm == arm]


def _of_model(experiment: Experiment, name: str, model: HookedModel, quick: bool, seed: int) -> pd.DataFrame:
    """The rows of a model that is not of the study, of its kept result where there is one; none of an experiment that
    refuses it."""
    options = {"seed": seed, "quick": quick}
    key = result_key(experiment.name, options | {"device": model.cfg.device})
    folder = result_folder(model_hash(model), key) if may_be_kept(model) else None
    result = read_result(folder) if folder else None
    if result is None:
        try:
            with float32_by_default():
                result = experiment.load()(model, progress=False, **options)
        except ReflowlensError:
            return pd.DataFrame()
        if folder:
            keep_result(result, folder)
    rows = [
        {"metric": metric, "value": finding.value, "verdict": finding.verdict or ""}
        | {f"control_{control}": value for control, value in finding.controls.items()}
        for metric, finding in result.findings.items()
    ]
    return pd.DataFrame(rows).assign(experiment=experiment.name, run=name, is_seed=False)


def _judged(table: pd.DataFrame, seeds: Sequence[str], models: Sequence[str]) -> pd.DataFrame:
    """A row a claim that is judged on any seed, and run: ``verdict``, ``value``, ``margin``; "no verdict", NaN where a
    run has none."""
    on_seeds = table[table["is_seed"] & (table["verdict"].fillna("") != "")]
    seen = dict.fromkeys(zip(on_seeds["experiment"], on_seeds["metric"], strict=True))
    known: dict[tuple[str, str, str], dict[Any, Any]] = {
        (row["experiment"], row["metric"], row["run"]): row for row in table.to_dict("records")
    }
    rows = []
    for experiment, metric in sorted(seen, key=lambda place: list(CLAIMS).index(place[0])):
        for run in [*seeds, *models]:
            found = known.get((experiment, metric, run), {})
            rows.append(
                {
                    "experiment": experiment,
                    "metric": metric,
                    "run": run,
                    "verdict": found.get("verdict") or NO_VERDICT,
                    "value": float(found.get("value", math.nan)),
                    "margin": _margin(experiment, metric, found),
                    "is_seed": run in seeds,
                }
            )
    return pd.DataFrame(rows)


def _margin(experiment: str, metric: str, row: Mapping[Any, Any]) -> float:
    """How far a value lies beyond what its claim asks for; NaN without a claim in the table, or a control."""
    claim = claim_of(experiment, metric)
    if claim is None or "value" not in row:
        return math.nan
    controls = {
        str(name).removeprefix("control_"): value
        for name, value in row.items()
        if str(name).startswith("control_") and not math.isnan(value)
    }
    bound = claim.bound(controls)
    return claim.sign * row["value"] - bound if math.isfinite(bound) else math.nan


def _claim_frame(of_seeds: pd.DataFrame) -> pd.DataFrame:
    """A row a claim, over the seeds."""
    named = of_seeds.assign(claim=of_seeds["experiment"] + " " + of_seeds["metric"])
    values, margins = (
        over_seeds(named, column, by="claim").set_index("claim")[["mean", "low", "high"]]
        for column in ("value", "margin")
    )  # of a column without any number there are no rows, and no dtype
    rows = []
    for claim, part in named.groupby("claim", sort=False):
        told = part["verdict"].unique()
        rows.append(
            {
                "experiment": part["experiment"].iloc[0],
                "metric": part["metric"].iloc[0],
                "verdict": str(told[0]) if len(told) == 1 else DIFFERS,
                "supported": int((part["verdict"] == "supported").sum()),
                "seeds": len(part),
                "claim": claim,
            }
        )
    frame = pd.DataFrame(rows).join(values.rename(columns={"mean": "value"}), on="claim")
    names = {"mean": "margin", "low": "margin_low", "high": "margin_high"}
    frame = frame.join(margins.rename(columns=names), on="claim").drop(columns="claim")
    return frame.astype(dict.fromkeys(("value", "low", "high", *names.values()), float))


def _grid(of_seeds: pd.DataFrame) -> NDArray[np.str_]:
    """Verdicts, [claim, seed]."""
    n_seeds = of_seeds["run"].nunique()
    return of_seeds["verdict"].to_numpy(dtype=str).reshape(-1, n_seeds)


def _shares(grid: NDArray[np.str_]) -> dict[str, NDArray[np.bool_]]:
    """What each metric is the share of, [claim]."""
    supported = (grid == "supported").sum(axis=1)
    return {
        "stable_share": (grid == grid[:, :1]).all(axis=1),
        "supported_on_all": supported == grid.shape[1],
        "supported_on_some": (supported > 0) & (supported < grid.shape[1]),
    }


def _findings(grid: NDArray[np.str_], seed: int) -> dict[str, Finding]:
    rng = derive_rng(seed, "claims_over_seeds", "shuffled_claims")
    dealt = [_shares(rng.permuted(grid, axis=0)) for _ in range(_PERMUTATIONS)]
    findings = {}
    for metric, hits in _shares(grid).items():
        null = [each[metric].mean() for each in dealt]
        interval = rate_interval(hits) if len(hits) > 1 else None
        judged = None
        if metric == "stable_share" and interval is not None:
            p = permutation_pvalue(float(hits.mean()), null)
            judged = stability_verdict(interval, float(np.mean(null)), p, *grid.shape)
        findings[metric] = Finding(float(hits.mean()), interval, {"shuffled_claims": float(np.mean(null))}, judged)
    return findings


def _figure(judged: pd.DataFrame) -> go.Figure:
    claim = judged["experiment"] + ": " + judged["metric"]
    shown = judged.assign(claim=claim, shade=judged["verdict"].map(_SHADES), number=claim.factorize()[0])
    shown = shown.sort_values("number", ascending=False, kind="stable")  # a heatmap's first row is its lowest
    return heatmap(
        shown,
        "run",
        "claim",
        "shade",
        text="verdict",
        z_range=(-1, 1),
        diverging=True,
        hover=["value", "margin"],
        title="Verdicts on every claim, by run",
        x_title="run",
        z_title="1: supported",
    ).update_layout(height=160 + 22 * shown["claim"].nunique())


def _notes(claims: pd.DataFrame, seeds: int) -> list[str]:
    def listed(some: pd.DataFrame) -> str:
        return ", ".join(some["metric"]) or "none"

    return [
        f"supported on all {seeds} seeds: {listed(claims[claims['verdict'] == 'supported'])}",
        f"otherwise on another seed: {listed(claims[claims['verdict'] == DIFFERS])}",
        "claims are not independent of each other: several read the same prompts and recipes",
    ]
