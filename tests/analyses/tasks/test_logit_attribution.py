"""Direct logit attribution: contributions sum to the logits, and say which head of a planted model writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.statistics.familywise import max_statistic_pvalues
from analyses.tasks.logit_attribution import direct_logit_attribution
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.prompts import Prompts
from tests.support.families import ours
from tests.support.planted_tasks import copying_model, copying_prompts
from tests.support.tiny import random_model

TEXTS = ("the king", "a kind of", "no", "on the road", "thin", "ok")
RAGGED = Prompts.of(
    [{"clean": text, "answer": "abcd"[i % 4], "wrong_answer": "wxyz"[i // 2]} for i, text in enumerate(TEXTS)]
)


def contributions(model, prompts):
    result = direct_logit_attribution(model, prompts, draws=20, progress=False)
    frame = result.frames["contributions"]
    return frame.pivot(index="prompt", columns="component", values="contribution")[frame["component"].unique()]


TINY = ("reflow", "reflow_lite", "gpt2_biased", "llama_untied", "gpt2_own_readout")


@pytest.mark.parametrize("answer_alone", [False, True])
@pytest.mark.parametrize("name", [*TINY, "gpt_neox", "gpt_neo", "phi", "olmo2"])
def test_contributions_sum_to_the_logit_difference_of_each_prompt_alone(name, answer_alone):
    """Of parallel blocks, of blocks with norms behind their sublayers and of others."""
    model = random_model(name).eval() if name in TINY else ours(name)
    prompts = Prompts(RAGGED.frame.drop(columns="wrong_answer")) if answer_alone else RAGGED
    expected = []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            logits = model(text)[0, -1, : model.tokenizer.n_vocab]
            other = logits.mean() if answer_alone else logits[prompts.wrong_ids(model)[row]]
            expected.append(float(logits[prompts.answer_ids(model)[row]] - other))
    found = contributions(model, prompts)
    assert found.shape == (len(TEXTS), 2 + model.cfg.n_layers * (model.cfg.n_heads + 1))
    np.testing.assert_allclose(found.sum(axis=1), expected, rtol=0, atol=1e-5 * found.abs().sum(axis=1).max())


def test_of_capped_logits_they_sum_to_the_difference_before_the_cap():
    model, point = ours("gemma2"), "unembed.hook_logits_pre_cap"
    result = direct_logit_attribution(model, RAGGED, draws=20, progress=False)
    before = []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            logits = model.run_with_cache(text, names_filter=point)[1][point][0, -1]
            before.append(float(logits[RAGGED.answer_ids(model)[row]] - logits[RAGGED.wrong_ids(model)[row]]))
    found = result.frames["contributions"].groupby("prompt")["contribution"].sum()
    np.testing.assert_allclose(found, before, atol=1e-4)
    assert "caps logits" in " ".join(result.notes)


def test_prompts_of_unequal_lengths_are_as_each_with_another_of_its_length():
    model = random_model("llama_untied").eval()
    together = contributions(model, RAGGED)
    for row in range(len(RAGGED)):
        alone = contributions(model, RAGGED.select([row, row]))
        np.testing.assert_allclose(together.iloc[row], alone.iloc[0], atol=1e-5 * alone.abs().max().max())


def test_the_head_that_writes_the_answer_is_found_and_only_it():
    result = direct_logit_attribution(copying_model(noise=0.02), copying_prompts(), progress=False)
    frame = result.frames["components"].set_index("component")
    assert frame["mean"].idxmax() == "L1H2"
    assert frame.loc["L1H2", "mean"] == pytest.approx(result.metrics["logit_diff"], rel=0.01)
    assert frame.loc["L1H2", "shuffled_high"] < frame.loc["L1H2", "low"]
    assert frame.index[frame["p"] < 0.05].tolist() == ["L1H2"]
    assert result.metrics["components_beyond_control"] == 1
    assert (result.verdicts["from_heads"], result.verdicts["from_mlps"]) == ("supported", "not supported")
    assert result.metrics["accuracy"] == 1
    assert not result.notes
    assert result.metrics["sum_error"] < 1e-5


def test_where_no_head_writes_it_nothing_is_found_and_the_failure_at_the_task_is_said():
    result = direct_logit_attribution(copying_model(works=False, noise=0.02), copying_prompts(), progress=False)
    assert result.metrics["components_beyond_control"] == 0
    assert result.verdicts["from_heads"] == "not supported"
    low, high = result.intervals["from_heads"]
    assert low < 0 < high
    assert "does not do this task" in result.notes[0]


def test_answers_that_are_all_the_same_are_held_against_random_tokens():
    frame = copying_prompts().frame
    turned = np.arange(len(frame)) % 2 == 0  # the same two tokens the other way round are the same question
    frame = frame.assign(answer=np.where(turned, "a", "b"), wrong_answer=np.where(turned, "b", "a"))
    result = direct_logit_attribution(copying_model(), Prompts(frame), draws=20, progress=False)
    assert "random tokens" in " ".join(result.notes)
    assert abs(result.controls["from_heads"]["shuffled_answers"]) < 5


def test_what_has_no_heads_and_mlps_is_refused():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 24, "d_mlp": 48, "d_vocab": 256, "n_ctx": 32}
    bdh = build_model(ModelConfig(architecture="bdh", tie_word_embeddings=False, tokenizer_name="bytes", **sizes))
    with pytest.raises(ReflowlensError, match="is not made of these"):
        direct_logit_attribution(bdh, RAGGED)
    with pytest.raises(ReflowlensError, match="at least 2"):
        direct_logit_attribution(random_model("gpt2"), RAGGED.select([0]))


def test_family_wise_pvalues_reject_the_one_test_that_is_off():
    null = np.random.default_rng(0).standard_normal((199, 50)) * np.linspace(1, 9, 50)
    observed = np.zeros(50)
    observed[7] = -30.0
    p = max_statistic_pvalues(observed, null)
    assert p[7] == 1 / 200
    assert (np.delete(p, 7) > 0.9).all()
