from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analyses.statistics.intervals import (
    Interval,
    bootstrap_band,
    bootstrap_interval,
    rate_band,
    rate_interval,
    t_interval,
)
from analyses.statistics.pvalues import (
    benjamini_hochberg,
    holm,
    paired_permutation_pvalue,
    permutation_pvalue,
    predictive_pvalue,
    sign_flip_pvalues,
)
from analyses.statistics.resampling import mean_band
from analyses.statistics.verdicts import verdict
from reflowlens.errors import ReflowlensError
from tests.reference.holm import closed_bonferroni

numbers = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(("alternative", "expected"), [("greater", 2 / 5), ("less", 5 / 5), ("two-sided", 4 / 5)])
def test_permutation_pvalue_counts_ties_and_the_observed(alternative, expected):
    assert permutation_pvalue(3.0, [0.0, 1.0, 2.0, 3.0], alternative) == pytest.approx(expected)


def test_permutation_pvalue_takes_a_sum_in_another_order_as_a_tie():
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert permutation_pvalue(0.1 + 0.2 + 0.3, [0.3 + 0.2 + 0.1]) == 1.0


@given(numbers, st.lists(numbers, min_size=1, max_size=50))
def test_permutation_pvalues_lie_above_zero_and_at_most_at_one(observed, null):
    greater, less, both = (permutation_pvalue(observed, null, a) for a in ("greater", "less", "two-sided"))
    assert 1 / (1 + len(null)) <= min(greater, less) <= both <= 1
    assert greater + less >= 1
    assert permutation_pvalue(-observed, [-value for value in null], "less") == greater


def test_permutation_pvalue_is_uniform_under_the_null():
    draws = np.random.default_rng(0).normal(size=(4000, 20))
    p = np.array([permutation_pvalue(row[0], row[1:]) for row in draws])
    for level in (0.05, 0.25, 0.5, 0.9):  # each attainable: 20 exchangeable values, p a multiple of 1/20
        assert np.mean(p <= level + 1e-9) == pytest.approx(level, abs=0.025)


def test_permutation_pvalue_rejects_what_cannot_be_ranked():
    with pytest.raises(ReflowlensError, match="at least one permutation"):
        permutation_pvalue(1.0, [])
    with pytest.raises(ReflowlensError, match="null: finite numbers expected, got 1"):
        permutation_pvalue(1.0, [0.0, float("nan")])
    with pytest.raises(ReflowlensError, match="no alternative 'bigger'; there are greater, less, two-sided"):
        permutation_pvalue(1.0, [0.0], "bigger")


def test_paired_pvalue_is_exact_for_few_units():
    differences = np.array([0.3, 1.2, -0.4, 0.9, 0.5])
    means = [np.mean(differences * signs) for signs in product((1, -1), repeat=5)]
    expected = np.mean(np.array(means) >= differences.mean() - 1e-12)
    assert paired_permutation_pvalue(differences) == pytest.approx(expected)


def test_paired_pvalue_of_many_units_is_seeded_and_sees_the_shift():
    values = np.random.default_rng(1).normal(size=200)
    shifted = paired_permutation_pvalue(values + 0.5, permutations=999, seed=3)
    assert shifted == 1 / 1000
    assert paired_permutation_pvalue(-values - 0.5, "less", permutations=999) == 1 / 1000
    again = [paired_permutation_pvalue(values, permutations=999, seed=3) for _ in range(2)]
    assert again[0] == again[1] > 0.01


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(2).normal(loc=3.0, size=(400, 40))
    intervals = [bootstrap_interval(sample, resamples=400, seed=i) for i, sample in enumerate(samples)]
    coverage = np.mean([interval.low <= 3.0 <= interval.high for interval in intervals])
    assert 0.90 <= coverage <= 0.98  # a percentile interval of 40 units is slightly too short


def test_the_ends_of_an_interval_are_in_order_where_values_are_all_alike():
    for n in (2, 5, 20, 25):
        low, high = bootstrap_interval([-1.2908833308092904] * n)
        assert low <= high
        assert low == pytest.approx(-1.2908833308092904)


def test_bootstrap_interval_is_seeded_and_takes_other_statistics():
    values = np.random.default_rng(3).exponential(size=50)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    low, high = bootstrap_interval(values, np.median, confidence=0.8)
    assert low <= np.median(values) <= high
    wide = bootstrap_interval(values, np.median)
    assert wide.low <= low
    assert wide.high >= high


