from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from analyses.experiments.semantic_galaxy.clusters import euclidean_distances, silhouettes, voted_labels
from analyses.experiments.semantic_galaxy.experiment import JUDGED, semantic_galaxy
from analyses.words.lexicon import Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.planted_results import GALAXY, missed
from tests.planted_results import GALAXY_LEXICON as LEXICON
from tests.support.planted import category_model, empty_model, of_architecture
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def planted():
    return GALAXY.run()


def test_the_planted_categories_are_found(planted):
    assert not missed(planted, GALAXY.expected)
    assert planted.metrics["silhouette_plane"] > 0.7
    assert set(planted.verdicts) == set(JUDGED)
    assert planted.metrics["silhouette"] == pytest.approx(planted.frames["words"]["silhouette"].mean())
    assert set(planted.figures) == {"galaxy", "galaxy_3d", "categories", "null"}


def test_an_orthogonal_basis_moves_no_cosine(planted):
    for metric in JUDGED:
        assert planted.controls[metric]["E"] == pytest.approx(planted.metrics[metric], abs=1e-4)
    assert set(planted.controls["silhouette"]) == {"E", "shuffled_recipe", "gaussian", "untrained", "label_permutation"}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_where_nothing_is(seed):
    result = semantic_galaxy(empty_model(seed), lexicon=LEXICON, quick=True, seed=seed)
    assert "supported" not in result.verdicts.values()


def test_gpt2_and_tsne():
    model = build_model(dataclasses.replace(of_architecture("gpt2"), n_layers=1))
    result = semantic_galaxy(model, lexicon=LEXICON, quick=True, method="tsne")
    assert result.params["view"] == "identity"
    assert {"tsne1", "tsne2"} <= set(result.frames["words"])
    assert "E" not in result.controls["silhouette"]


def test_few_words_are_underpowered():
    lexicon = Lexicon(version="x", categories={name: words[:8] for name, words in LEXICON.categories.items()})
    assert set(semantic_galaxy(category_model(lexicon), lexicon=lexicon, quick=True).verdicts.values()) == {
        "underpowered"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "umap"}, "method must be"),
        ({"k": 36}, "k must be between 1 and 35"),
        ({"lexicon": Lexicon(version="x", categories={"a": ("red", "blue")})}, "needs at least 20 words"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        semantic_galaxy(empty_model(), **{"lexicon": LEXICON, **options})


def test_a_tokenizer_without_words_is_an_error():
    with pytest.raises(ReflowlensError, match="got 0 in 0"):
        semantic_galaxy(build_model(tiny_config("reflow")), lexicon=LEXICON)


def test_silhouettes_are_scikit_learns():
    rng = np.random.default_rng(0)
    points, labels = rng.standard_normal((40, 3)), np.r_[np.arange(4), rng.integers(4, size=35), 4]
    distances = euclidean_distances(points)
    expected = silhouette_samples(distances, labels, metric="precomputed")
    assert silhouettes(distances, labels) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ReflowlensError, match="at least 2 labels"):
        silhouettes(distances, np.zeros(40, dtype=int))


def test_of_equal_votes_the_nearest_decides():
    assert voted_labels(np.array([[1, 2, 3, 4]]), np.array([0, 2, 1, 1, 2])).tolist() == [2]
