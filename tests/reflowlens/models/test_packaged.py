"""The packaged models are what their manifests say, and have learned something."""

from __future__ import annotations

import pytest
import torch

import reflowlens as rl
from analyses import load_lexicon
from reflowlens.checkpoints import ASSETS, WEIGHTS, read_manifest, weights_in
from reflowlens.config import ModelConfig
from reflowlens.storage.opening import file_hash


@pytest.mark.parametrize("name", rl.list_models())
def test_the_manifest_describes_the_weights(name):
    manifest, weights = read_manifest(name), weights_in(ASSETS / name)
    assert weights is not None
    if weights.name == WEIGHTS:  # a packed file has its own
        assert file_hash(weights) == manifest["weights_sha256"]
    assert ModelConfig.from_dict(manifest["config"]) == rl.load_model(name).cfg
    training = manifest["training"]
    assert manifest["tokens_seen"] == manifest["step"] * training["run"]["batch_size"] * training["data"]["context"]
    assert (ASSETS / name / "README.md").read_text(encoding="utf8").startswith(f"# {name}")


def test_reflow_nano_predicts_plain_prose_far_better_than_chance():
    model = rl.load_model("reflow-nano")
    with torch.no_grad():
        losses = [float(model(text, "loss")) for text in load_lexicon().neutral_texts]
    assert max(losses) < 6.0  # the logarithm of its 16,641 tokens is 9.7
    assert sum(losses) / len(losses) < 4.6


def test_reflow_nano_is_the_documented_size():
    model = rl.load_model("reflow-nano")
    assert model.n_parameters == 9_178_368
    assert next(model.parameters()).dtype == torch.float32


def test_greedy_text_is_english():
    text = rl.load_model("reflow-nano").generate("The king of France was", 12, temperature=0)
    assert text.startswith("The king of France was")
    assert {" the", " a", " of", " in", " to", ","} & set(rl.load_model("reflow-nano").to_str_tokens(text)[5:])


@pytest.mark.parametrize("name", ["bdh-nano", "relu-nano"])
def test_the_models_of_bytes_have_read_plays(name):
    """A line costs less than half of what a byte of unknown text would, read backwards much more."""
    model, line = rl.load_model(name), "KING HENRY:\nMy lord, I will not see the king to-night.\n"
    with torch.no_grad():
        loss, scrambled = (float(model(text, "loss")) for text in (line, line[::-1]))
    assert loss < 2.6 < 4.0 < scrambled  # log 256 is 5.5


def test_bdh_nano_and_its_control_are_as_large():
    bdh, relu = (rl.load_model(name) for name in ("bdh-nano", "relu-nano"))
    assert bdh.n_parameters == 2_039_808
    assert abs(relu.n_parameters / bdh.n_parameters - 1) < 1e-3


def test_ttt_flow_nano_is_one_small_file_whose_inner_learner_and_flow_help():
    """On a text of no corpus, with a stretch that comes twice: each refiner's gate closed costs loss."""
    assert weights_in(ASSETS / "ttt-flow-nano").stat().st_size < 1_640_000
    model = rl.load_model("ttt-flow-nano")
    assert model.n_parameters == 1_923_428
    text = "The river is wide here, and the old town lies on its left bank. In winter the ferry does not run. " * 3
    with torch.no_grad():
        loss = float(model(text, "loss"))
        assert loss < 3.5  # the logarithm of its 1,024 tokens is 6.9
        for gate in (model.ttt.gate, model.flow.gate):
            kept = gate.clone()
            gate.fill_(-100.0)
            assert float(model(text, "loss")) > loss
            gate.copy_(kept)
