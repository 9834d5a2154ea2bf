"""Orders, their controls, and what is read off curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.measures.knockout import curve_area, curve_counts, matched_order, random_order, real_tokens, write_norms
from reflowlens.signals import signal_view
from tests.support.tiny import assert_close, random_model

PROMPT = "The capital"


@pytest.fixture(scope="module")
def model():
    return random_model("reflow", seed=1)


@pytest.fixture(scope="module")
def final(model):
    _, cache = model.run_with_cache(PROMPT)
    return cache["resid_post", 1][:, -1].detach()


@given(st.integers(2, 40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_matched_order_is_a_permutation_that_avoids_its_partner(n, seed):
    norms = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    order = random_order((1, n), seed)
    matched = matched_order(order, norms)
    assert sorted(matched[0].tolist()) == list(range(n))
    assert (matched[0, :-1] != order[0, :-1]).all()


@pytest.mark.parametrize("name", ["reflow", "gpt2_own_readout"])
def test_real_tokens_are_those_of_the_tokenizer(name, final):
    view = signal_view(random_model(name, seed=1))
    real = real_tokens(view)
    assert real.recipe.shape == (256, 32)
    a = view.readout(final)
    assert_close(real.logits(a), view.logits(a)[:, :256])


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
