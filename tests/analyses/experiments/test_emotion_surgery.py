from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import reflowlens as rl
from analyses.controls.nulls import untrained_model
from analyses.experiments.emotion_surgery.carriers import SteeredTexts, affordable_strength
from analyses.experiments.emotion_surgery.experiment import boundary_verdict, emotion_surgery, flip_verdict
from analyses.measures.damage import NeutralTexts, continuation_losses
from analyses.measures.sentiment import Poles, distinct_ngrams, sentiment_poles, text_valence, word_valences
from analyses.words.lexicon import load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.signals import signal_view
from reflowlens.sweeps.injections import steer
from tests.planted_results import STRENGTHS, SURGERY, last_effective, missed
from tests.support.planted import FEELING, empty_model, feeling_lexicon, feeling_model, of_architecture
from tests.support.tiny import assert_close, random_model, tiny_config

LEXICON = feeling_lexicon()


@pytest.fixture(scope="module")
def planted():
    return SURGERY.run()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_planted_last_effective_layer_is_found(layer, planted):
    result = planted if layer == 1 else emotion_surgery(feeling_model(layer), lexicon=LEXICON, strengths=STRENGTHS)
    rates = result.frames["layers"].query("series == 'sentiment'").set_index("layer")["flip_rate"]
    assert (rates[: layer + 1] == 1).all()
    assert (rates[layer + 1 :] == 0).all()
    assert not missed(result, last_effective(layer))


def test_some_layers_show_what_all_layers_show_there(planted):
    few = emotion_surgery(feeling_model(1), lexicon=LEXICON, strengths=STRENGTHS, layers=[1], permutations=125)
    for name in ("sweep", "prompts", "layers"):
        expected = planted.frames[name].query("layer in (0, 1, 2, 4)").reset_index(drop=True)
        shown = few.frames[name].drop(columns="p_holm", errors="ignore")  # over fewer layers
        pd.testing.assert_frame_equal(shown, expected[list(shown)])
    assert "measured at 4 of 5 layers: 0, 1, 2, 4" in few.notes
    assert few.metrics == planted.metrics


def test_controls_do_not_turn_what_the_direction_turns(planted):
    controls = planted.controls["best_flip_rate"]
    assert set(controls) == {"shuffled_labels", "random_direction", "untrained"}
    assert max(controls["shuffled_labels"], controls["random_direction"]) < 0.05
    assert planted.metrics["log_odds_shift"] > 5 * abs(planted.controls["log_odds_shift"]["shuffled_labels"])
    assert planted.metrics["perplexity_cost"] <= 0.05
    assert planted.controls["last_effective_layer"]["random_direction"] < 0, "no layer, of most draws"
    assert planted.controls["last_effective_share"]["random_direction"] < 0.05


def test_a_rate_of_one_is_no_certainty(planted):
    assert planted.metrics["best_flip_rate"] == 1
    n = planted.params["carriers"]
    assert planted.intervals["best_flip_rate"] == pytest.approx((0.025 ** (1 / n), 1.0))
    rows = planted.frames["layers"].query("series == 'sentiment' and flip_rate in (0, 1)")
    assert (rows["high"] - rows["low"]).to_numpy() == pytest.approx(1 - 0.025 ** (1 / n))


def test_controls_are_given_as_much_as_their_own_cost_allows(planted):
    for name in ("shuffled_labels", "random_direction"):  # they cost nothing, at no strength of the sweep
        assert planted.controls["perplexity_cost"][name] <= 0.05
        assert planted.controls["strength"][name] == max(STRENGTHS)
        assert planted.controls["damage_kl"][name] < 0.5 * planted.metrics["damage_kl"]  # of two draws each
    wide = emotion_surgery(feeling_model(1), lexicon=LEXICON, strengths=(0.2, 2.0, 20.0), quick=True)
    frontier = wide.frames["frontier"].query("series == 'random_direction'")
    strength = wide.controls["strength"]["random_direction"]
    assert frontier.query("strength < @strength")["perplexity_cost"].max() <= 0.05
    assert frontier.query("strength > @strength")["perplexity_cost"].min() > 0.05
    assert strength < 20
    assert wide.controls["alpha"]["random_direction"] / strength == pytest.approx(
        wide.metrics["alpha"] / wide.metrics["strength"]
    )


def test_the_probability_of_the_held_out_words_has_that_of_the_untrained_model_beside_it(planted):
    model = untrained_model(feeling_model(1), seed=0)
    _, heldout = sentiment_poles(model, LEXICON, "x")
    logits = torch.cat([model(text)[:, -1] for text in LEXICON.sentiment.prompts])
    share = logits[:, : model.tokenizer.n_vocab].softmax(dim=-1)[:, heldout.ids].sum(dim=-1).mean()
    assert planted.controls["heldout_probability"]["untrained"] == pytest.approx(share.item(), rel=1e-4)
    assert planted.intervals["heldout_probability"].low > 10 * share.item()


