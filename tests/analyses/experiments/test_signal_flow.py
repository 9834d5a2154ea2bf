from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.experiments.signal_flow.experiment import signal_flow
from analyses.words.lexicon import Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.signals import signal_view
from tests.planted_results import KEPT, missed, relayed
from tests.support.planted import (
    CONFIG,
    LEXICON,
    RELAYED,
    empty_model,
    keeping_model,
    of_architecture,
    relaying_model,
    turning_model,
)

LEADING = ("leading_share", "neighbour_overlap", "leading_since")


@pytest.fixture(scope="module")
def kept():
    return KEPT.run()


@pytest.mark.parametrize(("layer", "writer"), [(0, "mlp"), (2, "mlp"), (1, "head")])
def test_the_planted_signals_are_born_where_they_are_written(layer, writer):
    result = signal_flow(relaying_model(layer, writer), k=5, rotations=2, lexicon=LEXICON)
    assert not missed(result, relayed(layer, writer))
    tracks = result.frames["tracks"].dropna(subset="since")
    assert tracks["codebook"].str.startswith("' Paris'").all()
    assert result.params["target"] == " Paris"
    after = result.frames["layers"].query(f"basis == 'model' and block > {layer}")
    assert after["overlap"].to_numpy() == pytest.approx(1)
    assert after["births"].eq(0).all()


@pytest.mark.parametrize("writer", ["mlp", "head"])
def test_the_split_finds_the_writer(writer):
    result = signal_flow(relaying_model(1, writer), k=5, rotations=2, lexicon=LEXICON)
    split = result.frames["split"].query("model == 'model'")
    written = split.loc[split["logit"].idxmax()]
    assert (written["part"], written["block"]) == ("mlp" if writer == "mlp" else "attention", 1)
    assert written["logit"] > 5 * split["logit"].drop(written.name).abs().max()
    heads = result.frames["heads"].query("model == 'model'")
    if writer == "head":
        strongest = heads.loc[heads["logit"].idxmax()]
        assert (strongest["layer"], strongest["head"]) == (1, 1)
        assert strongest["logit"] == pytest.approx(written["logit"])
    else:
        assert heads.query("layer == 1")["logit"].eq(0).all()
    changes = result.frames["changes"].set_index(["part", "block", "signal"])["contribution"]
    shares = [changes[written["part"], 1, signal] for signal in RELAYED]
    assert min(shares) > 0.5 * max(shares) > 0


def test_the_planted_basis_beats_its_rotations(kept):
    assert not missed(kept, KEPT.expected)
    for metric in LEADING:
        assert {"rotated_basis", "varimax", "untrained"} <= set(kept.controls[metric])
    assert kept.metrics["leading_share"] > 0.9
    assert kept.controls["leading_share"]["random_signal"] == pytest.approx(5 / 32)


@pytest.mark.parametrize("model", [turning_model(), empty_model()], ids=["turning", "silent"])
def test_nothing_is_found_where_nothing_is(model):
    result = signal_flow(model, k=5, lexicon=LEXICON)
    assert {result.verdicts[metric] for metric in LEADING} == {"not supported"}
    for metric in LEADING:
        low, high = result.intervals[metric]
        width = high - low + 1e-9
        assert low - width <= result.controls[metric]["rotated_basis"] <= high + width
    assert ("attention_share" in result.metrics) == (model.blocks[0].mlp.W_out.abs().sum() > 0).item()


