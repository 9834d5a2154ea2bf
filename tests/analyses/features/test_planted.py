"""Planted features: they fire as is said of them, and dictionaries of every kind find them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from analyses.features.planted import CHILDREN, TOGETHER, Planted, planted_data, recover, summary
from reflowlens.dictionaries.config import ACTIVATIONS
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of
from tests.support.planted_dictionaries import fit_planted, planted_config
from tests.support.tiny import random_model

PLANTED = planted_data(alone=12, pairs=2, parents=2, d=24)


def perfect(planted: Planted) -> Dictionary:
    """Directions that are orthogonal, as they are."""
    dictionary = Dictionary.fresh(planted_config(planted, "jumprelu", len(planted.kind)))
    (layer,) = dictionary.each_layer()
    with torch.no_grad():
        layer.W_enc.copy_(planted.directions)
        layer.W_dec.copy_(planted.directions[:, None])
        layer.threshold.fill_(0.25)
    return dictionary


def test_features_fire_as_often_and_together_as_is_said() -> None:
    x, a = PLANTED.sample(40_000, part=3)
    fires = (a > 0).double()
    tolerance = 4 * (PLANTED.frequency / 40_000).sqrt().numpy()
    assert (np.abs(fires.mean(0).numpy() - PLANTED.frequency.numpy()) < tolerance).all()
    assert ((a == 0) | ((a >= 0.5) & (a <= 1.5))).all()
    first, second = fires[:, 12].bool(), fires[:, 13].bool()
    assert float(second[first].double().mean()) == pytest.approx(TOGETHER, abs=0.03)
    children, parent = a[:, 17 : 17 + CHILDREN] > 0, a[:, 16] > 0
    assert PLANTED.kind[16:20] == ("parent", "child", "child", "child")
    assert not (children.any(1) & ~parent).any()
    assert int(children.sum(1).max()) == 1
    independent = np.corrcoef(fires[:, :12].T)[np.triu_indices(12, 1)]
    assert np.abs(independent).max() < 0.03
    assert float((x - a @ PLANTED.directions).std()) == pytest.approx(PLANTED.noise, rel=0.01)
    again = PLANTED.sample(40_000, part=3)[0]
    assert torch.equal(x, again)
    assert not torch.equal(x, PLANTED.sample(40_000, part=4)[0])


def test_a_perfect_dictionary_finds_all_in_any_order() -> None:
    directions = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    planted = dataclasses.replace(PLANTED, directions=directions, noise=0.01)
    found = recover(perfect(planted), planted, n=3000)
    assert found["partner"].tolist() == found["feature"].tolist()
    assert (found[["f1", "precision", "recall"]] == 1).all(axis=None)
    np.testing.assert_allclose(found[["correlation", "cosine"]], 1, rtol=2e-3)
    table = summary(found).set_index("kind")
    assert table["features"].to_dict() == {"alone": 12, "pair": 4, "parent": 2, "child": 6, "all": 24}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_dictionary_finds_features_that_fire_alone(activation: str) -> None:
    found = fit_planted(PLANTED, activation, n_features=32, steps=300, batch=256, learning_rate=1e-2)
    table = summary(recover(found, PLANTED, n=5000)).set_index("kind")
    fresh = Dictionary.fresh(planted_config(PLANTED, "topk", 32))
    chance = summary(recover(fresh, PLANTED, n=5000)).set_index("kind")
    assert table.loc["alone", "correlation"] > 0.85
    assert table.loc["alone", "cosine"] > 0.9
    for metric in ("f1", "correlation", "cosine"):
        assert table.loc["all", metric] > chance.loc["all", metric] + 0.2


def test_bad_input_is_one_error() -> None:
    for changes in ({"alone": -1}, {"alone": 0, "pairs": 0, "parents": 0}, {"d": 0}):
        with pytest.raises(ReflowlensError, match="planted features must be 0 or more"):
            planted_data(**changes)
    with pytest.raises(ReflowlensError, match="a dictionary of one layer that reads vectors of width 24"):
        recover(dictionary_of(random_model("reflow")), PLANTED)
