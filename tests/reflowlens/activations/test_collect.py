"""Statistics of streams against numpy on everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reflowlens as rl
from reflowlens.activations import stream
from reflowlens.activations.moments import Moments, PointStatistics, TopExamples
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model, random_tokens

TEXTS = ["The king of France", "A stone", "Water runs down", "x", "Of all the days"]


def top_by_numpy(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each column and their rows, earlier ones first among equals."""
    order = np.argsort(-x.astype(np.float64), axis=0, kind="stable")[:k]
    return np.take_along_axis(x, order, axis=0).T, order.T


# ------------------------------------------------------------------------------------------------------ vectors by hand


def split_at(x: Tensor, cuts: list[int]) -> list[Tensor]:
    ends = sorted(min(cut, len(x)) for cut in cuts)
    return [part for part in torch.tensor_split(x, ends) if len(part)]


matrices = st.tuples(st.integers(1, 30), st.integers(1, 5), st.integers(0, 10_000), st.booleans())


@given(matrices, st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=60, deadline=None)
def test_moments_do_not_depend_on_the_split(shape: tuple[int, int, int, bool], cuts: list[int]) -> None:
    n, width, seed, pairs = shape
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1e4
    merged, *others = [Moments.of(part, pairs=pairs) for part in split_at(x, cuts)]
    for other in others:
        merged = merged.merge(other)
    whole = x.double().numpy()
    assert merged.n == n
    np.testing.assert_allclose(merged.mean, whole.mean(axis=0), rtol=1e-12)
    expected = np.cov(whole.T, bias=True).reshape(width, width) if pairs else whole.var(axis=0)
    np.testing.assert_allclose(merged.comoment / n, expected, rtol=1e-7, atol=1e-7)


@given(matrices, st.lists(st.integers(0, 30), max_size=5), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_examples_do_not_depend_on_the_split(shape: tuple[int, int, int, bool], cuts: list[int], k: int) -> None:
    """Many values are equal, zeros of either sign among them."""
    n, width, seed, few = shape
    x = torch.randint(-3, 3, (n, width), generator=torch.Generator().manual_seed(seed)).float() * (0.5 if few else -0.0)
    place = torch.arange(n)
    parts = [
        TopExamples.of(values, rows, rows + 100, rows + 200, k)
        for values, rows in zip(split_at(x, cuts), split_at(place, cuts), strict=True)
    ]
    merged = parts[0]
    for other in parts[1:]:
        merged = merged.merge(other, k)
    values, rows = top_by_numpy(x.numpy() + 0.0, k)
    assert np.array_equal(merged.value, values)
    assert np.array_equal(merged.row, rows)
    assert torch.equal(merged.position, merged.row + 100)
    assert torch.equal(merged.token, merged.row + 200)


def test_a_long_stream_keeps_its_digits() -> None:
    """A variance of 1e-4 around 1000, where sums of squares in float32 have none left, and in 2,000 merges."""
    generator = torch.Generator().manual_seed(0)
    parts = [1000 + 0.01 * torch.randn(50, 1, generator=generator, dtype=torch.double) for _ in range(2000)]
    merged = Moments.of(parts[0], pairs=False)
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part, pairs=False))
    whole = torch.cat(parts)
    assert float(merged.comoment / merged.n) == pytest.approx(float(whole.var(correction=0)), rel=1e-9)


# --------------------------------------------------------------------------------------------------------------- models