def test_the_controls_of_the_best_layer_have_a_best_layer_too():
    """Chosen among as many layers as the metric: a mean of draws' maxima is at least any layer's mean."""
    result = emotion_surgery(empty_model(0), lexicon=LEXICON, strengths=(1.0,), max_cost=1e9)  # turns some, not all
    rates = result.frames["layers"].pivot(index="layer", columns="series", values="flip_rate")
    controls = result.controls["best_flip_rate"]
    for series in ("shuffled_labels", "random_direction"):
        assert controls[series] >= rates[series].max() > 0
    assert controls["untrained"] == rates["untrained"].max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_found_where_nothing_is(seed):
    result = emotion_surgery(empty_model(seed), lexicon=LEXICON, strengths=STRENGTHS, seed=seed)
    assert result.verdicts == {"best_flip_rate": "not supported"}
    assert "last_effective_layer" not in result.metrics
    assert any("last_effective_layer is absent" in note for note in result.notes)


def test_the_direction_is_that_of_the_planted_signal():
    model = feeling_model(1)
    words, heldout = sentiment_poles(model, LEXICON, "x")
    direction = words.direction(rl.signal_view(model))
    assert int(direction.abs().argmax()) == FEELING
    assert float(direction[FEELING]) == pytest.approx(2, rel=1e-5)
    assert not set(words.ids) & set(heldout.ids)
    shuffled = words.shuffled(3)
    assert sorted(shuffled.ids) == sorted(words.ids)
    assert len(shuffled.positive) == len(words.positive)


def test_frames_and_figures_are_complete_and_the_weights_are_what_they_were():
    model = feeling_model(1)
    before = rl.model_hash(model)
    result = emotion_surgery(model, lexicon=LEXICON, strengths=STRENGTHS, quick=True)
    assert rl.model_hash(model) == before
    assert len(result.frames["sweep"]) == 5 * len(STRENGTHS)
    assert len(result.frames["layers"]) == 5 * 4
    assert len(result.frames["prompts"]) == 5 * 8
    assert set(result.figures) == {"sweep", "layers", "frontier", "generations"}
    texts = result.frames["generations"]
    assert texts["toward"].tolist()[:5] == ["none", "negative", "positive", "negative", "positive"]
    assert texts["strength"].max() == pytest.approx(3 * result.metrics["strength"])


