"""Likeness of two words against one forward pass a prompt and the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses.experiments.typo_resilience import measure as typos
from analyses.experiments.typo_resilience.measure import compare_words, others_of_same_length
from reflowlens.signals import random_rotation, rotate, signal_view
from tests.support.tiny import random_model

CARRIERS = ("See a", "I say")
POOL = ["a", "bb", "cc", "ddd", "eeee", "ffff", "gggggg"]
WORDS, OTHERS = ["cat", "bird", "cat"], ["ct", "birds!", "dog"]


@pytest.fixture(scope="module")
def model():
    return random_model("reflow", seed=5)


@torch.no_grad()
def plain(view, point, word, other, carrier):
    """Cosines and KL of one pair in one carrier, in float64."""
    measured = []
    for text in (word, other):
        _, cache = view.model.run_with_cache(f"{carrier} {text}")
        resid = cache[point][0, -1]
        readout = view.readout(resid)
        measured.append((resid.double(), readout.double(), view.logits(readout)[:256].double().log_softmax(-1)))
    (x, a, p), (y, b, q) = measured

    def cosine(u, v):
        return float(u @ v / (u.norm() * v.norm()))

    return cosine(x, y), cosine(a, b), float((p.exp() * (p - q)).sum())


def test_likeness_is_that_of_the_last_tokens_whatever_their_number(model, monkeypatch):
    monkeypatch.setattr(typos, "BATCH", 2)
    view = signal_view(model)
    found = compare_words(view, WORDS, {"other": OTHERS, "same": WORDS}, CARRIERS)
    for i, (word, other) in enumerate(zip(WORDS, OTHERS, strict=True)):
        for number, point in (
            (0, "blocks.0.hook_resid_pre"),
            (3, "blocks.1.hook_resid_mid"),
            (4, "blocks.1.hook_resid_post"),
        ):
            expected = np.mean([plain(view, point, word, other, carrier) for carrier in CARRIERS], axis=0)
            likeness = found["other"]
            actual = [values[number, i] for values in (likeness.cosine_resid, likeness.cosine_readout, likeness.kl)]
            assert actual == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert found["same"].cosine_resid == pytest.approx(1, abs=1e-6)
    assert found["same"].kl == pytest.approx(0, abs=1e-5)


def test_a_rotation_of_the_signals_moves_nothing(model):
    view = signal_view(model)
    turned = rotate(view, random_rotation(view.n_signals, seed=1))
    first, second = (compare_words(each, WORDS, {"other": OTHERS}, CARRIERS)["other"] for each in (view, turned))
    assert second.cosine_readout == pytest.approx(first.cosine_readout, abs=1e-5)
    assert second.kl == pytest.approx(first.kl, rel=1e-3, abs=1e-5)


@given(st.lists(st.sampled_from(POOL), min_size=1), st.integers(0, 9))
def test_the_other_word_is_another_of_the_nearest_length(words, seed):
    for word, other in zip(words, others_of_same_length(words, POOL, seed), strict=True):
        distances = {each: abs(len(each) - len(word)) for each in POOL if each != word}
        assert other != word
        assert distances[other] == min(distances.values())


def test_drawing_is_seeded_and_random():
    pool = [f"word{i}" for i in range(10)]
    draws = [tuple(others_of_same_length(pool, pool, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 3
