"""Measures of codes where the features are known, and the whole question on a model made of known features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from analyses.features.probing_tasks import Task
from analyses.findings import signals_against_dictionaries as question
from analyses.findings.code_measures import Resamples, knocked_out, probed, recovered, removal, stability
from analyses.findings.codes import STREAM, Code, Held
from analyses.findings.signals_against_dictionaries import (
    SMALLEST,
    Size,
    answer,
    better_verdict,
    signals_against_dictionaries,
)
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.random_dictionary import random_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import random_rotation
from tests.support.dictionaries import dictionary_of
from tests.support.planted import silent_blocks
from tests.support.tiny import assert_close, random_model

D, N, DOCUMENTS = 24, 600, 20


@pytest.fixture(scope="module")
def held() -> Held:
    """Features are the axes, each present in a tenth of the positions; two tokens speak for and against each."""
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(N, D, generator=generator) < 0.1
    v = fires * (0.5 + torch.rand(N, D, generator=generator))
    unembedding = 6 * torch.cat([torch.eye(D), -torch.eye(D)])
    document, position = torch.arange(N) // (N // DOCUMENTS), torch.arange(N) % (N // DOCUMENTS)
    target = (v @ unembedding.T).argmax(dim=-1)
    places = {STREAM: v}
    return Held(document, position, target, torch.ones(N, 1), places, {}, unembedding, torch.zeros(D), None, None)


@pytest.fixture(scope="module")
def task(held) -> Task:
    """Whether each of the first three features is present."""
    place = torch.stack([held.document, held.position], dim=1).numpy()
    labels = (held.places[STREAM][:, :3] > 0).numpy()
    training = place[:, 0] < DOCUMENTS // 2
    return Task("concepts", ("a", "b", "c"), labels, place[:, 0], training, place, np.arange(N))


OVER = Resamples.of(np.arange(DOCUMENTS) >= DOCUMENTS // 2, 100, seed=0)


def code_along(directions: torch.Tensor) -> Code:
    nothing = torch.zeros(D)
    return Code(
        "planted",
        STREAM,
        lambda held: held.places[STREAM] @ directions.T,
        directions,
        lambda held: nothing.expand(len(held), -1),
        0,
        0.0,
    )


EXACT, ROTATED = code_along(torch.eye(D)), code_along(random_rotation(D, 1))


def test_features_that_are_there_recover_the_loss_and_rotated_ones_do_not(held):
    mean = held.places[STREAM].mean(dim=0)
    most = int((held.places[STREAM] > 0).sum(dim=1).max())
    exact, rotated = (recovered(code, held, mean, most, OVER) for code in (EXACT, ROTATED))
    assert_close(torch.tensor(exact["recovered_mean"]), torch.ones(101, dtype=torch.float64), 1e-5)
    assert rotated["recovered_mean"][0] < 0.9
    everything = recovered(ROTATED, held, mean, D, OVER)
    assert everything["recovered_zero"][0] == pytest.approx(1, abs=1e-5)


def test_a_place_that_does_harm_has_no_share_of_what_it_is_worth(held):
    """Without it the least likely tokens are predicted better: codes of it would "recover" all of a loss below 0."""
    harmful = dataclasses.replace(held, target=held.logits(held.normed).argmin(dim=-1))
    found = recovered(EXACT, harmful, held.places[STREAM].mean(dim=0), D, OVER)
    assert np.isnan(found["recovered_mean"]).all()
    assert np.isnan(found["recovered_zero"]).all()
    assert np.isfinite(found["loss"]).all()


def test_a_probe_on_one_coordinate_finds_the_feature_that_is_there(held, task):
    exact, rotated = (probed(code, held, task, 1, OVER, 0) for code in (EXACT, ROTATED))
    assert exact["auc"][0] == exact["accuracy"][0] == 1
    assert rotated["auc"][0] < 0.95
    assert 0.2 < exact["auc_permuted"][0] < 0.8


def test_removing_a_feature_that_is_there_is_felt_where_it_is_alone(held, task):
    exact, rotated = (removal(code, held, task, OVER, 60, 0) for code in (EXACT, ROTATED))
    assert exact["selectivity"][0] == pytest.approx(1, abs=1e-4)
    assert exact["on"][0] > 0.1 > exact["off"][0]
    assert rotated["selectivity"][0] < 0.9


def test_a_prediction_is_in_few_features_that_are_there(held):
    exact, rotated = (knocked_out(code, held, OVER) for code in (EXACT, ROTATED))
    assert exact["leading_share"][0] == pytest.approx(1, abs=1e-5)
    assert rotated["leading_share"][0] < 0.95
    assert exact["left_after_one"][0] < rotated["left_after_one"][0]


def test_an_error_counts_against_the_code_that_leaves_it(held):
    """A code of half of the features: what they hold of a prediction is at most what it says."""
    half = code_along(torch.eye(D)[: D // 2])
    assert knocked_out(half, held, OVER)["leading_share"][0] < 0.7


def test_stability_is_that_of_directions_matched_one_to_one():
    turned = dataclasses.replace(EXACT, writes=-torch.eye(D).flip(0))
    assert stability([EXACT, turned]) == pytest.approx(1)
    assert 0.2 < stability([EXACT, ROTATED]) < 0.8
    assert np.isnan(stability([EXACT]))


def test_resamples_draw_the_measured_documents_alone():
    assert (OVER.weights[:, : DOCUMENTS // 2] == 0).all()
    assert (OVER.weights.sum(axis=1) == DOCUMENTS // 2).all()
    values = torch.arange(N).float().masked_fill(torch.arange(N) % 2 == 0, torch.nan)
    mean = OVER.mean(values, torch.arange(N) // (N // DOCUMENTS))
    assert mean[0] == pytest.approx(np.arange(N // 2, N)[1::2].mean())


def test_the_rule_of_the_answer():
    assert [answer(*ends, 0.05) for ends in ((0.06, 0.2), (-0.2, -0.06), (-0.04, 0.04), (0.04, 0.06))] == [
        "own",
        "other",
        "alike",
        "undecided",
    ]
    assert better_verdict("own", 20) == "supported"
    assert better_verdict("own", 19) == "underpowered"
    assert better_verdict("alike", 20) == "not supported"


def test_a_random_dictionary_has_the_norms_of_the_trained_one():
    trained = dictionary_of(random_model("reflow"), "sae")
    random = random_dictionary(trained)
    for own, other in zip(trained.each_layer(), random.each_layer(), strict=True):
        assert_close(other.W_enc.norm(dim=1), own.W_enc.norm(dim=1), 1e-5)
        assert_close(other.W_dec.norm(dim=2), own.W_dec.norm(dim=2), 1e-5)
        cosines = [torch.nn.functional.cosine_similarity(x.W_enc, x.W_dec[:, 0], dim=1) for x in (own, other)]
        assert_close(cosines[1], cosines[0], 1e-4)
        assert torch.equal(own.b_dec, other.b_dec)
        across = torch.nn.functional.cosine_similarity(own.W_enc, other.W_enc, dim=1)
        assert float(across.abs().mean()) < 0.4


def test_a_random_transcoder_has_no_trained_matrix_left():
    """Not the skip's either, which would say of an MLP what was trained."""
    trained = dictionary_of(random_model("gpt2"), "skip")
    for own, other in zip(trained.each_layer(), random_dictionary(trained).each_layer(), strict=True):
        for name, dim in (("W_enc", 1), ("W_dec", 2), ("W_skip", 1)):
            before, after = getattr(own, name), getattr(other, name)
            assert_close(after.norm(dim=dim), before.norm(dim=dim), 1e-5)
            assert float(torch.nn.functional.cosine_similarity(before, after, dim=dim).abs().mean()) < 0.4


