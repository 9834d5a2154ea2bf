from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretraining.data import prepare
from pretraining.dictionaries.documents import document_windows, drawn_rounds, padded_batches
from pretraining.dictionaries.harvest import batches, harvest, n_vectors
from pretraining.token_files import TokenData, open_tokens
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model

LENGTHS = (5, 9, 24, 25, 50, 8, 31, 60)
POINTS = ["blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Documents of known lengths in bytes, of letters drawn."""
    folder = tmp_path_factory.mktemp("documents")
    letters, generator = list("abcdefghijklmnop"), np.random.default_rng(0)
    texts = ["q" + "".join(generator.choice(letters, size=n - 1)) for n in LENGTHS]
    (folder / "train.txt").write_text("\n<|endoftext|>\n".join(texts))
    (folder / "val.txt").write_text("something else to validate on")
    prepare(folder / "train.txt", folder / "tokens", "bytes", val_sources=folder / "val.txt", progress=False)
    return open_tokens(folder / "tokens", "train")


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return random_model("reflow")


def stream(data: TokenData) -> NDArray[np.int64]:
    return np.asarray(data.tokens).astype(np.int64)


def test_windows_stay_within_documents(documents: TokenData) -> None:
    windows = document_windows(documents, 24)
    tokens, end = stream(documents), documents.manifest.end_id
    covered = np.zeros(len(tokens), dtype=int)
    for start, length in zip(windows.start, windows.length, strict=True):
        assert 8 <= length <= 24
        assert (tokens[start : start + length] != end).all()
        covered[start : start + length] += 1
    assert covered.max() == 1
    per_document = [[24] * (n // 24) + [n % 24] * (n % 24 >= 8) for n in LENGTHS]
    assert sorted(windows.length.tolist()) == sorted(length for of in per_document for length in of)
    first = document_windows(documents, 24, first_only=True)
    assert first.length.tolist() == [min(n, 24) for n in LENGTHS if n >= 8]
    assert len(set(first.document.tolist())) == len(first)


def test_an_epoch_draws_every_window_once(documents: TokenData) -> None:
    windows = document_windows(documents, 8)
    rounds = drawn_rounds(windows, 5, seed=3)
    per_epoch = len(windows) // 5
    epochs = [[next(rounds).start.tolist() for _ in range(per_epoch)] for _ in range(2)]
    for epoch in epochs:
        starts = [start for of_round in epoch for start in of_round]
        assert len(set(starts)) == len(starts) == 5 * per_epoch
    assert epochs[0] != epochs[1]
    later = next(drawn_rounds(windows, 5, seed=3, first=per_epoch))
    assert later.start.tolist() == epochs[1][0]


def test_a_harvest_is_each_window_alone_without_its_first_position(documents: TokenData, model: HookedModel) -> None:
    windows = document_windows(documents, 24)
    found = harvest(model, documents.tokens, windows, POINTS, seed=[0])
    alone: dict[str, list[torch.Tensor]] = {point: [] for point in POINTS}
    tokens = stream(documents)
    for start, length in zip(windows.start, windows.length, strict=True):
        one = torch.from_numpy(tokens[start : start + length])[None]
        cache = model.run_with_cache(one, names_filter=POINTS, return_type=None)[1]
        for point in POINTS:
            alone[point].append(cache[point][0, 1:])
    for point in POINTS:
        expected = torch.cat(alone[point])
        assert len(found[point]) == len(expected) == n_vectors(windows)
        distance = torch.cdist(found[point], expected, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distance.min(1).values.max()) < 1e-4
        alike = torch.cdist(expected, expected, compute_mode="donot_use_mm_for_euclid_dist") < 1e-4
        assert (distance < 1e-4).sum(0).tolist() == alike.sum(0).tolist()  # each as often as it is there
    both = torch.cat([found[point] for point in POINTS], 1)
    pairs = torch.cat([torch.cat(alone[point]) for point in POINTS], 1)
    distance = torch.cdist(both, pairs, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.min(1).values.max()) < 1e-4  # the same order at both points
    again = harvest(model, documents.tokens, windows, POINTS, seed=[0])
    other = harvest(model, documents.tokens, windows, POINTS, seed=[1])
    assert torch.equal(again[POINTS[0]], found[POINTS[0]])
    assert not torch.equal(other[POINTS[0]], found[POINTS[0]])


def test_batches_leave_out_what_is_too_few() -> None:
    parts = list(batches({"a": torch.arange(23.0)[:, None]}, 5, first=1))
    assert [part["a"][:, 0].tolist() for part in parts] == [[float(i) for i in range(n, n + 5)] for n in (5, 10, 15)]


def test_padding_is_of_no_window(documents: TokenData) -> None:
    windows = document_windows(documents, 24)
    for tokens, lengths, chosen in padded_batches(documents.tokens, windows, 3):
        for row, length, which in zip(tokens, lengths, chosen, strict=True):
            start = int(windows.start[which])
            assert row[: int(length)].tolist() == stream(documents)[start : start + int(length)].tolist()


def test_activations_that_are_not_finite_are_refused(documents: TokenData) -> None:
    broken = random_model("reflow")
    with torch.no_grad():
        broken.blocks[1].mlp.W_out[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ReflowlensError, match=r"blocks.1.hook_mlp_out' are not finite"):
        harvest(broken, documents.tokens, document_windows(documents, 24), POINTS, seed=[0])


def test_documents_that_are_too_short_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc\n<|endoftext|>\ndef")
    (tmp_path / "val.txt").write_text("another text")
    prepare(tmp_path / "train.txt", tmp_path / "t", "bytes", val_sources=tmp_path / "val.txt", progress=False)
    with pytest.raises(ReflowlensError, match="no document of at least 8 tokens"):
        document_windows(open_tokens(tmp_path / "t", "train"), 16)
