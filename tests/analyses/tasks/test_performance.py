"""Whether a model does a task: on a planted model that does it, one that does not, and as each prompt alone has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import reflowlens as rl
from analyses.tasks.answered import some_prompts
from analyses.tasks.performance import task_performance
from tests.support.planted_tasks import copying_model, copying_prompts


def test_each_prompt_is_what_it_is_alone(tiny_models: dict[str, Any]) -> None:
    model = tiny_models["gpt2"]
    rows = [
        ("the cat", "a dog", "x", "y", "a"),
        ("go", "no way", "p", "q", "b"),
        ("it was so", "it is so", "e", "t", "a"),
    ]
    prompts = rl.Prompts.of(
        [dict(zip(("clean", "corrupted", "answer", "wrong_answer", "group"), r, strict=True)) for r in rows]
    )
    result = task_performance(model, prompts)
    frame = result.frames["prompts"]
    for row, (clean, corrupted, right, wrong, _) in enumerate(rows):
        with torch.no_grad():
            both = [model(text)[0, -1, :256] for text in (clean, corrupted)]
        differences = [float(logits[ord(right)] - logits[ord(wrong)]) for logits in both]
        np.testing.assert_allclose(frame.logit_diff[row], differences[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(frame.gap[row], differences[0] - differences[1], rtol=1e-4, atol=1e-5)
        assert frame.correct[row] == (differences[0] > 0)
        assert frame.top1[row] == (int(both[0].argmax()) == ord(right))
    assert result.verdicts == {"accuracy": "underpowered", "gap": "underpowered"}
    groups = result.frames["groups"].set_index("group")
    assert groups.prompts.to_dict() == {"all": 3, "a": 2, "b": 1}
    assert groups.accuracy["a"] == frame.correct[[0, 2]].mean()
    assert np.isnan(groups.low["b"])


def test_a_planted_model_does_its_task_and_not_the_opposite() -> None:
    model, prompts = copying_model(), copying_prompts()
    result = task_performance(model, prompts)
    assert result.metrics["accuracy"] == 1
    assert result.verdicts["accuracy"] == "supported"
    assert result.controls["accuracy"]["other_prompt"] < 0.75
    assert not result.notes
    opposite = prompts.frame.rename(columns={"answer": "wrong_answer", "wrong_answer": "answer"})
    failed = task_performance(model, rl.Prompts.of(opposite))
    assert failed.metrics["accuracy"] == 0
    assert failed.verdicts["accuracy"] == "not supported"
    assert "does not do this task" in failed.notes[0]


def test_without_wrong_answers_the_answer_has_to_be_the_likeliest(tiny_models: dict[str, Any]) -> None:
    prompts = rl.Prompts.of([{"clean": "the cat", "answer": "x"}, {"clean": "go", "answer": "y"}])
    result = task_performance(tiny_models["gpt2"], prompts)
    assert result.metrics["accuracy"] == result.metrics["top1"]
    assert "gap" not in result.metrics
    with pytest.raises(rl.ReflowlensError, match="no column 'answer'"):
        task_performance(tiny_models["gpt2"], rl.Prompts.of([{"clean": "a"}, {"clean": "b"}]))


def two_answers(n: int = 12) -> list[dict[str, str]]:
    texts = [f"it {'ab'[i % 2]} no {i}" for i in range(2 * n)]
    return [{"clean": text, "answer": "xy"[i >= n], "wrong_answer": "yx"[i >= n]} for i, text in enumerate(texts)]


def test_the_control_is_of_prompts_with_another_answer_in_whatever_order_they_stand() -> None:
    model, prompts = copying_model(), copying_prompts()
    for frame in (prompts.frame, prompts.frame.sort_values("answer")):
        result = task_performance(model, rl.Prompts.of(frame))
        assert result.controls["accuracy"]["other_prompt"] < 0.75
        assert result.controls["top1"]["other_prompt"] == 0  # which copies the other prompt's answer
        assert result.verdicts["accuracy"] == "supported"


def test_prompts_with_one_pair_of_answers_are_judged_against_chance(tiny_models: dict[str, Any]) -> None:
    rows = [row | {"answer": "x", "wrong_answer": "y"} for row in two_answers()]
    result = task_performance(tiny_models["gpt2"], rl.Prompts.of(rows))
    assert result.controls["accuracy"] == {"chance": 0.5}
    assert "top1" not in result.controls


def test_a_quick_look_is_of_every_group_and_of_no_fixed_rows() -> None:
    rows = [{"clean": f"text {i}", "group": "abc"[i % 3]} for i in range(36)]
    looks = [some_prompts(rl.Prompts.of(rows), True, seed) for seed in (0, 1)]
    assert [look.groups.count(group) for look in looks for group in "abc"] == [4] * 6
    assert looks[0].clean != looks[1].clean
    assert some_prompts(rl.Prompts.of(rows), True, 0).clean == looks[0].clean


def test_no_group_is_called_all() -> None:
    with pytest.raises(rl.ReflowlensError, match="row 1, column 'group': 'all' is what results call all prompts"):
        rl.Prompts.of([{"clean": "a", "group": "x"}, {"clean": "b", "group": "all"}])
