"""Whether students have their teacher's signals: planted students that have all of them or none, and the rule."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analyses.findings.distillation import claim_verdict, differences_of, distillation, transfer
from analyses.findings.seeds import Difference
from analyses.findings.transfer import Pairing, by_recipe, codebook_agreement
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.checkpoints import load_model, save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.signals import random_rotation, signal_view
from tests.support.tiny import random_model

PAIRINGS = ("number", "recipe")
SHARES = ("causal", "edit", "steering")


@pytest.fixture(scope="module")
def teacher() -> HookedModel:
    return load_model("reflow-nano")


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    """A sixth of the packaged one's prompts and carriers: what is planted shows in a few."""
    whole = load_lexicon()
    sentiment = dataclasses.replace(whole.sentiment, prompts=whole.sentiment.prompts[:10])
    return dataclasses.replace(whole, factual=whole.factual[:15], sentiment=sentiment)


def without_last_block(teacher: HookedModel) -> HookedModel:
    """The planted positive: what a student of fewer layers would be that has taken over everything."""
    cfg = dataclasses.replace(teacher.cfg, n_layers=teacher.cfg.n_layers - 1)
    student = build_model(cfg)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(teacher.get_parameter(name))
    return student


def in_rotated_basis(teacher: HookedModel, Q: torch.Tensor) -> HookedModel:
    """The planted negative: the teacher itself, (R Qᵀ)(Q B), every logit the same and no single signal."""
    student: Any = copy.deepcopy(teacher)
    with torch.no_grad():
        student.embed.W_recipe.copy_(student.embed.W_recipe @ Q.T)
        student.embed.W_basis.copy_(Q @ student.embed.W_basis)
    return student


def test_a_student_that_is_its_teacher_has_everything(teacher: HookedModel, lexicon: Lexicon) -> None:
    found = transfer(copy.deepcopy(teacher), signal_view(teacher), lexicon)
    for pairing in PAIRINGS:
        assert found[f"codebook_{pairing}"] == 1
        for kind in SHARES:
            assert found[f"{kind}_{pairing}_share"] == pytest.approx(1, abs=1e-4), kind
    assert found["steering_vector_share"] == pytest.approx(1, abs=1e-4)
    assert found["codebook_shuffled"] < 0.02
    for kind in SHARES:
        assert found[f"{kind}_number_own"] > 3 * abs(found[f"{kind}_number_random"]), kind


def test_a_student_that_lacks_a_block_has_its_teachers_signals(teacher: HookedModel, lexicon: Lexicon) -> None:
    """What it predicts is another thing, and is caused by the same signals."""
    found = transfer(without_last_block(teacher), signal_view(teacher), lexicon)
    assert found["codebook_number"] == found["codebook_recipe"] == 1
    assert found["edit_number_share"] == found["steering_number_share"] == pytest.approx(1, abs=1e-4)
    assert found["causal_number_share"] > 0.7


def test_in_another_basis_only_vectors_carry_over(teacher: HookedModel, lexicon: Lexicon) -> None:
    Q = random_rotation(teacher.cfg.n_signals or 0, seed=3)
    found = transfer(in_rotated_basis(teacher, Q), signal_view(teacher), lexicon)
    assert found["codebook_number"] < 0.02
    for kind in SHARES:
        assert abs(found[f"{kind}_number_share"]) < 0.3, kind
    assert found["steering_vector_share"] == pytest.approx(1, abs=1e-3)


def test_signals_in_another_order_are_found_by_their_recipes(teacher: HookedModel, lexicon: Lexicon) -> None:
    """A student's signals are the teacher's in another order and with other signs: matched, everything carries over."""
    n = teacher.cfg.n_signals or 0
    generator = torch.Generator().manual_seed(4)
    order, signs = torch.randperm(n, generator=generator), torch.randint(2, (n,), generator=generator) * 2.0 - 1
    student = in_rotated_basis(teacher, torch.diag(signs) @ torch.eye(n)[order])
    theirs, ours = signal_view(teacher), signal_view(student)
    pairing = by_recipe(ours, theirs)
    assert torch.equal(pairing.student[order], torch.arange(n))
    assert torch.equal(pairing.sign[order], signs)
    assert float(codebook_agreement(ours, theirs, pairing).min()) == 1
    found = transfer(student, theirs, lexicon)
    for kind in SHARES:
        assert found[f"{kind}_recipe_share"] == pytest.approx(1, abs=1e-3), kind
        assert abs(found[f"{kind}_number_share"]) < 0.4, kind


