"""Semantic Algebra against plain loops, in a model with planted analogies and in one with none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.claims import control_of
from analyses.experiments.semantic_algebra.experiment import (
    NULLS,
    carries_analogies,
    paired_hits_pvalue,
    semantic_algebra,
)
from analyses.experiments.semantic_algebra.measure import analogy_ranks, candidate_sets, usable_analogies
from analyses.result.result import Result
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.words.lexicon import Analogy, Lexicon, load_lexicon
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.planted_results import ALGEBRA, missed
from tests.reference.analogies import rank
from tests.support.planted import analogy_model, planted_analogies

WIDTH = 32
PLANTED = planted_analogies()
RANK_COLUMNS = ("add", "add_unit", "mul", "c_alone", "a_plus_c")


def tiny(architecture: str = "reflow", tokenizer: str = "gpt2_16k", d_vocab: int = 16768) -> HookedModel:
    cfg = ModelConfig(
        architecture=architecture,
        n_layers=1,
        d_model=WIDTH,
        n_heads=2,
        d_head=16,
        d_mlp=32,
        d_vocab=d_vocab,
        n_ctx=16,
        n_signals=WIDTH if architecture.startswith("reflow") else None,
        topk=8 if architecture == "reflow_topk" else None,
        tokenizer_name=tokenizer,
    )
    return build_model(cfg, seed=0)


BESIDE = {control_of(name) for name in NULLS}


@pytest.fixture(scope="module")
def planted() -> HookedModel:
    return analogy_model()


@pytest.fixture(scope="module")
def found(planted: HookedModel) -> Result:
    return ALGEBRA.measure(planted)


@pytest.fixture(scope="module")
def nothing() -> Result:
    return semantic_algebra(tiny(), seed=3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_ranks_are_those_of_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(24, generator=generator)[:4] for _ in range(6)])
    candidates = torch.rand(3, 24, generator=generator) < 0.7
    ranks = analogy_ranks(rows, ids, candidates)
    words, tokens, lexicon = (set(column.nonzero().flatten().tolist()) for column in candidates)
    plain = rows.numpy()
    for i, quadruple in enumerate(ids.tolist()):
        for method in RANK_COLUMNS:
            assert ranks[f"rank_{method}"][i] == rank(method, plain, quadruple, words, exclude=True)
        assert ranks["rank_with_inputs"][i] == rank("add", plain, quadruple, words, exclude=False)
        assert ranks["rank_all_tokens"][i] == rank("add", plain, quadruple, tokens, exclude=True)
        assert ranks["rank_lexicon"][i] == rank("add", plain, quadruple, lexicon, exclude=True)
        predicted = [*quadruple[:3], int(ranks["predicted"][i])]
        assert rank("add", plain, predicted, words, exclude=True) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_ranks_know_neither_rotation_nor_scale(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(200, generator=generator)[:4] for _ in range(5)])
    everything = torch.ones(3, 200, dtype=torch.bool)
    before = analogy_ranks(rows, ids, everything)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    after = analogy_ranks(scale * rows @ rotation, ids, everything)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


def test_a_space_in_which_all_is_alike_answers_nothing() -> None:
    ranks = analogy_ranks(torch.ones(50, 4), torch.tensor([[0, 1, 2, 3]]), torch.ones(3, 50, dtype=torch.bool))
    assert [ranks[f"rank_{method}"].item() for method in RANK_COLUMNS] == [47] * 5
    assert ranks["rank_with_inputs"].item() == 50


def test_planted_analogies_are_all_found(found: Result) -> None:
    assert not missed(found, ALGEBRA.expected)
    for metric in ("rank_queen", "rank_ran", "rank_Beijing"):
        assert found.controls[metric]["untrained"] > 1
    assert max(found.controls["accuracy_at_1"][null] for null in BESIDE) < 0.2
    assert found.published == {"rank_queen": 1, "rank_ran": 1, "rank_Beijing": 2}
    assert (
        found.frames["quadruples"].query("space == 'R' and weights == 'trained'").eval("predicted == expected")
    ).all()


def test_an_untrained_model_carries_none(nothing: Result) -> None:
    assert nothing.metrics["accuracy_at_1"] < 0.02
    assert nothing.metrics["mean_reciprocal_rank"] < 0.02
    assert nothing.verdicts["accuracy_at_1"] == "not supported"
    assert nothing.verdicts["recipe_minus_E"] == "not supported"
    assert nothing.metrics["rank_queen"] > 20


def test_a_rotation_moves_no_answer(found: Result, nothing: Result) -> None:
    for result in (found, nothing):
        asked = len(result.frames["quadruples"].query("space == 'R' and weights == 'trained'"))
        for measure in ("accuracy_at_1", "accuracy_at_5"):  # the rounding of turned rows may decide one question
            assert abs(result.controls[measure]["rotated_basis"] - result.metrics[measure]) < 1.5 / asked
        # Words far down the list lie closer together than rounding in float32.
        assert result.metrics["rotated_basis_rank_difference"] <= 3


def test_every_headline_metric_has_its_controls(found: Result) -> None:
    for measure in ("accuracy_at_1", "accuracy_at_5", "mean_reciprocal_rank"):
        assert set(found.controls[measure]) == {*BESIDE, "rotated_basis", "E"}
        assert set(found.controls[f"{measure}_E"]) == {*BESIDE, "R"}
        low, high = found.intervals[measure]
        assert low <= found.metrics[measure] <= high
    assert set(found.controls["rank_queen"]) == {*BESIDE, "rotated_basis", "E"}
    assert set(found.metrics) <= set(found.definitions)


def test_metrics_are_means_of_the_frame(nothing: Result) -> None:
    rows = nothing.frames["quadruples"].query("space == 'E' and weights == 'trained'")
    assert len(rows) == len(usable_analogies(load_lexicon().analogies, get_tokenizer("gpt2_16k"))[0])
    assert nothing.metrics["accuracy_at_5_E"] == pytest.approx((rows["rank_add"] <= 5).mean())
    assert nothing.metrics["mean_reciprocal_rank_E"] == pytest.approx((1 / rows["rank_add"]).mean())
    assert nothing.metrics["accuracy_at_1_lexicon_E"] == pytest.approx((rows["rank_lexicon"] == 1).mean())
    assert (rows["rank_add"] <= rows["rank_all_tokens"]).all()
    assert (rows["rank_add"] <= rows["rank_with_inputs"]).all()
    sections = nothing.frames["sections"].query("series == 'E'")
    assert sections["n"].sum() == len(rows)
    assert np.average(sections["accuracy_at_5"], weights=sections["n"]) == pytest.approx((rows["rank_add"] <= 5).mean())


def test_the_same_seed_gives_the_same_frames(planted: HookedModel, found: Result) -> None:
    again = semantic_algebra(planted, analogies=PLANTED)
    for name, frame in found.frames.items():
        pd.testing.assert_frame_equal(frame, again.frames[name])


def test_a_result_survives_its_folder(found: Result, tmp_path: Path) -> None:
    loaded = Result.load(found.save(tmp_path / "algebra"))
    assert loaded.metrics == found.metrics
    assert set(loaded.figures) == {"accuracy", "sections", "published"}
    pd.testing.assert_frame_equal(loaded.frames["quadruples"], found.frames["quadruples"])


@pytest.mark.parametrize("architecture", ["gpt2_new", "reflow_topk"])
def test_other_architectures_answer_too(architecture: str) -> None:
    result = semantic_algebra(tiny(architecture), analogies=PLANTED)
    assert result.metrics["accuracy_at_1"] < 0.1
    native = architecture.startswith("reflow")
    assert ("accuracy_at_1_E" in result.metrics) is native
    assert ("recipe_minus_E" in result.metrics) is native
    assert any("identity" in note for note in result.notes) is not native


def test_google_file_quick_and_section_limits(planted: HookedModel, tmp_path: Path) -> None:
    lines = [f"{item.b} {item.a} {item.c} {item.expected}" for item in PLANTED]
    path = tmp_path / "questions.txt"
    path.write_text(": one\n" + "\n".join(lines) + "\n: two\n" + "\n".join(lines * 2) + "\nking queen zyzzyva man\n")
    result = semantic_algebra(planted, analogies=path, max_per_section=12)
    sizes = result.frames["sections"].query("series == 'R'").set_index("relation")["n"]
    assert sizes.to_dict() == {"one": 12, "two": 12}
    assert any(note.startswith("1 of") and "zyzzyva" in note for note in result.notes)
    assert result.metrics["rank_queen"] == 1
    quick = semantic_algebra(planted, analogies=path, quick=True)
    assert quick.frames["sections"].query("series == 'R'")["n"].sum() == 100


def test_candidates_are_words_tokens_and_the_lexicon() -> None:
    tokenizer = get_tokenizer("gpt2_16k")
    king, paris = tokenizer.single_token(" king"), tokenizer.single_token(" Paris")
    lexicon = Lexicon("1", categories={"royalty": ("king", "zyzzyva")})
    candidates = candidate_sets(tokenizer, lexicon, torch.tensor([[paris] * 4]))
    assert candidates.shape == (3, tokenizer.n_vocab)
    assert candidates[2].nonzero().flatten().tolist() == sorted([king, paris])
    assert candidates[1].all()
    assert candidates[0].sum() < tokenizer.n_vocab


def test_answers_among_the_inputs_are_not_asked() -> None:
    trivial = Analogy("same", a="king", b="man", c="queen", expected="queen")
    kept, notes = usable_analogies([*PLANTED, trivial], get_tokenizer("gpt2_16k"))
    assert kept == PLANTED
    assert notes == [f"1 of {len(PLANTED) + 1} analogies skipped, the answer is one of the inputs: {trivial}"]


def test_too_few_analogies_are_an_error() -> None:
    with pytest.raises(ReflowlensError, match=r"at least 10 .* got 9"):
        semantic_algebra(tiny(), analogies=PLANTED[:9])
    with pytest.raises(ReflowlensError, match=r"'bytes', got 0 \(52 of 52 analogies skipped, not single tokens"):
        semantic_algebra(tiny(tokenizer="bytes", d_vocab=256), analogies=PLANTED)


def test_the_exact_test_is_the_sign_flip_test() -> None:
    generator = np.random.default_rng(0)
    hits, other = generator.random(12) < 0.8, generator.random(12) < 0.3
    flipped = paired_permutation_pvalue(hits.astype(float) - other)  # 2^12 signs: exact
    assert paired_hits_pvalue(hits, other) == pytest.approx(flipped)
    assert paired_hits_pvalue(hits, hits) == 1


def test_a_space_must_beat_every_null() -> None:
    answered, none = np.arange(100) < 60, np.zeros(100, dtype=bool)
    assert carries_analogies(answered, (0.5, 0.7), {"c_alone": none, "untrained": none}) == "supported"
    assert carries_analogies(answered, (0.5, 0.7), {"c_alone": answered, "untrained": none}) == "not supported"
    assert carries_analogies(answered[:20], (0.5, 0.7), {"c_alone": none[:20]}) == "underpowered"
