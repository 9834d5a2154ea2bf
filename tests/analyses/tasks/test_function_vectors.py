"""Function vectors: as plain hooks on each prompt alone have them, and a head of a planted model that carries one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import reflowlens as rl
from analyses.statistics.draws import derive_rng
from analyses.tasks.function_vectors import function_vectors, head_sets
from analyses.tasks.in_context import Pairs
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.prompts import Prompts
from tests.support.planted_tasks import learning_model, letter_pairs
from tests.support.tiny import random_model, tiny_config

WORDS = ("on", "a", "the", "it", "no", "ok", "thin", "b")
PAIRS = Prompts.of([{"clean": word, "answer": "wxyzuvst"[i]} for i, word in enumerate(WORDS)])


@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied"])
@torch.no_grad()
def test_effects_and_accuracies_are_those_of_plain_hooks_on_each_prompt_alone(name):
    model = random_model(tiny_config(name, n_ctx=32)).eval()
    result = function_vectors(model, PAIRS, examples=2, n_heads=3, layers=[1], draws=20, progress=False)
    found_on, held_out = Pairs.of(model, PAIRS, "{input}:{answer}\n").halves(0)
    right, wrong = (found_on.in_context([2, 0], found_on, 2, 0, shuffled) for shuffled in (False, True))
    assert right.texts[0] != wrong.texts[0]
    assert [text.replace("\n", ":").split(":")[::2] for text in right.texts] == [
        text.replace("\n", ":").split(":")[::2] for text in wrong.texts
    ]

    def probability(text, answer, hooks=()):
        logits = model.run_with_hooks(text, fwd_hooks=list(hooks))[0, -1]
        return float(logits.softmax(0)[model.to_single_token(answer)])

    contexts = result.params["contexts"]
    order = derive_rng(0, "function_vectors", "asked").permutation(len(found_on))
    asked = np.resize(order, contexts).tolist()
    right, wrong = (found_on.in_context(asked, found_on, 2, 0, shuffled) for shuffled in (False, True))
    for layer, head in [(0, 1), (1, 3)]:
        point = f"blocks.{layer}.attn.hook_z"
        mean = torch.stack([model.run_with_cache(text)[1][point][0, -1, head] for text in right.texts]).mean(0)

        def put(x, hook, mean=mean, head=head):
            x = x.clone()
            x[0, -1, head] = mean
            return x

        expected = [
            probability(text, found_on.outputs[row], [(point, put)]) - probability(text, found_on.outputs[row])
            for text, row in zip(wrong.texts, asked, strict=True)
        ]
        found = result.frames["heads"].query("layer == @layer and head == @head")["effect"]
        assert found.item() == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-7)

    chosen = result.frames["heads"].query("chosen")[["layer", "head"]].to_numpy().tolist()
    vector = torch.zeros(32)
    for layer, head in chosen:
        outputs = [model.run_with_cache(text)[1][f"blocks.{layer}.attn.hook_z"][0, -1, head] for text in right.texts]
        vector += torch.stack(outputs).mean(0) @ model.blocks[layer].attn.W_O[head]
    steer = rl.Steer("resid_pre", vector, layer=1, position="last")
    for row, log_p in enumerate(result.frames["prompts"]["log_p_injected"]):
        logits = rl.run(model, f"{held_out.inputs[row]}:", steer)[0, -1, : model.tokenizer.n_vocab]
        expected = logits.log_softmax(0)[model.to_single_token(held_out.outputs[row])]
        assert log_p == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_the_head_that_carries_the_function_is_found_and_its_vector_works_without_examples():
    result = function_vectors(learning_model(), letter_pairs(), examples=3, n_heads=1, progress=False)
    assert result.metrics["accuracy"] == result.metrics["injected_accuracy"] == 1
    assert result.controls["injected_accuracy"] == dict.fromkeys(("zero_shot", "random_heads", "shuffled_labels"), 0)
    assert result.verdicts["injected_accuracy"] == "supported"
    assert result.notes == [
        "random heads are every set of 1 others that there is: 15",
        "heads L1H2 and layer 0: found on 24 pairs, judged on 24 others",
    ]
    assert result.frames["layers"]["accuracy"].tolist() == [1, 1, 1, 0]  # the MLP of layer 2 reads it
    rest = result.frames["heads"].query("not chosen")["effect"]
    assert rest.abs().max() < 0.001 < 0.1 < result.frames["heads"]["effect"].max()


def test_where_no_head_carries_it_nothing_works_and_the_failure_to_learn_is_said():
    result = function_vectors(learning_model(works=False), letter_pairs(), examples=3, n_heads=2, progress=False)
    assert result.verdicts["injected_accuracy"] == "not supported"
    assert result.metrics["injected_accuracy"] == 0
    assert result.intervals["log_p_gain"] == pytest.approx((0, 0), abs=1e-6)
    assert "does not learn this function from examples" in result.notes[0]


def test_bad_input_is_refused():
    model = random_model(tiny_config("gpt2", n_ctx=32))
    for options, message in (
        ({"template": "{input}:"}, "the template must have"),
        ({"examples": 4}, "examples=4 are to be shown"),
        ({"examples": 3, "template": "question {input}:{answer}\n"}, "too long"),
    ):
        with pytest.raises(ReflowlensError, match=message):
            function_vectors(model, PAIRS, **options)
    with pytest.raises(ReflowlensError, match="at least 8"):
        function_vectors(model, PAIRS.select(range(7)))
    with pytest.raises(ReflowlensError, match="no function to show"):
        function_vectors(model, Prompts(PAIRS.frame.assign(answer="a")))
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 24, "d_mlp": 48, "d_vocab": 256, "n_ctx": 32}
    bdh = build_model(ModelConfig(architecture="bdh", tie_word_embeddings=False, tokenizer_name="bytes", **sizes))
    with pytest.raises(ReflowlensError, match="is not made of these"):
        function_vectors(bdh, PAIRS)


def test_random_heads_are_others_than_the_chosen_ones_of_which_half_are_the_most():
    model = random_model(tiny_config("gpt2", n_ctx=32)).eval()
    result = function_vectors(model, PAIRS, examples=2, n_heads=100, layers=1, draws=20, progress=False)
    heads = result.frames["heads"]
    assert result.params["n_heads"] == heads["chosen"].sum() == len(heads) // 2
    assert f"n_heads is {len(heads) // 2}, not 100" in " ".join(result.notes)
    assert f"every set of {len(heads) // 2} others that there is: 1" in " ".join(result.notes)
    assert len(result.frames["draws"]) == result.params["draws"] == 1  # the other half


def test_no_set_of_random_heads_is_drawn_twice():
    rng = np.random.default_rng(0)
    for others, size, draws in ((6, 2, 14), (6, 2, 20), (7, 1, 20)):
        sets = {tuple(sorted(heads)) for heads in head_sets(np.arange(others), size, draws, rng)}
        assert len(sets) == min(draws, math.comb(others, size))
        assert all(len(set(heads)) == size for heads in sets)
