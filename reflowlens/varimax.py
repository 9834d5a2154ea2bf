"""Varimax: the rotation in which each column of a matrix has few large entries and many small ones (Kaiser, 1958).

A recipe R and its rotation R A give the same predictions, so a basis can be chosen. Varimax chooses the one whose
squared entries vary most, a fourth moment and hence a kurtosis of the columns, and is the ceiling of any statement that
the signals of a model are sparse: no training is needed to reach it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reflowlens.models.products import product

MAX_ROWS = 32_768
MAX_ENTRIES = 2**23  # of the rows together: an iteration costs as much as there are, times the width
TOLERANCE = 1e-4
MAX_ITERATIONS = 300
_KEPT = 4
_found: OrderedDict[tuple[str, float], Tensor] = OrderedDict()


def varimax_criterion(rows: Float[Tensor, "row S"]) -> float:
    """Variance of the squared entries of a column, mean over columns, with every row scaled to length √S.

    Independent Gaussian entries give about 2; rows with one entry each, spread evenly over the columns, S - 1.

    >>> round(varimax_criterion(torch.eye(8)), 5)
    7.0
    """
    scaled = _scaled(rows)
    return _criterion_and_gradient(scaled, _identity(scaled))[0]


@torch.no_grad()
def varimax_rotation(
    rows: Float[Tensor, "row S"], *, seed: int = 0, max_rows: int | None = None, tolerance: float = TOLERANCE
) -> Float[Tensor, "S S"]:
    """The orthogonal A that maximises :func:`varimax_criterion` of ``rows @ A``: a local maximum, reached from A = 1.

    Rows are scaled to one length first (Kaiser's normalisation), so that a few long ones do not decide. The polar
    factor of the gradient is the next A (Sherin, 1966), extrapolated by Nesterov's momentum, which starts again
    whenever the criterion falls (O'Donoghue and Candès, 2015). The best A seen is returned: the criterion of
    ``rows @ A`` is never below that of ``rows``.

    Args:
        seed: of the uniform draw of ``max_rows`` rows where there are more; otherwise nothing is random.
        max_rows: default 32,768, of rows wider than 256 as many as have 2^23 entries, but at least eight times their
            width.
        tolerance: the relative growth of the criterion below which an iteration is the last.

    The last few rotations are kept, and found again by the content of ``rows``.

    Example: ``rows @ varimax_rotation(rows)``
    """
    if max_rows is None:
        width = rows.shape[1]
        max_rows = min(MAX_ROWS, max(MAX_ENTRIES // width, 8 * width))
    if len(rows) > max_rows:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:max_rows]
        rows = rows[drawn.to(rows.device)]
    scaled = _scaled(rows)
    key = (hashlib.sha256(scaled.cpu().numpy().tobytes()).hexdigest(), tolerance)
    if key not in _found:
        _found[key] = _ascend(scaled, tolerance).cpu()
        if len(_found) > _KEPT:
            _found.popitem(last=False)
    _found.move_to_end(key)
    return _found[key].to(rows.device)


def polar_factor(matrix: Float[Tensor, "S S"]) -> Float[Tensor, "S S"]:
    """The orthogonal matrix nearest to an invertible one, by Newton's iteration with Higham's scaling (1986).

    In float64 on the CPU, and unlike a singular value decomposition untroubled by singular values that are all alike.
    """
    x = matrix.cpu().double()
    for _ in range(50):
        inverse = torch.linalg.inv(x).T
        scale = (inverse.norm() / x.norm()).sqrt()
        following = (scale * x + inverse / scale) / 2
        moved = (following - x).norm() / following.norm()
        x = following
        if moved < 1e-6:  # convergence is quadratic: what is left is its square
            break
    return x.to(matrix)


def _scaled(rows: Float[Tensor, "row S"]) -> Float[Tensor, "row S"]:
    return F.normalize(rows.float(), dim=1) * rows.shape[1] ** 0.5


def _identity(scaled: Float[Tensor, "row S"]) -> Float[Tensor, "S S"]:
    return torch.eye(scaled.shape[1], device=scaled.device, dtype=scaled.dtype)


def _ascend(scaled: Float[Tensor, "row S"], tolerance: float) -> Float[Tensor, "S S"]:
    current = previous = best = _identity(scaled)
    highest = before = -torch.inf
    momentum = 0
    for _ in range(MAX_ITERATIONS):
        point = polar_factor(current + momentum / (momentum + 3) * (current - previous)) if momentum else current
        value, gradient = _criterion_and_gradient(scaled, point)
        if value > highest:
            highest, best = value, point
        if 0 <= value - before <= tolerance * abs(value):
            break
        momentum = momentum + 1 if value > before else 0
        # A little of the point itself decides the directions of which the gradient says nothing, such as dead signals.
        previous, current = current, polar_factor(gradient + (1e-6 * gradient.norm() + 1e-30) * point)
        before = value
    return best


def _criterion_and_gradient(
    scaled: Float[Tensor, "row S"], rotation: Float[Tensor, "S S"]
) -> tuple[float, Float[Tensor, "S S"]]:
    turned = product(scaled, rotation)
    squares = turned.square()
    means = squares.mean(dim=0)
    value = squares.square().mean(dim=0).sub_(means.square()).mean()
    return float(value), product(scaled.T, squares.sub_(means).mul_(turned)) / len(scaled)
