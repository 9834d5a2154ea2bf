"""A view in another basis: rotated at random, or so that single signals are as sparse as they can be."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.arguments import random_seed
from reflowlens.errors import ReflowlensError
from reflowlens.models.numerics import without_autocast
from reflowlens.signals.view import SignalView
from reflowlens.varimax import varimax_rotation

_TURNED = 256


def rotate(view: SignalView, rotation: Float[Tensor, "S S"]) -> SignalView:
    """The view (R A, Aᵀ B) in a basis that is rotated by A: every logit stays, every single signal changes.

    Args:
        rotation: A, orthogonal; not checked beyond its shape.

    Raises:
        ReflowlensError: the rotation is not a matrix [S, S].
    """
    if not isinstance(rotation, Tensor) or rotation.shape != (view.n_signals, view.n_signals):
        got = list(rotation.shape) if isinstance(rotation, Tensor) else repr(rotation)
        raise ReflowlensError(f"a rotation of this view is a matrix [S, S], S={view.n_signals}, got {got}")
    A = rotation.to(view.recipe)
    with without_autocast(A):
        return view._rotated(A)


def varimax_of(view: SignalView, *, seed: int = 0) -> Float[Tensor, "S S"]:
    """The rotation that :func:`varimax_view` turns a view by.

    Of a dictionary's features it turns the 256 that most tokens have, and leaves the others: among thousands of
    features, which no rotation makes much sparser, the search would take hours.
    """
    rows = view.recipe[: view.n_tokens]
    with without_autocast(rows):
        if not view.n_carried or view.n_signals <= _TURNED:
            return varimax_rotation(rows, seed=random_seed(seed))
        often = (rows != 0).sum(dim=0).topk(_TURNED).indices
        turn = torch.eye(view.n_signals, device=rows.device, dtype=rows.dtype)
        some = rows[:, often]
        turn[often[:, None], often] = varimax_rotation(some[some.any(dim=1)], seed=random_seed(seed)).to(turn)
        return turn


def varimax_view(view: SignalView, *, seed: int = 0) -> SignalView:
    """The view in the basis that :func:`reflowlens.varimax.varimax_rotation` finds for the recipes of its real tokens.

    By varimax's criterion its signals are at least as sparse as the view's own, and every logit stays: an upper bound
    of the sparsity that a basis with these logits can show, as ``rotated`` is the lower one.

    Args:
        seed: of the rows that are sampled from a large vocabulary.

    Example: ``varimax_view(signal_view(model)).codebook(0)``
    """
    return dataclasses.replace(rotate(view, varimax_of(view, seed=seed)), name="varimax")


def random_rotation(n: int, seed: int) -> Float[Tensor, "n n"]:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian one, signs fixed by the diagonal of R (Mezzadri, 2007)."""
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(random_seed(seed)), dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()
