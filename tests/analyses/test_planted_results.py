"""Planted against found; the experiments' own tests assert the same cases one by one."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from analyses.registry import EXPERIMENTS
from analyses.result.result import Result
from tests.planted_results import CASES, DECISION, Case, metric, missed, shown, table_of, verdict
from tests.support import ROOT

# Checks of exactness, and places at which other metrics are measured.
WITHOUT_CONTROL = {"rotated_basis_rank_difference", "best_layer"}


def test_every_experiment_has_a_case():
    assert list(dict.fromkeys(case.experiment for case in CASES)) == [each.name for each in EXPERIMENTS.values()]


def test_a_number_is_found_within_its_tolerance_and_a_verdict_as_it_is():
    result = Result("layer_evolution", "", metrics={"x": 1.02, "y": 2.0}, verdicts={"x": "not supported"})
    expected = (metric("x", 1, 0.03), metric("x", 1, 0.01), metric("y", 2), verdict("x", "supported"))
    assert [each.holds(result) for each in expected] == [True, False, True, False]
    assert missed(result, expected) == [
        "x: 1 ± 0.01 was expected, found 1.02",
        "verdict of x: supported ± 0.0 was expected, found not supported",
    ]
    table = table_of([(Case("layer_evolution", DECISION.model, DECISION.measure, expected), result)])
    assert table["ok"].tolist() == [True, False, True, False]
    assert table["model"].unique().tolist() == ["deciding_model"]
    lines = shown(table).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["7", "layer_evolution", "deciding_model", "x", "1", "1.02", "0.01", "NO"]


def test_the_documentation_shows_every_row():
    page = (ROOT / "docs/validation.md").read_text(encoding="utf8")
    shown_rows = re.findall(r"^ ?\d+ (\w+_\w+) +(\w+) +(\S.*?)(?:  |$)", page, flags=re.MULTILINE)
    rows = [(case.experiment, case.model.func.__name__, each.quantity) for case in CASES for each in case.expected]
    assert shown_rows == rows


@pytest.mark.slow
@pytest.mark.by_hand
def test_every_planted_answer_is_found_and_every_metric_has_its_control():
    results = [(case, case.run()) for case in CASES]
    table = table_of(results)
    assert table["ok"].all(), shown(pd.DataFrame(table[~table["ok"]]))
    for case, result in results:
        bare = set(result.metrics) - set(result.controls) - WITHOUT_CONTROL
        for name in bare:  # a control that has no value here is told of
            assert any(note.startswith(f"{name}: without ") for note in result.notes), (case.experiment, name)
