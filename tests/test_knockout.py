"""Closed forms against performing the removal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.knockout import (
    curve_area,
    curve_counts,
    knockout_curve,
    matched_order,
    random_order,
    single_effects,
    upstream_effects,
    write_norms,
)
from reflowlens.signals import VIEWS, signal_view
from tests.tiny import random_model

PROMPT = "The capital"


@pytest.fixture(scope="module")
def model():
    return random_model("reflow", seed=1)


@pytest.fixture(scope="module")
def final(model):
    _, cache = model.run_with_cache(PROMPT)
    return cache["resid_post", 1][:, -1].detach()


@pytest.mark.parametrize("name", VIEWS)
def test_single_effects_equal_zeroing_one_signal_after_another(model, final, name):
    view = signal_view(model, name)
    a = view.readout(final).detach()
    effects = single_effects(view, a, torch.tensor([7]))
    before = view.logits(a)[0, :256].softmax(-1)
    assert float(effects.before) == pytest.approx(float(before[7]), rel=1e-5)
    for signal in range(view.n_signals):
        without = a.clone()
        without[:, signal] = 0
        after = view.logits(without)[0, :256].softmax(-1)
        assert float(effects.after[0, signal]) == pytest.approx(float(after[7]), rel=1e-4)
        kl = float((before * (before / after).log()).sum())
        assert float(effects.kl[0, signal]) == pytest.approx(kl, rel=1e-2, abs=2e-6)


def test_zeroing_at_the_readout_is_zeroing_hook_signal(model, final):
    view = signal_view(model)
    effects = single_effects(view, view.readout(final).detach(), torch.tensor([7]))

    def zero(signal, hook):
        edited = signal.clone()
        edited[..., 5] = 0
        return edited

    with model.hooks([("unembed.hook_signal", zero)]):
        performed = model(PROMPT)[0, -1, :256].softmax(-1)[7]
    assert float(effects.after[0, 5]) == pytest.approx(float(performed), rel=1e-5)


def test_a_replacement_is_put_in_place_of_the_signal(model, final):
    view = signal_view(model)
    a = view.readout(final).detach()
    values = torch.linspace(-1, 1, view.n_signals)[None]
    effects = single_effects(view, a, torch.tensor([7]), values)
    edited = a.clone()
    edited[:, 3] = values[0, 3]
    assert float(effects.after[0, 3]) == pytest.approx(float(view.logits(edited)[0, :256].softmax(-1)[7]), rel=1e-4)


def test_everywhere_is_a_zero_basis_row_for_the_whole_pass(model):
    view, tokens = signal_view(model), model.to_tokens(PROMPT)

    def zero_row(basis, hook):
        edited = basis.clone()
        edited[4] = 0
        return edited

    with model.hooks([("hook_basis", zero_row)]):
        performed = model(tokens)[0, -1, :256].softmax(-1)[9]
    ours = upstream_effects(model, view, tokens, 9, torch.tensor([2, 4]), "everywhere")
    assert float(ours[1]) == pytest.approx(float(performed), rel=1e-5)


def test_embed_is_a_zero_recipe_entry_at_every_position(model):
    view, tokens = signal_view(model), model.to_tokens(PROMPT)

    def zero_entry(recipe, hook):
        edited = recipe.clone()
        edited[..., 4] = 0
        return edited

    with model.hooks([("hook_recipe", zero_entry)]):
        performed = model(tokens)[0, -1, :256].softmax(-1)[9]
    assert float(upstream_effects(model, view, tokens, 9, torch.tensor([4]), "embed")) == pytest.approx(
        float(performed), rel=1e-5
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_loses_the_component_along_the_basis_row(model, layer):
    view, tokens = signal_view(model), model.to_tokens(PROMPT)
    direction = view.basis[4] / view.basis[4].norm()

    def project_out(resid, hook):
        return resid - (resid @ direction)[..., None] * direction

    with model.hooks([(f"blocks.{layer}.hook_resid_pre", project_out)]):
        performed = model(tokens)[0, -1, :256].softmax(-1)[9]
    assert float(upstream_effects(model, view, tokens, 9, torch.tensor([4]), layer)) == pytest.approx(
        float(performed), rel=1e-5
    )


def test_curves_start_at_the_prediction_and_end_at_the_uniform_one(model, final):
    view = signal_view(model)
    a = view.readout(final).detach()
    counts = curve_counts(view.n_signals)
    order = random_order((1, view.n_signals), seed=0)
    removed = knockout_curve(view, a, torch.tensor([7]), order, counts)[0]
    kept = knockout_curve(view, a, torch.tensor([7]), order, counts, keep=True)[0]
    before = float(view.logits(a)[0, :256].softmax(-1)[7])
    assert float(removed[0]) == pytest.approx(before, rel=1e-5)
    assert float(kept[-1]) == pytest.approx(before, rel=1e-5)
    assert float(removed[-1]) == pytest.approx(1 / view.n_tokens)
    assert float(kept[0]) == pytest.approx(1 / view.n_tokens)
    third = a.clone()
    third[:, order[0, :3]] = 0
    assert float(removed[3]) == pytest.approx(float(view.logits(third)[0, :256].softmax(-1)[7]), rel=1e-5)


@given(st.integers(2, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_matched_order_is_a_permutation_that_avoids_its_partner(n, seed):
    norms = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    order = random_order((1, n), seed)
    matched = matched_order(order, norms)
    assert sorted(matched[0].tolist()) == list(range(n))
    assert (matched[0, :-1] != order[0, :-1]).all()


def test_a_matched_signal_moves_the_logits_about_as_much(model, final):
    view = signal_view(model)
    a = view.readout(final).detach()
    norms = write_norms(view, a)
    assert float(norms[0, 3]) == pytest.approx(float((a[0, 3] * view.recipe[:256, 3]).norm()), rel=1e-5)
    partner = int(matched_order(torch.tensor([[3]]), norms)[0, 0])
    gaps = (norms[0] - norms[0, 3]).abs()
    gaps[3] = torch.inf
    assert partner == int(gaps.argmin())


@given(st.integers(1, 400))
def test_counts_run_from_none_to_all(n):
    counts = curve_counts(n)
    assert counts[0] == 0
    assert counts[-1] == n
    assert counts == sorted(set(counts))


def test_area_of_a_straight_line_is_one_half():
    counts = curve_counts(100)
    line = 1 - np.array([counts]) / 100
    assert curve_area(line, counts) == pytest.approx([0.5])