def activations(model: HookedModel, texts: list[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Everything at once: [position, feature], and [position, (row, position, token)]."""
    x, places = [], []
    for row, text in enumerate(texts):
        tokens = model.to_tokens(text)
        activation = model.run_with_cache(tokens, names_filter=name)[1][name][0].detach().flatten(1)
        x.append(activation)
        places += [(row, position, int(token)) for position, token in enumerate(tokens[0])]
    return torch.cat(x).numpy(), np.array(places)


@pytest.mark.parametrize("batches", [TEXTS, [TEXTS[:2], TEXTS[2:]], [TEXTS]])
@pytest.mark.parametrize("point", ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post", "ln_final.hook_normalized"])
def test_statistics_are_those_of_everything_at_once(model: HookedModel, batches: list, point: str) -> None:
    collected = rl.collect(model, batches, point, k=4, threshold=0.5)[point]
    x, places = activations(model, TEXTS, point)
    assert collected.n == len(x)
    np.testing.assert_allclose(collected.mean, x.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(collected.covariance, np.cov(x.T, bias=True), atol=1e-5)
    np.testing.assert_allclose(collected.variance, x.var(axis=0), atol=1e-5)
    np.testing.assert_allclose(collected.std, x.std(axis=0), atol=1e-5)
    np.testing.assert_allclose(collected.firing_rate, (x > 0.5).mean(axis=0), atol=1.01 / len(x))
    values, _ = top_by_numpy(x, 4)
    np.testing.assert_allclose(collected.top.value, values, atol=1e-5)
    index = {tuple(place): i for i, place in enumerate(places.tolist())}
    for feature in range(0, x.shape[1], 7):
        examples = collected.examples(feature)
        found = [
            x[index[tuple(place)], feature] for place in examples[["row", "position", "token"]].to_numpy().tolist()
        ]
        np.testing.assert_allclose(examples["value"], found, atol=1e-5)


def test_heads_are_flattened_to_features() -> None:
    model = random_model("reflow")
    collected = rl.collect(model, TEXTS, "blocks.0.attn.hook_z")["blocks.0.attn.hook_z"]
    assert collected.feature_shape == (4, 8)
    x, _ = activations(model, TEXTS, "blocks.0.attn.hook_z")
    np.testing.assert_allclose(
        collected.mean.reshape(collected.feature_shape)[2], x.reshape(-1, 4, 8)[:, 2].mean(axis=0), atol=1e-5
    )


@pytest.mark.parametrize(
    ("positions", "per_text"),
    [("last", slice(-1, None)), (slice(1, None), slice(1, None)), (slice(-3, -1), slice(-3, -1))],
)
def test_positions_are_each_prompts_own(positions: Any, per_text: slice) -> None:
    model = random_model("reflow")
    collected = rl.collect(model, [TEXTS], "hook_embed", positions=positions)["hook_embed"]
    rows = [activations(model, [text], "hook_embed")[0][per_text] for text in TEXTS]
    x = np.concatenate(rows)
    assert collected.n == len(x)
    np.testing.assert_allclose(collected.mean, x.mean(axis=0), atol=1e-5)


def test_arrays_of_tokens_are_read_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("reflow")
    tokens = random_tokens(model.cfg, batch=9, pos=5)
    whole = rl.collect(model, [tokens], "hook_recipe")
    monkeypatch.setattr(stream, "_ROWS_AT_ONCE", 4)
    rows = (row[None] for row in tokens.numpy().astype(np.uint16))
    for array in (tokens, tokens.numpy().astype(np.uint16), rows):
        assert_alike(rl.collect(model, array, "hook_recipe"), whole)


def test_no_more_is_run_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("reflow")
    stops: list[int | None] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: stops.append(kwargs["stop_at_layer"]) or forward(*args, **kwargs)
    )
    for names in ("hook_embed", ["hook_embed", "blocks.0.hook_mlp_out"], ["unembed.hook_signal", "hook_embed"]):
        rl.collect(model, TEXTS[:1], names)
    assert stops == [0, 1, None]


def assert_alike(first: rl.Collected, second: rl.Collected) -> None:
    assert first.n_rows == second.n_rows
    assert list(first) == list(second)
    for name in first:
        ours, theirs = first[name].tensors(), second[name].tensors()
        assert set(ours) == set(theirs)
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-4)


@given(st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_parts_merge_to_the_whole(first: int, second: int) -> None:
    model, names = random_model("reflow_topk"), ["hook_recipe", "blocks.0.hook_mlp_out"]
    choices: dict[str, Any] = {"k": 5, "threshold": 0.0, "positions": slice(1, None)}  # nothing of the text "x" counts
    low, high = sorted((first, second))
    parts = [part for part in (TEXTS[:low], TEXTS[low:high], TEXTS[high:]) if part]
    if ["x"] in parts:  # alone it is an error: no position counts
        parts = [TEXTS]
    merged, *others = [rl.collect(model, part, names, **choices) for part in parts]
    for other in others:
        merged = merged.merge(other)
    assert_alike(merged, rl.collect(model, TEXTS, names, **choices))


def test_saved_statistics_are_the_same(tmp_path: Path) -> None:
    model = random_model("reflow")
    collected = rl.collect(model, TEXTS, ["hook_embed", "blocks.0.attn.hook_z"], threshold=0.1)
    loaded = rl.Collected.load(collected.save(tmp_path / "statistics"))
    assert_alike(loaded, collected)
    assert loaded["blocks.0.attn.hook_z"].feature_shape == (4, 8)
    assert loaded.choices == collected.choices
    assert_alike(loaded.merge(collected), collected.merge(collected))


def test_an_interrupted_collection_continues(tmp_path: Path) -> None:
    model, names = random_model("reflow"), ["unembed.hook_signal"]

    def interrupted() -> Any:
        yield TEXTS[:2]
        yield TEXTS[2:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rl.collect(model, interrupted(), names, results=tmp_path / "kept")
    assert rl.Collected.load(tmp_path / "kept").n_rows == 3
    ran: list[int] = []
    with model.hooks([("hook_embed", lambda x, hook: ran.append(len(x)))]):
        continued = rl.collect(model, [TEXTS[:4], TEXTS[4:]], names, results=tmp_path / "kept")
        again = rl.collect(model, [TEXTS], names, results=tmp_path / "kept")
    assert ran == [1, 1]  # the fourth text, then the fifth
    assert_alike(continued, rl.collect(model, TEXTS, names))
    assert_alike(again, continued)


def test_examples_show_their_text() -> None:
    model = random_model("reflow")
    collected = rl.collect(model, TEXTS, "hook_embed", k=3)
    frame = collected["hook_embed"].examples(5, model)
    assert list(frame) == ["value", "row", "position", "token", "text"]
    for _, example in frame.iterrows():
        assert TEXTS[example["row"]][example["position"]] == example["text"]


def test_memory_does_not_grow_with_the_stream() -> None:
    model = random_model("reflow")
    one, many = (rl.collect(model, [TEXTS] * n, "hook_embed", k=6, threshold=0.0)["hook_embed"] for n in (2, 30))
    sizes = [{key: tensor.shape for key, tensor in point.tensors().items()} for point in (one, many)]
    assert sizes[0] == sizes[1]
    assert many.n == 15 * one.n


def test_statistics_that_were_not_collected() -> None:
    model = random_model("reflow")
    point = rl.collect(model, TEXTS, "hook_embed", statistics=["mean"])["hook_embed"]
    assert point.variance.shape == (32,)
    for ask, missing in (
        (lambda p: p.covariance, "'covariance' among the statistics"),
        (lambda p: p.examples(0), "'top' among the statistics"),
        (lambda p: p.firing_rate, "a threshold"),
    ):
        with pytest.raises(ReflowlensError, match=missing):
            ask(point)
    counts = rl.collect(model, TEXTS, "hook_embed", statistics=[], threshold=0.0)["hook_embed"]
    with pytest.raises(ReflowlensError, match="'mean' among the statistics"):
        _ = counts.mean


@pytest.mark.parametrize(
    ("names", "choices", "message"),
    [
        ("hook_embd", {}, "hook_embed"),
        ("hook_basis", {}, "statistics are of"),
        ("blocks.0.attn.hook_pattern", {}, "statistics are of"),
        ("hook_embed", {"statistics": ["median"]}, "got 'median'"),
        ("hook_embed", {"statistics": []}, "nothing to collect"),
        ("hook_embed", {"k": 0}, "k must be an integer and at least 1"),
        ("hook_embed", {"positions": 3}, "a slice, 'last' or None, got 3"),
        ("hook_embed", {"positions": slice(None, None, -1)}, "its step at least 1"),
        ("hook_embed", {"positions": slice(50, None)}, "no position counts"),
    ],
)
def test_errors_say_what_was_expected(names: str, choices: dict, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.collect(random_model("reflow"), TEXTS, names, **choices)


def test_what_cannot_be_read_or_merged_is_an_error(tmp_path: Path) -> None:
    model = random_model("reflow")
    collected = rl.collect(model, TEXTS, "hook_embed", k=3)
    for batches, message in (
        ("one text", "not one text"),
        ([], "batches are empty"),
        (torch.zeros(3), r"\[row, pos\]"),
        (np.array([[1.5, 2.5]]), "token ids"),
    ):
        with pytest.raises(ReflowlensError, match=message):
            rl.collect(model, batches, "hook_embed")
    with pytest.raises(ReflowlensError, match="'hook_recipe' was not collected; these were: hook_embed"):
        _ = collected["hook_recipe"]
    with pytest.raises(ReflowlensError, match="features 0 to 31"):
        collected["hook_embed"].examples(32)
    with pytest.raises(ReflowlensError, match="differently: k 3 and 20"):
        collected.merge(rl.collect(model, TEXTS, "hook_embed"))
    with pytest.raises(ReflowlensError, match="different models"):
        collected.merge(rl.collect(random_model("reflow", seed=3), TEXTS, "hook_embed", k=3))
    with pytest.raises(ReflowlensError, match="holds no statistics"):
        rl.Collected.load(model.run_with_cache("ab")[1].save(tmp_path / "cache"))
    collected.save(tmp_path / "kept")
    with pytest.raises(ReflowlensError, match="differently: k 3 and 20"):
        rl.collect(model, TEXTS, "hook_embed", results=tmp_path / "kept")
    with torch.no_grad():
        model.embed.W_basis[0, 0] = torch.inf
    with pytest.raises(ReflowlensError, match="NaN or infinite"):
        rl.collect(model, TEXTS, "hook_embed")


def test_tensors_hold_everything_that_was_collected() -> None:
    collected = rl.collect(random_model("reflow"), TEXTS, "hook_embed", threshold=0.0)["hook_embed"]
    again = PointStatistics.of_tensors(collected.n, collected.feature_shape, collected.tensors())
    assert torch.equal(again.covariance, collected.covariance)
    assert torch.equal(again.firing_rate, collected.firing_rate)
    assert again.examples(3).equals(collected.examples(3))
