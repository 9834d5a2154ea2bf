from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from analyses.experiments.genetic_hijack.edits import (
    RecipeEdits,
    random_recipes,
    random_replacement,
    random_swap,
    replacements,
)
from analyses.experiments.genetic_hijack.experiment import WRITTEN_DRAWS, genetic_hijack, shift_verdict, signal_verdict
from analyses.experiments.genetic_hijack.measure import Probe
from analyses.measures.sentiment import sentiment_poles
from analyses.statistics.pvalues import predictive_pvalue
from reflowlens.errors import ReflowlensError
from reflowlens.figures.table import table
from reflowlens.models import build_model
from reflowlens.signals import random_rotation, rotate
from tests.planted_results import HIJACK, missed
from tests.support.planted import empty_model, feeling_lexicon, feeling_model, of_architecture

LEXICON = feeling_lexicon()
OPTIONS = {"lexicon": LEXICON, "betas": (0.25, 0.5), "new_tokens": 2}


@pytest.fixture(scope="module")
def planted():
    model = HIJACK.model()
    before = rl.model_hash(model)
    result = HIJACK.measure(model)
    assert rl.model_hash(model) == before
    return result


def test_the_planted_signal_is_found_and_its_column_decides_the_prediction(planted):
    assert not missed(planted, HIJACK.expected)
    silenced = planted.frames["carriers"].query("edit == 'silence' and series == 'edit'")["log_odds"]
    unedited = planted.frames["carriers"].query("edit == 'unedited'")["log_odds"]
    assert silenced.abs().max() < 0.05 < 1 < unedited.min()
    assert planted.controls["silence_effect"]["random_direction"] < 0.1 * planted.metrics["silence_effect"]


def test_a_swap_of_the_poles_turns_the_log_odds_exactly(planted):
    carriers = planted.frames["carriers"]
    unedited = carriers.query("edit == 'unedited'")["log_odds"].to_numpy()
    swapped = carriers.query("edit == 'swap' and series == 'edit'")["log_odds"].to_numpy()
    assert swapped == pytest.approx(-unedited, rel=1e-5)


def test_shifting_the_subjects_turns_the_next_word(planted):
    assert planted.intervals["log_odds_shift"][0] > 10 * abs(planted.controls["log_odds_shift"]["random_direction"])
    assert planted.verdicts["sentiment_shift"] == "not supported"


@pytest.mark.parametrize("max_ratio", [1e-9, 1.0, 1e9])
def test_the_beta_of_the_headline_and_of_its_control_are_what_their_texts_bear(max_ratio):
    model = build_model(of_architecture("reflow", n_layers=1))
    result = genetic_hijack(model, rotations=2, max_ratio=max_ratio, **OPTIONS)
    shifts = result.frames["edits"].query("edit == 'shift'").drop_duplicates(["series", "beta"])  # of several draws one
    found = {"edit": result.metrics["beta"], **result.controls["beta"]}
    for series, rows in shifts.groupby("series"):
        ratio = np.exp(np.log(rows["perplexity_ratio"]).groupby(rows["beta"].abs()).mean())
        assert found[series] == max(ratio.index[ratio <= max_ratio], default=0.25)
    raw = result.controls["beta_raw"]["random_direction"] / result.metrics["beta_raw"]
    assert raw == pytest.approx(result.controls["beta"]["random_direction"] / result.metrics["beta"])
    assert set(result.metrics) == set(result.controls)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_found_where_nothing_is(seed):
    result = genetic_hijack(empty_model(seed), **OPTIONS | {"betas": (0.5,), "seed": seed})
    assert result.metrics["log_odds_shift"] == pytest.approx(0, abs=1e-5)
    assert set(result.verdicts.values()) == {"not supported"}


