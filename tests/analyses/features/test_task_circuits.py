"""Circuits of features over many prompts, judged as plain hooks judge them, one prompt at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from analyses.features.task_circuits import find_circuit, judge_circuit, matched_features, mean_activations
from analyses.features.task_prompts import TASKS, TaskPrompt, split, task_prompts
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_model

PROMPTS = [
    TaskPrompt(text, correct, wrong, text)
    for text, correct, wrong in (
        ("some words", "a", "b"), ("more", "c", "a"), ("of another length", "b", "a"), ("the last", "d", "a"),
    )
]  # fmt: skip
CIRCUIT = [(0, 3), (0, 17), (1, 0), (1, 5), (1, 30), (0, 22)]


def by_plain_hooks(model: Any, dictionary: Any, prompt: TaskPrompt, kept: set[Any], values: Any, errors: bool) -> float:
    """The metric of a run with the features outside of ``kept`` at ``values``, of one prompt."""
    encoded: list[Tensor] = []
    edited: list[Tensor] = []
    read: list[Tensor] = []

    def catch(x: Tensor, hook: Any) -> None:
        layer = len(read)
        read.append(x)
        encoded.append(dictionary.each_layer()[layer].encode(x))
        changed = encoded[-1].clone()
        for feature in range(changed.shape[-1]):
            if (layer, feature) not in kept:
                changed[..., feature] = values[layer][feature]
        edited.append(changed)

    def write(y: Tensor, hook: Any) -> Tensor:
        layer = len(read) - 1
        said, own = (dictionary.reconstruct(layer, features, read[layer]) for features in (edited, encoded))
        return said + (y - own) if errors else said

    hooks = []
    for block in range(model.cfg.n_layers):
        hooks += [(f"blocks.{block}.ln2.hook_normalized", catch), (f"blocks.{block}.hook_mlp_out", write)]
    with model.hooks(hooks), torch.no_grad():
        logits = model(prompt.text)
    return float(rl.metrics.logit_diff(prompt.correct, prompt.wrong).of_logits(model, logits))


@pytest.mark.parametrize("kind", ["plt", "clt", "skip"])
def test_circuits_are_judged_as_plain_hooks_judge_them(kind):
    model = random_model("gpt2_biased")
    dictionary = dictionary_of(model, kind)
    found_on = PROMPTS[2:]
    table = judge_circuit(model, dictionary, CIRCUIT, PROMPTS, found_on, controls=3, resamples=50)
    everything = {(layer, feature) for layer in range(2) for feature in range(40)}
    means = []
    for point, layer in zip(dictionary.cfg.reads, dictionary.each_layer(), strict=True):
        reads = [model.run_with_cache(prompt.text)[1][point][0] for prompt in found_on]
        means.append(torch.cat([layer.encode(x) for x in reads]).mean(0))
    zeros = [torch.zeros(40)] * 2
    random = matched_features(CIRCUIT, mean_activations(model, dictionary, found_on), 3)
    assert len(table) == 8
    for row in table.to_dict("records"):
        values, errors = means if row["ablation"] == "mean" else zeros, row["errors"]

        def run(kept: set[Any], values: Any = values, errors: bool = errors) -> list[float]:
            return [by_plain_hooks(model, dictionary, prompt, kept, values, errors) for prompt in PROMPTS]

        def kept_by(circuit: Any, score: str = row["score"]) -> set[Any]:
            return set(circuit) if score == "faithfulness" else everything - set(circuit)

        full, empty, own = run(everything), run(set()), run(kept_by(CIRCUIT))
        assert row["full"] == pytest.approx(np.mean(full), abs=1e-4)
        assert row["empty"] == pytest.approx(np.mean(empty), abs=1e-4)
        assert row["logit_diff"] == pytest.approx(np.mean(own), abs=1e-4)
        assert row["accuracy"] == np.mean(np.array(own) > 0)
        effect = np.mean(full) - np.mean(empty)
        if row["effect_low"] <= 0 <= row["effect_high"]:
            assert np.isnan(row["value"])
            continue
        scored = [(np.mean(run(kept_by(each))) - np.mean(empty)) / effect for each in (CIRCUIT, *random)]
        assert row["value"] == pytest.approx(scored[0], abs=1e-3)
        assert row["random"] == pytest.approx(np.mean(scored[1:]), abs=1e-3)
        strong = [(block, int(i)) for block in (0, 1) for i in means[block].sort(descending=True).indices[:3]]
        most_active = (np.mean(run(kept_by(strong))) - np.mean(empty)) / effect
        assert row["most_active"] == pytest.approx(most_active, abs=1e-3)
        ahead = np.array(scored[1:]) >= scored[0] if row["score"] == "faithfulness" else scored[1:] <= scored[0]
        assert row["pvalue"] == (1 + ahead.sum()) / 4
    assert table["value"].notna().sum() >= 2
    assert table["activation"].to_numpy() == pytest.approx(sum(means[block][i].item() for block, i in CIRCUIT))
    in_random = sum(means[block][i].item() for each in random for block, i in each) / 3
    assert table["random_activation"].to_numpy() == pytest.approx(in_random)


def test_what_is_no_circuit_or_has_no_effect_is_not_judged():
    model = random_model("gpt2")
    dictionary = dictionary_of(model)
    circuit = [(layer, feature) for layer in range(2) for feature in range(20)]
    everything = [(layer, feature) for layer in range(2) for feature in range(40)]
    with pytest.raises(ReflowlensError, match="block 0 has 40 features in the circuit, and 0 others"):
        judge_circuit(model, dictionary, everything, PROMPTS, PROMPTS)
    with pytest.raises(ReflowlensError, match="no feature 40 of block 0: there are 0 to 39 of blocks 0, 1"):
        judge_circuit(model, dictionary, [(0, 40)], PROMPTS, PROMPTS)
    with pytest.raises(ReflowlensError, match="a circuit without features"):
        judge_circuit(model, dictionary, [], PROMPTS, PROMPTS)
    silent = dictionary_of(model)
    with torch.no_grad():
        for layer in silent.each_layer():
            layer.W_dec.zero_()
    table = judge_circuit(model, silent, circuit, PROMPTS, PROMPTS, controls=2, resamples=20)
    assert table["value"].isna().all()  # features that write nothing have no effect to explain
    np.testing.assert_allclose(table["full"], table["empty"], atol=1e-5)


def test_controls_are_other_features_of_the_same_blocks_and_about_as_active():
    model = random_model("gpt2")
    means = mean_activations(model, dictionary_of(model, n_features=200), PROMPTS)
    circuit = [(0, int(i)) for i in means[0].argsort(descending=True)[:8:2]] + [(1, 7)]
    sets = matched_features(circuit, means, 30, seed=1)
    assert len({tuple(each) for each in sets}) > 20
    for each in sets:
        assert Counter(block for block, _ in each) == Counter(block for block, _ in circuit)
        assert len(set(each)) == len(each)
        assert not set(each) & set(circuit)
        free = np.sort([means[0][i] for i in range(200) if (0, i) not in circuit])[::-1]
        for (_, own), (_, drawn) in zip(circuit[:4], each[:4], strict=True):
            nearest = np.sort(np.abs(free - means[0][own].item()))
            assert abs(means[0][drawn] - means[0][own]).item() <= nearest[13]  # the ten nearest, three taken before


def test_a_circuit_is_what_the_merged_graphs_share():
    model = random_model("gpt2")
    found = find_circuit(model, dictionary_of(model), PROMPTS, share=0.5)
    texts, correct, wrong = zip(*((one.text, one.correct, one.wrong) for one in PROMPTS), strict=True)
    graphs = rl.attribute_each(model, texts, dictionary_of(model), list(correct), against=list(wrong), progress=False)
    survive = Counter(
        (row.layer, row.feature)
        for graph in graphs
        for row in graph.nodes.query("kind == 'feature'").drop_duplicates(["layer", "feature"]).itertuples()
    )
    assert set(found.features) == {feature for feature, n in survive.items() if n >= 2}
    assert "logit" in set(found.nodes["node"])


@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_prompts_enough_whose_answers_are_tokens(task):
    prompts, tokenizer = task_prompts(task), get_tokenizer("gpt2_16k")
    assert len(prompts) == len({prompt.text for prompt in prompts}) >= 40
    for prompt in prompts:
        assert tokenizer.is_single_token(prompt.correct)
        assert tokenizer.is_single_token(prompt.wrong)
        assert prompt.correct != prompt.wrong
    found_on, held_out = split(prompts, seed=3)
    assert sorted(map(str, found_on + held_out)) == sorted(map(str, prompts))
    assert not {prompt.item for prompt in found_on} & {prompt.item for prompt in held_out}
    assert len(held_out) >= len(prompts) / 3
    assert split(prompts, seed=3)[0] == found_on != split(prompts, seed=4)[0]


def test_there_is_no_other_task():
    with pytest.raises(ReflowlensError, match="no task 'agreements'; there are agreement, capitals, ioi"):
        task_prompts("agreements")
