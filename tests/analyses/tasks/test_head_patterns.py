"""Heads made by hand are what they are made to be, and scores are those of TransformerLens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformer_lens.head_detector import (
    compute_head_attention_similarity_score,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

import reflowlens as rl
from analyses.tasks.attention_shares import KINDS, pattern_of
from analyses.tasks.head_patterns import head_patterns
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_bdh import random_bdh
from tests.reflowlens.models.test_ttt_flow import filled
from tests.support.planted import silent_blocks
from tests.support.tiny import random_model

TEXTS = ["the cat sat on the mat", "a dog and a cat", "who was it? who?", "the king of the land", "no no no", "abcabc"]
_V, _POS, _SHARP = 256, 32, 150.0
_EXPECTED = {"previous": (0, 0), "duplicate": (0, 1), "current": (0, 2), "induction": (1, 0), "first": (1, 1)}


def induction_model() -> HookedModel:
    """Two layers of heads that are made by hand, on tokens and positions that are unit vectors.

    Layer 0: the position before, whose token it writes; earlier copies of the token; the position itself. Layer 1: keys
    behind which head 0.0 wrote the query's token; the first position; all alike.
    """
    d_model, d_head = 2 * _V + _POS, _V + _POS
    sizes = {"n_layers": 2, "n_heads": 3, "d_mlp": 4, "n_ctx": _POS, "tokenizer_name": "bytes"}
    model = rl.build_model(ModelConfig(architecture="gpt2", d_model=d_model, d_head=d_head, d_vocab=_V, **sizes))
    silent_blocks(model)
    token, copied, place = slice(0, _V), slice(_V, 2 * _V), slice(2 * _V, d_model)
    own, at = slice(0, _V), slice(_V, d_head)  # of a head
    one, before = torch.eye(_V), torch.diag(torch.ones(_POS - 1), 1).T  # position p asks for p - 1
    with torch.no_grad():
        model.embed.W_E.zero_()
        model.embed.W_E[:, token] = one
        model.pos_embed.W_pos.zero_()
        model.pos_embed.W_pos[:, place] = torch.eye(_POS)
        for block in model.blocks:
            for weight in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                weight.zero_()
        first, second = (block.attn for block in model.blocks)
        first.W_Q[0, place, at], first.W_K[0, place, at] = _SHARP * before, torch.eye(_POS)
        first.W_V[0, token, own], first.W_O[0, own, copied] = one, one
        first.W_Q[1, token, own], first.W_K[1, token, own] = _SHARP * one, one
        first.W_Q[1, place, at], first.W_K[1, place, at] = -2 * _SHARP * torch.eye(_POS), torch.eye(_POS)  # not itself
        first.W_Q[2, place, at], first.W_K[2, place, at] = _SHARP * torch.eye(_POS), torch.eye(_POS)
        second.W_Q[0, token, own], second.W_K[0, copied, own] = _SHARP * one, one
        second.W_Q[1, place, at] = _SHARP
        second.W_K[1, place, at][0] = 1.0
    return model


def test_heads_made_by_hand_are_found():
    result = head_patterns(induction_model(), ["the cat sat on the cat", "ab ab ab", "it is what it is", "who is who"])
    heads = result.frames["heads"].set_index(["source", "kind", "layer", "head"]).sort_index()
    for kind, place in _EXPECTED.items():
        for source in ("random", "text"):
            of_kind = heads.loc[(source, kind)]
            assert of_kind["excess"].idxmax() == place, (source, kind)
            # position 0, with no token before, copies its own: queries of that token find it too
            assert of_kind.loc[place, "where_possible"] > (0.95 if source == "random" else 0.8), kind
        assert result.metrics[f"{kind}_random"] > 0.4
        assert result.verdicts[f"{kind}_random"] == "supported"
        assert f"(layer {place[0]}, head {place[1]})" in result.definitions[f"{kind}_random"]
    assert heads.loc[("random", "induction", 1, 0), "shuffled"] < 0.1
    idle = heads.loc[("random", slice(None), 1, 2)]
    np.testing.assert_allclose(idle["score"], idle["uniform"], rtol=1e-4)
    assert set(result.figures) == {f"{kind}_{source}" for kind in KINDS for source in ("random", "text")}


def test_groups_of_prompts_are_told_apart_and_each_is_in_both_halves():
    """Texts with and without repeated letters, in turns: the induction head has something to do in one group alone."""
    repeated, different = ["abcabc", "dedede", "fghfgh", "ijijij"], ["abcdef", "ghijkl", "mnopqr", "stuvwx"]
    rows = [
        {"clean": text, "group": name}
        for pair in zip(repeated, different, strict=True)
        for text, name in zip(pair, ("repeated", "different"), strict=True)
    ]
    result = head_patterns(induction_model(), rl.Prompts.of(rows))
    groups = result.frames["groups"].set_index(["group", "metric"])
    assert groups["prompts"].unstack()["induction_text"].to_dict() == {"all": 4, "repeated": 2, "different": 2}
    for kind in KINDS:
        assert groups.loc[("all", f"{kind}_text"), "value"] == pytest.approx(result.metrics[f"{kind}_text"])
    assert groups.loc[("repeated", "induction_text"), "value"] > 0.2
    assert abs(groups.loc[("different", "induction_text"), "value"]) < 0.05
    assert "groups" in result.figures


def test_a_head_of_a_fixed_offset_is_no_induction_head():
    """It attends length - 1 positions back: where an induction head does, and with shuffled tokens too."""
    model, n = induction_model(), 12
    with torch.no_grad():
        back = torch.zeros(_POS, _POS)
        back[torch.arange(n - 1, _POS), torch.arange(_POS - n + 1)] = _SHARP
        model.blocks[1].attn.W_Q[2, 2 * _V :, _V:], model.blocks[1].attn.W_K[2, 2 * _V :, _V:] = back, torch.eye(_POS)
    heads = head_patterns(model, length=n).frames["heads"].set_index(["kind", "layer", "head"]).sort_index()
    row = heads.loc[("induction", 1, 2)]
    assert row["where_possible"] > 0.95
    assert abs(row["excess"]) < 1e-3
    assert heads.loc[("induction", 1, 0), "excess"] > 0.4


@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied"])
def test_scores_are_those_of_transformer_lens(name):
    model = random_model(name)
    heads = head_patterns(model, TEXTS).frames["heads"].query("source == 'text'")
    detect = {
        "previous": get_previous_token_head_detection_pattern,
        "duplicate": get_duplicate_token_head_detection_pattern,
        "induction": get_induction_head_detection_pattern,
    }
    points = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    for kind, pattern in detect.items():
        expected = np.zeros((2, 4))
        for text in TEXTS:
            tokens = model.to_tokens(text)
            _, cache = model.run_with_cache(tokens, names_filter=points)
            assert torch.equal(pattern_of(kind, tokens)[0].float(), pattern(tokens).float())
            for layer, point in enumerate(points):
                for head in range(4):
                    expected[layer, head] += compute_head_attention_similarity_score(
                        cache[point][0, head],
                        pattern(tokens),
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure="mul",
                    )
        found = heads[heads["kind"] == kind].set_index(["layer", "head"])["score"].unstack().to_numpy()
        np.testing.assert_allclose(found, expected / len(TEXTS), rtol=1e-5, atol=1e-6)


def test_refined_models_have_patterns_too():
    result = head_patterns(filled(), sequences=12, length=5)
    assert np.isfinite(result.frames["heads"]["score"]).all()
    assert len(result.frames["heads"]) == len(KINDS) * filled().cfg.n_layers * filled().cfg.n_heads


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (random_bdh, {}, "the attention of a BDH is no distribution over keys"),
        (lambda: random_model("reflow"), {"texts": ["the cat"]}, "need four at least, got 1"),
        (lambda: random_model("reflow"), {"texts": "the cat"}, "need four at least, got 1"),
        (lambda: random_model("reflow"), {"sequences": 3}, "sequences must be an integer and at least 4"),
        (lambda: random_model("reflow"), {"length": 1}, "length must be an integer and at least 2"),
    ],
)
def test_what_has_no_pattern(model, options, message):
    with pytest.raises(ReflowlensError, match=message):
        head_patterns(model(), **options)


def test_the_length_that_is_read_is_recorded():
    model = random_model("reflow")
    result = head_patterns(model, sequences=4, length=1000, progress=False)
    assert result.params["length"] == (model.cfg.n_ctx - len(model.text_start())) // 2