def test_the_same_seed_gives_the_same_frames():
    run = [emotion_surgery(empty_model(), lexicon=LEXICON, strengths=(0.2,), seed=4, quick=True) for _ in range(2)]
    for name, frame in run[0].frames.items():
        pd.testing.assert_frame_equal(frame, run[1].frames[name], check_exact=True)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_architecture_runs(architecture):
    model = build_model(of_architecture(architecture, n_layers=1))
    result = emotion_surgery(model, lexicon=LEXICON, strengths=(0.2, 0.4), quick=True)
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert 0 <= result.metrics["best_flip_rate"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["The film was"]}, "at least two carrier prompts, got 1"),
        ({"prompts": "The film was"}, "prompts: a list was expected"),
        ({"lexicon": dataclasses.replace(LEXICON, neutral_texts=("A king.",))}, "two neutral_texts"),
        ({"lexicon": dataclasses.replace(LEXICON, categories={})}, "positive_adjectives, got 0"),
        ({"strengths": (0.4, 0.2)}, "must be positive and ascend"),
        ({"max_cost": 0.0}, "max_cost must be positive"),
        ({"where": " film"}, "no token ' film' to steer from"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        emotion_surgery(empty_model(), **{"lexicon": LEXICON, **options})


def test_a_tokenizer_without_words_is_an_error():
    with pytest.raises(ReflowlensError, match="single-token words"):
        emotion_surgery(build_model(tiny_config("gpt2")), lexicon=load_lexicon())


def test_the_verdicts_follow_their_rules():
    controls = {"shuffled_labels": 0.1, "random_direction": 0.2, "untrained": 0.9}
    assert flip_verdict((0.3, 0.5), controls, 0.01, 20) == "supported"
    assert flip_verdict((0.15, 0.5), controls, 0.01, 20) == flip_verdict((0.3, 0.5), controls, 0.2, 20)
    assert flip_verdict((0.3, 0.5), controls, 0.2, 20) == "not supported"
    assert flip_verdict((0.3, 0.5), controls, 0.01, 19) == "underpowered"
    assert boundary_verdict((0.2, 0.5), (0.1, 0.3), 20) == "supported"
    assert boundary_verdict((0.6, 1.0), (0.1, 0.3), 20) == "not supported"
    assert boundary_verdict((0.2, 0.5), (0.0, 0.3), 20) == "underpowered"
    assert boundary_verdict((0.2, 0.5), (0.1, 0.3), 19) == "underpowered"
    assert boundary_verdict((0.5, 0.6), (0.1, 0.3), 20) == "underpowered"


def test_what_turns_nothing_has_no_boundary(monkeypatch):
    monkeypatch.setattr("analyses.experiments.emotion_surgery.experiment.flip_verdict", lambda *_: "not supported")
    result = emotion_surgery(feeling_model(1), lexicon=LEXICON, strengths=STRENGTHS, quick=True)
    assert "last_effective_share" in result.metrics
    assert "last_effective_share" not in result.verdicts
    assert any(note.startswith("last_effective_share has no verdict") for note in result.notes)


# -- the measures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_damage_equals_loss_and_divergence_taken_from_whole_logits():
    model, texts = feeling_model(1), list(LEXICON.neutral_texts)
    neutral = NeutralTexts(model, texts)
    tokens = [model.to_tokens(text)[0] for text in texts]
    before = [model(row[None])[0, :, : model.tokenizer.n_vocab].log_softmax(-1) for row in tokens]
    change = torch.full((32,), 0.3)
    steered = SteeredTexts(model, texts).damage(2, change)
    with rl.edit(model, rl.ScaleWeights("embed.W_recipe", 0.5, columns=0)):
        damage = neutral.damage()
        after = [model(row[None])[0, :, : model.tokenizer.n_vocab].log_softmax(-1) for row in tokens]
    for i, row in enumerate(tokens):
        loss = F.nll_loss(after[i][:-1], row[1:]) - F.nll_loss(before[i][:-1], row[1:])
        kl = (before[i].exp() * (before[i] - after[i])).sum(-1)[:-1].mean()
        assert float(damage.loss[i]) == pytest.approx(float(loss), abs=1e-5)
        assert float(damage.kl[i]) == pytest.approx(float(kl), abs=1e-5)
        with rl.intervene(model, steer(model, 2, change, -1.0 if i % 2 else 1.0)):
            moved = model(row[None])[0, :, : model.tokenizer.n_vocab].log_softmax(-1)
        assert float(steered.loss[i]) == pytest.approx(
            float(F.nll_loss(moved[:-1], row[1:]) - F.nll_loss(before[i][:-1], row[1:])), abs=1e-5
        )
    assert damage.cost == pytest.approx(float(damage.loss.mean().exp()) - 1)


@torch.no_grad()
def test_the_loss_of_a_continuation_is_that_of_its_own_tokens():
    model = feeling_model(1)
    tokens = model.to_tokens("The river runs through the city")
    continued = torch.zeros_like(tokens, dtype=torch.bool)
    continued[:, 3:5] = True
    logits = model(tokens)[0, :, : model.tokenizer.n_vocab]
    expected = F.cross_entropy(logits[2:4], tokens[0, 3:5])
    assert float(continuation_losses(model, tokens, continued)) == pytest.approx(float(expected), rel=1e-5)
    assert float(continuation_losses(model, tokens, torch.zeros_like(continued))) == 0


def test_log_odds_and_leaning():
    poles = Poles((1, 2), (3,))
    logits = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 2.0]])
    p = logits.exp()
    assert torch.allclose(poles.log_odds(logits), (p[:, :2].sum(1) / p[:, 2]).log())
    assert poles.leaning(logits).tolist() == [1, -1]


def test_logits_of_the_poles_are_the_model_s():
    model = random_model("gpt2_own_readout")
    logits, cache = model.run_with_cache("The river")
    poles = Poles((70, 80), (90,))
    ours = poles.logits(signal_view(model), cache["resid_post", -1][0])
    assert_close(ours, logits[0][:, poles.ids])


def test_valence_and_distinctness():
    assert len(word_valences()) == 7208
    assert text_valence("Great! A GREAT film", without={"film"}) == pytest.approx(2 * 3.1 / 4)
    assert text_valence("") == text_valence("42") == 0
    assert distinct_ngrams([[1, 2, 3], [4, 5]], 2) == 1
    assert distinct_ngrams([[1]], 2) == 1


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([0.01, 0.02, 0.03], 0.4),
        ([0.2, 0.3, 0.4], 0.1 * np.sqrt(0.25)),
        ([-0.1, 0.05, 0.2], 0.2),
        ([0.0, 0.1, 0.01], np.sqrt(0.01 + 0.5 * 0.03)),
    ],
)
def test_the_affordable_strength(costs, expected):
    assert affordable_strength([0.1, 0.2, 0.4], costs, 0.05) == pytest.approx(expected)