def test_frames_are_complete_and_consistent(kept):
    model = keeping_model()
    signals, tracks, positions = (kept.frames[name] for name in ("signals", "tracks", "positions"))
    points = 2 * CONFIG.n_layers + 1
    assert len(signals) == points * len(tracks)
    assert tracks["contribution"].is_monotonic_decreasing
    leads = signals[signals["leads"]]
    assert (leads["rank"] <= 5).all()
    assert (leads.groupby("depth").size() <= 5).all()
    assert set(leads["signal"]) == set(tracks["signal"])
    born = leads.groupby("signal")["depth"].min()
    assert tracks.set_index("signal")["born"].sort_index().to_numpy() == pytest.approx(born.to_numpy())
    assert (tracks["since"].isna() == tracks["died"].notna()).all()
    assert len(positions) == points * 5
    assert positions["signal"].eq(tracks["signal"].iloc[0]).all()
    last = positions[(positions["position"] == 4) & (positions["depth"] == CONFIG.n_layers)]
    assert last["contribution"].item() == pytest.approx(tracks["contribution"].iloc[0], rel=1e-5)
    at_end = kept.frames["changes"].groupby("signal")["contribution"].sum()
    for row in tracks.itertuples():
        assert at_end[row.signal] == pytest.approx(row.contribution, abs=1e-4)
    logits = model("The king of the house")[0, -1]
    assert kept.frames["prompts"].query("basis == 'model'")["leading_share"].mean() == pytest.approx(
        kept.metrics["leading_share"]
    )
    assert int(logits[: model.tokenizer.n_vocab].argmax()) == model.to_single_token(kept.params["target"])
    assert set(kept.figures) == {"signals", "tracks", "positions", "overlap", "split", "heads"}


def test_the_sums_are_exact_in_every_basis(kept):
    for metric in ("sum_error", "split_error"):
        assert 0 < kept.metrics[metric] < 2e-6
        assert all(0 < value < 2e-6 for value in kept.controls[metric].values())


def test_an_earlier_position_is_read_as_the_end_of_a_shorter_prompt():
    model = turning_model()
    options = {"k": 5, "rotations": 2, "quick": True, "lexicon": LEXICON}
    early = signal_flow(model, "The king of the house", position=1, signal=7, **options)
    short = signal_flow(model, "The king", signal=7, **options)
    for name in ("tracks", "signals", "changes"):
        pd.testing.assert_frame_equal(early.frames[name], short.frames[name], rtol=1e-4, atol=1e-5)
    assert len(early.frames["positions"]) == 5 * (2 * CONFIG.n_layers + 1)
    assert early.params["signal"] == 7


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_architecture_runs(architecture):
    model = build_model(of_architecture(architecture, n_layers=1))
    result = signal_flow(model, target=" Paris", lexicon=LEXICON, rotations=2, quick=True)
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert result.params["target"] == " Paris"
    assert 0 < result.metrics["leading_share"] < 1 + 1e-6
    assert result.metrics["sum_error"] < 1e-5


def test_an_imported_model_is_read_through_svd():
    model = build_model(dataclasses.replace(of_architecture("llama", n_layers=1), tie_word_embeddings=False))
    result = signal_flow(model, view="svd", lexicon=LEXICON, rotations=2, quick=True)
    assert result.params["view"] == "svd"
    assert max(result.metrics["sum_error"], result.metrics["split_error"]) < 1e-5


def test_a_target_that_nothing_speaks_for_is_shown_all_the_same():
    model = empty_model()
    with torch.no_grad():
        model.embed.W_recipe[model.to_single_token(" queen")] = 0
    result = signal_flow(model, target=" queen", lexicon=LEXICON, rotations=2, quick=True)
    tracks = result.frames["tracks"]
    assert len(tracks) == 1
    assert tracks[["born", "since", "died"]].isna().all(axis=None)
    assert np.isfinite(result.metrics["leading_share"])


def test_the_same_seed_gives_the_same_frames_and_leaves_the_weights():
    model = turning_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (signal_flow(model, lexicon=LEXICON, rotations=2, quick=True, seed=2) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be between 1 and the view's 32 signals, got 0"),
        ({"k": 33}, "k must be between 1"),
        ({"signal": 32}, "no signal 32: this view has signals 0 to 31"),
        ({"prompt": "The king", "position": 2}, "position: the prompt has 2 tokens, 0 to 1; got 2"),
        ({"rotations": 1}, "rotations must be at least 2"),
        ({"lexicon": Lexicon(version="x")}, "at least two factual prompts"),
        ({"prompt": "king " * 50}, "too long"),
    ],
)
def test_what_cannot_be_asked_is_an_error(options, message):
    with pytest.raises(ReflowlensError, match=message):
        signal_flow(empty_model(), **{"lexicon": LEXICON, **options})


def test_a_view_can_be_given():
    model = turning_model()
    view = signal_view(model, "rotated", seed=3)
    result = signal_flow(model, view=view, k=3, lexicon=LEXICON, rotations=2, quick=True)
    assert result.params["view"] == "rotated"
    assert "3 leading signals" in result.definitions["leading_share"]
