from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from reflowlens import varimax
from reflowlens.signals import random_rotation, rotate, signal_view, varimax_view
from reflowlens.varimax import polar_factor, varimax_criterion, varimax_rotation
from tests.reference.varimax import varimax_by_planes
from tests.support.planted import empty_model, sparse_model


def mixed(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows with a simple structure, turned so that no column shows it, and noise."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randn(rows, columns, generator=generator).pow(3)
    return sparse @ random_rotation(columns, seed) + 0.1 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_it_reaches_what_planar_rotations_reach(seed):
    rows = mixed(400, 6, seed)
    expected = varimax_by_planes(rows.double().numpy())
    squares = expected**2
    own = rows @ varimax_rotation(rows, tolerance=1e-7)
    assert varimax_criterion(own) == pytest.approx(squares.var(axis=0).mean(), rel=1e-4)
    turned = (own / own.norm(dim=1, keepdim=True) * 6**0.5).numpy()
    likeness = np.abs(turned.T @ expected) / len(rows)  # the same columns, in another order and of either sign
    assert likeness.max(axis=1) == pytest.approx(np.square(turned).mean(axis=0), rel=1e-2)


@pytest.mark.parametrize("shape", [(300, 12), (50, 40), (20, 32)])
def test_the_rotation_is_orthogonal_and_never_lowers_the_criterion(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    A = varimax_rotation(rows)
    assert (A.T @ A - torch.eye(shape[1])).abs().max() < 1e-5
    assert varimax_criterion(rows @ A) >= varimax_criterion(rows)


def test_the_criterion_of_a_gaussian_is_2_and_of_the_planted_recipes_what_they_hold():
    gaussian = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    # Rows of one length are a little less kurtotic than free ones: 3 S / (S + 2) - 1.
    assert varimax_criterion(gaussian) == pytest.approx(3 * 16 / 18 - 1, rel=0.02)
    recipe = sparse_model(4).embed.W_recipe.detach()
    assert varimax_criterion(recipe) == pytest.approx(32 / 4 - 1, rel=0.01)


def test_it_finds_the_planted_signals_behind_a_rotation():
    view = signal_view(sparse_model(3))
    hidden = rotate(view, random_rotation(32, 5))
    found = varimax_view(hidden).recipe[:2000]
    assert ((found.abs() > 0.5).sum(dim=1) == 3).all()
    order = (found.T @ view.recipe[:2000]).abs().argmax(dim=1)
    assert sorted(order.tolist()) == list(range(32))
    assert (found.abs() - view.recipe[:2000, order].abs()).abs().max() < 0.05


def test_the_view_predicts_the_same():
    model = empty_model()
    view = signal_view(model, "varimax")
    assert view.name == "varimax"
    resid = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    native = signal_view(model)
    expected = native.logits(native.readout(resid))
    assert (view.logits(view.readout(resid)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_signals_that_are_dead_stay_finite_and_are_left_to_themselves():
    rows = torch.cat([mixed(200, 6, 0), torch.zeros(200, 2)], dim=1)
    A = varimax_rotation(rows)
    assert A.isfinite().all()
    assert (A.T @ A - torch.eye(8)).abs().max() < 1e-5


def test_a_rotation_is_found_once_for_the_same_rows_and_drawn_rows_go_by_the_seed(monkeypatch):
    rows = mixed(300, 5, 9)
    first = varimax_rotation(rows, seed=0, max_rows=100)
    other = varimax_rotation(rows, seed=1, max_rows=100)
    assert not torch.equal(first, other)
    monkeypatch.setattr(varimax, "_ascend", None)
    assert torch.equal(varimax_rotation(rows, seed=0, max_rows=100), first)


def test_only_real_tokens_decide():
    view = signal_view(empty_model())
    padded = view.recipe.clone()
    padded[view.n_tokens :] = 1e3
    assert torch.equal(varimax_view(dataclasses.replace(view, recipe=padded)).recipe[:9], varimax_view(view).recipe[:9])


@pytest.mark.parametrize("n", [1, 5, 30])
def test_the_polar_factor_is_scipys(n):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert polar_factor(matrix).numpy() == pytest.approx(scipy.linalg.polar(matrix.numpy())[0], abs=1e-8)
