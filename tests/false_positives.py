"""The false-positive table: how often the verdicts of the experiments support a claim in models that hold nothing.

    python -m tests.false_positives --models 200 --out false_positives.csv

`tests.planted.empty_model` draws recipes and weights anew for each seed, and its blocks write nothing, so that a claim
supported there is supported by chance. A rule that keeps its promise says so about one time in twenty, or less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest
from tqdm import tqdm

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.result import Result
from reflowlens.models.base import HookedModel
from tests.planted import empty_model

COLUMNS = ["experiment", "metric", "models", "supported", "share", "low", "high", "underpowered", "failed"]


def verdicts_on(models: Iterable[HookedModel], experiments: Sequence[Experiment], quick: bool) -> pd.DataFrame:
    """A row a model, experiment and metric with a verdict; an experiment that fails has one with metric "" and the
    error as its verdict. The i-th model is run with seed i."""
    rows = []
    for seed, model in enumerate(models):
        for experiment in experiments:
            for metric, verdict in _verdicts(experiment, model, seed, quick).items():
                place = {"model": seed, "experiment": experiment.name}
                rows.append(place | {"metric": metric, "verdict": verdict})
    return pd.DataFrame(rows, columns=["model", "experiment", "metric", "verdict"])


def table_of(verdicts: pd.DataFrame) -> pd.DataFrame:
    """A row an experiment and metric: of how many models, the share supported with its exact 95% binomial interval
    (Clopper and Pearson 1934), and how many were underpowered. `failed`: models for which the experiment has no result.
    """
    failed = verdicts[verdicts["metric"] == ""].groupby("experiment")["model"].nunique()
    rows = []
    for (experiment, metric), part in verdicts.groupby(["experiment", "metric"], sort=False):
        judged = part["verdict"] if metric else part["verdict"].iloc[:0]
        supported = int((judged == "supported").sum())
        row = {"experiment": experiment, "metric": metric, "models": len(judged), "supported": supported}
        if len(judged):
            low, high = binomtest(supported, len(judged)).proportion_ci()
            row |= {"share": supported / len(judged), "low": low, "high": high}
        underpowered = int((judged == "underpowered").sum())
        rows.append(row | {"underpowered": underpowered, "failed": int(failed.get(experiment, 0))})
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdicts(experiment: Experiment, model: HookedModel, seed: int, quick: bool) -> dict[str, str]:
    try:
        result: Result = experiment.load()(model, seed=seed, quick=quick, progress=False)
    except Exception as error:  # one that fails is a row of the table, as it is of a report
        return {"": f"{type(error).__name__}: {error}"}
    return dict(result.verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200, help="how many empty models (default: 200)")
    parser.add_argument("--experiments", nargs="+", default=["all"], help="numbers or names (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and controls in each")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    options = parser.parse_args()
    experiments = [EXPERIMENTS[number] for number in parse_selection(options.experiments)]
    began = time.perf_counter()
    models = tqdm(map(empty_model, range(options.models)), total=options.models, unit="model", disable=None)
    verdicts = verdicts_on(models, experiments, options.quick)
    table = table_of(verdicts)
    print(table.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
    for (experiment, error), part in verdicts[verdicts["metric"] == ""].groupby(["experiment", "verdict"], sort=False):
        print(f"{experiment}, {len(part)} models: {error}")
    seconds = (time.perf_counter() - began) / options.models
    print(f"{options.models} models, {seconds:.1f} s each; 200 take {200 * seconds / 60:.0f} minutes")
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
