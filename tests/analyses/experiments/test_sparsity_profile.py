from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analyses.claims import CLAIMS
from analyses.experiments.sparsity_profile.experiment import sparsity_profile
from analyses.measures.sparsity import (
    active_signals,
    check_rule,
    column_kurtosis,
    density_curve,
    gaussian_density,
    gini,
    hoyer,
    lorenz_curve,
    participation_share,
    support_size,
)
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.resampling import percentile_interval, resampled_means
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.planted_results import ACTIVE, SPARSITY, missed
from tests.support.planted import empty_model, of_architecture, sparse_model

SPARSE = {"active_share", "hoyer", "participation", "signal_kurtosis", "support_share"}


@pytest.fixture(scope="module")
def sparse():
    return SPARSITY.run()


@pytest.fixture(scope="module")
def empty():
    return sparsity_profile(empty_model(), rotations=10)


def test_the_planted_count_is_found(sparse):
    assert not missed(sparse, SPARSITY.expected)
    assert (sparse.frames["tokens"]["active"] == ACTIVE).all()


def test_the_planted_count_beats_a_rotation_and_is_what_varimax_finds(sparse):
    assert {metric for metric, verdict in sparse.verdicts.items() if verdict == "supported"} >= SPARSE
    for metric in SPARSE - {"active_share"}:
        assert sparse.controls[metric]["varimax"] == pytest.approx(sparse.metrics[metric], rel=0.05)
        assert abs(sparse.controls[metric]["rotated_basis"] / sparse.metrics[metric] - 1) > 0.2
    assert set(sparse.controls["hoyer"]) == {"gaussian", "untrained", "rotated_basis", "varimax"}


@pytest.mark.parametrize(
    ("rule", "threshold"), [("std", 1.5), ("absolute", 0.1), ("relative", 0.5), ("mass", 0.99), ("abs_gt_2mean", None)]
)
def test_every_rule_finds_the_planted_count(rule, threshold):
    rows = sparse_model(ACTIVE).embed.W_recipe.detach()[:300]
    assert (active_signals(rows, rule, threshold).sum(dim=1) == ACTIVE).all()


def test_nothing_is_found_where_nothing_is(empty):
    assert set(empty.verdicts) == set(CLAIMS["sparsity_profile"])
    assert set(empty.verdicts.values()) == {"not supported"}
    assert empty.metrics["active_share"] == pytest.approx(empty.controls["active_share"]["gaussian"], rel=0.01)
    assert empty.metrics["hoyer"] == pytest.approx(empty.controls["hoyer"]["rotated_basis"], rel=0.01)


@pytest.mark.slow
@pytest.mark.by_hand
def test_claims_of_empty_models_are_rarely_supported():
    """Six claims of each of 12 models, Holm-adjusted: 0.6 models with any are expected."""
    wrong = [
        "supported" in sparsity_profile(empty_model(seed), rotations=4, seed=seed, texts=[]).verdicts.values()
        for seed in range(1, 13)
    ]
    assert sum(wrong) <= 3


def test_frames_agree_with_the_metrics(sparse, empty):
    for result in (sparse, empty):
        frames = result.frames
        assert frames["tokens"]["active"].sum() == frames["signals"]["usage"].sum()
        assert frames["tokens"]["occurrences"].sum() == result.params["text_tokens"]
        shares = frames["counts"].groupby("basis")["share"].sum()
        assert shares.to_numpy() == pytest.approx(1)
        assert gini(frames["signals"]["usage"]) == pytest.approx(result.metrics["usage_gini"])
        curve = frames["usage"].query("basis == 'trained'")
        assert 1 - 2 * np.trapezoid(curve["held"], curve["signals"]) == pytest.approx(result.metrics["usage_gini"])
        assert set(result.figures) == {"active", "usage", "lorenz", "density", "recipes"}
        for metric, interval in result.intervals.items():
            if metric == "usage_gini":  # of usage all alike a resample is never as even: its interval lies above
                continue
            slack = 1e-5 * abs(result.metrics[metric])  # resamples are float32
            assert interval.low - slack <= result.metrics[metric] <= interval.high + slack, metric


def test_topk_has_its_own_share_as_a_control():
    result = sparsity_profile(build_model(of_architecture("reflow_topk", n_layers=1)), "absolute", 1e-9, rotations=2)
    assert result.controls["active_signals"]["topk"] == 4
    assert result.metrics["active_signals"] == pytest.approx(4, rel=0.01)


