"""Ablation of heads and MLPs: as plain hooks on each prompt alone have it, and the head of a planted model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from analyses.statistics.draws import derive_rng
from analyses.tasks.head_ablation import WAYS, head_ablation
from reflowlens.errors import ReflowlensError
from reflowlens.prompts import Prompts
from tests.support.families import ours
from tests.support.planted_tasks import copying_model, copying_prompts
from tests.support.tiny import CONFIGS, random_model

TEXTS = ("the king", "a kind of", "no", "on the road")
PROMPTS = Prompts.of([{"clean": text, "answer": "abcd"[i], "wrong_answer": "wxyz"[i]} for i, text in enumerate(TEXTS)])


def score(model, row, logits):
    answer, wrong = (ids(model)[row] for ids in (PROMPTS.answer_ids, PROMPTS.wrong_ids))
    logits = logits[0, -1, : model.tokenizer.n_vocab]
    return np.array([float(logits[answer] - logits[wrong]), float(logits.logsumexp(0) - logits[answer])])


def put(head, new, x, hook):
    x = x.clone()
    x[0, :, head if head >= 0 else slice(None)] = new[:, head] if head >= 0 else new
    return x


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_effects_are_those_of_plain_hooks_on_each_prompt_alone(name, by):
    model = random_model(name).eval() if name in CONFIGS else ours(name)
    effects = head_ablation(model, PROMPTS, by, progress=False).frames["effects"]
    caches = [model.run_with_cache(text)[1] for text in TEXTS]
    # all answers differ, so that any other prompt may be drawn
    rng = derive_rng(0, "head_ablation", "others")
    others = [int(rng.choice(np.delete(np.arange(len(TEXTS)), row))) for row in range(len(TEXTS))]

    def replacement(point, row):
        own = caches[row][point][0]
        if by == "zero":
            return torch.zeros_like(own)
        if by == "mean":
            from_end = range(len(own) - 1, -1, -1)
            return torch.stack([torch.stack([c[point][0, -1 - i] for c in caches if len(c[point][0]) > i]).mean(0)
                                for i in from_end])  # fmt: skip
        other = caches[others[row]][point][0]
        return torch.stack([other[max(0, len(other) - len(own) + i)] for i in range(len(own))])

    for row, text in enumerate(TEXTS):
        before = score(model, row, model(text))
        for layer, head in [(0, 1), (1, 3), (1, -1)]:
            point = f"blocks.{layer}.hook_mlp_out" if head < 0 else f"blocks.{layer}.attn.hook_z"

            hooks = [(point, partial(put, head, replacement(point, row)))]
            expected = score(model, row, model.run_with_hooks(text, fwd_hooks=hooks)) - before
            found = effects.query("prompt == @row and layer == @layer and head == @head")[["effect", "loss"]]
            np.testing.assert_allclose(found.to_numpy()[0], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("by", WAYS)
def test_the_head_that_answers_is_found_on_one_half_and_confirmed_on_the_other(by):
    result = head_ablation(copying_model(noise=0.01), copying_prompts(48), by, progress=False)
    frame = result.frames["components"].set_index("component")
    assert frame["effect"].idxmin() == "L1H2"
    assert "of L1H2: chosen on 24" in result.notes[0]
    assert result.verdicts["largest_drop"] == "supported"
    assert result.metrics["components_with_effect"] == 1
    if by != "resample":  # which puts another answer in its place
        assert result.metrics["largest_drop"] == pytest.approx(result.metrics["logit_diff"], rel=0.1)
    assert result.controls["largest_drop"]["random_direction"] < 0.5 * result.metrics["largest_drop"]
    assert abs(frame.loc["nothing", ["effect", "loss"]].astype(float)).max() < 1e-5


def test_where_no_head_answers_none_is_confirmed():
    result = head_ablation(copying_model(works=False, noise=0.02), copying_prompts(48), progress=False)
    assert result.verdicts["largest_drop"] == "not supported"
    assert "does not do this task" in result.notes[0]
    silent = head_ablation(copying_model(works=False), copying_prompts(48), "mean", progress=False)
    assert silent.intervals["largest_drop"] == (0, 0)
    assert silent.metrics["components_with_effect"] == 0


def test_ways_that_there_are_not_are_refused():
    with pytest.raises(ReflowlensError, match="'zero', 'mean' or 'resample'"):
        head_ablation(random_model("gpt2"), PROMPTS, "median")
