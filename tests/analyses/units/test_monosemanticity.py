"""Concepts by example, scores against brute force, and planted units: found, and gone in the controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from analyses import monosemanticity
from analyses.units.concepts import CONCEPTS, label_characters, label_tokens
from analyses.units.held_out import as_stream
from analyses.units.monosemanticity import Text, score_units
from analyses.units.scores import auroc, best_thresholds, f1_at, mean_ranks, shifted_auroc, token_entropy
from analyses.units.silencing import ablate_concepts, matched, row_losses
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.tiny import random_model

POINT = "blocks.0.hook_xy_sparse"
SPEAKER, COLON, NOISE = 5, 6, 30  # planted units, in the flattened axes of the point
NAMES = list(CONCEPTS)


def drama(lines: int = 240, seed: int = 0) -> str:
    """Speeches of random words behind a blank line and a speaker's name."""
    generator = np.random.default_rng(seed)
    words = ["the", "lord", "is", "come", "and", "no", "man", "hath", "Rome", "we", "shall", "go"]
    said = (" ".join(generator.choice(words, 6)) + generator.choice([".", "!", "?", ","]) for _ in range(lines))
    return "".join(f"{generator.choice(['KING', 'ANNE', 'First Lord'])}:\n{line}\n\n" for line in said)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return random_bdh()


@contextmanager
def planted(model: HookedModel) -> Iterator[None]:
    """A unit for names of speakers, one for colons, and one that fires whatever is read."""
    seen: dict[str, Tensor] = {}
    table = model.W_E.detach()

    def read(embedded: Tensor, hook: HookPoint) -> None:
        seen["tokens"] = (embedded[:, :, None] == table).all(-1).int().argmax(-1)

    def plant(activation: Tensor, hook: HookPoint) -> Tensor:
        labels = label_tokens(model, seen["tokens"])
        generator = torch.Generator().manual_seed(int(seen["tokens"].sum()))
        noise = torch.rand(3, *labels.shape[:2], generator=generator)
        flat = activation.flatten(2).clone()
        for unit, concept, own in ((SPEAKER, "speaker_name", noise[0]), (COLON, "colon", noise[1])):
            flat[..., unit] = labels[..., NAMES.index(concept)] * (1 + own) + 0.9 * own
        flat[..., NOISE] = (noise[2] - 0.7).clamp(min=0)
        return flat.unflatten(2, activation.shape[2:])

    with model.hooks(fwd_hooks=[("hook_embed", read), (POINT, plant)]):
        yield


# -- concepts ---------------------------------------------------------------------------------------------------------


def test_concepts_by_example() -> None:
    text = "He.\n\nANNE:\nHo, no"
    found = label_characters(text)
    assert list(found) == NAMES
    expected = {
        "line_start": [5, 11],
        "after_blank_line": [5],
        "speaker_name": [5, 6, 7, 8, 9],
        "early_in_line": [5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16],
        "capital": [0, 5, 6, 7, 8, 11],
        "vowel": [1, 5, 8, 12, 16],
        "space": [14],
        "newline": [3, 4, 10],
        "colon": [9],
        "punctuation": [2, 9, 13],
        "word_start": [0, 5, 11, 15],
        "word_end": [1, 8, 12],
    }
    assert {name: np.flatnonzero(labels).tolist() for name, labels in found.items()} == expected


def test_tokens_of_several_characters() -> None:
    """A concept about a beginning goes by the first character, others by the last."""
    tokenizer = get_tokenizer("gpt2")
    ids = torch.tensor([tokenizer.encode("Oh.\n\nKing Lear:\nNo")])
    pieces = tokenizer.to_str_tokens(ids[0].tolist())
    labels = label_tokens(SimpleNamespace(tokenizer=tokenizer), ids)[0]  # type: ignore[arg-type]
    of = {name: [piece for piece, label in zip(pieces, labels[:, i], strict=True) if label] for i, name in
          enumerate(NAMES)}  # fmt: skip
    assert of["after_blank_line"] == ["King"]
    assert of["speaker_name"][0] == "King"
    assert of["speaker_name"][-1] == ":"
    assert of["newline"] == ["\n", "\n", "\n"]
    assert of["capital"] == of["word_start"] == ["Oh", "King", " Lear", "No"]


def test_bytes_are_labelled_as_characters(model: HookedModel) -> None:
    text = "\n\n  King Lear:\n  No, no"
    labels = label_tokens(model, torch.tensor([list(text.encode())]))[0]
    np.testing.assert_array_equal(labels.T, np.stack(list(label_characters(text).values())))


# -- scores -----------------------------------------------------------------------------------------------------------


def rectified(n: int, units: int, seed: int = 0) -> Tensor:
    """Half zeros, and ties among the others."""
    return torch.randn(n, units, generator=torch.Generator().manual_seed(seed)).clamp(min=0).round(decimals=1)


