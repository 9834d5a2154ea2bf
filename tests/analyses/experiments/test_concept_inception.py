from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import reflowlens as rl
from analyses.claims import QUICK_UNTRAINED, UNTRAINED, joined_draws
from analyses.controls.nulls import untrained_model
from analyses.experiments.concept_inception.experiment import closing_verdict, concept_inception, delay_verdict
from analyses.measures.steering import critical_strength
from analyses.words.lexicon import Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.sweeps.injections import steer
from tests.planted_results import CLOSING, CRITICAL, missed, no_return
from tests.support.planted import closing_model, concept_lexicon, concepts, heavy_model, of_architecture, turning_model

LEXICON = concept_lexicon()
WORDS = concepts()


@pytest.fixture(scope="module")
def heavy():
    return CRITICAL.run()


@pytest.fixture(scope="module")
def closing():
    return CLOSING.run()


def test_the_planted_critical_strength_is_found_at_every_layer(heavy):
    problems = heavy.frames["problems"].query("series in ('short', 'long')")
    assert ((problems["alpha"] >= 9 - 1e-4) & (problems["alpha"] <= 9 * 1.02)).all()
    assert problems["strength"].to_numpy() == pytest.approx(3.0, rel=0.02)
    assert not missed(heavy, CRITICAL.expected)
    assert heavy.controls["critical_alpha"]["untrained"] < 2


def test_nothing_closes_and_nothing_is_delayed_where_blocks_are_silent(heavy):
    assert set(heavy.verdicts) == {"closed_share", "long_clause_delay"}
    assert "point_of_no_return" not in heavy.metrics
    assert any("point_of_no_return is absent" in note for note in heavy.notes)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_planted_point_of_no_return_and_its_delay_are_found(layer, closing):
    few = WORDS[:4]
    result = closing if layer == 1 else concept_inception(closing_model(layer), few, lexicon=LEXICON, quick=True)
    assert not missed(result, CLOSING.expected if layer == 1 else no_return(layer))
    if layer != 1:
        assert set(result.verdicts.values()) == {"underpowered"}
    assert result.controls["long_clause_delay"]["untrained"] == 0


def test_some_layers_show_what_all_layers_show_there(closing):
    few = concept_inception(closing_model(1), WORDS, lexicon=LEXICON, layers=[3], prompts_per_concept=1)
    columns = ["series", "concept", "prompt", "layer"]
    shown = few.frames["problems"].set_index(columns)
    pd.testing.assert_frame_equal(shown, closing.frames["problems"].set_index(columns).loc[shown.index])
    assert few.frames["problems"]["layer"].unique().tolist() == [0, 2, 3, 4]
    for metric in ("point_of_no_return", "closed_share"):
        assert few.metrics[metric] == pytest.approx(closing.metrics[metric])
    assert "measured at 4 of 5 layers: 0, 2, 3, 4" in few.notes


def test_untrained_models_are_measured_as_the_model_is():
    model = turning_model()
    result = concept_inception(model, WORDS[:2], lexicon=LEXICON, quick=True)
    draws = {
        name: concept_inception(untrained_model(model, 0, number), WORDS[:2], lexicon=LEXICON, quick=True)
        for number, name in enumerate(UNTRAINED[:QUICK_UNTRAINED], start=1)
    }

    def beside(metric, values):
        (control,) = joined_draws("concept_inception", metric, dict(zip(draws, values, strict=True))).values()
        return pytest.approx(control)

    for metric in ("long_clause_delay", "log_long_clause_ratio", "closed_share", "reachable_share"):
        values = [draw.metrics[metric] for draw in draws.values()]
        assert result.controls[metric]["untrained"] == beside(metric, values), metric
    assert abs(draws["untrained"].metrics["log_long_clause_ratio"]) > 1e-3
    rows = [draw.frames["problems"].query("series == 'long' and reachable") for draw in draws.values()]
    lost = [found["lost_again"].mean() for found in rows]
    assert result.controls["non_monotone_share"]["untrained"] == beside("non_monotone_share", lost)
    problems = result.frames["problems"]
    assert {"untrained", "untrained_2", "untrained_long", "untrained_2_long"} <= set(problems["series"])
    assert set(result.metrics) == set(result.controls)


