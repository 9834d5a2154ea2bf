"""Logits and gradients against implementations that share no code with the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.models.base import HookedModel
from tests.reference import hugging_face, tiny_transcoder
from tests.reference import reflow as reference
from tests.support.tiny import CONFIGS, FACTORED, assert_close, random_model, random_tokens, tiny_config


def gradients(model: HookedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Of the mean of all next-token losses, through the model's own loss."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(tokens, return_type="loss"), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def weights_of(model: HookedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def compare(model: HookedModel, hf: Any, layout: hugging_face.Layout) -> None:
    weights, tokens = weights_of(model), random_tokens(model.cfg, batch=3, pos=model.cfg.n_ctx)
    hugging_face.load(hf, layout, weights)
    theirs = hf(tokens).logits
    assert_close(model(tokens), theirs, what="logits")
    loss = F.cross_entropy(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, return_type="loss"), loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    ours = gradients(model, tokens)
    parameters = dict(hf.named_parameters())
    for name, arrange in layout.items():
        if arrange is not hugging_face.merged_embedding or "embed.W_E" in ours:
            assert_close(arrange(ours), parameters[name].grad, what=name)
    if "embed.W_recipe" in ours:  # E = R B: dR = dE Bᵀ and dB = Rᵀ dE
        dE = parameters["model.embed_tokens.weight"].grad
        assert_close(ours["embed.W_recipe"], dE @ weights["embed.W_basis"].T, what="recipe")
        assert_close(ours["embed.W_basis"], weights["embed.W_recipe"].T @ dE, what="basis")


def test_gpt2_is_transformers_gpt2() -> None:
    model = random_model("gpt2")
    compare(model, *hugging_face.gpt2(model.cfg))


@pytest.mark.parametrize("name", ["gpt2_new", "reflow", "reflow_wide", "reflow_lite"])
def test_rotary_models_are_transformers_llama(name: str) -> None:
    model = random_model(name)
    compare(model, *hugging_face.llama(model.cfg))


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    d_head=st.sampled_from([2, 4, 6]),
    width_per_head=st.integers(1, 5),
    n_layers=st.integers(1, 3),
    n_signals=st.integers(1, 16),
    adjacent=st.booleans(),
)
def test_llama_agrees_for_any_shape(
    heads: tuple[int, int], d_head: int, width_per_head: int, n_layers: int, n_signals: int, adjacent: bool
) -> None:
    """The width of a head need not be d_model / n_heads, nor S have anything to do with d_model."""
    cfg = ModelConfig(
        architecture="reflow_lite",
        n_layers=n_layers,
        d_model=heads[0] * width_per_head,  # what transformers asks for
        n_heads=heads[0],
        n_key_value_heads=heads[1],
        d_head=d_head,
        d_mlp=7,
        d_vocab=256,
        n_ctx=6,
        n_signals=n_signals,
        rotary_adjacent_pairs=adjacent,
        tokenizer_name="bytes",
    )
    model = random_model(cfg)
    hf, layout = hugging_face.llama(cfg)
    hugging_face.load(hf, layout, weights_of(model))
    tokens = random_tokens(cfg, pos=6)
    assert_close(model(tokens), hf(tokens).logits.detach(), 2e-5)


PRUNED = [
    tiny_config("reflow_topk", topk_ends=ends, topk_gradient=gradient)
    for ends in ("both", "input", "output")
    for gradient in ("kept", "straight_through")
]


@pytest.mark.parametrize("cfg", [*(CONFIGS[name] for name in FACTORED), *PRUNED])
def test_reflow_is_its_description(cfg: ModelConfig) -> None:
    """The plain forward of tests/reference, top-k included."""
    model = random_model(cfg, seed=3)
    cfg, tokens = model.cfg, random_tokens(model.cfg, batch=2, pos=9)
    weights = {name: w.clone().requires_grad_() for name, w in weights_of(model).items()}
    pruning: dict[str, Any] = {name: getattr(cfg, name) for name in ("topk", "topk_ends", "topk_gradient")}
    expected = torch.stack(
        [reference.forward(weights, row, n_layers=cfg.n_layers, base=cfg.rotary_base, **pruning) for row in tokens]
    )
    assert_close(model(tokens), expected.detach(), what="logits")
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for parameter, gradient in gradients(model, tokens).items():
        assert_close(gradient, weights[parameter].grad, what=parameter)


@pytest.mark.parametrize(("d_model", "n_heads"), [(31, 4), (26, 3)])
def test_the_gpt_that_tiny_transcoder_explains(d_model: int, n_heads: int) -> None:
    """With heads that do not make up d_model: logits, loss, every gradient, and the same from a cache."""
    sizes = {"d_model": d_model, "n_heads": n_heads, "d_head": d_model // n_heads}
    model = random_model(tiny_config("gpt2_own_readout", dropout=0.1, **sizes), seed=4)
    cfg, tokens = model.cfg, random_tokens(model.cfg, batch=3, pos=model.cfg.n_ctx)
    weights = {name: w.clone().requires_grad_() for name, w in weights_of(model).items()}
    gpt = tiny_transcoder.GPT(cfg.n_layers, d_model, n_heads, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx)
    names = tiny_transcoder.in_their_names(weights)
    assert names.keys() == dict(gpt.named_parameters()).keys()
    expected = torch.func.functional_call(gpt, names, (tokens,))
    assert_close(model(tokens).detach(), expected.detach(), what="logits")
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(model(tokens, return_type="loss"), loss, rtol=1e-6, atol=1e-6)
    for parameter, gradient in gradients(model, tokens).items():
        assert_close(gradient, weights[parameter].grad, what=parameter)
    past = model.make_cache(3)
    with torch.no_grad():
        parts = [model(part, past_kv_cache=past) for part in tokens.split((5, 1, 1, 17), dim=1)]
    assert_close(torch.cat(parts, dim=1), expected.detach(), what="from a cache")


@pytest.mark.parametrize("kept", [1, 40])
def test_topk_of_one_signal_and_of_all(kept: int) -> None:
    """With every entry kept what remains is the ReLU."""
    model = random_model(tiny_config("reflow_topk", topk=kept))
    weights, (row,) = weights_of(model), random_tokens(model.cfg, batch=1)
    expected = reference.forward(weights, row, n_layers=model.cfg.n_layers, topk=kept)
    assert_close(model(row)[0], expected)
    assert CONFIGS["reflow_topk"].n_signals == 40
