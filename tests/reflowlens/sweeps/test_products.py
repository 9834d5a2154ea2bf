"""Products by oneDNN against those in float64, and what is left to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reflowlens as rl
from reflowlens import metrics
from reflowlens.sweeps.products import OneDNNProducts
from tests.support.tiny import assert_close, random_model, random_tokens

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
W = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def names_in(call: object, *factors: Tensor) -> tuple[Tensor, list[str]]:
    """What a call returns, and the operators that it runs."""
    names: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Noting(), OneDNNProducts():
        return call(*factors), names  # type: ignore[operator]


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("x", [X, X[0], X[:, ::3], X.mT.contiguous().mT, X[:1].expand(3, -1, -1)])
@pytest.mark.parametrize("matrix", [W, W.T.contiguous().T, W[:, 3:11], W[:, ::2], W[:, :1], W[:, :1].expand(-1, 5)])
def test_products_of_one_matrix_are_onednns(x: Tensor, matrix: Tensor) -> None:
    for call in (torch.matmul, lambda x, matrix: x @ matrix):
        out, names = names_in(call, x, matrix)
        assert any("mkldnn" in name for name in names)
        assert_close(out.double(), x.double() @ matrix.double())


@torch.no_grad()
def test_infinities_stay_where_they_are() -> None:
    x = X.clone()
    x[0, 3, 5], x[1, 4, 2] = torch.inf, torch.nan
    with OneDNNProducts():
        out = x @ W
    assert torch.equal(out.isnan(), (x @ W).isnan())
    assert torch.equal(out.isinf(), (x @ W).isinf())


@pytest.mark.parametrize(
    ("x", "matrix"),
    [
        (X.double(), W.double()),
        (X.bfloat16(), W.bfloat16()),
        (X, W.expand(2, -1, -1)),
        (X[:0], W),
        (X[0, 0], W),
        (X, W.clone().requires_grad_()),
    ],
    ids=["float64", "bfloat16", "matrices", "empty", "vector", "gradient"],
)
def test_other_products_are_torchs(x: Tensor, matrix: Tensor) -> None:
    out, names = names_in(torch.matmul, x, matrix)
    assert not any("mkldnn" in name for name in names)
    assert torch.equal(out, x @ matrix)


@torch.no_grad()
def test_switched_off_it_is_not_used() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        _, names = names_in(torch.matmul, X, W)
    assert not any("mkldnn" in name for name in names)


@needs_onednn
def test_a_sweep_multiplies_by_it() -> None:
    model, (clean, corrupted) = (
        random_model("reflow"),
        (random_tokens(random_model("reflow").cfg, seed=s) for s in (1, 2)),
    )
    arguments = (model, clean, corrupted, "resid_pre", metrics.target_prob(65))
    swept, names = names_in(lambda: rl.sweep(*arguments).values)
    assert any("mkldnn" in name for name in names)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(swept, rl.sweep(*arguments).values)


def test_the_clean_run_is_made_for_metrics_that_compare_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one that patches take their activations from."""
    model, passes = random_model("reflow"), []
    run = type(model).final_stream
    monkeypatch.setattr(type(model), "final_stream", lambda self, *a, **k: passes.append(1) or run(self, *a, **k))
    rl.sweep(model, "abc", "abd", "resid_pre", metrics.logit_diff("a", "b"))
    assert not passes
    rl.sweep(model, "abc", "abd", "resid_pre", metrics.kl())
    assert len(passes) == 1