def test_a_strength_that_is_lost_again_is_flagged(closing):
    """Behind the first amplifier a large injection drowns the mark that the second one asks for."""
    problems = closing.frames["problems"]
    assert not problems.query("series == 'short'")["lost_again"].any()
    assert problems.query("series == 'long' and layer == 2")["lost_again"].all()


def test_a_reported_strength_suffices_in_a_whole_pass_and_a_smaller_one_does_not():
    model = turning_model()
    view = rl.signal_view(model)
    result = concept_inception(model, WORDS[:3], lexicon=LEXICON, prompts_per_concept=2)
    rows = result.frames["problems"].query("series == 'short' and reachable and strength > 0")
    assert len(rows) >= 8
    for row in rows.head(8).itertuples():
        written = view.write(view.rows([f" {row.concept}"]))[0]
        for factor, said in ((1.0, True), (0.97, False)):
            with rl.intervene(model, steer(model, row.layer, written, factor * row.alpha, -1)):
                top = int(model(row.prompt)[0, -1, : model.tokenizer.n_vocab].argmax())
            assert (top == model.to_single_token(f" {row.concept}")) == said


def test_the_search_brackets_by_doubling_and_bisects_to_its_tolerance():
    needed = np.array([0.0, 0.03, 1.0, 7.9, 8.1])
    found = critical_strength(lambda i, s: s >= needed[i], 5, smallest=0.5, largest=8, tolerance=0.01)
    assert found.strength[0] == 0
    assert np.isnan(found.strength[4])
    assert (found.strength[1:4] >= needed[1:4]).all()
    assert (found.strength[1:4] <= needed[1:4] * 1.011).all()
    tried = found.trace.query("problem == 4")["strength"].tolist()
    assert tried == [0, 0.5, 1, 2, 4, 8]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_architecture_runs(architecture):
    model = build_model(of_architecture(architecture, n_layers=1))
    result = concept_inception(model, WORDS[:3], lexicon=LEXICON, quick=True)
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert set(result.frames["problems"]["layer"]) == {0, 1}
    assert set(result.figures) == {"critical", "alpha", "reachable", "trace"}


def test_the_same_seed_gives_the_same_frames():
    model = build_model(of_architecture("gpt2", n_layers=1))
    first, second = (concept_inception(model, WORDS[:3], lexicon=LEXICON, seed=4, quick=True) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)


def test_what_is_several_tokens_is_skipped_and_named():
    model = build_model(of_architecture("reflow", n_layers=1))
    result = concept_inception(model, [*WORDS[:2], "Constantinople"], lexicon=LEXICON, quick=True)
    assert result.params["concepts"] == WORDS[:2]
    assert "Constantinople" in result.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ["red"]}, "two concepts of one token, got 1"),
        ({"lexicon": Lexicon(version="x")}, "needs short_prompts"),
        ({"limit": -1.0}, "smallest ≤ largest"),
        ({"tolerance": 2.0}, "tolerance < 1"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        concept_inception(heavy_model(), **{"concepts": WORDS[:2], "lexicon": LEXICON, **options})


def test_one_word_is_not_taken_for_its_letters():
    with pytest.raises(ReflowlensError, match="concepts: a list was expected, got the text 'Paris'"):
        concept_inception(heavy_model(), "Paris")


def test_the_verdicts_follow_their_rules():
    assert closing_verdict((0.6, 0.9), 0.0, 20) == "supported"
    assert closing_verdict((0.6, 0.9), 0.7, 20) == "not supported", "an untrained model closes as often"
    assert closing_verdict((0.1, 0.4), 0.0, 20) == "not supported"
    assert closing_verdict((0.4, 0.6), 0.0, 20) == closing_verdict((0.6, 0.9), 0.0, 19) == "underpowered"
    assert delay_verdict((0.1, 0.2), -0.1, 0.01, 20) == "supported"
    assert delay_verdict((0.1, 0.2), 0.0, 0.2, 20) == delay_verdict((0.0, 0.2), -0.1, 0.01, 20) == "not supported"
    assert delay_verdict((0.1, 0.2), 0.15, 0.01, 20) == "not supported", "an untrained model is delayed as much"