def test_frames_and_figures_are_complete(planted):
    edits, carriers = planted.frames["edits"], planted.frames["carriers"]
    assert len(edits) == 1 + 2 * 4 + 2 * (WRITTEN_DRAWS - 1) + 6
    assert len(carriers) == len(edits) * len(LEXICON.sentiment.prompts)
    assert set(planted.figures) == {"fluency", "log_odds", "generations", "signals"}
    means = carriers.groupby(["edit", "series", "beta"], sort=False)["log_odds"].mean()
    swap = edits.query("edit == 'swap' and series == 'edit'")["log_odds"].iloc[0]
    assert means["swap", "edit", 0.0] == pytest.approx(swap)
    shown = planted.figures["generations"].data[0].cells["values"]
    assert set(shown[1]) == {"unedited", "shift", "swap", "silence", "graft"}
    assert set(planted.frames["signals"]["basis"]) == {"native", *(f"rotated_{i}" for i in range(6))}


def test_directions_and_not_carriers_are_what_the_written_texts_are_judged_against(planted):
    beta = planted.metrics["beta"]
    shifts = planted.frames["carriers"].query("edit == 'shift' and abs(beta) == @beta")
    own = {sign: shifts[(shifts["series"] == "edit") & (shifts["beta"] == sign * beta)]["valence"] for sign in (1, -1)}
    observed = (own[1].mean() - own[-1].mean()) / 2
    random = shifts[shifts["series"] == "random_direction"]
    n = len(LEXICON.sentiment.prompts)
    up, down = (random[random["beta"] == sign * beta]["valence"].to_numpy().reshape(-1, n) for sign in (1, -1))
    null = (up - down).mean(axis=1) / 2
    assert len(null) == WRITTEN_DRAWS
    assert planted.metrics["sentiment_shift"] == pytest.approx(observed)
    assert planted.controls["sentiment_shift"]["random_direction"] == pytest.approx(null.mean())
    p = predictive_pvalue(observed, null)
    assert any(note.startswith(f"sentiment_shift: p = {p:.2g},") for note in planted.notes)


