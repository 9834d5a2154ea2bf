"""Weights with signals or stream rotated: the same logits, other coordinates."""

from __future__ import annotations

import pytest
import torch

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.rotations import rotate_signals, rotate_stream
from reflowlens.signals import random_rotation
from tests.support.tiny import assert_close, random_model, random_tokens


def with_plain_norms(architecture: str) -> HookedModel:
    model = random_model(architecture)
    for name, weight in model.named_parameters():
        if name.endswith(".w"):
            weight.data.fill_(1.5)
    return model


@pytest.mark.parametrize("architecture", ["gpt2_new", "reflow", "reflow_topk", "reflow_lite"])
def test_a_rotated_stream_computes_the_same(architecture: str) -> None:
    model = with_plain_norms(architecture)
    tokens, Q = random_tokens(model.cfg), random_rotation(model.cfg.d_model, 3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rotated = rotate_stream(model, Q)
    assert_close(rotated(tokens), model(tokens), 1e-5)
    assert_close(rotated(tokens, stop_at_layer=1), model(tokens, stop_at_layer=1) @ Q, 1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    kept = {name for name, weight in rotated.named_parameters() if torch.equal(weight, before[name])}
    assert kept == {name for name in before if name.endswith((".w", "W_recipe"))}


def test_rotated_signals_compute_the_same() -> None:
    model = random_model("reflow")
    tokens, S = random_tokens(model.cfg), model.cfg.n_signals or 0
    Q = random_rotation(S, 3)
    rotated = rotate_signals(model, Q)
    logits, cache = rotated.run_with_cache(tokens)
    ours, signals = model.run_with_cache(tokens, names_filter="unembed.hook_signal")
    assert_close(logits, ours, 1e-5)
    assert_close(cache["unembed.hook_signal"], signals["unembed.hook_signal"] @ Q, 1e-5)
    assert not torch.allclose(rotated.embed.W_basis, model.embed.W_basis)  # type: ignore[union-attr]


def test_what_cannot_be_rotated() -> None:
    for architecture in ("gpt2_new", "reflow_topk"):
        with pytest.raises(ReflowlensError, match="has no signals that can be rotated"):
            rotate_signals(random_model(architecture), torch.eye(32))
    for architecture in ("gpt2", "reflow"):  # LayerNorm; a weight of its own for each axis
        with pytest.raises(ReflowlensError, match=r"optimizer.freeze_norms = true"):
            rotate_stream(random_model(architecture), torch.eye(32))
    with pytest.raises(ReflowlensError, match=r"is a matrix \[S, S\], S=32, got \[4, 4\]"):
        rotate_signals(random_model("reflow"), torch.eye(4))
    with pytest.raises(ReflowlensError, match=r"is a matrix \[d_model, d_model\], d_model=32, got 'eye'"):
        rotate_stream(with_plain_norms("reflow"), "eye")  # type: ignore[arg-type]
