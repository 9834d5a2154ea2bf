"""Sparse probes: what they choose and score against plain arithmetic, and on features that are known to tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from analyses.features.documents import token_rows
from analyses.features.probing import largest_differences, sparse_probing, weighted_auc
from analyses.features.probing_tasks import OCCURRENCES, probing_tasks
from analyses.words.lexicon import Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_model

LETTERS = Lexicon("letters", categories={"low": tuple("abcdefghijkl"), "high": tuple("nopqrstuvwxy")})


@pytest.fixture(scope="module")
def reflow() -> HookedModel:
    return random_model("reflow")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Letters and line breaks at random, of random lengths."""
    generator = np.random.default_rng(0)
    alphabet = list("abcdefghijklmnopqrstuvwxyz") + ["\n", " ", ".", "A", "B"] * 2
    return ["".join(generator.choice(alphabet, size=n)) for n in generator.integers(8, 24, size=90)]


@pytest.fixture
def bytes_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models read bytes: a letter is a word, without the space before it."""

    def single(categories: dict[str, tuple[str, ...]], tokenizer: object) -> tuple[dict[str, list[int]], list[str]]:
        return {name: [ord(word) for word in words] for name, words in categories.items()}, []

    monkeypatch.setattr("analyses.features.probing_tasks.single_token_categories", single)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_sklearns_with_ties_and_weights(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, positive = generator.integers(0, 5, size=40) / 4, generator.random(40) < 0.4
    weights = generator.integers(0, 3, size=(6, 40)).astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auc(scores, positive, weights), expected, rtol=1e-10)
    assert np.isnan(weighted_auc(scores, positive, positive[None].astype(float)))


def test_the_features_with_the_largest_difference_of_means_are_chosen() -> None:
    features, positive = np.random.default_rng(0).random((30, 6)).astype(np.float32), np.arange(30) < 10
    features[positive, 4] -= 2
    features[positive, 1] += 1
    assert largest_differences(features, positive, 2).tolist() == [4, 1]


@pytest.mark.usefixtures("bytes_are_words")
def test_no_word_and_no_document_is_in_both_halves(reflow: HookedModel, documents: list[str]) -> None:
    rows = token_rows(reflow, documents)
    words, concepts = probing_tasks(reflow, rows, LETTERS, 300, seed=0)
    assert words.classes == ("low", "high")
    assert words.training.sum() == 12 == (~words.training).sum()
    assert words.labels[words.training].sum(0).tolist() == [6, 6]
    for document, position in words.place.tolist():
        assert position >= 1
        assert chr(int(rows[document][position])) in "abcdefghijklnopqrstuvwxy"
    assert np.bincount(words.row).max() <= OCCURRENCES
    halves = [set(concepts.unit[concepts.training == half].tolist()) for half in (True, False)]
    assert not halves[0] & halves[1]
    letters = [documents[document][position] for document, position in concepts.place.tolist()]
    vowels = concepts.labels[:, concepts.classes.index("vowel")].tolist()
    assert vowels == [letter.lower() in "aeiou" for letter in letters]
    mean = words.rows(torch.from_numpy(words.place[:, 1:2].astype(np.float32)))
    assert float(mean[3]) == pytest.approx(words.place[words.row == 3, 1].mean())


@pytest.mark.usefixtures("bytes_are_words")
@pytest.mark.parametrize("kind", ["sae", "plt"])
def test_probes_of_every_basis_are_compared_on_the_same_rows(
    kind: str, reflow: HookedModel, documents: list[str]
) -> None:
    dictionary = dictionary_of(reflow, kind)  # type: ignore[arg-type]
    frame = sparse_probing(reflow, dictionary, documents, ks=(1, 8), lexicon=LETTERS, positions=150, resamples=20)
    bases = ["dictionary", *["neurons"] * (kind == "plt"), "native", "varimax", "rotated", "pca", "random"]
    assert frame["basis"].drop_duplicates().tolist() == bases
    assert set(frame["layer"]) == {"0", "1"}
    own = frame[frame["basis"] == "dictionary"].set_index(["task", "class", "layer", "k"])
    for basis in bases:
        beside = frame[frame["basis"] == basis].set_index(["task", "class", "layer", "k"])
        assert beside.index.equals(own.index)
        np.testing.assert_allclose(beside["difference"], beside["auc"] - own["auc"], atol=1e-12)
    assert frame["auc"].between(0, 1).all()
    assert (frame["low"] <= frame["high"]).all()
    each = frame[(frame["task"] == "concepts") & (frame["class"] != "all")]
    together = frame[(frame["task"] == "concepts") & (frame["class"] == "all")]
    means = each.groupby(["layer", "basis", "k"], sort=False)["auc"].mean()
    np.testing.assert_allclose(means, together["auc"], rtol=1e-12)


@pytest.mark.usefixtures("bytes_are_words")
def test_a_feature_that_is_the_concept_is_found(reflow: HookedModel, documents: list[str]) -> None:
    """An autoencoder of which one feature reads a direction that only line breaks have."""
    model = random_model("reflow")
    dictionary = dictionary_of(model, "sae", "relu")
    with torch.no_grad():
        direction = torch.zeros(32)
        direction[5] = 1.0
        for block in model.blocks:
            block.attn.W_O.zero_()
            block.mlp.W_out.zero_()
        embedding = torch.linalg.pinv(model.embed.W_basis)
        model.embed.W_recipe[:256] = (torch.rand(256, 32) * (1 - direction)) @ embedding
        model.embed.W_recipe[ord("\n")] += (10 * direction) @ embedding
        for layer in dictionary.each_layer():
            layer.W_enc.mul_(0.01)
            layer.W_enc[7] = direction
            layer.b_enc.zero_()
            layer.b_enc[7] = -5.0
    frame = sparse_probing(model, dictionary, documents, ks=(1,), lexicon=LETTERS, positions=600, resamples=10)
    found = frame[(frame["class"] == "newline") & (frame["basis"] == "dictionary")]
    assert len(found) == 2
    np.testing.assert_allclose(found[["auc", "accuracy"]], 1, atol=1e-9)
    assert found["detectable"].isna().all()


def test_too_little_text_is_one_error(reflow: HookedModel) -> None:
    with pytest.raises(ReflowlensError, match="neither words of a category nor concepts occur often enough in 3 doc"):
        sparse_probing(reflow, dictionary_of(reflow), ["some text", "and some more", "and the end"])
