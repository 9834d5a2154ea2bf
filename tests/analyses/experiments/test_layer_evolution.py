from __future__ import annotations

import pandas as pd
import pytest

from analyses.experiments.layer_evolution.experiment import crystallisation_verdict, layer_evolution
from analyses.words.lexicon import FactualPrompt, Lexicon
from reflowlens.errors import ReflowlensError
from tests.planted_results import decision, missed
from tests.support.planted import CONFIG, LEXICON, deciding_model, empty_model


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_planted_decision_layer_is_found(layer):
    result = layer_evolution(deciding_model(layer), lexicon=LEXICON)
    prompts = result.frames["prompts"].query("model == 'model'")
    assert (prompts["crystallisation_layer"] == layer + 1).all()
    assert not missed(result, decision(layer))


def test_silent_blocks_decide_nothing():
    result = layer_evolution(empty_model(), lexicon=LEXICON)
    assert result.metrics["crystallisation_layer"] == 0
    assert result.metrics["kl_at_half_depth"] == pytest.approx(0, abs=1e-6)


def test_frames_are_complete_and_consistent():
    result = layer_evolution(deciding_model(2), "The king of the", target=" queen", lexicon=LEXICON)
    layers, positions = result.frames["layers"], result.frames["positions"]
    points = 2 * CONFIG.n_layers + 1
    assert len(positions) == points * 4
    assert list(dict.fromkeys(positions["token"])) == ["The", " king", " of", " the"]
    final = layers[layers["depth"] == CONFIG.n_layers]
    assert final.loc[final["rank"] == 1, "token"].tolist() == [" Paris"]
    assert layers.loc[layers["is_target"], "token"].unique().tolist() == [" queen"]
    assert final["kl_to_final"].abs().max() < 1e-6
    top = positions[(positions["point"] == "2_post") & (positions["position"] == 3)]
    assert top["top"].item() == " Paris"
    assert set(result.figures) == {"probability", "positions", "depth", "crystallisation"}


def test_the_same_seed_gives_the_same_frames():
    first, second = (layer_evolution(deciding_model(1), lexicon=LEXICON, seed=4) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)


def test_too_few_prompts_are_an_error():
    lexicon = Lexicon(
        version="x", factual=(FactualPrompt("The king", " queen"), FactualPrompt("The", " Constantinople is"))
    )
    with pytest.raises(ReflowlensError, match="at least two factual prompts"):
        layer_evolution(empty_model(), lexicon=lexicon)


def test_a_target_of_several_tokens_is_an_error():
    with pytest.raises(ReflowlensError, match="token"):
        layer_evolution(empty_model(), "The king", target=" Constantinople", lexicon=LEXICON)


@pytest.mark.parametrize(
    ("n", "interval", "untrained", "expected"),
    [
        (50, (0.3, 0.45), 0.1, "supported"),
        (50, (0.3, 0.45), 0.4, "not supported"),
        (50, (0.0, 0.0), 0.02, "not supported"),
        (50, (0.6, 0.7), 0.1, "not supported"),
        (50, (0.4, 0.6), 0.1, "underpowered"),
        (10, (0.3, 0.4), 0.1, "underpowered"),
    ],
)
def test_the_verdict_follows_its_rule(n, interval, untrained, expected):
    assert crystallisation_verdict([0.4] * n, interval, untrained) == expected


def test_the_default_prompt_comes_with_its_own_target():
    split = FactualPrompt("The emperor of", " Constantinople is")
    lexicon = Lexicon(version="x", factual=(split, *LEXICON.factual))
    result = layer_evolution(empty_model(), lexicon=lexicon)
    assert (result.params["prompt"], result.params["target"]) == (LEXICON.factual[0].prompt, " Paris")