def sparse_model() -> HookedModel:
    """Every byte is four of 32 signals, which are the axes, and no block adds anything."""
    model = silent_blocks(random_model("reflow"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chosen = torch.rand(model.embed.W_recipe.shape, generator=generator).argsort(dim=1) < 4
        model.embed.W_recipe.copy_(chosen * (1 + torch.rand(chosen.shape, generator=generator)))
        model.embed.W_basis.copy_(torch.eye(32))
        model.ln_final.w.fill_(0.4)  # as sure of itself as it is right
    return model


def autoencoder(axes: torch.Tensor, name: str) -> Dictionary:
    point = "blocks.1.hook_resid_post"
    cfg = DictionaryConfig((point,), (point,), 32, 32, 64, "topk", 4, name=name)
    dictionary = Dictionary(cfg).requires_grad_(False)
    (layer,) = dictionary.each_layer()
    both = torch.cat([axes, -axes])
    layer.W_enc.copy_(both)
    layer.W_dec.copy_(both[:, None])
    layer.b_enc.zero_()
    layer.b_dec.zero_()
    return dictionary


@pytest.fixture(scope="module")
def asked():
    """Ends are tied, so that every byte speaks for itself: of text in which each comes eight times it is right."""
    texts = ["".join(8 * c for c in f"\nKING {i}: Hear") for i in range(44)]
    dictionaries = [autoencoder(torch.eye(32), "exact"), autoencoder(random_rotation(32, 3), "spun")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Size, "of", classmethod(lambda cls, quick: cls(44, 60, 600, 12, 60)))
        return signals_against_dictionaries(sparse_model(), dictionaries, texts)


def test_signals_that_are_there_beat_a_rotated_dictionary_and_not_an_exact_one(asked):
    rows = asked.frames["differences"].query("place == 'stream'").set_index(["measure", "against"])
    for measure in ("recovered_mean", "leading_share"):
        assert rows.loc[(measure, "spun"), "answer"] == "own"
        assert rows.loc[(measure, "rotated"), "answer"] == "own"
        assert rows.loc[(measure, "exact"), "answer"] != "own"
    assert asked.verdicts["recovered_mean_stream_against_spun"] == "supported"
    assert asked.verdicts["recovered_mean_stream_against_exact"] == "not supported"


def test_the_table_has_every_code_of_both_places(asked):
    table = asked.frames["table"]
    views = {"native", "varimax", "rotated", "svd", "identity"}
    assert set(table.query("place == 'mlp'")["code"]) == views | {"neurons"}
    assert set(table.query("place == 'stream'")["code"]) == views | {"exact", "spun", "random exact", "random spun"}
    assert set(table.loc[table["place"] == "stream", "l0"]) == {4}
    assert set(SMALLEST) <= set(table.columns)
    assert table.set_index("code").loc["exact", "stability"] < 0.9  # two dictionaries of one size are two seeds
    exact = table.query("place == 'stream' and code == 'exact'").iloc[0]
    assert exact["recovered_mean"] == pytest.approx(1, abs=1e-3)
    assert np.isnan(exact["training_tokens"])
    ends = table.query("place == 'stream'")
    assert (ends["recovered_mean_low"] <= ends["recovered_mean"]).all()
    assert table.query("place == 'mlp'")["recovered_mean"].isna().all()  # silent: worth nothing, and said so
    assert any("recovered_mean is NaN in mlp" in note for note in asked.notes)


def test_what_is_no_dictionary_of_the_end_is_refused():
    model = random_model("reflow")
    texts = [f"\n\nKING {i}:\nHear, the queen of {i} towns.\n" for i in range(44)]
    with pytest.raises(ReflowlensError, match="codes of a prediction are autoencoders of the last residual stream"):
        signals_against_dictionaries(model, [dictionary_of(model, "clt")], texts)
    with pytest.raises(ReflowlensError, match="model of other weights"):
        signals_against_dictionaries(model, [dictionary_of(model, "sae", model_hash="0" * 64)], texts)
    with pytest.raises(ReflowlensError, match="at least 2 documents"):
        signals_against_dictionaries(model, None, texts[:1])


def test_the_question_is_listed():
    from analyses.findings import QUESTIONS

    assert QUESTIONS["signals_against_dictionaries"] == question.__name__.rsplit(".", 1)[-1]
