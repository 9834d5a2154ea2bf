from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.experiments.basis_geometry.coherence import measure_coherence, welch_bound
from analyses.experiments.basis_geometry.experiment import basis_geometry
from analyses.experiments.basis_geometry.spectra import (
    condition_number,
    effective_rank,
    factored_singular_values,
    gaussian_singular_values,
    marchenko_pastur_edges,
    stable_rank,
)
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.planted_results import GEOMETRY, RANK, missed
from tests.planted_results import GEOMETRY_TEXTS as TEXTS
from tests.support.planted import empty_model, gaussian_basis_model, of_architecture


@pytest.fixture(scope="module")
def planted():
    return GEOMETRY.run()


def test_the_planted_rank_is_found(planted):
    assert not missed(planted, GEOMETRY.expected)
    for name in ("effective_rank", "stable_rank", "participation_ratio"):
        assert planted.controls[name]["gaussian"] > 2 * RANK
        assert planted.controls[name]["untrained"] == pytest.approx(32, rel=1e-4)


def test_residuals_lie_within_the_planted_directions(planted):
    for name in ("alignment_first", "alignment_last", "alignment_mean"):
        assert planted.controls[name]["random_direction"] == pytest.approx(RANK / 32, abs=0.08)
        assert planted.controls[name]["best_directions"] >= planted.metrics[name] - 1e-6
    assert set(planted.figures) == {"scree_B", "scree_E", "cosines", "gram", "alignment"}


def test_an_orthogonal_basis_has_no_strongest_direction_and_no_coherence():
    result = basis_geometry(empty_model(), texts=TEXTS, quick=True)
    assert result.verdicts == {"effective_rank": "not supported", "effective_rank_E": "not supported"}
    assert result.metrics["effective_rank"] == pytest.approx(32, rel=1e-4)
    assert "alignment_first" not in result.metrics
    assert any("no alignment of the trained basis" in note for note in result.notes)
    assert any("no verdict on coherence_mean" in note for note in result.notes)


def test_nothing_is_found_in_a_gaussian_basis():
    result = basis_geometry(gaussian_basis_model(1), texts=TEXTS[:1], quick=True)
    assert result.verdicts["effective_rank"] == result.verdicts["coherence_mean"] == "not supported"
    assert any("at least two texts" in note for note in result.notes)


def test_gpt2_has_the_spectrum_of_its_embedding_alone():
    result = basis_geometry(build_model(of_architecture("gpt2", n_layers=1)), quick=True)
    assert set(result.figures) == {"scree_E"}
    assert all(name.endswith("_E") for name in result.metrics)
    assert "only E is measured" in result.notes[0]


@pytest.mark.parametrize(
    ("options", "message"), [({"directions": 32}, "directions must be"), ({"rotations": 1}, "rotations must be")]
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        basis_geometry(empty_model(), texts=TEXTS, **options)


def test_factored_singular_values_are_those_of_the_product():
    generator = torch.Generator().manual_seed(0)
    R, B = torch.randn(200, 9, generator=generator), torch.randn(9, 7, generator=generator)
    expected = np.linalg.svd((R @ B).double().numpy(), compute_uv=False)
    assert factored_singular_values(R, B)[:7] == pytest.approx(expected, rel=1e-5)


def test_gaussian_singular_values_lie_between_the_edges_and_are_those_of_a_drawn_matrix():
    values = gaussian_singular_values(2000, 200, 4.0, 0)
    low, high = marchenko_pastur_edges(2000, 200, 4.0)
    assert values.min() > 0.98 * low
    assert values.max() < 1.02 * high
    drawn = np.linalg.svd(2 * np.random.default_rng(1).standard_normal((2000, 200)), compute_uv=False)
    assert values == pytest.approx(drawn, rel=0.03)


def test_ranks_of_spectra_known_by_hand():
    assert effective_rank([2, 2, 0]) == pytest.approx(2)
    assert stable_rank([2, 1]) == 1.25
    assert condition_number([2, 0]) == float("inf")


def test_three_directions_at_equal_angles_meet_the_welch_bound():
    angles = torch.tensor([0.0, 2.0, 4.0]) * torch.pi / 3
    found = measure_coherence(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert found.headline()["coherence_max"] == pytest.approx(welch_bound(3, 2), rel=1e-5)
