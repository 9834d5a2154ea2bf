from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from analyses.experiments.typo_resilience.experiment import CARRIERS, resilience_verdict, typo_resilience
from analyses.statistics.intervals import bootstrap_interval
from analyses.words.lexicon import Lexicon, Typo, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.planted_results import TYPOS, missed, recovery
from tests.support.planted import CONFIG, correcting_model, deciding_model, empty_model, of_architecture, typo_lexicon
from tests.support.tiny import tiny_config

LEXICON = typo_lexicon()
JUDGED = {"final_cosine_readout", "final_cosine_resid", "final_kl", "recovered_share"}


@pytest.fixture(scope="module")
def corrected():
    return TYPOS.run()


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_planted_recovery_layer_is_found(layer, corrected):
    result = corrected if layer == 2 else typo_resilience(correcting_model(layer), lexicon=LEXICON, carriers=["A"])
    pairs = result.frames["pairs"].query("comparison == 'misspelt'")
    assert (pairs["recovery_layer"] == layer + 1).all()
    assert pairs["start_cosine_readout"].abs().max() < 1e-6
    assert not missed(result, recovery(layer))


def test_the_planted_likeness_is_measured_and_beats_every_control(corrected):
    assert not missed(corrected, TYPOS.expected)
    for metric in ("final_cosine_readout", "final_cosine_resid"):
        assert corrected.controls[metric]["unrelated_word"] == pytest.approx(0, abs=1e-6)
        assert corrected.controls[metric]["unrelated_misspelling"] == pytest.approx(0, abs=1e-6)
        assert set(corrected.controls[metric]) == {"unrelated_word", "unrelated_misspelling", "untrained"}
    assert corrected.controls["final_kl"]["unrelated_word"] > 1
    assert set(corrected.verdicts) == JUDGED
    assert corrected.frames["kinds"].query("comparison == 'misspelt'")["p_holm"].max() < 0.05


def test_a_word_counts_once_however_often_it_is_misspelt():
    lexicon = Lexicon(version="x", typos=load_lexicon().typos)
    result = typo_resilience(empty_model(), lexicon=lexicon, carriers=["A"], threshold=0)
    pairs = result.frames["pairs"].query("comparison == 'misspelt'")
    words = list(dict.fromkeys(pairs["clean"]))
    assert (result.params["pairs"], result.params["words"]) == (len(pairs), len(words))
    assert len(words) < len(pairs)
    for metric in ("final_cosine_readout", "final_kl"):
        means = [np.mean([row[metric] for _, row in pairs.iterrows() if row["clean"] == word]) for word in words]
        assert result.metrics[metric] == pytest.approx(np.mean(means)) != pytest.approx(pairs[metric].mean())
        assert result.intervals[metric] == pytest.approx(bootstrap_interval(means))
    curve = result.frames["layers"].query("comparison == 'misspelt' and quantity == 'kl'").iloc[-1]
    assert (curve["mean"], curve["low"], curve["high"]) == pytest.approx((np.mean(means), *bootstrap_interval(means)))
    recovered = pairs.query("recovered").groupby("clean")["recovery_layer"].mean()
    assert result.metrics["recovery_layer"] == pytest.approx(recovered.mean())


def test_many_misspellings_of_few_words_are_underpowered():
    typos = [Typo("drop", typo.clean, typo.misspelt + "x" * i) for typo in LEXICON.typos[:10] for i in range(3)]
    result = typo_resilience(empty_model(), lexicon=Lexicon(version="x", typos=tuple(typos)), carriers=["A"])
    assert set(result.verdicts.values()) == {"underpowered"}
    assert result.frames["kinds"].query("comparison == 'misspelt'")[["pairs", "words"]].to_numpy().tolist() == [
        [30, 10]
    ]


def test_the_threshold_is_what_recovery_means():
    result = typo_resilience(correcting_model(1), lexicon=LEXICON, carriers=["A"], threshold=0.999)
    assert result.metrics["recovered_share"] == 0
    assert "recovery_layer" not in result.metrics
    assert any("recovery_layer: absent" in note for note in result.notes)
    assert "0.999" in result.definitions["recovered_share"]


def test_nothing_is_found_where_nothing_is():
    result = typo_resilience(empty_model(), lexicon=LEXICON)
    assert result.verdicts == dict.fromkeys(JUDGED, "not supported")
    assert abs(result.metrics["final_cosine_readout"]) < 0.15


def test_a_direction_that_all_prompts_share_is_no_recovery():
    result = typo_resilience(deciding_model(1), lexicon=LEXICON)
    assert result.metrics["final_cosine_readout"] > 0.8
    assert result.controls["final_cosine_readout"]["unrelated_word"] > 0.8
    assert set(result.verdicts.values()) == {"not supported"}


