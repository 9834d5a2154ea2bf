"""Means and differences over seeds, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses.findings.seeds import gap, measures_over_seeds, over_seeds, paired_difference
from reflowlens.errors import ReflowlensError

VALUES = {"a": [1.0, 2.0, 4.0], "b": [0.5, 1.9, 3.0]}
FRAME = pd.DataFrame(
    [{"arm": arm, "seed": seed, "value": value} for arm, own in VALUES.items() for seed, value in enumerate(own)]
)


def test_means_over_seeds() -> None:
    found = over_seeds(FRAME).set_index("arm")
    low, high = stats.t.interval(0.95, 2, loc=np.mean(VALUES["a"]), scale=stats.sem(VALUES["a"]))
    assert found.loc["a", ["seeds", "mean", "low", "high"]].tolist() == pytest.approx([3, 7 / 3, low, high])
    assert found.loc["a", "sd"] == pytest.approx(np.std(VALUES["a"], ddof=1))


def test_several_measures_over_seeds() -> None:
    found = measures_over_seeds(FRAME.assign(twice=2 * FRAME["value"]), ["value", "twice"])
    assert found["measure"].tolist() == ["value", "value", "twice", "twice"]
    assert found["mean"].tolist() == pytest.approx([7 / 3, 1.8, 14 / 3, 3.6])


def test_runs_of_a_seed_are_paired_whatever_their_order() -> None:
    test = stats.ttest_rel(VALUES["a"], VALUES["b"])
    low, high = test.confidence_interval()
    found = paired_difference(FRAME.sample(frac=1, random_state=0), "a", "b")
    assert found == pytest.approx((np.mean(VALUES["a"]) - np.mean(VALUES["b"]), low, high, test.pvalue, 3))


def test_a_seed_that_one_arm_lacks_is_left_out() -> None:
    found = paired_difference(FRAME.drop(index=5), "a", "b")
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.3)


def test_one_seed_has_a_mean_alone() -> None:
    found = paired_difference(FRAME[FRAME.seed == 0], "a", "b")
    assert (found.mean, found.seeds) == (0.5, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.p)
    assert over_seeds(FRAME[FRAME.seed == 0]).low.isna().all()


def test_gaps() -> None:
    table = FRAME.assign(metric="hoyer", experiment="sparsity_profile", control_rotated_basis=0.5)
    assert gap(table, "hoyer").value.tolist() == pytest.approx([0.5, 1.5, 3.5, 0.0, 1.4, 2.5])
    with pytest.raises(ReflowlensError, match="no metric 'hoyr' was measured"):
        gap(table, "hoyr")
    with pytest.raises(ReflowlensError, match="no control 'untrained' of hoyer was measured"):
        gap(table, "hoyer", "untrained")


def test_what_cannot_be_paired() -> None:
    with pytest.raises(ReflowlensError, match="no run of an arm 'c'; there are a, b"):
        paired_difference(FRAME, "c", "a")
    with pytest.raises(ReflowlensError, match="arm 'a' has several values a seed"):
        paired_difference(pd.concat([FRAME, FRAME]), "a", "b")
    with pytest.raises(ReflowlensError, match="no seed was trained in both 'a' and 'b'"):
        paired_difference(FRAME[(FRAME.arm == "a") == (FRAME.seed == 0)], "a", "b")