def test_ranks_and_auroc_are_scipys() -> None:
    values = rectified(150, 4)
    labels = torch.rand(150, 3, generator=torch.Generator().manual_seed(1)) > 0.7
    ranks = mean_ranks(values)
    np.testing.assert_array_equal(ranks, stats.rankdata(values, axis=0))
    found = auroc(ranks, labels)
    for unit in range(4):
        for concept in range(3):
            yes = labels[:, concept]
            pairs = int(yes.sum()) * int((~yes).sum())
            u = stats.mannwhitneyu(values[yes, unit], values[~yes, unit]).statistic
            assert float(found[unit, concept]) == pytest.approx(u / pairs, abs=1e-5)


def test_thresholds_are_the_best_of_all() -> None:
    values = rectified(80, 5, seed=2)
    labels = torch.rand(80, 5, generator=torch.Generator().manual_seed(3)) > 0.6
    threshold, f1 = best_thresholds(values, labels)
    for unit in range(5):
        every = []
        for cut in values[:, unit].unique():
            said, yes = values[:, unit] >= cut, labels[:, unit]
            if cut > 0:
                every.append(2 * int((said & yes).sum()) / (int(said.sum()) + int(yes.sum())))
        assert float(f1[unit]) == pytest.approx(max(every))
    torch.testing.assert_close(f1_at(values, labels, threshold), f1)
    silent, none = best_thresholds(torch.zeros(9, 1), torch.ones(9, 1, dtype=torch.bool))
    assert (float(silent), float(none)) == (float("inf"), 0.0)


def test_entropy_of_the_token_that_is_fired_at() -> None:
    fires = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]).bool()
    tokens = torch.tensor([9, 9, 4, 7])
    assert float(token_entropy(fires, tokens, events=4)[0]) == pytest.approx(1.5)
    of_two = token_entropy(fires, tokens, events=2)
    assert float(of_two[1]) == pytest.approx(0.0, abs=1e-6)
    assert bool(of_two[2].isnan())


