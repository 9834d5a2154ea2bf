"""Weights under TransformerLens's names: against its own bridge to the transformers model with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM

from reflowlens.conversion.hf import export_hf
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import NAMES, assert_close, random_model

WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")


def bridged(model: HookedModel, folder: Path) -> Any:
    hf = AutoModelForCausalLM.from_pretrained(export_hf(model, folder))
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def per_query_head(weight: Tensor, model: HookedModel) -> Tensor:
    """The bridge keeps one a key/value head in W_K and W_V, though not in QK and OV."""
    return torch.stack(
        [weight[:, h * model.cfg.kv_heads // model.cfg.n_heads] for h in range(model.cfg.n_heads)], dim=1
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2_own_readout"])  # no class of transformers'
@torch.no_grad()
def test_they_are_those_of_transformer_lens(name: str, tmp_path: Path) -> None:
    model: Any = random_model(name)
    bridge = bridged(model, tmp_path / "hf")
    turned = model.cfg.rotary_adjacent_pairs  # the export orders channels of queries and keys as Llama does
    for weight in WEIGHTS:
        ours, theirs = getattr(model, weight), getattr(bridge, weight)
        if theirs is None:
            assert ours is None
        elif not (turned and weight in ("W_Q", "W_K")):
            assert_close(ours, per_query_head(theirs, model) if weight in ("W_K", "W_V") else theirs, what=weight)
    for circuit in ("QK", "OV"):
        ours, theirs = getattr(model, circuit), getattr(bridge, circuit)
        assert isinstance(ours, FactoredMatrix)
        assert ours.shape == (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.d_model)
        assert_close(ours.AB, theirs.AB, what=circuit)
    assert (
        model.all_head_labels
        == bridge.all_head_labels
        == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0", "L1H1", "L1H2", "L1H3"]
    )
    for mode in "QKV":
        assert_close(model.all_composition_scores(mode), bridge.all_composition_scores(mode).scores, what=mode)
    for bias in BIASES:
        present = any(parameter.endswith(bias) for parameter, _ in model.named_parameters())
        assert getattr(model, bias).any() == present


@torch.no_grad()
def test_biases_and_positions_of_gpt2(tmp_path: Path) -> None:
    model: Any = random_model("gpt2_biased")
    bridge = bridged(model, tmp_path / "hf")
    for name in BIASES:
        theirs = getattr(bridge, name)
        assert_close(getattr(model, name), theirs.reshape(getattr(model, name).shape), what=name)
    assert_close(model.W_pos, bridge.W_pos)
    assert_close(model.W_E_pos, torch.cat([bridge.W_E, bridge.W_pos]))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_head_s_part_of_a_pass_follows_from_them(name: str) -> None:
    """Scores between equal positions, which no rotation tells apart, and what each head writes."""
    model: Any = random_model(name)
    layer, d_head = 1, model.cfg.d_head
    cache = model.run_with_cache("abcd", names_filter=lambda point: "attn" in point or "ln1" in point)[1]
    block = model.blocks[layer]
    x = cache["normalized", layer, "ln1"][0] * block.ln1.w + (0 if block.ln1.b is None else block.ln1.b)
    q = torch.einsum("pd,hde->phe", x, model.W_Q[layer]) + model.b_Q[layer]
    k = torch.einsum("pd,hde->phe", x, model.W_K[layer]) + model.b_K[layer]
    scores = (q * k).sum(dim=-1).T / d_head**0.5
    assert_close(scores, cache["attn_scores", layer][0].diagonal(dim1=-2, dim2=-1))
    attended = cache["pattern", layer][0] @ x
    written = torch.einsum("hpd,hde->phe", attended, model.OV[layer].AB)
    written = written.sum(dim=1) + torch.einsum("he,hed->d", model.b_V[layer], model.W_O[layer]) + model.b_O[layer]
    assert_close(written, cache["attn_out", layer][0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_code_that_reads_a_head_from_token_to_token(name: str) -> None:
    """As ARENA's exercises do: the full OV circuit, how much of it copies, and the full QK circuit."""
    model: Any = random_model(name).double()
    W_E = model.W_E.AB if isinstance(model.W_E, FactoredMatrix) else model.W_E
    assert (W_E.shape[0], model.W_U.shape[1]) == (model.cfg.d_vocab, model.cfg.d_vocab_out)
    product = W_E @ model.W_V[1, 2] @ model.W_O[1, 2] @ model.W_U
    full = model.W_E @ model.OV[1, 2] @ model.W_U
    assert_close(full.AB, product)
    assert_close(full[7].AB.squeeze(), product[7])
    assert_close(full.eigenvalues.sum().real, product.trace())
    assert_close((W_E @ model.QK[0, 1] @ W_E.T).AB, W_E @ model.W_Q[0, 1] @ model.W_K[0, 1].T @ W_E.T)
    copying = model.OV.eigenvalues.sum(dim=-1).real
    assert_close(copying, model.OV.AB.diagonal(dim1=-2, dim2=-1).sum(dim=-1))


def test_gradients_reach_the_parameters() -> None:
    model: Any = random_model("reflow_lite")
    model.QK.AB.square().sum().backward()
    assert all(block.attn.W_K.grad.any() for block in model.blocks)
    model.half()
    assert model.b_Q.dtype == model.W_Q.dtype == torch.float16


def test_what_is_not_there_is_said() -> None:
    model: Any = random_model("reflow")
    assert not hasattr(model, "W_pos")
    with pytest.raises(ReflowlensError, match="mode must be 'Q', 'K' or 'V', got 'q'"):
        model.all_composition_scores("q")
