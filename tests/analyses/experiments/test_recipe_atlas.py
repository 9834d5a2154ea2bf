from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.experiments.recipe_atlas.experiment import recipe_atlas
from analyses.experiments.recipe_atlas.pairs import label_cosines, top_pairs
from analyses.measures.neighbors import word_tokens
from analyses.words.lexicon import Lexicon
from analyses.words.tokens import frequency_matched
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.planted_results import ATLAS, ATLAS_LEXICON, missed
from tests.support.planted import empty_model, of_architecture
from tests.support.tiny import tiny_config

OPTIONS = {"lexicon": ATLAS_LEXICON, "quick": True, "rotations": 4}


@pytest.fixture(scope="module")
def planted():
    return ATLAS.run()


def test_the_planted_categories_are_found(planted):
    assert not missed(planted, ATLAS.expected)
    assert planted.controls["valid_top_pairs"]["random_words"] < 0.5
    neighbors = planted.frames["neighbors"].query("space == 'R'")
    assert (neighbors["probe_category"] == neighbors["category"]).all()


def test_a_planted_signal_has_a_pure_codebook_and_a_rotation_has_none(planted):
    codebooks = planted.frames["codebooks"].query("sign == 1 and signal < 8")
    assert codebooks.set_index("signal")["category"].sort_index().tolist() == list(ATLAS_LEXICON.categories)
    assert planted.metrics["codebook_purity"] > planted.controls["codebook_purity"]["label_permutation"] + 0.05


def test_the_figures_are_complete(planted):
    assert set(planted.figures) == {"neighbors", "pairs", "similarity", "purity"}


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_found_where_nothing_is(seed):
    result = recipe_atlas(empty_model(seed), seed=seed, **OPTIONS)
    assert set(result.verdicts.values()) == {"not supported"}
    assert result.metrics["valid_top_pairs"] < 0.4


def test_gpt2_has_one_space_alone():
    result = recipe_atlas(build_model(of_architecture("gpt2", n_layers=1)), **OPTIONS)
    assert "jaccard_at_10" not in result.metrics
    assert set(result.frames["neighbors"]["space"]) == {"R"}
    assert any("the identity view's recipe is E itself" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k must be between"),
        ({"rotations": 1}, "rotations must be at least 2"),
        ({"lexicon": Lexicon(version="x", categories={"a": ("red", "blue")})}, "needs at least 20 words"),
        ({"probes": ["Constantinople"]}, "Constantinople"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        recipe_atlas(empty_model(), **(OPTIONS | options))


def test_a_tokenizer_without_words_is_an_error():
    with pytest.raises(ReflowlensError, match="got 0 in 0"):
        recipe_atlas(build_model(tiny_config("reflow")), lexicon=ATLAS_LEXICON)


def test_pairs_and_category_means_are_those_of_plain_loops():
    rows, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    every = {(a, b): float(unit[a] @ unit[b]) for a in range(9) for b in range(a + 1, 9)}
    best = sorted(every, key=lambda pair: -every[pair])[:5]
    found = top_pairs(rows, 5)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == best
    means = label_cosines(rows, labels)
    assert means[1, 1] == pytest.approx(np.mean([every[3, 4], every[3, 5], every[4, 5]]), abs=1e-6)
    assert means[0, 2] == pytest.approx(np.mean([every[a, b] for a in range(3) for b in range(6, 9)]), abs=1e-6)


def test_matched_words_are_others_and_about_as_frequent():
    candidates = word_tokens(get_tokenizer("gpt2_16k"))
    given = np.array(candidates[5::200])
    drawn = frequency_matched(given, candidates, window=50)
    assert len(set(drawn.tolist())) == len(given)
    assert not set(drawn.tolist()) & set(given.tolist())
    places = {token: i for i, token in enumerate(candidates)}
    assert max(abs(places[a] - places[b]) for a, b in zip(given.tolist(), drawn.tolist(), strict=True)) <= 51
    with pytest.raises(ReflowlensError, match="random words were expected"):
        frequency_matched([1, 2], [1, 2, 3])
