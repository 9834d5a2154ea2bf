from __future__ import annotations

import dataclasses

import torch

from analyses.experiments.layer_evolution.context_length import (
    DELAY,
    clauses,
    context_prompts,
    crystallisation_shares,
    delays,
)
from analyses.experiments.layer_evolution.experiment import layer_evolution
from analyses.measures.lens import read_lens, residual_stack
from analyses.words.lexicon import load_lexicon
from reflowlens.models import build_model
from reflowlens.signals import signal_view
from tests.support.planted import CONFIG, LEXICON, deciding_model, silent_blocks

PACKAGED = load_lexicon()
WITH_CLAUSES = dataclasses.replace(LEXICON, short_prompts=PACKAGED.short_prompts, long_prompts=PACKAGED.long_prompts)
PAIRS = clauses(PACKAGED.short_prompts, PACKAGED.long_prompts)
PROMPTS = context_prompts(PAIRS, [0, 1, 2, 4, 8, 16], seed=0)


def attending_model(series, but_not):
    """Block 2 writes " Paris" wherever it sees a token of the first texts that the others lack; all else is silent."""
    model = silent_blocks(build_model(dataclasses.replace(CONFIG, n_ctx=64), seed=0))
    inside, outside = (
        {token for text in texts for token in model.tokenizer.encode(text)} for texts in (series, but_not)
    )
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        model.embed.W_recipe.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        model.embed.W_recipe[:, :2] = 0.0
        model.embed.W_recipe[list(inside - outside), 0] = 1.0
        model.embed.W_recipe[model.to_single_token(" Paris"), 1] = 3.0
        attention = model.blocks[2].attn
        attention.W_Q.zero_()
        attention.W_V.zero_()
        attention.W_V[0, 0, 0] = 1.0
        attention.W_O[0, 0, 1] = 50.0
    return model


def test_a_delay_that_order_makes_is_a_delay_by_the_clause():
    """A text's first word is another token than the same word elsewhere, which the shuffled clause mostly makes it."""
    ordered, shuffled = PROMPTS[16]["model"], PROMPTS[16]["shuffled_clause"]
    result = layer_evolution(attending_model(ordered, [*shuffled, *PROMPTS[0]["model"]]), lexicon=WITH_CLAUSES)
    assert result.metrics[DELAY] > 2 / 4
    assert max(result.controls[DELAY].values()) < 0.1
    assert result.verdicts[DELAY] == "supported"


def test_a_delay_that_words_make_in_any_order_is_none_by_the_clause():
    result = layer_evolution(attending_model(PROMPTS[16]["model"], PROMPTS[0]["model"]), lexicon=WITH_CLAUSES)
    assert result.metrics[DELAY] == 2.5 / 4
    assert result.controls[DELAY]["shuffled_clause"] == 2.5 / 4
    assert result.controls[DELAY]["untrained"] < 0.1
    assert result.verdicts[DELAY] == "not supported"
    frame = result.frames["context"]
    assert frame["words"].unique().tolist() == [0, 1, 2, 4, 8, 16]
    assert (delays(frame)["model"] == 2.5 / 4).all()
    curve = result.figures["context"]
    assert {trace.name for trace in curve.data} == {
        "model",
        "shuffled clause",
        "untrained",
        "untrained 2",
        "untrained 3",
    }


def test_an_empty_model_has_no_delay():
    model = silent_blocks(build_model(dataclasses.replace(CONFIG, n_ctx=64), seed=0))
    result = layer_evolution(model, lexicon=WITH_CLAUSES)
    assert result.metrics[DELAY] == 0.0
    assert result.verdicts[DELAY] == "not supported"


def test_what_the_model_cannot_read_is_left_out_and_said():
    model = silent_blocks(build_model(dataclasses.replace(CONFIG, n_ctx=20), seed=0))
    assert layer_evolution(model, lexicon=WITH_CLAUSES).frames["context"]["words"].max() == 8
    result = layer_evolution(model, lexicon=LEXICON)
    assert DELAY not in result.metrics
    assert any(note.startswith(f"{DELAY} is absent") for note in result.notes)


def test_a_token_that_begins_texts_takes_a_place_too(monkeypatch):
    encode = build_model(CONFIG, device="meta").tokenizer.encode
    eight = context_prompts(PAIRS, [8], seed=0)[8]
    room = max(len(encode(prompt)) for prompts in eight.values() for prompt in prompts)
    model = silent_blocks(build_model(dataclasses.replace(CONFIG, n_ctx=room), seed=0))
    assert layer_evolution(model, lexicon=WITH_CLAUSES).frames["context"]["words"].max() == 8
    monkeypatch.setattr(model, "text_start", lambda prepend_bos=None: [0])
    assert layer_evolution(model, lexicon=WITH_CLAUSES).frames["context"]["words"].max() == 4


def test_every_long_prompt_of_the_lexicon_is_a_short_one_behind_a_clause():
    assert len(PAIRS) == len(PACKAGED.short_prompts) == 20
    assert min(len(clause) for clause, _ in PAIRS) >= 16
    assert clauses(["He saw a", "They"], ["He saw a", "When it rained, we"]) == []


def test_prompts_are_the_last_words_of_the_clause_and_the_sentence():
    prompts = context_prompts([(["When", "it", "rained,"], "he saw a")], [0, 2], seed=0)
    assert prompts[0] == {"model": ["he saw a"], "shuffled_clause": ["he saw a"]}
    assert prompts[2]["model"] == ["it rained, he saw a"]
    assert sorted(prompts[2]["shuffled_clause"][0].split()) == ["a", "he", "it", "rained,", "saw"]
    many = [([str(i) for i in range(16)], "x")]
    assert context_prompts(many, [16], 1) == context_prompts(many, [16], 1) != context_prompts(many, [16], 2)


def test_shares_are_those_of_the_lens():
    model = deciding_model(1)
    prompts, view = ["The king of the", "The river"], signal_view(model)
    reading = read_lens(view, residual_stack(model, prompts), [0, 0])
    shares = crystallisation_shares(view, prompts)
    assert shares.tolist() == (reading.crystallisation / 2 / CONFIG.n_layers).tolist() == [0.5, 0.5]
