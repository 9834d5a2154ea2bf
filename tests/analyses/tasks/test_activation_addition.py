"""Activation addition: as whole passes on each prompt alone have it, and a planted feeling that decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reflowlens as rl
from analyses.tasks.activation_addition import _other_labels, activation_addition
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.prompts import Prompts
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support.planted_tasks import feeling_model, feeling_texts
from tests.support.tiny import random_model

POSITIVE, NEGATIVE = ["good", "so nice", "yes!"], ["bad", "a sad thing"]
TEXTS = ("the king", "a kind of", "no", "on the road", "thin", "ok")
PROMPTS = Prompts.of([{"clean": text, "answer": "a", "wrong_answer": "b"} for text in TEXTS])
NEUTRAL = ["a house", "the river"]


@pytest.mark.parametrize("where", ["all", "last"])
@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied"])
@torch.no_grad()
def test_effects_and_cost_are_those_of_whole_passes_on_each_text_alone(name, where):
    model = random_model(name).eval()
    options = {"layers": [1], "strengths": [1.5], "draws": 20, "neutral": NEUTRAL, "progress": False}
    result = activation_addition(model, POSITIVE, NEGATIVE, PROMPTS, where=where, max_loss_rise=99, **options)
    means = [
        torch.stack([model.run_with_cache(text)[1]["resid_pre", 1][0, -1] for text in texts]).mean(0)
        for texts in (POSITIVE, NEGATIVE)
    ]
    position = None if where == "all" else "last"
    steer = rl.Steer("resid_pre", means[0] - means[1], 1.5, layer=1, position=position)
    a, b = map(model.to_single_token, "ab")
    for row, effect in result.frames["prompts"].set_index("prompt")["effect"].items():
        before, after = (logits[0, -1] for logits in (model(TEXTS[row]), rl.run(model, TEXTS[row], steer)))
        expected = float((after[a] - after[b]) - (before[a] - before[b]))
        assert effect == pytest.approx(expected, rel=1e-3, abs=1e-4)
    everywhere = rl.Steer("resid_pre", means[0] - means[1], 1.5, layer=1)
    rises = []
    for text in NEUTRAL:
        ids, log_p = model.to_tokens(text)[0], []
        for logits in (model(text), rl.run(model, text, everywhere)):
            log_p.append(logits[0, :-1, : model.tokenizer.n_vocab].log_softmax(-1).gather(1, ids[1:, None]).mean())
        rises.append(float(log_p[0] - log_p[1]))
    assert result.metrics["loss_rise"] == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-4)


def test_a_feeling_that_decides_is_found_before_the_layer_that_reads_it():
    result = activation_addition(feeling_model(), *feeling_texts(), layers=[0, 2], max_loss_rise=50, progress=False)
    assert result.verdicts["effect"] == "supported"
    assert result.metrics["effect"] > 3 * max(result.controls["effect"].values())
    assert result.metrics["loss_rise"] > 1  # neutral texts then all end in "y"
    assert "chosen on 24 prompts, judged on 24" in result.notes[0]
    careful = activation_addition(feeling_model(), *feeling_texts(), layers=[0], max_loss_rise=0.1, progress=False)
    assert "the cheapest is taken" in careful.notes[1]


def test_where_nothing_reads_the_feeling_nothing_is_steered():
    result = activation_addition(feeling_model(works=False), *feeling_texts(), layers=[0, 2], progress=False)
    assert result.verdicts["effect"] == "not supported"
    assert result.intervals["effect"] == pytest.approx((0, 0), abs=1e-4)


def test_levels_and_refined_streams_are_steered_too_and_bad_input_is_refused():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 48, "d_vocab": 256, "n_ctx": 32}
    bdh = build_model(
        ModelConfig(architecture="bdh", d_head=24, tie_word_embeddings=False, tokenizer_name="bytes", **sizes)
    )
    options = {"draws": 20, "neutral": NEUTRAL, "progress": False}
    assert activation_addition(bdh.eval(), POSITIVE, NEGATIVE, PROMPTS, **options).metrics["layer"] in (0, 1)
    own = TTTFlowConfig(ttt_heads=2, ttt_chunk=4, flow_width=6, value_layers=2, exclusive_layers=2, rotary_channels=4)
    refined = build_model(ModelConfig(architecture="ttt_flow", d_head=8, ttt_flow=own, tokenizer_name="bytes", **sizes))
    result = activation_addition(refined.eval(), POSITIVE, NEGATIVE, PROMPTS, layers=[1], strengths=[2], **options)
    row = result.frames["prompts"].iloc[0]
    with torch.no_grad():
        ends = [refined.run_with_cache(text)[1]["resid_pre", 1][0, -1] for text in (*POSITIVE, *NEGATIVE)]
        steer = rl.Steer("resid_pre", torch.stack(ends[:3]).mean(0) - torch.stack(ends[3:]).mean(0), 2.0, layer=1)
        before, after = (logits[0, -1] for logits in (refined(row["text"]), rl.run(refined, row["text"], steer)))
    a, b = map(refined.to_single_token, "ab")
    expected = float((after[a] - after[b]) - (before[a] - before[b]))
    assert row["effect"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    with pytest.raises(ReflowlensError, match="positive must be two texts"):
        activation_addition(bdh, ["good"], NEGATIVE, PROMPTS)
    with pytest.raises(ReflowlensError, match="layers must be from 0 to 2"):
        activation_addition(bdh, POSITIVE, NEGATIVE, PROMPTS, layers=[3])


@pytest.mark.parametrize(
    ("n_positive", "n_negative", "ways"), [(2, 2, 4), (2, 3, 9), (3, 3, 18), (3, 4, 34), (4, 4, 40)]
)
def test_each_other_labelling_counts_once(n_positive, n_negative, ways):
    labels = np.arange(n_positive + n_negative) < n_positive
    others = _other_labels(labels, 40, 0)
    assert len({each.tobytes() for each in others}) == len(others) == ways
    assert (others.sum(axis=1) == n_positive).all()
    assert not (others == labels).all(axis=1).any()
    assert not (others != labels).all(axis=1).any()


def test_few_texts_support_nothing():
    positive, negative, prompts = feeling_texts()
    options = {"layers": 2, "strengths": 1.0, "max_loss_rise": 50, "progress": False}
    few = activation_addition(feeling_model(), iter(positive[:3]), iter(negative[:3]), prompts, **options)
    assert few.verdicts["effect"] == "underpowered"
    assert (few.frames["draws"]["series"] == "shuffled_labels").sum() == 18
    assert "labelled in 18 other ways" in " ".join(few.notes)
    assert few.params["strengths"] == [1.0]
    assert few.params["layers"] == [2]
    for wrong in ([], "1", [1.0, None]):
        with pytest.raises(ReflowlensError, match="strengths must be a number"):
            activation_addition(feeling_model(), positive, negative, prompts, **options | {"strengths": wrong})
    with pytest.raises(ReflowlensError, match="positive must be two texts or more, got 5"):
        activation_addition(feeling_model(), 5, negative, prompts, **options)
