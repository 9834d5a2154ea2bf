"""Verdicts on models with nothing in them; `python -m tests.false_positives` makes the whole table."""

from __future__ import annotations

import pandas as pd
import pytest

from analyses.registry import EXPERIMENTS, Experiment
from analyses.result.result import Result
from tests import false_positives
from tests.false_positives import table_of, verdicts_on


def test_shares_are_of_the_models_on_which_the_experiment_ran():
    rows = [(i, "a", "m", "supported" if i < 2 else "not supported") for i in range(40)]
    rows += [(i, "a", "seldom", "supported") for i in range(3)]
    rows += [(i, "b", "n", "underpowered") for i in range(10)] + [(10, "b", "", "ValueError: no"), (11, "b", "", "")]
    table = table_of(pd.DataFrame(rows, columns=["model", "experiment", "metric", "verdict"]))
    share, seldom, none = table.to_dict("records")
    assert (share["models"], share["supported"], share["share"]) == (40, 2, 0.05)
    # Clopper-Pearson for 2 of 40, from the beta quantiles of statistical tables
    assert (share["low"], share["high"]) == pytest.approx((0.0061, 0.1692), abs=1e-4)
    assert (seldom["models"], seldom["supported"], seldom["share"]) == (40, 3, 0.075)
    assert (none["models"], none["supported"], none["underpowered"], none["failed"]) == (11, 0, 10, 1)
    assert (none["low"], none["high"]) == pytest.approx((0.0, 1 - 0.025 ** (1 / 11)))


def test_every_model_is_judged_with_a_seed_of_its_own_and_a_failure_is_a_row(monkeypatch):
    seeds = []

    def experiment(model, *, seed, quick, progress):
        seeds.append((model, seed))
        if seed == 1:
            raise ValueError("no")
        return Result("layer_evolution", "", metrics={"x": 1.0}, verdicts={"x": "not supported"} if seed else {})

    monkeypatch.setattr(Experiment, "load", lambda self: experiment)
    monkeypatch.setattr(false_positives, "null_model", lambda number, seed: (number, seed))
    verdicts = verdicts_on(range(3), [7], quick=True)
    assert seeds == [((7, 0), 0), ((7, 1), 1), ((7, 2), 2)]
    assert verdicts["metric"].tolist() == ["", "", "x"]
    assert verdicts["verdict"].tolist() == ["", "ValueError: no", "not supported"]


def test_a_few_empty_models_support_nothing_of_recipes():
    table = table_of(verdicts_on(range(2), [3], quick=True))
    assert len(table)
    assert table["failed"].sum() == table["supported"].sum() == 0


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("number", EXPERIMENTS)
def test_verdicts_on_empty_models_are_seldom_in_favour(number):
    """The lower end of the exact interval lies at or below 5% for every verdict, and every verdict could have been."""
    table = table_of(verdicts_on(range(20), [number], quick=True))
    assert (table["failed"] == 0).all(), table.to_string()
    assert (table["low"] <= 0.05).all(), table.to_string()
    assert (table["underpowered"] < table["models"]).all(), table.to_string()
