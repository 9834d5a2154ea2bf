"""How much of a dictionary another finds again, on pairs of which it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.features.stability import best_matching, correlations, seed_stability, subspace_overlap
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reference.dictionary_evaluation import brute_force_matching
from tests.support.dictionaries import Kind, dictionary_of, ragged_documents
from tests.support.tiny import random_model

DOCUMENTS = ragged_documents(8)


@pytest.fixture(scope="module")
def reflow() -> HookedModel:
    return random_model("reflow")


def permuted(dictionary: Dictionary, order: torch.Tensor) -> Dictionary:
    other = Dictionary(dictionary.cfg)
    per_feature = ("W_enc", "b_enc", "W_dec", "threshold")
    state = {k: v[order] if k.endswith(per_feature) else v for k, v in dictionary.state_dict().items()}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("shape", [(5, 5), (3, 6)])
def test_matching_is_the_best_of_all(shape: tuple[int, int]) -> None:
    for seed in range(5):
        similarity = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found = similarity.numpy()[best_matching(similarity.numpy())]
        assert found.mean() == pytest.approx(brute_force_matching(similarity), rel=1e-5)


@pytest.mark.parametrize(("kind", "activation"), [("plt", "topk"), ("clt", "batchtopk"), ("sae", "relu")])
def test_the_same_dictionary_in_another_order_is_found_again(reflow: HookedModel, kind: Kind, activation: str) -> None:
    dictionary = dictionary_of(reflow, kind, activation)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    frame = seed_stability(reflow, {"a": dictionary, "b": permuted(dictionary, order)}, DOCUMENTS)
    assert frame["layer"].tolist() == ["0", "1", "all"]
    np.testing.assert_allclose(frame[["decoder_cosine", "shared", "overlap"]], 1, rtol=1e-5)
    assert (frame["decoder_cosine_chance"] < 0.8).all()
    assert (frame["shared_chance"] < 0.1).all()
    assert frame["unmatched_overlap"].isna().all()
    alive = frame["activation_correlation"]
    assert (alive > frame["activation_correlation_chance"] + 0.2).all()
    assert (alive <= 1 + 1e-5).all()


def test_unrelated_dictionaries_are_at_the_level_of_chance(reflow: HookedModel) -> None:
    three = {str(seed): dictionary_of(reflow, n_features=64, seed=seed) for seed in range(3)}
    frame = seed_stability(reflow, three, DOCUMENTS, rank=8)
    assert frame[frame["layer"] == "all"][["first", "second"]].to_numpy().tolist() == [
        ["0", "1"],
        ["0", "2"],
        ["1", "2"],
    ]
    for metric, tolerance in (
        ("decoder_cosine", 0.03),
        ("shared", 0.05),
        ("overlap", 0.15),
        ("unmatched_overlap", 0.15),
    ):
        np.testing.assert_allclose(frame[metric], frame[f"{metric}_chance"], atol=tolerance)
    assert frame["overlap_chance"].eq(8 / 32).all()


def test_unstable_features_of_one_subspace_overlap(reflow: HookedModel) -> None:
    """Two dictionaries whose features have nothing in common but the plane that they lie in."""
    a, b = (dictionary_of(reflow, seed=seed) for seed in (0, 1))
    plane = torch.eye(32)[:16]
    for seed, dictionary in enumerate((a, b)):
        generator = torch.Generator().manual_seed(seed)
        for layer in dictionary.each_layer():
            layer.W_dec.copy_((torch.randn(40, 16, generator=generator) @ plane)[:, None])
    frame = seed_stability(reflow, {"a": a, "b": b}, DOCUMENTS, rank=16)
    assert (frame["unmatched_overlap"] > 0.99).all()
    assert frame["unmatched_overlap_chance"].eq(0.5).all()
    assert (frame["shared"] == 0).all()


def test_correlations_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, n, generator=generator).double() for n in (3, 4))
    a[:, 2] = 7.0
    found = correlations(50, a.T @ b, (a.sum(0), b.sum(0)), (a.square().sum(0), b.square().sum(0)))
    expected = np.corrcoef(a[:, :2].T, b.T)[:2, 2:]
    np.testing.assert_allclose(found[:2], expected, rtol=1e-8)
    assert (found[2] == 0).all()


def test_overlap_of_subspaces_is_that_of_their_projections() -> None:
    a, b = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)).unbind()
    bases = [torch.linalg.svd(x / x.norm(dim=1, keepdim=True)).Vh[:3] for x in (a, b)]
    projections = [basis.T @ basis for basis in bases]
    assert subspace_overlap(a, b, 3) == pytest.approx(float((projections[0] * projections[1]).sum() / 3), rel=1e-5)


def test_bad_input_is_one_error(reflow: HookedModel) -> None:
    one = dictionary_of(reflow)
    with pytest.raises(ReflowlensError, match="two dictionaries or more, got 1"):
        seed_stability(reflow, {"a": one}, DOCUMENTS)
    with pytest.raises(ReflowlensError, match="b reads or writes other points than a"):
        seed_stability(reflow, {"a": one, "b": dictionary_of(reflow, "sae")}, DOCUMENTS)