def test_frames_are_complete_and_consistent(corrected):
    layers, cells, pairs = (corrected.frames[name] for name in ("layers", "cells", "pairs"))
    points = 2 * CONFIG.n_layers + 1
    assert len(layers) == 4 * 3 * points
    assert len(cells) == len(LEXICON.typos) * points
    assert len(pairs) == 4 * len(LEXICON.typos)
    unrelated = pairs.query("comparison == 'unrelated_word'")
    assert (unrelated["other"] != unrelated["clean"]).all()
    elsewhere = pairs.query("comparison == 'unrelated_misspelling'")
    assert not set(zip(elsewhere["clean"], elsewhere["other"], strict=True)) & {
        (t.clean, t.misspelt) for t in LEXICON.typos
    }
    means = cells.groupby("depth")["cosine_readout"].mean()
    curve = layers.query("comparison == 'misspelt' and quantity == 'cosine_readout'").set_index("depth")["mean"]
    assert means.to_numpy() == pytest.approx(curve.to_numpy())
    at_end = cells[cells["depth"] == CONFIG.n_layers].groupby("kind")["cosine_readout"].mean()
    kinds = corrected.frames["kinds"].query("comparison == 'misspelt'").set_index("kind")
    for kind, value in at_end.items():
        assert kinds.loc[kind, "final_cosine_readout"] == pytest.approx(value)
    assert kinds["pairs"].sum() == len(LEXICON.typos)
    assert set(corrected.figures) == {"readout", "residual", "kl", "kinds", "pairs"}
    assert corrected.params["carriers"] == list(CARRIERS)


def test_the_unrelated_word_is_as_long_where_the_lexicon_has_one():
    lexicon = Lexicon(version="x", categories=load_lexicon().categories, typos=load_lexicon().typos[:30])
    result = typo_resilience(empty_model(), lexicon=lexicon, carriers=["A"], quick=True)
    unrelated = result.frames["pairs"].query("comparison == 'unrelated_word'")
    assert len(unrelated) == 10
    assert (unrelated["other"].str.len() == unrelated["clean"].str.len()).all()
    assert (unrelated["other_tokens"] == 1).all()


def test_the_same_seed_gives_the_same_frames():
    first, second = (typo_resilience(empty_model(), lexicon=LEXICON, carriers=["A"], seed=4, quick=True) for _ in "ab")
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_architecture_runs(architecture):
    model = build_model(of_architecture(architecture, n_layers=1))
    result = typo_resilience(model, lexicon=LEXICON, carriers=["A"], quick=True)
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert -1 <= result.metrics["final_cosine_readout"] <= 1
    assert np.isfinite(result.frames["layers"]["mean"]).all()


def test_an_imported_model_is_read_through_svd():
    model = build_model(dataclasses.replace(of_architecture("llama", n_layers=1), tie_word_embeddings=False))
    result = typo_resilience(model, view="svd", lexicon=LEXICON, carriers=["A"], quick=True)
    assert result.params["view"] == "svd"
    assert result.metrics["final_kl"] > 0


def test_words_of_several_tokens_are_skipped_and_named():
    lexicon = Lexicon(version="x", typos=(*LEXICON.typos[:4], Typo("drop", "Constantinople", "Constantinole")))
    result = typo_resilience(empty_model(), lexicon=lexicon, carriers=["A"])
    assert result.params["pairs"] == 4
    assert "Constantinople" in result.notes[0]
    assert set(result.verdicts.values()) == {"underpowered"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold: a cosine"),
        ({"carriers": []}, "carriers: one beginning"),
        ({"carriers": "She wrote"}, "carriers: a list"),
        ({"lexicon": Lexicon(version="x", typos=LEXICON.typos[:1])}, "at least two words"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        typo_resilience(empty_model(), **{"lexicon": LEXICON, **options})


def test_a_tokenizer_without_words_is_an_error():
    with pytest.raises(ReflowlensError, match="single tokens, got 0 of the lexicon's 24"):
        typo_resilience(build_model(tiny_config("reflow")), lexicon=LEXICON)


@pytest.mark.parametrize(
    ("metric", "interval", "word", "p", "units", "expected"),
    [
        ("final_cosine_readout", (0.5, 0.6), 0.4, 0.01, 30, "supported"),
        ("final_cosine_readout", (0.5, 0.6), 0.55, 0.01, 30, "not supported"),
        ("final_cosine_readout", (0.5, 0.6), 0.4, 0.2, 30, "not supported"),
        ("final_cosine_readout", (0.5, 0.6), 0.4, 0.01, 19, "underpowered"),
        ("final_cosine_readout", (0.5, 0.6), 0.47, 0.01, 30, "not supported"),  # by less than what matters
        ("final_kl", (0.5, 0.6), 0.75, 0.01, 30, "supported"),
        ("final_kl", (0.5, 0.6), 0.65, 0.01, 30, "not supported"),
        ("final_kl", (0.5, 0.6), 0.4, 0.01, 30, "not supported"),
    ],
)
def test_the_verdict_follows_its_rule(metric, interval, word, p, units, expected):
    easier = 0.9 if metric == "final_kl" else 0.1
    controls = {"unrelated_word": word, "unrelated_misspelling": easier, "untrained": 0.55}
    assert resilience_verdict(metric, interval, controls, p, units) == expected
