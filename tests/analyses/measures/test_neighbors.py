"""Cosine neighbours and ranks against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.measures import neighbors
from analyses.measures.neighbors import cosine_neighbors, rank_among, shuffle_columns, unit_rows, word_tokens
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.reference.analogies import cosine


def gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.booleans(), st.booleans())
def test_neighbors_are_those_of_a_sort(seed: int, k: int, restrict: bool, without_self: bool) -> None:
    rows = gaussian(20, 5, seed)
    probes = torch.tensor([0, 7, 19])
    allowed = [i for i in range(20) if not restrict or i % 2 == 1] if k < 9 else list(range(20))
    found = cosine_neighbors(
        rows[probes],
        rows,
        k,
        candidates=torch.tensor(allowed) if restrict else None,
        exclude=probes[:, None] if without_self else None,
    )
    for query, ids, cosines in zip(probes.tolist(), found.ids.tolist(), found.cosines.tolist(), strict=True):
        possible = [i for i in allowed if not (without_self and i == query)]
        by_cosine = sorted(possible, key=lambda i: -cosine(rows[query].numpy(), rows[i].numpy()))
        assert ids == by_cosine[:k]
        np.testing.assert_allclose(cosines, [cosine(rows[query].numpy(), rows[i].numpy()) for i in ids])


def test_neighbors_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gaussian(50, 8, 0)
    # No two cosines are so near that the rounding of a product of another shape could exchange them.
    assert cosine_neighbors(rows, rows, 6).cosines.diff(dim=1).max() < -1e-6
    whole = cosine_neighbors(rows, rows, 5)
    monkeypatch.setattr(neighbors, "BLOCK", 7)
    parts = cosine_neighbors(rows, rows, 5)
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.cosines, parts.cosines)
    assert cosine_neighbors(rows[:0], rows, 5).ids.shape == (0, 5)


def test_asking_for_more_neighbors_than_there_are() -> None:
    rows = gaussian(6, 3, 0)
    with pytest.raises(ReflowlensError, match="between 1 and 5"):
        cosine_neighbors(rows, rows, 6, exclude=torch.arange(6)[:, None])


def test_unit_rows_keep_zero_rows_and_widen_halves() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float16)
    assert unit_rows(rows).dtype == torch.float32
    torch.testing.assert_close(unit_rows(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_ties_count_against_the_target() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert rank_among(torch.zeros(1, 4), torch.tensor([2]), everything).item() == 4
    assert rank_among(torch.zeros(1, 4), torch.tensor([2]), everything, torch.tensor([[0, 0]])).item() == 3


def test_a_target_outside_the_candidates_is_ranked_as_if_inside() -> None:
    candidates = torch.tensor([[True, True, False, False]])
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.7]])
    assert rank_among(scores, torch.tensor([2]), candidates).item() == 2


def test_word_tokens_are_a_space_and_letters() -> None:
    tokenizer = get_tokenizer("gpt2_16k")
    words = set(word_tokens(tokenizer))
    for text, is_word in ((" queen", True), ("able", False), (" 1990", False), (" (", False), (" ", False)):
        assert (tokenizer.single_token(text) in words) is is_word, text
    assert max(words) < tokenizer.n_vocab
    assert word_tokens(get_tokenizer("bytes")) == []


def test_shuffling_keeps_each_column_and_nothing_else() -> None:
    matrix = gaussian(200, 3, 0).float()
    shuffled = shuffle_columns(matrix, seed=1)
    assert torch.equal(shuffled.sort(dim=0).values, matrix.sort(dim=0).values)
    assert torch.equal(shuffled, shuffle_columns(matrix, seed=1))
    assert not torch.equal(shuffled, shuffle_columns(matrix, seed=2))
    assert not torch.equal(shuffled[:, 0].argsort(), shuffled[:, 1].argsort())
    assert (matrix[:, 0] == shuffled[:, 0]).float().mean() < 0.1