def test_a_rare_unit_has_no_lower_entropy_for_being_rare() -> None:
    """Both fire at any of 200 tokens, one of them fifty times as often."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(200, (4000,), generator=generator)
    fires = torch.rand(4000, 2, generator=generator) < torch.tensor([0.5, 0.01])
    common, rare = token_entropy(fires, tokens, events=20).tolist()
    assert common == pytest.approx(rare, abs=0.4)
    assert common <= np.log2(20)
    halves = torch.arange(4000) // 2000  # events are of all the text, not the first
    assert float(token_entropy(torch.ones(4000, 1).bool(), halves, events=20)) > 0.7


def test_the_shifted_null_is_calibrated_for_units_with_runs() -> None:
    """Units and concepts that come in runs and know nothing of each other: about one in twenty has p < 0.05."""
    generator = torch.Generator().manual_seed(0)

    def runs(columns: int) -> Tensor:
        steps = torch.randn(4000, columns, generator=generator)
        smooth = torch.nn.functional.avg_pool1d(steps.T[None], 25, stride=1, padding=12)[0].T
        return (smooth - 0.15).clamp(min=0)

    values, labels = runs(300), runs(6) > 0
    ranks = mean_ranks(values)
    null = shifted_auroc(ranks, labels, shifts=20, seed=1)
    p = null.pvalues(auroc(ranks, labels))
    assert 0.02 < (p < 0.05).mean() < 0.09


# -- planted units ----------------------------------------------------------------------------------------------------


def test_planted_units_are_found_and_gone_in_the_controls(model: HookedModel) -> None:
    with planted(model):
        result = monosemanticity(model, drama(), [POINT], context=48, causal=2, seed=1)
    units = result.frames["units"].set_index("index")
    assert units.loc[SPEAKER, "concept"] == "speaker_name"
    assert units.loc[COLON, "concept"] == "colon"
    assert (units.loc[[SPEAKER, COLON], "f1"] > 0.95).all()
    assert (units.loc[[SPEAKER, COLON], "auroc"] > 0.98).all()
    assert (units.loc[[SPEAKER, COLON], "q"] < 1e-3).all()
    assert units.loc[NOISE, "q"] > 0.05
    assert units.loc[NOISE, "f1"] < 0.5
    concepts = result.frames["concepts"].set_index("concept")
    assert concepts.loc["speaker_name", "best_index"] == SPEAKER
    assert concepts.loc["colon", "telling"] >= 1
    assert set(result.controls["telling_share"]) == {"untrained", "shuffled_text", "permuted_units"}
    assert result.controls["telling_share"]["permuted_units"] == 0
    ablation = result.frames["ablation"]
    assert len(ablation) == 2
    assert ablation["p"].between(0.05, 1.0).all()
    assert set(result.figures) == {"f1", "concepts"}


def test_a_context_unit_is_not_found_in_shuffled_text(model: HookedModel) -> None:
    """A colon is a colon anywhere; the name of a speaker needs its place."""
    stream = as_stream(model, drama())
    mixed = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))]
    with planted(model):
        found = score_units(model, Text.of(model, mixed, 48, None), [POINT], shifts=8, seed=0).set_index("index")
    assert found.loc[COLON, "f1"] > 0.95
    if SPEAKER in found.index:
        assert found.loc[SPEAKER, "f1"] < 0.5


def test_kinds_of_units_are_points(model: HookedModel) -> None:
    result = monosemanticity(model, drama(), "xy_sparse", context=24, causal=0, quick=True)
    assert result.params["points"] == [f"blocks.{level}.hook_xy_sparse" for level in range(3)]
    assert result.params["causal"] == 0
    assert result.frames["units"]["token_entropy"].between(0, np.log2(20) + 1e-5).all()


def test_a_matched_model_stands_beside(model: HookedModel) -> None:
    other = random_model("gpt2")
    result = monosemanticity(model, drama(), matched=other, context=24, rows=60, causal=0, quick=True)
    assert "matched" in result.controls["best_f1"]
    assert "ablation" not in result.frames
    assert result.params["rows"] == 24


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: monosemanticity(model, "To be", context=4), "two rows of 4 tokens"),
        (lambda model: monosemanticity(model, "x" * 500, context=48), "no concept occurs often enough"),
        (lambda model: monosemanticity(model, drama(), ["blocks.9.hook_x"], context=48), "no hook"),
        (lambda model: monosemanticity(model, drama(), ["words"], context=48), "no kind of units 'words'"),
        (lambda _: monosemanticity(random_model("gpt2"), drama(), ["blocks.0.attn.hook_pattern"]), "units are of"),
        (lambda _: monosemanticity(random_model("reflow"), drama(), ["hook_basis"]), "units are of"),
    ],
)
def test_errors(model: HookedModel, ask: Callable[[HookedModel], Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        ask(model)


# -- ablation ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_are_the_models(model: HookedModel) -> None:
    rows = Text.of(model, as_stream(model, drama()), 48, 4).tokens
    assert float(row_losses(model, rows).mean()) == pytest.approx(float(model(rows, "loss")), rel=1e-5)


def test_silencing_is_measured_on_the_concept_and_off_it(model: HookedModel) -> None:
    text = Text.of(model, as_stream(model, drama()), 48, 20)
    units = score_units(model, text, [POINT], shifts=4, seed=0)
    table, notes = ablate_concepts(model, text.tokens, text.labels, units, text.n_first, 1, seed=0)
    found = table.iloc[0]
    assert notes == []
    best = units[units["concept"] == found["concept"]].nlargest(10, "f1_s1")["index"].to_numpy()

    def silence(activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.stack(
            [activation.flatten(2)[..., i] * (i not in best) for i in range(48)], dim=-1
        ).unflatten(2, activation.shape[2:])  # fmt: skip

    rows = text.tokens[text.n_first : text.n_first + 16]
    on = text.labels[text.n_first : text.n_first + 16, :-1, NAMES.index(found["concept"])]
    with torch.no_grad():
        before = row_losses(model, rows)
        with model.hooks(fwd_hooks=[(POINT, silence)]):
            change = row_losses(model, rows) - before
    assert found["on"] == pytest.approx(float(change[on].mean()), rel=1e-4)
    assert found["off"] == pytest.approx(float(change[~on].mean()), rel=1e-4)


def test_without_enough_others_a_concept_is_left_out_and_named(model: HookedModel) -> None:
    """Ten units need twenty others; with none every draw would be 0, and p the smallest there is."""
    text = Text.of(model, as_stream(model, drama()), 48, 20)
    units = score_units(model, text, [POINT], shifts=4, seed=0).assign(concept="vowel")
    for n, notes in ((10, 1), (29, 1), (30, 0)):
        found, said = ablate_concepts(model, text.tokens, text.labels, units.head(n), text.n_first, 1, seed=0)
        assert (len(found), len(said)) == (1 - notes, notes)
        assert all("vowel is not ablated: too few other units" in note for note in said)
    elsewhere = units.head(30).assign(point=["blocks.1.hook_xy_sparse"] * 10 + [POINT] * 20)
    best_first = elsewhere.assign(f1_s1=np.linspace(1, 0, 30))
    assert ablate_concepts(model, text.tokens, text.labels, best_first, text.n_first, 1, seed=0)[0].empty
    never = torch.zeros_like(text.labels)
    found, said = ablate_concepts(model, text.tokens, never, units, text.n_first, 1, seed=0)
    assert found.empty
    assert "all have it, or none" in said[0]


def test_matched_units_are_others_of_the_same_point_and_rate() -> None:
    generator = np.random.default_rng(0)
    rates = generator.uniform(0.01, 0.5, 200)
    table = pd.DataFrame({"point": ["a", "b"] * 100, "index": range(200), "firing_rate": rates})
    best, others = table.iloc[:10], table.iloc[10:]
    drawn = matched(best, others, generator)
    assert len(drawn) == len(set(drawn["index"])) == 10
    assert drawn["point"].tolist() == best["point"].tolist()
    ratio = drawn["firing_rate"].to_numpy() / best["firing_rate"].to_numpy()
    assert np.abs(np.log(ratio)).max() < 1
