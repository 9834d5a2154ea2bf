"""The chunked loss against torch's on the whole logit matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reflowlens.models.loss import IGNORE, cross_entropy, token_losses
from tests.support.tiny import assert_close, random_model, random_tokens, tiny_config


def inputs(n: int, k: int, d_vocab: int, ignored: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, k, generator=generator)
    matrix = torch.randn(d_vocab, k, generator=generator)
    targets = torch.randint(0, d_vocab, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = IGNORE
    targets[0] = d_vocab - 1  # at least one counts
    return features, matrix, targets


def with_gradients(loss: Any, features: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f, m = features.clone().requires_grad_(), matrix.clone().requires_grad_()
    value = loss(f, m)
    (3 * value).backward()  # a factor after the loss scales its gradients
    assert f.grad is not None
    assert m.grad is not None
    return value.detach(), f.grad, m.grad


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 8),
    d_vocab=st.integers(1, 50),
    chunk=st.integers(1, 45),
    ignored=st.sampled_from([0.0, 0.3, 0.95]),
    seed=st.integers(0, 1000),
)
def test_equals_cross_entropy_of_the_whole(n: int, k: int, d_vocab: int, chunk: int, ignored: float, seed: int) -> None:
    features, matrix, targets = inputs(n, k, d_vocab, ignored, seed)
    actual = with_gradients(lambda f, m: cross_entropy(f, m, targets, chunk), features, matrix)
    expected = with_gradients(lambda f, m: F.cross_entropy(f @ m.T, targets), features, matrix)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # another path, without gradients
        torch.testing.assert_close(cross_entropy(features, matrix, targets, chunk), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_a_bias_of_the_readout(chunk: int) -> None:
    """In the loss, with and without gradients, and in every gradient; it alone may learn."""
    features, matrix, targets = inputs(9, 4, 11, 0.3, 1)
    bias = torch.linspace(-2, 2, 11).requires_grad_()
    actual = with_gradients(lambda f, m: cross_entropy(f, m, targets, chunk, bias), features, matrix)
    bias_grad, bias.grad = bias.grad, None
    expected = with_gradients(lambda f, m: F.cross_entropy(f @ m.T + bias, targets), features, matrix)
    for one, two in zip((*actual, bias_grad), (*expected, bias.grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    (alone,) = torch.autograd.grad(cross_entropy(features, matrix, targets, chunk, bias), bias)
    assert_close(3 * alone, bias.grad, 1e-5)
    with torch.no_grad():
        assert_close(cross_entropy(features, matrix, targets, chunk, bias), expected[0], 1e-6)


def test_one_side_may_be_fixed() -> None:
    """Features of a frozen model, or a frozen readout."""
    features, matrix, targets = inputs(9, 4, 11, 0.0, 1)
    whole = with_gradients(lambda f, m: F.cross_entropy(f @ m.T, targets), features, matrix)
    for i, (f, m) in enumerate(
        [(features.clone().requires_grad_(), matrix), (features, matrix.clone().requires_grad_())]
    ):
        cross_entropy(f, m, targets, 4).backward()
        assert_close(3 * (f, m)[i].grad, whole[1 + i], 1e-6)
        assert (f, m)[1 - i].grad is None


def test_a_second_derivative_is_refused() -> None:
    features, matrix, targets = inputs(9, 4, 11, 0.0, 1)
    features.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy(features.tanh(), matrix, targets, 4), features, create_graph=True)


def test_under_autocast() -> None:
    """Products in bfloat16, softmax and sums in float32: within rounding of the factors."""
    features, matrix, targets = inputs(200, 32, 300, 0.2, 2)
    features = features / 4
    exact = with_gradients(lambda f, m: F.cross_entropy(f @ m.T, targets), features, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(lambda f, m: cross_entropy(f, m, targets, 64), features, matrix)
        torchs = with_gradients(lambda f, m: F.cross_entropy((f @ m.T).float(), targets), features, matrix)
    assert ours[0].dtype == torch.float32
    assert [x.dtype for x in ours] == [torch.float32] * 3
    for one, two, true in zip(ours, torchs, exact, strict=True):
        error = (one - true).norm() / true.norm()
        assert error < 0.01
        assert error < 1.5 * (two - true).norm() / true.norm() + 1e-4


def test_token_losses() -> None:
    features, matrix, targets = inputs(6, 4, 9, 0.5, 3)
    losses = token_losses(features, matrix, targets)
    log_p = (features @ matrix.T).double().log_softmax(-1)
    for loss, row, target in zip(losses, log_p, targets.tolist(), strict=True):
        assert loss.item() == pytest.approx(0.0 if target == IGNORE else -row[target].item(), abs=1e-5)


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_are_never_held_whole() -> None:
    n, k, d_vocab, chunk = 500, 4, 300, 50
    features, matrix, targets = inputs(n, k, d_vocab, 0.0, 4)
    with LargestOutput() as whole:
        with_gradients(lambda f, m: F.cross_entropy(f @ m.T, targets), features, matrix)
    assert whole.numel == n * d_vocab
    with LargestOutput() as chunked:
        with_gradients(lambda f, m: cross_entropy(f, m, targets, chunk), features, matrix)
    assert chunked.numel == chunk * d_vocab
    with LargestOutput() as evaluated, torch.no_grad():
        cross_entropy(features, matrix, targets, chunk)
    assert evaluated.numel == chunk * d_vocab


def test_a_model_that_learns_holds_neither_logits_nor_embedding() -> None:
    """2,048 positions and 512 tokens: the chunk of 256 positions bounds what is held."""
    cfg = tiny_config("reflow", n_layers=1, d_vocab=512, n_ctx=64)
    model = random_model(cfg)
    tokens = random_tokens(cfg, batch=32, pos=64)
    with LargestOutput() as seen:
        model(tokens, "loss").backward()
    assert seen.numel == 256 * 512