def test_the_same_seed_gives_the_same_frames():
    model = build_model(of_architecture("reflow", n_layers=1))
    first, second = (genetic_hijack(model, seed=4, quick=True, **OPTIONS) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite", "llama"])
def test_every_architecture_runs_and_keeps_its_weights(architecture):
    changes = {"tie_word_embeddings": False} if architecture == "llama" else {}
    model = build_model(dataclasses.replace(of_architecture(architecture, n_layers=1), **changes))
    before = rl.model_hash(model)
    result = genetic_hijack(model, quick=True, rotations=2, **OPTIONS)
    assert rl.model_hash(model) == before
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert ("rotated_basis" in result.controls["silence_effect"]) == (architecture != "reflow_topk")
    assert any("no rotated_basis" in note for note in result.notes) == (architecture == "reflow_topk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": "film"}, "words: a list was expected"),
        ({"words": []}, "sentiment.prompts at least that hold an edited word"),
        ({"lexicon": dataclasses.replace(LEXICON, neutral_texts=("A film is long.",))}, "without an edited word"),
        ({"lexicon": dataclasses.replace(LEXICON, categories={})}, "positive_adjectives, got 0"),
        ({"betas": (0.0,)}, "betas must be positive"),
        ({"rotations": 1}, "rotations must be at least 2"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        genetic_hijack(empty_model(), **OPTIONS | options)


def test_the_recipe_of_top_k_cannot_be_edited_through_another_view():
    model = build_model(of_architecture("reflow_topk", n_layers=1))
    with pytest.raises(ReflowlensError, match="in its native view, not in 'svd'"):
        RecipeEdits.of(rl.signal_view(model, "svd"))


def test_the_verdicts_follow_their_rules():
    def shifted(interval, control, p, units):
        return shift_verdict("log_odds_shift", interval, {"random_direction": control, "untrained": 0.0}, p, units)

    for rule in (shifted, signal_verdict):
        assert rule((0.31, 0.5), 0.2, 0.01, 20) == "supported"
        assert rule((0.1, 0.5), 0.2, 0.01, 20) == rule((0.31, 0.5), 0.2, 0.2, 20) == "not supported"
        assert rule((0.31, 0.5), 0.2, 0.01, 19) == "underpowered"
        assert rule((0.21, 0.5), 0.2, 0.01, 20) == "not supported", "by less than what matters"


# -- edits ------------------------------------------------------------------------------------------------------------


def views(model):
    native = rl.signal_view(model)
    yield from (native, rl.signal_view(model, "svd"), rotate(native, random_rotation(native.n_signals, 1)))


@pytest.mark.parametrize("architecture", ["reflow", "gpt2", "llama"])
def test_an_edit_through_any_view_changes_that_views_recipe(architecture):
    changes = {"tie_word_embeddings": False} if architecture == "llama" else {}
    model = build_model(dataclasses.replace(of_architecture(architecture, n_layers=1), **changes))
    for view in views(model):
        before = rl.model_hash(model)
        editor, change = RecipeEdits.of(view), torch.randn(view.n_signals)
        expected = view.recipe.clone()
        expected[[3, 9]] = view.recipe[[9, 3]]
        assert_embedding(model, editor.swap(3, 9), expected @ view.basis)
        expected = view.recipe.clone()
        expected[[3, 9]] += change
        assert_embedding(model, editor.shift([3, 9], change), expected @ view.basis)
        expected = view.recipe.clone()
        expected[:, 2] = 0
        assert_embedding(model, editor.silence(2), expected @ view.basis)
        column = torch.randn(len(view.recipe))
        expected[:, 2] = column
        assert_embedding(model, editor.graft(2, column), expected @ view.basis)
        assert rl.model_hash(model) == before


def assert_embedding(model, change, expected):
    """What the unembedding reads logits along, while the edit lasts."""
    with rl.edit(model, change):
        actual = model.W_U.AB if hasattr(model.W_U, "AB") else model.W_U
        torch.testing.assert_close(actual.T, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_controls_change_as_much_as_the_edit():
    view = rl.signal_view(feeling_model(1))
    editor, recipe = RecipeEdits.of(view), view.recipe.clone()

    def size(edits):
        with rl.edit(view.model, edits):
            return float((rl.signal_view(view.model).recipe - recipe).norm())

    assert size(random_swap(view, [(5, 9), (7, 8)], 0)) == pytest.approx(
        size([editor.swap(5, 9), editor.swap(7, 8)]), rel=1e-4
    )
    direction = random_recipes(1, view, 1)[0]
    for column in replacements(view, direction).values():
        signal = int(direction.abs().argmax())
        assert size([random_replacement(view, signal, column, 0)]) == pytest.approx(
            size([editor.graft(signal, column)]), rel=1e-4
        )


def test_a_probe_continues_from_the_same_seeds_and_undoes_its_edits_after_an_error():
    model = feeling_model(1)
    _, heldout = sentiment_poles(model, LEXICON, "x")
    probe = Probe(model, LEXICON.sentiment.prompts[:3], heldout, LEXICON.neutral_texts, new_tokens=3)
    first, second = (probe.outcome(write=True) for _ in range(2))
    assert first.written.texts == second.written.texts
    assert first.kl == pytest.approx(0, abs=1e-6)
    before = rl.model_hash(model)
    with pytest.raises(ReflowlensError):
        probe.outcome(
            [RecipeEdits.of(rl.signal_view(model)).silence(3), rl.SetWeights("embed.W_recipe", 0.0, rows=-(10**9))]
        )
    assert rl.model_hash(model) == before


def test_a_table_shows_every_row_as_it_is():
    frame = pd.DataFrame({"text": ["<b> & \n", "x" * 300], "valence": [0.123456, 2.0]})
    figure = table(frame, ["text", "valence"], widths=[4, 1], title="t")
    assert list(figure.data[0].header["values"]) == ["text", "valence"]
    assert figure.data[0].cells["values"][0][0] == "&lt;b&gt; &amp; ⏎"
    assert list(figure.data[0].cells["values"][1]) == ["0.1235", "2"]
    assert figure.layout.height > table(frame.head(1), ["text", "valence"]).layout.height + 60
    with pytest.raises(ReflowlensError, match="no column 'beta'"):
        table(frame, ["beta"])
