"""Composition scores: those of dense matrices, their baseline, and a planted pair of heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.tasks.composition import Circuits, composition_scores, random_overlaps, spectrum
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.support.families import ours
from tests.support.tiny import CONFIGS, random_model, tiny_config


def scores_of(result, mode):
    frame = result.frames["pairs"].query("mode == @mode")
    return frame.set_index(["layer", "head", "later_layer", "later_head"])["score"]


@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied", "gemma2", "olmo2"])
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_scores_are_those_of_dense_matrices_with_the_norm_folded_in_and_keys_of_their_own_group(name, mode):
    model = random_model(tiny_config(name, n_layers=3)) if name in CONFIGS else ours(name)
    found = scores_of(composition_scores(model, mode, draws=50, progress=False), mode)
    cfg = model.cfg

    def circuits(layer, head):
        block, shared = model.blocks[layer], head // (cfg.n_heads // cfg.kv_heads)
        read = torch.diag(block.ln1.w)
        if block.ln1.centered:
            read = (torch.eye(cfg.d_model) - 1 / cfg.d_model) @ read
        attn = block.attn
        qk = read @ attn.W_Q[head] @ (read @ attn.W_K[shared]).T
        write = attn.W_O[head] if block.ln1_post is None else attn.W_O[head] * block.ln1_post.w
        return {"Q": qk, "K": qk.T, "V": read @ attn.W_V[shared] @ write}

    assert len(found) == 3 * cfg.n_heads**2
    with torch.no_grad():
        for (layer, head, later_layer, later_head), score in found.items():
            left, right = circuits(layer, head)["V"], circuits(later_layer, later_head)[mode]
            assert score == pytest.approx(float((left @ right).norm() / left.norm() / right.norm()), rel=1e-4)


def test_without_the_norms_they_are_the_models_own():
    model = random_model("reflow_lite")
    result = composition_scores(model, "K", fold_norms=False, draws=50, progress=False)
    expected = model.all_composition_scores("K")
    for place, score in scores_of(result, "K").items():
        assert score == pytest.approx(float(expected[place].detach()), rel=1e-4)


def test_the_baseline_is_that_of_matrices_drawn_whole():
    """Orthogonal directions of both matrices drawn anew, their product formed in full."""
    circuits = Circuits.of(random_model("gpt2"), True)
    generator = torch.Generator().manual_seed(0)
    left, right = spectrum(circuits.ov)[0, 1], spectrum(circuits.qk)[1, 2]
    dense = torch.linalg.svdvals(circuits.qk.AB[1, 2])[: len(right)].square()
    torch.testing.assert_close(right.sort(descending=True).values, dense / dense.sum(), rtol=1e-3, atol=1e-6)
    rotations = torch.linalg.qr(torch.randn(2, 4000, 32, 8, generator=generator)).Q
    products = left.sqrt()[:, None] * (rotations[0].mT @ rotations[1]) * right.sqrt()
    expected = products.norm(dim=(1, 2))
    squares = torch.einsum("i,mij,j->m", left, random_overlaps(32, 8, 4000, generator), right)
    assert squares.mean() == pytest.approx(1 / 32, rel=0.02)
    np.testing.assert_allclose(squares.sqrt().quantile(0.975), expected.quantile(0.975), rtol=0.03)
    np.testing.assert_allclose(squares.sqrt().quantile(0.025), expected.quantile(0.025), rtol=0.03)


def test_a_planted_pair_composes_by_keys_and_no_other():
    model = random_model(tiny_config("llama_untied", n_layers=3))
    with torch.no_grad():
        model.blocks[2].attn.W_K[1] = model.blocks[0].attn.W_O[3].T / model.blocks[2].ln1.w[:, None]
    result = composition_scores(model, draws=400, progress=False)
    strongest = result.frames["pairs"].nlargest(2, "z")
    # two query heads read through the key head that reads what L0H3 writes
    assert strongest[["mode", "layer", "head", "later_layer"]].to_numpy().tolist() == [["K", 0, 3, 2]] * 2
    assert set(strongest["later_head"]) == {2, 3}
    assert result.metrics["significant_k"] == 2
    others = result.frames["pairs"].drop(index=strongest.index)["p"]
    assert strongest["p"].max() < 1e-9 < 1e-3 < others.min()


def test_random_weights_do_not_compose():
    """288 pairs of 6 models: at one in twenty for a mode of a model, four of its 18 are hardly ever reached."""
    found = [composition_scores(random_model(tiny_config("gpt2", n_layers=4), seed), draws=400) for seed in range(6)]
    assert sum(result.metrics[f"significant_{mode}"] > 0 for result in found for mode in "qkv") < 4
    assert np.mean([result.metrics[f"beyond_{mode}"] for result in found for mode in "qkv"]) < 0.04


def test_what_cannot_compose_is_refused():
    with pytest.raises(ReflowlensError, match="'Q', 'K' or 'V'"):
        composition_scores(random_model("gpt2"), "O")
    with pytest.raises(ReflowlensError, match="across layers"):
        composition_scores(random_model(tiny_config("gpt2", n_layers=1)))
    sizes = {name: getattr(CONFIGS["gpt2"], name) for name in ("n_layers", "d_model", "n_heads", "d_head", "d_vocab")}
    cfg = ModelConfig(architecture="bdh", tie_word_embeddings=False, tokenizer_name="bytes", d_mlp=32, n_ctx=8, **sizes)
    with pytest.raises(ReflowlensError, match="is not made of these"):
        composition_scores(build_model(cfg))
