"""The false-positive table: how often the verdicts of the experiments support a claim in models that hold nothing.

    python -m tests.false_positives --models 200 --quick --out false_positives.csv

Each seed draws a model anew. Experiments 1 to 5 are about recipes alone and get an `empty_model` of
`tests.support.planted`. The others are about what the blocks make of them. With silent blocks most of what they measure
would be zero, not small, so they get a `turning_model`, whose blocks write much, and nothing in particular. What is
supported there is supported by chance. A rule that keeps its promise says so about one time in twenty, or less.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.result.result import Result
from reflowlens.models.base import HookedModel
from tests.support.planted import empty_model, turning_model

COLUMNS = ["experiment", "metric", "models", "supported", "share", "low", "high", "underpowered", "failed"]
OF_RECIPES = range(1, 6)


def null_model(number: int, seed: int) -> HookedModel:
    """A model with nothing in it that the experiment of this number could find."""
    return empty_model(seed) if number in OF_RECIPES else turning_model(seed)


def verdicts_on(seeds: Iterable[int], numbers: Sequence[int], quick: bool, processes: int = 1) -> pd.DataFrame:
    """A row a seed, experiment and metric with a verdict; an experiment that fails has one with metric "" and the error
    as its verdict, one that gives no verdict one with metric "" and verdict "". Model and experiment share the seed."""
    seeds = list(seeds)
    judge = partial(_verdict_rows, numbers=numbers, quick=quick)
    with tqdm(total=len(seeds), unit="model", disable=None) as bar:
        if processes == 1:
            rows = [_counted(judge(seed), bar) for seed in seeds]
        else:
            with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                rows = [_counted(some, bar) for some in pool.map(judge, seeds)]
    return pd.DataFrame([row for some in rows for row in some], columns=["model", "experiment", "metric", "verdict"])


def table_of(verdicts: pd.DataFrame) -> pd.DataFrame:
    """A row an experiment and metric: in how many of the models on which the experiment ran the claim is supported,
    with the exact 95% binomial interval of that share (Clopper and Pearson 1934), and in how many it is underpowered.
    A verdict that is given for some models only, such as that of a boundary that must first be found, is not supported
    in the others. `failed`: models for which the experiment has no result.
    """
    rows = []
    for experiment, part in verdicts.groupby("experiment", sort=False):
        failed = part.loc[(part["metric"] == "") & (part["verdict"] != ""), "model"].nunique()
        models = part["model"].nunique() - failed
        for metric in [name for name in part["metric"].unique() if name] or [""]:
            judged = part.loc[part["metric"] == metric, "verdict"]
            supported = int((judged == "supported").sum())
            row = {"experiment": experiment, "metric": metric, "models": models, "supported": supported}
            if metric and models:
                low, high = binomtest(supported, models).proportion_ci()
                row |= {"share": supported / models, "low": low, "high": high}
            rows.append(row | {"underpowered": int((judged == "underpowered").sum()), "failed": failed})
    return pd.DataFrame(rows, columns=COLUMNS)


def _counted(rows: list[dict[str, Any]], bar: Any) -> list[dict[str, Any]]:
    bar.update()
    return rows


def _verdict_rows(seed: int, numbers: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        experiment = EXPERIMENTS[number]
        found = _verdicts(experiment, null_model(number, seed), seed, quick) or {"": ""}
        place = {"model": seed, "experiment": experiment.name}
        rows += [place | {"metric": metric, "verdict": verdict} for metric, verdict in found.items()]
    return rows


def _verdicts(experiment: Experiment, model: HookedModel, seed: int, quick: bool) -> dict[str, str]:
    try:
        result: Result = experiment.load()(model, seed=seed, quick=quick, progress=False)
    except Exception as error:  # one that fails is a row of the table, as it is of a report
        return {"": f"{type(error).__name__}: {error}"}
    return dict(result.verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200, help="how many models (default: 200)")
    parser.add_argument("--experiments", nargs="+", default=["all"], help="numbers or names (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and controls in each")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each (default: a core)")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    options = parser.parse_args()
    numbers = parse_selection(options.experiments)
    began = time.perf_counter()
    verdicts = verdicts_on(range(options.models), numbers, options.quick, options.processes)
    table = table_of(verdicts)
    print(table.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
    errors = verdicts[(verdicts["metric"] == "") & (verdicts["verdict"] != "")]
    for (experiment, error), part in errors.groupby(["experiment", "verdict"], sort=False):
        print(f"{experiment}, {len(part)} models: {error}")
    print(f"{options.models} models, {(time.perf_counter() - began) / 60:.0f} minutes")
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
