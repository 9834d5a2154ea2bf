from __future__ import annotations

import pytest

from analyses.claims import CLAIMS, Claim, bound_of, claim_of
from analyses.controls.bases import Bases, basis_verdicts
from analyses.registry import EXPERIMENTS
from analyses.report.explanations import explanation
from analyses.result.finding import Finding


def judged(metric, experiment, value, interval, rotated, untrained, alternative):
    """The verdict on one metric of a trained basis beside rotations of it and the untrained model."""
    turned = {f"rotated_{i}": rotated * (1 + 1e-4 * i) for i in range(4)}
    controls = {"rotated_basis": rotated, "untrained": untrained}
    found, _ = basis_verdicts(
        {metric: Finding(value, interval, controls)},
        {metric: Bases(value, turned, 0.9, {"untrained": untrained})},
        {metric: alternative},
        {metric: 1000},
        minimum_units=20,
        experiment=experiment,
    )
    return found[metric].verdict


@pytest.mark.parametrize(
    ("interval", "untrained", "verdict"),
    [
        ((0.608, 0.678), 0.641, "not supported"),  # which lies inside
        ((0.608, 0.678), 0.540, "supported"),
        ((0.580, 0.610), 0.540, "not supported"),  # beyond it, by too little
    ],
)
def test_the_untrained_model_must_be_beaten_too(interval, untrained, verdict):
    value = sum(interval) / 2
    assert judged("neighbour_overlap", "signal_flow", value, interval, 0.52, untrained, "greater") == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.97, "not supported"), (0.85, "supported")])
def test_a_difference_that_many_units_make_certain_need_not_matter(share, verdict):
    value = 0.11 * share
    interval = (value - 1e-4, value + 1e-4)  # of 49,152 tokens
    assert judged("active_share", "sparsity_profile", value, interval, 0.11, 0.11, "less") == verdict


def test_the_hardest_control_decides():
    claim = Claim(("a", "b"), 0.1)
    assert claim.bound({"a": 0.3, "b": 0.2, "c": 0.9}) == pytest.approx(0.4)
    assert claim.bound({"a": 0.3, "b": 0.2}, sign=-1) == pytest.approx(-0.1)
    relative = Claim(("a",), 0.1, relative=True)
    assert relative.bound({"a": -2.0}) == pytest.approx(-1.8)
    assert relative.bound({"a": 2.0}, sign=-1) == pytest.approx(-1.8)
    assert Claim(("a",), 0.05, beyond=0.5).bound({"a": 0.1}) == 0.5
    assert (claim.amount, relative.amount) == ("0.1", "10%")


def test_every_claim_is_of_an_experiment_and_explained():
    assert set(CLAIMS) == {experiment.name for experiment in EXPERIMENTS.values()}
    for experiment, claims in CLAIMS.items():
        for pattern, claim in claims.items():
            metric = pattern.replace("*", "5" if "lifting" in pattern else "")
            assert claim_of(experiment, metric) is claim
            assert claim.smallest > 0 or claim.beyond
            explained = explanation(experiment, metric)
            assert "*" in pattern or (explained is not None and explained.claim is claim)
    assert claim_of("semantic_algebra", "own") is claim_of("my_experiment", "accuracy_at_1") is None
    assert bound_of("semantic_algebra", "recipe_minus_E", {"untrained": 3.0}) == 0.05