def test_agreement_is_a_share_of_top_words() -> None:
    """Against a count by hand, with a sign turned."""
    teacher, student = (signal_view(random_model("reflow", seed=seed)) for seed in (0, 1))
    pairing = Pairing(torch.arange(32).flip(0), torch.tensor([1.0, -1.0]).repeat(16))
    found = codebook_agreement(student, teacher, pairing, k=5)
    odd = range(1, 256, 2)
    for signal in (0, 7):
        theirs = sorted(odd, key=lambda token: -float(teacher.recipe[token, signal]))[:5]
        sign = -1 if signal % 2 else 1
        ours = sorted(odd, key=lambda token: -sign * float(student.recipe[token, 31 - signal]))[:5]
        assert float(found[signal]) == pytest.approx(len({*theirs} & {*ours}) / 5)


# ------------------------------------------------------------------------------------------------------------ a study


@pytest.fixture
def study(teacher: HookedModel, tmp_path: Path) -> Path:
    """Frozen students that are the teacher less a block, rotated ones, and one arm of one seed."""
    rows = []
    for seed in range(3):
        Q = random_rotation(teacher.cfg.n_signals or 0, seed)
        arms = {"frozen": without_last_block(teacher), "rotated": in_rotated_basis(teacher, Q)}
        if seed == 0:
            arms["logits"] = arms["rotated"]
        for arm, student in arms.items():
            save_model(tmp_path / f"seed_{seed}_{arm}" / "step_0000002", student, dtype=torch.float16)
            loss = {"frozen": 4.0, "rotated": 4.2, "logits": 4.4}[arm] + 0.01 * seed
            rows.append({"arm": arm, "seed": seed, "complete": True, "tokens": 64, "val_loss": loss})
    rows.append({"arm": "own", "seed": 0, "complete": False, "tokens": 32, "val_loss": math.nan})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path


def test_a_planted_study(study: Path, teacher: HookedModel, lexicon: Lexicon) -> None:
    result = distillation(study, teacher, lexicon=lexicon)
    assert result.metrics["codebook"] == pytest.approx(1, abs=0.02)
    assert result.intervals["codebook"][0] > 0.9
    for claim in ("codebook", "causal", "edit", "steering"):
        assert result.verdicts[claim] == "supported", claim
    assert result.metrics["signals_gain"] == pytest.approx(0.4)
    assert result.verdicts["signals_gain"] == "underpowered"
    assert result.controls["signals_gain"] == pytest.approx({"logits": 4.4, "frozen": 4.01})
    assert "logits_gain, basis_gain, signals_loss, shared_basis" in result.notes[0]
    assert "1 of 8 runs" in result.notes[-1]
    by_arm = result.frames["by_arm"].set_index(["measure", "arm"])
    assert by_arm.loc[("steering_vector_share", "rotated"), "mean"] == pytest.approx(1, abs=0.01)
    assert by_arm.loc[("val_loss", "frozen"), "mean"] == pytest.approx(4.01)
    assert set(result.figures) == {"loss", "codebooks", "transfer"}
    again = distillation(study, teacher, lexicon=lexicon)
    pd.testing.assert_frame_equal(again.frames["runs"], result.frames["runs"])


def test_the_rule() -> None:
    assert claim_verdict(Difference(0.3, 0.25, 0.35, 0.01, 3), 0.2, 0.03) == "supported"
    assert claim_verdict(Difference(0.3, 0.25, 0.35, 0.01, 3), 0.2, 0.06) == "underpowered"
    assert claim_verdict(Difference(0.1, 0.05, 0.15, 0.01, 3), 0.2, 0.03) == "not supported"
    assert claim_verdict(Difference(0.1, -0.1, 0.3, 0.2, 3), 0.2, 0.5) == "underpowered"
    assert claim_verdict(Difference(0.3, 0.25, 0.35, 0.01, 2), 0.2, 0.01) == "underpowered"


def test_p_values_are_of_all_claims_together() -> None:
    values = {"none": (5.0, 5.1, 5.2), "logits": (4.8, 4.91, 4.99), "frozen": (4.8, 4.9, 4.99)}
    rows = [{"arm": arm, "seed": seed, "gain": -loss} for arm, own in values.items() for seed, loss in enumerate(own)]
    found = differences_of(pd.DataFrame(rows)).set_index("claim")
    assert found.index.tolist() == ["logits_gain", "signals_gain"]
    assert found.loc["logits_gain", "mean"] == pytest.approx(0.2)
    assert found["verdict"].tolist() == ["supported", "not supported"]
    assert found.loc["logits_gain", "p"] < 0.01


def test_students_of_another_vocabulary_are_refused(teacher: HookedModel, lexicon: Lexicon) -> None:
    with pytest.raises(ReflowlensError, match="shares its teacher's tokenizer_name, which is 'gpt2_16k'"):
        transfer(random_model("reflow"), signal_view(teacher), lexicon)
    with pytest.raises(ReflowlensError, match="'gpt2_new' has no native signals"):
        transfer(load_model("gpt2-new-nano"), signal_view(teacher), lexicon)
