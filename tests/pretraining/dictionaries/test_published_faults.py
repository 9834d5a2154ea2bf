"""What the published TinyTranscoder gets wrong about its transcoders, each as a fact that holds here.

Its training with dropout on, its padding that enters the loss and its output that is inserted normalised are tested
where runs are (`test_train`, `test_harvest`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from pretraining.dictionaries.config import DictionarySpec
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model, random_tokens


@pytest.fixture
def model() -> HookedModel:
    """The published architecture: learned positions, LayerNorm, ReLU, a readout of its own with a bias."""
    return random_model("gpt2_own_readout")


def transcoder(model: HookedModel) -> Dictionary:
    return Dictionary.fresh(DictionarySpec("plt", n_features=40, k=5).of(model), seed=1)


def spliced_features(model: HookedModel, dictionary: Dictionary, tokens: Tensor) -> list[Tensor]:
    with dictionary.spliced(model):
        cache = model.run_with_cache(tokens)[1]
        return [cache["features", layer] for layer in range(model.cfg.n_layers)]


def test_features_are_the_k_largest_of_what_the_mlp_reads(model: HookedModel) -> None:
    """Published: pre-activations before TopK, of an input that is normalised otherwise, and of the attention's norm."""
    dictionary, tokens = transcoder(model), random_tokens(model)
    cache = model.run_with_cache(tokens)[1]
    for layer, features in enumerate(spliced_features(model, dictionary, tokens)):
        read = cache[f"blocks.{layer}.ln2.hook_normalized"]
        before = read @ dictionary.each_layer()[layer].W_enc.T
        kept = before >= before.topk(5, dim=-1).values[..., -1:]
        torch.testing.assert_close(features, before.relu() * kept, rtol=1e-5, atol=1e-6)
        other = cache[f"blocks.{layer}.ln1.hook_normalized"] @ dictionary.each_layer()[layer].W_enc.T
        assert not torch.allclose(features[features > 0], other[features > 0], atol=1e-3)


def test_what_is_written_is_in_the_scale_of_the_mlps_output(model: HookedModel) -> None:
    """Published: a feature forced to a value adds a direction that predicts the normalised output."""
    dictionary, tokens = transcoder(model), random_tokens(model)
    direction = dictionary.each_layer()[1].W_dec[3, 0].detach()
    plain = model.run_with_cache(tokens)[1]["mlp_out", 1]
    with (
        dictionary.spliced(model),
        rl.intervene(model, rl.Steer("features", torch.ones(1), 2.0, layer=1, index=3)),
    ):
        steered = model.run_with_cache(tokens)[1]["mlp_out", 1]
    torch.testing.assert_close(steered - plain, (2.0 * direction).expand_as(plain), rtol=1e-4, atol=1e-5)


def test_forced_values_are_told_in_units_of_what_is_observed(model: HookedModel) -> None:
    """Published: values of 100 and 200, whatever a feature reaches in text."""
    dictionary, tokens = transcoder(model), random_tokens(model)
    features = spliced_features(model, dictionary, tokens)[1].flatten(0, 1)
    strongest = int(features.amax(0).argmax())
    highest = float(features[:, strongest].quantile(0.99))
    with dictionary.spliced(model):
        changes = []
        for share in (0.5, 1.0, 2.0):
            replaced = rl.Replace("features", torch.full((1,), share * highest), layer=1, index=strongest)
            changes.append((rl.run(model, tokens, replaced) - model(tokens)).norm().item())
    assert 0 < changes[0] < changes[1] < changes[2]
