"""Verdicts on models with nothing in them; `python -m tests.false_positives` makes the whole table."""

from __future__ import annotations

import pandas as pd
import pytest

from analyses.registry import EXPERIMENTS, Experiment
from analyses.result import Result
from tests.false_positives import table_of, verdicts_on
from tests.planted import empty_model


def test_shares_are_counted_with_their_binomial_interval():
    rows = [(i, "a", "m", "supported" if i < 2 else "not supported") for i in range(40)]
    rows += [(i, "b", "n", "underpowered") for i in range(10)] + [(10, "b", "", "ValueError: no")]
    table = table_of(pd.DataFrame(rows, columns=["model", "experiment", "metric", "verdict"]))
    share, none, failed = table.to_dict("records")
    assert (share["models"], share["supported"], share["share"]) == (40, 2, 0.05)
    # Clopper-Pearson for 2 of 40, from the beta quantiles of statistical tables
    assert (share["low"], share["high"]) == pytest.approx((0.0061, 0.1692), abs=1e-4)
    assert (none["supported"], none["underpowered"], none["failed"]) == (0, 10, 1)
    assert (none["low"], none["high"]) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    assert (failed["metric"], failed["models"], failed["failed"]) == ("", 0, 1)


def test_every_model_is_judged_with_a_seed_of_its_own_and_a_failure_is_a_row(monkeypatch):
    seeds = []

    def experiment(model, *, seed, quick, progress):
        seeds.append(seed)
        if seed == 1:
            raise ValueError("no")
        return Result("layer_evolution", "", metrics={"x": 1.0}, verdicts={"x": "not supported"})

    monkeypatch.setattr(Experiment, "load", lambda self: experiment)
    verdicts = verdicts_on([None, None, None], [EXPERIMENTS[7]], quick=True)
    assert seeds == [0, 1, 2]
    assert verdicts["metric"].tolist() == ["x", "", "x"]
    assert verdicts["verdict"].tolist() == ["not supported", "ValueError: no", "not supported"]


def test_a_few_empty_models_support_nothing_of_the_lens():
    table = table_of(verdicts_on(map(empty_model, range(2)), [EXPERIMENTS[7]], quick=True))
    assert len(table)
    assert table["failed"].sum() == table["supported"].sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", EXPERIMENTS)
def test_verdicts_on_empty_models_are_seldom_in_favour(number):
    """The lower end of the exact interval lies at or below 5% for every verdict."""
    table = table_of(verdicts_on(map(empty_model, range(20)), [EXPERIMENTS[number]], quick=True))
    assert (table["failed"] == 0).all(), table.to_string()
    assert (table["low"] <= 0.05).all(), table.to_string()
