"""Experiments 1, 2, 4, 8 and 9 in a dictionary's features, on a model whose features are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from analyses.experiments.causal_ablation.experiment import causal_ablation
from analyses.experiments.recipe_atlas.experiment import recipe_atlas
from analyses.experiments.semantic_algebra.experiment import semantic_algebra
from analyses.experiments.semantic_galaxy.experiment import semantic_galaxy
from analyses.experiments.signal_flow.experiment import signal_flow
from analyses.experiments.sparsity_profile.experiment import sparsity_profile
from analyses.registry import EXPERIMENTS
from analyses.runner.comparison import compare_models
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import save_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import random_rotation, signal_view
from tests.support.planted import LEXICON, one_signal_model

POINT = "blocks.3.hook_resid_post"
FEW = dataclasses.replace(LEXICON, factual=LEXICON.factual[::4])  # what is planted shows in every prompt


def dictionary_along(axes: torch.Tensor, kept: int = 32) -> Dictionary:
    """Features that are active where the stream goes along an axis, or against it; the first ``kept`` axes alone."""
    both = torch.cat([axes[:kept], -axes[:kept]])
    cfg = DictionaryConfig((POINT,), (POINT,), 32, 32, len(both), "relu", name="planted")
    dictionary = Dictionary(cfg).requires_grad_(False)
    (layer,) = dictionary.each_layer()
    layer.W_enc.copy_(both)
    layer.W_dec.copy_(both[:, None])
    layer.b_enc.zero_()
    layer.b_dec.zero_()
    return dictionary


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return one_signal_model()


@pytest.fixture(scope="module")
def ablated(model):
    return causal_ablation(model, lexicon=FEW, view=signal_view(model, dictionary_along(torch.eye(32))), rotations=4)


def test_the_planted_feature_is_found_as_the_signal_is(model, ablated):
    """Feature 0 is signal 0, which carries every prediction; its error is nothing."""
    native = causal_ablation(model, lexicon=FEW, rotations=4)
    assert set(ablated.frames["prompts"].query("basis == 'native'")["worst_signal"]) == {0}
    for metric in ("remaining_after_one", "probability_before"):
        assert ablated.metrics[metric] == pytest.approx(native.metrics[metric], rel=1e-3)
    assert ablated.metrics["error_share"] == pytest.approx(0, abs=1e-4)
    assert ablated.controls["remaining_after_one"]["rotated_basis"] > 10 * ablated.metrics["remaining_after_one"]
    left = ablated.frames["sites"].query("group == 'most damaging'").groupby("site")["left"].min()
    assert left["resid 4"] < 0.05


def test_a_rotated_dictionary_finds_no_such_feature(model, ablated):
    view = signal_view(model, dictionary_along(random_rotation(32, 5)))
    found = causal_ablation(model, lexicon=FEW, view=view, rotations=4)
    assert found.metrics["remaining_after_one"] > 10 * ablated.metrics["remaining_after_one"]


def test_what_a_dictionary_lacks_is_its_error_and_stays(model):
    """Without the feature that predicts, the logit is in the error, which no removal takes."""
    axes = torch.eye(32).roll(-1, dims=0)  # signal 0 is the last
    found = causal_ablation(model, lexicon=FEW, view=signal_view(model, dictionary_along(axes, 31)), rotations=4)
    assert found.metrics["error_share"] > 0.9
    assert found.metrics["remaining_after_one"] > 0.5


def test_signal_flow_loses_nothing(model):
    view = signal_view(model, dictionary_along(torch.eye(32), kept=24))
    result = signal_flow(model, lexicon=FEW, view=view, rotations=2)
    assert result.metrics["sum_error"] < 1e-5
    assert result.metrics["split_error"] < 1e-5
    assert result.controls["sum_error"]["rotated_basis"] < 1e-5
    assert 0 < abs(result.metrics["error_share"]) < 0.5
    assert result.frames["tracks"]["signal"].max() < view.n_signals


def test_recipes_are_as_sparse_as_they_were_made(model):
    sparse = dataclasses.replace(dictionary_along(torch.eye(32)).cfg, activation="topk", k=2)
    dictionary = Dictionary(sparse).requires_grad_(False)
    dictionary.load_state_dict(dictionary_along(torch.eye(32)).state_dict())
    result = sparsity_profile(model, "absolute", 1e-6, lexicon=FEW, view=signal_view(model, dictionary), rotations=2)
    assert result.metrics["active_signals"] == pytest.approx(2, abs=0.01)
    assert result.controls["active_signals"]["rotated_basis"] > 60
    assert 0 < result.metrics["error_share"] < 1


@pytest.mark.parametrize("experiment", [recipe_atlas, semantic_galaxy])
def test_words_are_compared_in_features_and_in_what_these_are_of(experiment, model):
    view = signal_view(model, dictionary_along(torch.eye(32)))
    result = experiment(model, view=view, quick=True)
    assert result.metrics["error_share"] == pytest.approx(0, abs=1e-6)
    assert result.params["view"] == "planted"


def test_what_cannot_run_refuses_by_name(model):
    view = signal_view(model, dictionary_along(torch.eye(32)))
    with pytest.raises(
        ReflowlensError, match="semantic_algebra takes views whose signals make up the embedding exactly"
    ):
        semantic_algebra(model, view=view)
    taking = [e for e in EXPERIMENTS.values() if e.number in (3, 5, 6, 7, 10, 11, 12)]
    for experiment in taking:
        with pytest.raises(ReflowlensError, match=f"^{experiment.name} takes views"):
            experiment.load()(model, view=view)


def test_a_comparison_takes_a_dictionarys_folder_as_a_view(model, tmp_path):
    folder = str(save_dictionary(tmp_path / "planted", dictionary_along(torch.eye(32))))
    table = compare_models({"ours": model}, ["native", folder], [4], quick=True)
    assert set(table["view"]) == {"native", folder}
    assert set(table["error"]) == {""}
    assert "error_share" in set(table.loc[table["view"] == folder, "metric"])