def test_bootstrap_of_identical_values_is_a_point_and_of_one_unit_an_error():
    assert bootstrap_interval([0.5] * 3) == Interval(0.5, 0.5)
    with pytest.raises(
        ReflowlensError, match="at least 2 units of replication are needed to say how sure it is, got 1"
    ):
        bootstrap_interval([0.5])
    with pytest.raises(ReflowlensError, match="values: finite numbers expected"):
        bootstrap_interval([0.5, float("inf")])
    with pytest.raises(ReflowlensError, match=r"1 dimension\(s\) expected, got shape \(2, 2\)"):
        bootstrap_interval([[1.0, 2.0], [3.0, 4.0]])


def test_bootstrap_band_resamples_whole_units():
    curves = np.random.default_rng(4).normal(size=(30, 6))
    low, high = bootstrap_band(curves, seed=7)
    assert low.shape == high.shape == (6,)
    assert (low[2], high[2]) == pytest.approx(bootstrap_interval(curves[:, 2], seed=7))
    together = np.stack([curves[:, 0], -curves[:, 0]], axis=1)
    low, high = bootstrap_band(together, seed=7)
    assert low[0] == pytest.approx(-high[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_equals_closed_testing(pvalues):
    adjusted = holm(pvalues)
    np.testing.assert_allclose(adjusted, closed_bonferroni(pvalues), rtol=1e-12)
    assert np.all(adjusted >= np.array(pvalues) * (1 - 1e-12))
    assert np.all(adjusted <= 1)
    assert np.all(np.diff(adjusted[np.argsort(pvalues)]) >= 0)


def test_holm_of_nothing_and_of_no_pvalue():
    assert holm([]).shape == (0,)
    with pytest.raises(ReflowlensError, match="between 0 and 1"):
        holm([0.1, 1.5])


@pytest.mark.parametrize(
    ("interval", "p", "units", "published", "expected"),
    [
        ((0.3, 0.4), 0.001, 100, None, "supported"),
        ((0.3, 0.4), 0.001, 19, None, "underpowered"),
        ((0.3, 0.4), 0.05, 100, None, "not supported"),
        ((0.1, 0.4), 0.001, 100, None, "not supported"),
        ((0.0, 0.6), 0.2, 100, 0.5, "underpowered"),
        ((0.0, 0.3), 0.2, 100, 0.5, "not supported"),
    ],
)
def test_verdict_rule(interval, p, units, published, expected):
    assert verdict(interval, 0.1, p, minimum_units=20, units=units, published=published) == expected


@given(numbers, numbers, numbers, st.floats(0, 1), st.none() | numbers)
def test_a_verdict_is_supported_only_clear_of_the_control(one, other, control, p, published):
    interval = (min(one, other), max(one, other))
    judged = verdict(interval, control, p, minimum_units=1, units=10, published=published)
    assert (judged == "supported") == (p < 0.05 and interval[0] > control)


def test_verdict_rejects_impossible_input():
    with pytest.raises(ReflowlensError, match="low, high"):
        verdict((0.4, 0.3), 0.1, 0.01, minimum_units=1, units=2)
    with pytest.raises(ReflowlensError, match=r"and p = 1\.2"):
        verdict((0.3, 0.4), 0.1, 1.2, minimum_units=1, units=2)
    with pytest.raises(ReflowlensError, match="finite"):
        verdict((0.3, float("nan")), 0.1, 0.2, minimum_units=1, units=2)


def test_predictive_p_is_uniform_for_one_more_draw():
    generator = np.random.default_rng(0)
    p = [predictive_pvalue(row[0], row[1:]) for row in generator.normal(3.0, 2.0, size=(4000, 9))]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_predictive_p_of_draws_that_are_all_alike():
    assert predictive_pvalue(2.0, [1.0, 1.0, 1.0]) == 0
    assert predictive_pvalue(0.0, [1.0, 1.0, 1.0]) == 1
    assert predictive_pvalue(1.0, [1.0, 1.0, 1.0]) == 0.5


@pytest.mark.parametrize(("hits", "n"), [(0, 6), (6, 6), (1, 20), (13, 24), (500, 501)])
def test_rates_have_clopper_and_pearsons_interval(hits: int, n: int) -> None:
    interval = rate_interval([1.0] * hits + [0.0] * (n - hits))
    expected = stats.binomtest(hits, n).proportion_ci(method="exact")
    assert interval == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_interval_of_a_rate_covers_it_where_a_bootstrap_is_a_point() -> None:
    draws = (np.random.default_rng(0).random((300, 12)) < 0.95).astype(float)
    exact = [low <= 0.95 <= high for low, high in map(rate_interval, draws)]
    resampled = [low <= 0.95 <= high for low, high in (bootstrap_interval(d, resamples=200) for d in draws)]
    assert np.mean(exact) >= 0.95
    assert np.mean(resampled) < 0.6  # more than half of the samples have no failure


def test_a_band_of_rates_counts_where_it_can_and_resamples_shares() -> None:
    shares = np.random.default_rng(1).random((9, 1))
    table = np.concatenate([np.ones((9, 1)), np.zeros((9, 1)), shares], axis=1)
    low, high = rate_band(table, seed=3)
    assert [*low[:2], *high[:2]] == pytest.approx([0.025 ** (1 / 9), 0.0, 1.0, 1 - 0.025 ** (1 / 9)])
    assert (low[2], high[2]) == pytest.approx(bootstrap_interval(shares[:, 0], seed=3))
    for outside in ([0.5, 1.5], [-0.1, 1.0]):
        with pytest.raises(ReflowlensError, match="a mean of values from 0 to 1"):
            rate_interval(outside)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_sign_flips_of_columns_are_those_of_each(alternative):
    table = np.random.default_rng(0).normal(0.3, size=(9, 4))
    table[:, 3] = [1, 1, 1, 1, -1, -1, -1, -1, 0]  # ties with itself
    alone = [paired_permutation_pvalue(column, alternative) for column in table.T]
    np.testing.assert_allclose(sign_flip_pvalues(table, alternative), alone, rtol=1e-12)


def test_sign_flips_of_many_units_are_near_the_exact_and_never_zero():
    table = np.random.default_rng(1).normal(0.4, size=(13, 3))
    exact = sign_flip_pvalues(table, permutations=2**13)
    np.testing.assert_allclose(sign_flip_pvalues(table, permutations=2**13 - 1), exact, atol=0.02)
    assert sign_flip_pvalues(np.ones((64, 1)), permutations=99).tolist() == [0.01]


def test_sign_flips_reject_what_has_no_p():
    for table in (np.ones((1, 2)), np.full((3, 1), np.nan), np.ones(3)):
        with pytest.raises(ReflowlensError):
            sign_flip_pvalues(table)


def test_benjamini_and_hochbergs_p_is_scipys():
    pvalues = np.random.default_rng(0).uniform(size=30) ** 3
    np.testing.assert_allclose(benjamini_hochberg(pvalues), stats.false_discovery_control(pvalues), rtol=1e-12)
    with pytest.raises(ReflowlensError, match="between 0 and 1"):
        benjamini_hochberg([1.5])


def test_a_band_of_means_is_that_of_a_bootstrap(monkeypatch):
    values = 1e4 + np.random.default_rng(2).normal(size=(40, 5))
    low, high = mean_band(values, resamples=4000)
    wanted = bootstrap_band(values, resamples=4000)
    np.testing.assert_allclose(low, wanted[0], atol=0.03)
    np.testing.assert_allclose(high, wanted[1], atol=0.03)
    monkeypatch.setattr("analyses.statistics.resampling._COLUMNS", 2)
    np.testing.assert_allclose(mean_band(values, resamples=4000), (low, high), atol=1e-5)


def test_students_interval_is_scipys():
    values = [0.3, -0.1, 0.8, 0.4]
    (low, high), p = t_interval(values)
    found = stats.ttest_1samp(values, 0.0)
    assert (low, high, p) == pytest.approx((*found.confidence_interval(), found.pvalue), rel=1e-12)


@pytest.mark.parametrize("values", [[1.0, np.nan, 1.2], [np.nan, np.nan], [0.0, np.nan], [1.0, np.inf, 2.0]])
def test_of_what_is_not_finite_students_t_says_nothing(values):
    (low, high), p = t_interval(values)
    assert np.isnan([low, high, p]).all()


def test_students_t_of_values_all_alike_is_where_ever_smaller_spreads_lead():
    assert t_interval([-0.05, -0.05, -0.05]) == ((-0.05, -0.05), 0.0)  # whose mean rounds to another number
    assert t_interval([0.0, 0.0, 0.0]) == ((0.0, 0.0), 1.0)
    ends, pvalues = zip(*(t_interval([-0.05 - d, -0.05, -0.05 + d]) for d in (1e-3, 1e-6, 1e-9)), strict=True)
    assert list(pvalues) == sorted(pvalues, reverse=True)
    assert pvalues[-1] < 1e-15
    assert ends[-1] == pytest.approx((-0.05, -0.05), rel=1e-6)