def test_gpt2_is_profiled_by_the_coordinates_of_its_embedding():
    result = sparsity_profile(build_model(of_architecture("gpt2", n_layers=1)), rotations=2)
    assert result.params["view"] == "identity"
    assert result.metrics["active_share"] == pytest.approx(0.11, abs=0.01)
    assert set(result.metrics) == set(result.definitions)


def test_without_texts_or_words_what_needs_them_is_left_out_and_said():
    result = sparsity_profile(empty_model(), rotations=2, texts=[], lexicon=Lexicon(version="x"))
    assert "active_share_text" not in result.metrics
    assert "recipes" not in result.figures
    assert any("active_share_text and usage_gini_text are absent" in note for note in result.notes)
    assert any("no heatmap of recipes" in note for note in result.notes)


def test_the_same_seed_gives_the_same_frames():
    first, second = (sparsity_profile(empty_model(), rotations=2, seed=3) for _ in "ab")
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "loud"}, "rule must be one of 'abs_gt_2mean'"),
        ({"rule": "abs_gt_2mean", "threshold": 1.0}, "takes no threshold"),
        ({"rule": "mass", "threshold": 1.0}, "between 0 and 1"),
        ({"rule": "std", "threshold": 0.0}, "above 0"),
        ({"rotations": 1}, "rotations must be at least 2"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        sparsity_profile(empty_model(), **options)


# -- measures ---------------------------------------------------------------------------------------------------------


def test_gini_is_the_mean_difference_over_twice_the_mean():
    values = np.random.default_rng(0).gamma(0.5, size=(3, 17))
    for row, found in zip(values, gini(values), strict=True):
        assert found == pytest.approx(np.abs(row[:, None] - row).mean() / (2 * row.mean()))
    assert gini([0, 0]) == 0
    with pytest.raises(ReflowlensError, match="non-negative"):
        gini([1, -1])
    assert lorenz_curve([0, 0]).tolist() == [0, 0, 0]


def test_mass_takes_the_fewest_entries_that_hold_it():
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    for row, mask in zip(rows, active_signals(rows, "mass", 0.8), strict=True):
        ordered = row.square().sort(descending=True).values
        needed = next(k for k in range(1, 10) if ordered[:k].sum() >= 0.8 * ordered.sum())
        assert int(mask.sum()) == needed
        assert row[mask].abs().min() > row[~mask].abs().max()
    assert not active_signals(torch.zeros(1, 4), "mass").any()


def test_support_is_what_trying_every_number_finds():
    generator = torch.Generator().manual_seed(1)
    rows, basis = torch.randn(6, 12, generator=generator), torch.randn(12, 5, generator=generator)
    for row, found in zip(rows, support_size(rows, basis).tolist(), strict=True):
        order = (row.abs() * basis.norm(dim=1)).argsort(descending=True)
        whole = row @ basis
        short = [
            k
            for k in range(1, 13)
            if (row[order[:k]] @ basis[order[:k]] - whole).square().sum() > 0.1 * whole.square().sum()
        ]
        assert found == max(short, default=0) + 1


def test_the_ends_of_the_scales_and_a_gaussian():
    one, flat = torch.eye(16)[:1], torch.ones(1, 16)
    assert hoyer(torch.cat([one, flat])).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert participation_share(torch.cat([one, flat])).tolist() == pytest.approx([1 / 16, 1])
    gaussian = torch.randn(400, 2000, generator=torch.Generator().manual_seed(0))
    assert float(hoyer(gaussian).mean()) == pytest.approx(1 - (2 / np.pi) ** 0.5, rel=0.03)
    assert float(participation_share(gaussian).mean()) == pytest.approx(1 / 3, rel=0.01)
    assert density_curve(gaussian, [0.5, 2.0]) == pytest.approx(gaussian_density([0.5, 2.0]), rel=0.02)
    expected = stats.kurtosis(gaussian.double().numpy(), fisher=False)
    assert column_kurtosis(gaussian) == pytest.approx(expected, rel=1e-6)
    assert check_rule("std", None)[1] == 1.5


def test_resampled_means_are_those_of_the_bootstrap():
    values = np.random.default_rng(0).standard_normal(300)
    low, high = percentile_interval(resampled_means(values[:, None], resamples=2000)[:, 0])
    expected = bootstrap_interval(values)
    assert (low, high) == pytest.approx(expected, abs=0.015)
    with pytest.raises(ReflowlensError, match="at least 2 units"):
        resampled_means([[1.0]])


def test_the_packaged_texts_are_read_whole():
    assert sparsity_profile(empty_model(), rotations=2).params["texts"] == len(load_lexicon().neutral_texts)
