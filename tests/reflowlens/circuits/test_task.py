"""Circuits and graphs of data sets: numbers are those of the texts, and begin with whether the model does the task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

import reflowlens as rl
from reflowlens.circuits.task import TaskPerformance, performance_on
from reflowlens.models.base import HookedModel

CLEAN = ["the cat is", "a tiger", "one ox went", "it was so", "go", "no one", "my dog", "all day"]
CORRUPTED = ["the dog is", "a mouse", "two ox went", "it was no", "ga", "no two", "my cat", "all sun"]
METRIC = rl.metrics.logit_diff


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, HookedModel]) -> HookedModel:
    return tiny_models["gpt2"]


def last_logits(model: HookedModel, texts: list[str]) -> Tensor:
    """Each text's logits at its end, alone."""
    with torch.no_grad():
        return torch.stack([model(text)[0, -1] for text in texts])


@pytest.fixture(scope="module")
def right(model: HookedModel) -> rl.Prompts:
    """Prompts of which the model gives the right answer, more so than of the corrupted ones."""
    clean, corrupted = last_logits(model, CLEAN), last_logits(model, CORRUPTED)
    answers = (clean - corrupted)[:, :256].argmax(dim=1)
    wrong = (
        (clean - corrupted)[:, :256].where(clean[:, :256] < clean.gather(1, answers[:, None]), torch.inf).argmin(dim=1)
    )
    columns = zip(CLEAN, CORRUPTED, answers.tolist(), wrong.tolist(), strict=True)
    return rl.Prompts.of(
        [dict(zip(("clean", "corrupted", "answer", "wrong_answer"), row, strict=True)) for row in columns]
    )


@pytest.fixture(scope="module")
def swapped(right: rl.Prompts) -> rl.Prompts:
    names = {"answer": "wrong_answer", "wrong_answer": "answer"}
    return rl.Prompts.of(right.frame.rename(columns=names))


def test_performance_is_that_of_each_prompt_alone(model: HookedModel, right: rl.Prompts) -> None:
    found = performance_on(model, right)
    rows, answers, wrong = range(len(right)), right.answers, right.wrong_answers
    for texts, margin in ((CLEAN, found.margin), (CORRUPTED, found.margin - found.gap)):
        logits = last_logits(model, texts)
        torch.testing.assert_close(margin, logits[rows, answers] - logits[rows, wrong], rtol=1e-5, atol=1e-5)
    assert found.accuracy == 1
    assert found.verdict == "done"


@pytest.mark.parametrize(("n_right", "n"), [(0, 4), (3, 4), (6, 6), (31, 64)])
def test_the_interval_is_exact(n_right: int, n: int) -> None:
    found = TaskPerformance(torch.tensor([1.0] * n_right + [-1.0] * (n - n_right)))
    wanted = binomtest(n_right, n).proportion_ci(method="exact")
    assert found.interval == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(
    ("margin", "gap", "verdict"),
    [
        ([1.0] * 6, [1.0] * 6, "done"),
        ([1.0] * 4, None, "too few prompts to tell"),
        ([1.0, -1.0], None, "not done: not to be read"),
        ([1.0] * 6, [-1.0] * 6, "not done: not to be read"),
    ],
)
def test_verdicts(margin: list[float], gap: list[float] | None, verdict: str) -> None:
    assert TaskPerformance(torch.tensor(margin), None if gap is None else torch.tensor(gap)).verdict == verdict


CALLS: dict[str, Callable[..., Any]] = {
    "faithfulness": lambda m, *p, metric: rl.faithfulness(m, *p, circuit=["a0.h1", "m1"], metric=metric, controls=1),
    "completeness": lambda m, *p, metric: rl.completeness(m, *p, circuit=["a0.h1", "m1"], metric=metric, controls=1),
    "grow_circuit": lambda m, *p, metric: rl.grow_circuit(
        m, *p, scores=rl.edge_attribution(m, *p, metric=metric), metric=metric, of="nodes", sizes=[2]
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_circuit_of_a_task_that_the_model_fails_is_not_to_be_read(
    model: HookedModel, right: rl.Prompts, swapped: rl.Prompts, call: Callable[..., Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call(model, right, metric=METRIC(right))
        assert found.performance.verdict == "done"
        by_texts = call(model, right.clean, right.corrupted, metric=METRIC(right))
        assert call(model, right.clean, right.corrupted, metric=rl.metrics.kl()).performance is None
    torch.testing.assert_close(by_texts.performance.margin, found.performance.margin)
    with pytest.warns(UserWarning, match=r"does not do this task.*is not to be read") as said:
        failed = call(model, swapped, metric=METRIC(swapped))
    assert len(said) == 1
    assert failed.performance.accuracy == 0
    if hasattr(found, "value"):  # as faithful as where it is right
        torch.testing.assert_close(failed.value, found.value, rtol=1e-4, atol=1e-4)
        assert by_texts.value == found.value


def test_edges_and_paths_of_a_data_set(model: HookedModel, right: rl.Prompts) -> None:
    texts, metric = (right.clean, right.corrupted), METRIC(right)
    torch.testing.assert_close(
        rl.edge_attribution(model, right, metric=metric).values,
        rl.edge_attribution(model, *texts, metric).values,
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(
        rl.path_patch(model, right, sender="a0.h1", receiver="m1", metric=metric).values,
        rl.path_patch(model, *texts, "a0.h1", "m1", metric).values,
    )


def test_graphs_of_a_data_set_explain_its_answers(model: HookedModel, right: rl.Prompts, swapped: rl.Prompts) -> None:
    some = right.select(range(6))
    graphs = rl.attribute_each(model, some, neurons=2)
    wanted = rl.attribute_each(model, some.clean, None, some.answers, against=some.wrong_answers, neurons=2)
    for graph, other in zip(graphs, wanted, strict=True):
        assert (graph.matrix != other.matrix).nnz == 0
    assert graphs.merged().performance.verdict == "done"
    assert graphs[:3].performance.accuracy == 1
    assert len(graphs[:3].performance.margin) == 3
    with pytest.warns(UserWarning, match="what its graphs have in common is not to be read"):
        rl.attribute_each(model, swapped.select([0, 1]), neurons=2).merged()


def test_a_run_of_a_data_set_intervenes_at_its_roles(model: HookedModel, right: rl.Prompts) -> None:
    table = rl.Prompts.of(right.frame.assign(second=1, name=[text[-2:] for text in CLEAN]))
    for position, wanted in (("second", 1), ("name", "last")):
        part = rl.Scale("mlp_out", 3.0, layer=0, position=position)
        plain = rl.Scale("mlp_out", 3.0, layer=0, position=wanted)
        torch.testing.assert_close(rl.run(model, table, part), rl.run(model, table.clean, plain), rtol=0, atol=0)
