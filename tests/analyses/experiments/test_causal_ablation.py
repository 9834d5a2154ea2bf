from __future__ import annotations

import pandas as pd
import pytest
import torch

from analyses.controls.nulls import untrained_model, untrained_view
from analyses.experiments.causal_ablation.experiment import causal_ablation
from analyses.words.lexicon import FactualPrompt, Lexicon
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.signals import signal_view
from tests.planted_results import ABLATION, missed
from tests.support.planted import CONFIG, LEXICON, empty_model, one_signal_model
from tests.support.tiny import assert_close


@pytest.fixture(scope="module")
def planted():
    return ABLATION.run()


@pytest.fixture(scope="module")
def empty():
    return causal_ablation(empty_model(), lexicon=LEXICON, rotations=6)


def test_the_planted_signal_is_found(planted):
    assert not missed(planted, ABLATION.expected)
    assert planted.params["target"] == " Paris"


def test_the_planted_signal_beats_every_control(planted):
    controls = planted.controls["remaining_after_one"]
    assert controls["random_signal"] > 0.9
    assert controls["matched_signal"] > 0.5
    assert controls["rotated_basis"] > 0.1
    one = planted.controls["probability_after_one"]
    assert one["random_signal"] > one["rotated_basis"] > 100 * planted.metrics["probability_after_one"]


def test_every_metric_of_single_signals_has_its_floor_and_its_ceiling(planted):
    """Both are the same measurement, through views of the same predictions."""
    prompts = planted.frames["prompts"]
    for metric in ("remaining_after_one", "knockout_area", "sufficient_share"):
        for basis, control in ((r"rotated_\d+", "rotated_basis"), ("varimax", "varimax")):
            values = prompts.loc[prompts["basis"].str.fullmatch(basis), metric]
            assert planted.controls[metric][control] == pytest.approx(values.mean())
    assert {"rotated_basis", "varimax"} <= planted.controls["probability_after_one"].keys()


def test_nothing_is_found_where_nothing_is(empty):
    assert set(empty.verdicts.values()) == {"not supported"}
    for metric in ("remaining_after_one", "knockout_area", "sufficient_share"):
        low, high = empty.intervals[metric]
        width = high - low
        assert low - width <= empty.controls[metric]["rotated_basis"] <= high + width


def test_contributions_sum_to_the_logit_and_effects_agree_with_the_model(planted):
    model = one_signal_model()
    signals = planted.frames["signals"]
    logits = model(planted.params["prompt"])[0, -1]
    target = model.to_single_token(" Paris")
    assert signals["contribution"].sum() == pytest.approx(float(logits[target].detach()), rel=1e-4)
    p = logits[: model.tokenizer.n_vocab].softmax(-1)[target].item()
    assert signals["probability_before"].iloc[0] == pytest.approx(p, rel=1e-4)
    assert signals["contribution"].is_monotonic_decreasing
    assert signals.loc[0, "codebook"].startswith("' Paris'")


def test_removing_the_signal_anywhere_from_the_embedding_on_removes_the_prediction(planted):
    sites = planted.frames["sites"]
    wired = sites[sites["signal"] == 0].set_index("site")["left"]
    assert set(wired.index) == {"embed", "everywhere", "readout", *(f"resid {layer}" for layer in range(5))}
    assert (wired < 0.01).all()
    assert sites.loc[sites["group"] == "random", "left"].min() > 0.5


def test_curves_begin_at_one_and_the_random_order_is_slower(planted):
    curves = planted.frames["curves"].set_index(["order", "removed"])["left"]
    assert curves["contribution", 0] == pytest.approx(1, rel=1e-5)
    assert curves["keep", 32] == pytest.approx(1, rel=1e-5)
    assert curves["contribution", 1] < 0.001
    assert curves["random", 1] > 0.5


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_architecture_runs(architecture):
    fields = CONFIG.to_dict() | {"architecture": architecture, "act_fn": "", "gated_mlp": None, "eps": 0.0}
    fields |= {"normalization_type": "", "positional_embedding_type": "", "rotary_adjacent_pairs": None, "n_layers": 1}
    if not architecture.startswith("reflow"):
        fields["n_signals"] = None
    if architecture == "reflow_topk":
        fields["topk"] = 4
    if architecture == "reflow_lite":
        fields["n_key_value_heads"] = 1
    model = build_model(ModelConfig.from_dict(fields))
    result = causal_ablation(model, lexicon=LEXICON, rotations=2, quick=True)
    assert result.params["view"] == ("native" if architecture.startswith("reflow") else "identity")
    assert 0 < result.metrics["remaining_after_one"] <= 1


def test_an_unembedding_of_its_own_is_not_removed_from_the_input():
    fields = CONFIG.to_dict() | {"architecture": "llama", "n_signals": None, "tie_word_embeddings": False}
    fields["n_layers"] = 1
    result = causal_ablation(build_model(ModelConfig.from_dict(fields)), lexicon=LEXICON, rotations=2, quick=True)
    assert set(result.frames["sites"]["site"]) == {"readout", "resid 0", "resid 1"}
    assert not {"after_embed", "after_everywhere"} & set(result.frames["signals"])


def test_the_same_seed_gives_the_same_frames_and_leaves_the_weights():
    model = one_signal_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (causal_ablation(model, lexicon=LEXICON, rotations=2, quick=True, seed=2) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_document_end_can_be_the_target():
    model = one_signal_model()
    with torch.no_grad():
        model.embed.W_recipe[model.tokenizer.eot_token, 0] = 6.0
    result = causal_ablation(model, lexicon=LEXICON, rotations=2, quick=True)
    assert result.params["target"] == "<|endoftext|>"
    assert result.metrics["probability_before"] > 0.5


@pytest.mark.parametrize("name", ["native", "identity", "svd"])
def test_the_untrained_model_is_seen_through_a_view_of_the_same_kind(name):
    view = signal_view(one_signal_model(), name)
    twin = untrained_view(view, seed=3)
    assert twin.name == name
    assert_close(twin.recipe @ twin.basis, untrained_model(view.model, seed=3).W_U.T)


def test_a_prompt_that_is_too_long_is_an_error():
    with pytest.raises(ReflowlensError, match="too long"):
        causal_ablation(one_signal_model(), "king " * 50, lexicon=LEXICON)


def test_a_lexicon_without_reference_text_is_an_error():
    lexicon = Lexicon(version="x", factual=(FactualPrompt("The king", " queen"), FactualPrompt("The city", " is")))
    with pytest.raises(ReflowlensError, match="neutral_texts"):
        causal_ablation(one_signal_model(), lexicon=lexicon)
