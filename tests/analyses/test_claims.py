from __future__ import annotations

import pytest

from analyses.claims import CLAIMS, UNTRAINED, Claim, bound_of, claim_of, joined_draws, untrained_names
from analyses.controls.bases import Bases, basis_verdicts
from analyses.registry import EXPERIMENTS
from analyses.report.explanations import explanation
from analyses.result import Finding, Result


def judged(metric, experiment, value, interval, rotated, *untrained):
    """The verdict on one metric of a trained basis beside rotations of it and draws of the untrained model."""
    turned = {f"rotated_{i}": rotated * (1 + 1e-4 * i) for i in range(4)}
    draws = dict(zip(UNTRAINED, untrained, strict=False))
    found, _ = basis_verdicts(
        {metric: Finding(value, interval, {"rotated_basis": rotated, **draws})},
        {metric: Bases(value, turned, 0.9, draws)},
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
    assert judged("neighbour_overlap", "signal_flow", value, interval, 0.52, untrained) == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.97, "not supported"), (0.85, "supported")])
def test_a_difference_that_many_units_make_certain_need_not_matter(share, verdict):
    value = 0.11 * share
    interval = (value - 1e-4, value + 1e-4)  # of 49,152 tokens
    assert judged("active_share", "sparsity_profile", value, interval, 0.11, 0.11) == verdict


@pytest.mark.parametrize(
    ("metric", "draws", "hardest"),
    [("neighbour_overlap", (0.40, 0.62, 0.45), 0.62), ("leading_since", (0.80, 0.62, 0.75), 0.62)],
)
def test_the_hardest_of_several_untrained_models_decides(metric, draws, hardest):
    """A first draw that lies far off by chance supports nothing that another one contradicts."""
    interval, rotated = (0.60, 0.66), 0.3 if metric == "neighbour_overlap" else 0.9
    controls = dict(zip(UNTRAINED, draws, strict=True))
    assert judged(metric, "signal_flow", 0.63, interval, rotated, draws[0]) == "supported"
    assert judged(metric, "signal_flow", 0.63, interval, rotated, *draws) == "not supported"
    findings = {metric: Finding(0.63, interval, controls), "sum_error": Finding(0.1, None, controls)}
    result = Result("signal_flow", "Signal Flow", findings=findings)
    assert result.controls[metric] == {"untrained": hardest}
    assert result.controls["sum_error"] == {"untrained": pytest.approx(sum(draws) / 3)}
    assert joined_draws("own", "own", {"untrained": 0.1 + 0.2}) == {"untrained": 0.1 + 0.2}


def test_several_untrained_models_are_drawn_where_a_verdict_asks_for_them():
    asking = {name for name in CLAIMS if len(untrained_names(name, quick=False)) == 3}
    assert {name for name in CLAIMS if len(untrained_names(name, quick=True)) == 2} == asking
    assert set(CLAIMS) - asking == {"typo_resilience", "emotion_surgery", "genetic_hijack", "circuit_tracing"}


def test_the_hardest_control_decides():
    claim = Claim(("a", "b"), 0.1)
    assert claim.bound({"a": 0.3, "b": 0.2, "c": 0.9}) == pytest.approx(0.4)
    assert Claim(("a", "b"), 0.1, below=True).bound({"a": 0.3, "b": 0.2}) == pytest.approx(-0.1)
    relative = Claim(("a",), 0.1, relative=True)
    assert relative.bound({"a": -2.0}) == pytest.approx(-1.8)
    assert Claim(("a",), 0.1, relative=True, below=True).bound({"a": 2.0}) == pytest.approx(-1.8)
    assert Claim(("a",), 0.05, beyond=0.5).bound({"a": 0.1}) == 0.5
    assert (claim.amount, relative.amount) == ("0.1", "10%")


@pytest.mark.parametrize(
    ("measure", "metric", "controls", "of", "bound"),
    [
        ("minimal_pairs", "accuracy_per_token", {"chance": 0.5, "shorter": 0.6}, 1.0, 0.65),
        ("task_performance", "accuracy", {"chance": 0.5, "other_prompt": 0.4, "corrupted": 0.9}, 1.0, 0.55),
        ("head_ablation", "largest_drop", {"random_direction": -0.3}, -4.0, 0.2),  # nothing is the harder one
        ("causal_tracing", "mlp_peak", {"elsewhere": 0.1}, 0.6, 0.13),
        ("unit_statistics", "x_firing_rate", {"untrained": 0.5, "untrained_2": 0.4, "shuffled_text": 0.1}, 1.0, -0.36),
        ("head_patterns", "induction_text", {"uniform": 0.4}, 1.0, 0.05),
        ("refinement", "gate_interaction", {}, 1.0, 0.01),
    ],
)
def test_measures_have_their_smallest_effects_too(measure, metric, controls, of, bound):
    assert bound_of(measure, metric, controls, of) == pytest.approx(bound)


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
