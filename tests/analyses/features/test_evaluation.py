"""Dictionaries on held-out documents: against plain loops, and against what must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyses.controls.nulls import untrained_model
from analyses.features.documents import document_batches, token_rows
from analyses.features.evaluation import DictionaryEvaluation, evaluate_dictionary, training_statistics
from analyses.features.metrics import METRICS
from analyses.features.reconstructors import nulls, sparse_fit
from analyses.features.replacement import activations
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reference.dictionary_evaluation import plain_metrics
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.dictionaries import Kind, dictionary_of, ragged_documents
from tests.support.tiny import random_model

HELD_OUT, TRAINING = ragged_documents(5), ragged_documents(6, seed=1)


@pytest.fixture(scope="module")
def reflow() -> HookedModel:
    return random_model("reflow")


def evaluated(model: HookedModel, dictionary: Dictionary, **changes: Any) -> DictionaryEvaluation:
    return evaluate_dictionary(model, dictionary, HELD_OUT, TRAINING, **({"batch_size": 2, "resamples": 20} | changes))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("reflow", "clt"), ("gpt2_biased", "plt"), ("llama_untied", "sae"), ("reflow_topk", "skip"), ("bdh", "sae")],
)
def test_metrics_are_those_of_plain_loops_over_documents(architecture: str, kind: Kind) -> None:
    model = random_bdh() if architecture == "bdh" else random_model(architecture)
    dictionary = dictionary_of(model, kind)
    found = evaluated(model, dictionary, with_nulls=False)
    moments, _ = training_statistics(model, dictionary, token_rows(model, TRAINING), 4)
    means = [moments[point].mean.float() for point in dictionary.cfg.writes]
    for row in found.frames["layers"].to_dict("records"):
        layer = None if row["layer"] == "all" else int(row["layer"])
        expected = plain_metrics(model, dictionary, HELD_OUT, means, layer)
        assert found.params["model_loss"][0] == pytest.approx(expected.pop("model_loss"), rel=1e-5)
        assert {metric: row[metric] for metric in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_batches_of_any_size_give_the_same_metrics(reflow: HookedModel) -> None:
    dictionary = dictionary_of(reflow, "clt")
    one, all_at_once = (evaluated(reflow, dictionary, batch_size=size).frames["layers"] for size in (1, 5))
    # But for the bounds of what is recovered: in some resamples zeros cost next to nothing, by which it is divided.
    # What they are made of, the losses and their bounds, is compared.
    unbounded = {f"recovered_{by}_{bound}" for by in ("zero", "mean") for bound in ("low", "high")}
    numbers = [column for column in one if column not in {"dictionary", "layer", *unbounded}]
    np.testing.assert_allclose(one[numbers], all_at_once[numbers], rtol=1e-4, atol=1e-6)


def test_dead_and_dense_shares_are_counts_of_features(reflow: HookedModel) -> None:
    dictionary = dictionary_of(reflow)
    rows = token_rows(reflow, HELD_OUT)
    layers = evaluated(reflow, dictionary, with_nulls=False).frames["layers"]
    for layer, point in enumerate(dictionary.cfg.reads):
        fired = []
        for batch in document_batches(rows, 5):
            read = batch.within(activations(reflow, batch, [point])[point])
            fired.append(dictionary.layers[layer].encode(read) > 0)
        share = torch.cat(fired).float().mean(0)
        assert layers["dead"][layer] == pytest.approx(float((share == 0).float().mean()))
        assert layers["dense"][layer] == pytest.approx(float((share > 0.1).float().mean()))
    assert layers["dead_low"].isna().all()
    assert (layers["dense_low"] <= layers["dense_high"]).all()


def test_intervals_hold_the_value_and_differences_are_paired(reflow: HookedModel) -> None:
    dictionary, other = dictionary_of(reflow), dictionary_of(reflow, seed=5)
    found = evaluated(reflow, dictionary, against={"other": other, "same": dictionary}, resamples=200)
    layers = found.frames["layers"].set_index(["dictionary", "layer"])
    assert (layers["loss_low"] < layers["loss"]).all()
    assert (layers["loss_high"] > layers["loss"]).all()
    differences = found.frames["differences"].set_index(["dictionary", "layer", "metric"])
    same = differences.loc["same"].drop("dead", level="metric")
    assert (same.to_numpy() == 0).all()
    expected = layers.loc[("other", "all"), "loss"] - layers.loc[("dictionary", "all"), "loss"]
    assert differences.loc[("other", "all", "loss"), "difference"] == pytest.approx(expected)


def test_nulls_at_equal_l0_are_ordered_as_they_must_be(reflow: HookedModel) -> None:
    """On the documents that they were fitted to, no L0-dimensional affine subspace leaves less than the principal one,
    and a basis is best used with every vector of it."""
    dictionary = dictionary_of(reflow)
    found = evaluate_dictionary(reflow, dictionary, TRAINING, TRAINING, resamples=5)
    layers = found.frames["layers"].set_index(["layer", "dictionary"])
    assert set(layers.loc["all"].index) == {"dictionary", "mean", "pca", "neurons", "native", "varimax", "rotated"}
    for layer in ("0", "1"):
        rows = layers.loc[layer]
        assert rows.loc["mean", "fvu"] == pytest.approx(1, rel=1e-5)
        assert rows.loc["mean", "recovered_mean"] == pytest.approx(0, abs=1e-5)
        assert rows.loc["pca", "fvu"] < 1
        assert rows["l0"].drop(["mean", "dictionary"]).eq(6).all()
        assert rows.loc["rotated", "fvu"] < 1


@pytest.mark.parametrize("architecture", ["reflow", "gpt2_biased"])
def test_all_neurons_and_all_directions_say_everything(architecture: str) -> None:
    model = random_model(architecture)
    dictionary = dictionary_of(model)
    rows = token_rows(model, TRAINING)
    moments, _ = training_statistics(model, dictionary, rows, 3)
    batch = next(document_batches(rows, 6))
    for name, null in nulls(model, dictionary.cfg.writes, moments, [1e3, 1e3]):
        found = activations(model, batch, [*null.reads, *null.writes])
        for layer in range(2):
            x, y = batch.within(found[null.reads[layer]]), batch.within(found[null.writes[layer]])
            said = null.reconstruct(layer, {layer: null.encode(layer, x)}, x)
            if name != "mean":
                torch.testing.assert_close(said, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()), msg=name)


def test_the_signals_chosen_are_those_most_aligned_and_fit_best() -> None:
    basis = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    mean, y = torch.ones(4), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    found = sparse_fit(mean, basis, 2, y)
    for row, coefficients in zip(y - mean, found, strict=True):
        chosen = coefficients.nonzero()[:, 0]
        assert set(chosen.tolist()) == set((basis @ row / basis.norm(dim=1)).abs().topk(2).indices.tolist())
        best = torch.linalg.lstsq(basis[chosen].T, row[:, None]).solution[:, 0]
        torch.testing.assert_close(coefficients[chosen], best, rtol=1e-3, atol=1e-4)


def test_of_nulls_the_layers_can_be_replaced_together_only(reflow: HookedModel) -> None:
    dictionary = dictionary_of(reflow)
    whole, short = (evaluated(reflow, dictionary, layerwise=layerwise) for layerwise in (True, False))
    one, other = (result.frames["layers"].set_index(["dictionary", "layer"]) for result in (whole, short))
    assert other.drop("dictionary", level=0).drop("all", level=1)["loss"].isna().all()
    kept = other["loss"].dropna()
    np.testing.assert_allclose(kept, one["loss"][kept.index], rtol=1e-6)
    assert set(kept.index) == {
        *(("dictionary", layer) for layer in "01"),
        *one.xs("all", level=1, drop_level=False).index,
    }
    np.testing.assert_allclose(one["fvu"], other["fvu"], rtol=1e-6)
    metrics = short.frames["differences"].groupby("layer")["metric"].nunique()
    assert metrics["all"] == len(METRICS) > metrics["0"] == metrics["1"] > 0


def test_a_dictionary_of_the_untrained_model_is_measured_on_that_model(reflow: HookedModel) -> None:
    dictionary, untrained = dictionary_of(reflow), untrained_model(reflow, 0)
    found = evaluated(reflow, dictionary, with_nulls=False, against={"untrained": (untrained, dictionary)})
    alone = evaluated(untrained, dictionary, with_nulls=False)
    rows = found.frames["layers"]
    beside = rows[rows["dictionary"] == "untrained"].drop(columns="dictionary").reset_index(drop=True)
    np.testing.assert_allclose(
        beside.drop(columns="layer"), alone.frames["layers"].drop(columns=["dictionary", "layer"]), rtol=1e-6
    )


def test_a_perfect_dictionary_recovers_everything() -> None:
    """An autoencoder whose features are the coordinates of the stream, of either sign."""
    reflow = random_model("reflow")
    dictionary = dictionary_of(reflow, "sae", "relu", 64)
    with torch.no_grad():
        reflow.ln_final.w *= 10  # zeros then change the loss by nats, not by thousandths, by which it is divided
        for layer in dictionary.each_layer():
            both = torch.cat([torch.eye(32), -torch.eye(32)])
            layer.W_enc.copy_(both)
            layer.W_dec.copy_(both[:, None])
            layer.b_enc.zero_()
            layer.b_dec.zero_()
    layers = evaluated(reflow, dictionary, with_nulls=False).frames["layers"]
    assert layers["fvu"].max() < 1e-10
    assert layers["kl"].abs().max() < 1e-5
    for metric in ("recovered_zero", "recovered_mean", "cosine", "agreement"):
        np.testing.assert_allclose(layers[metric], 1, rtol=1e-5)


def test_results_are_kept_as_json_and_shown_as_tables(reflow: HookedModel, tmp_path: Path) -> None:
    found = evaluated(reflow, dictionary_of(reflow))
    kept = json.loads(found.save(tmp_path / "new" / "evaluation.json").read_text())
    assert kept["params"]["documents"] == 5
    assert kept["params"]["positions"] == sum(len(document) - 1 for document in HELD_OUT)
    assert len(kept["frames"]["layers"]) == 7 * 3
    assert kept["frames"]["layers"][0]["fvu"] == pytest.approx(found.frames["layers"]["fvu"][0])
    assert kept["frames"]["layers"][0]["dead_low"] is None
    assert all(f" {metric}" in str(found) for metric in METRICS)
    assert "varimax" in found._repr_html_()


def test_a_model_of_16_bits_is_measured_too(reflow: HookedModel) -> None:
    dictionary = dictionary_of(reflow)
    half = random_model("reflow").to(torch.bfloat16)
    one, other = (evaluated(model, dictionary).frames["layers"] for model in (reflow, half))
    np.testing.assert_allclose(one[["fvu", "l0", "loss"]], other[["fvu", "l0", "loss"]], rtol=0.1)


def test_bad_input_is_one_error(reflow: HookedModel) -> None:
    dictionary = dictionary_of(reflow)
    for documents in ([], [torch.tensor([1, 2])] * 4, ["a", "b"]):
        with pytest.raises(ReflowlensError, match="at least 2 documents of 3 tokens are needed"):
            evaluate_dictionary(reflow, dictionary, documents, TRAINING)
    with pytest.raises(ReflowlensError, match="documents must be a list"):
        evaluate_dictionary(reflow, dictionary, "one text", TRAINING)
    for document in (torch.ones(1, 9).long(), torch.rand(9), np.array(["a"])):
        with pytest.raises(ReflowlensError, match="one text or its token ids"):
            evaluate_dictionary(reflow, dictionary, [document, *HELD_OUT], TRAINING)
    with pytest.raises(ReflowlensError, match="no token 999"):
        evaluate_dictionary(reflow, dictionary, [torch.tensor([1, 999, 2]), *HELD_OUT], TRAINING)
    with pytest.raises(ReflowlensError, match="dictionaries are compared at the same hook points"):
        evaluated(reflow, dictionary, against={"sae": dictionary_of(reflow, "sae")})
    with pytest.raises(ReflowlensError, match="'pca' is already a row"):
        evaluated(reflow, dictionary, against={"pca": dictionary})
    broken = random_model("reflow")
    with torch.no_grad():
        broken.blocks[0].mlp.W_out.fill_(float("nan"))
    with pytest.raises(ReflowlensError, match=r"'blocks\.\d\..*' holds NaN or infinite values"):
        evaluated(broken, dictionary)


def test_ragged_documents_are_cut_to_the_context(reflow: HookedModel) -> None:
    long, short = torch.arange(40), torch.arange(5)
    rows = token_rows(reflow, [long, short, "some text"])
    assert [len(row) for row in rows] == [reflow.cfg.n_ctx, 5, 9]
    (batch,) = document_batches(rows, 3)
    assert int(batch.counted.sum()) == len(batch.document) == 23 + 4 + 8
    assert len(batch.targets) == int(batch.predicts.sum()) == 22 + 3 + 7
