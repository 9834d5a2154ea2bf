"""How alike the signals of a basis are as directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.neighbors import unit_rows

EDGES = np.linspace(-1, 1, 201)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2


def cosine_matrix(matrix: Float[Tensor, "S d_model"]) -> Float[Tensor, "S S"]:
    """Cosines between all rows."""
    unit = unit_rows(matrix)
    return unit @ unit.T


def welch_bound(n: int, dimension: int) -> float:
    """The least that the largest |cos| between n vectors can be (Welch, 1974): √((n - d) / (d (n - 1))), 0 for n ≤ d.

    >>> round(welch_bound(3, 2), 6)
    0.5
    """
    return ((n - dimension) / (dimension * (n - 1))) ** 0.5 if n > dimension else 0.0


@dataclass(frozen=True)
class Coherence:
    """|cos| of each row to the others, the largest and the mean, [row], and how all cosines are distributed.

    Args:
        density: share of the pairs in each bin of `EDGES`.
    """

    largest: NDArray[np.float64]
    mean: NDArray[np.float64]
    density: NDArray[np.float64]

    def headline(self) -> dict[str, float]:
        """Mutual coherence, and the mean |cos|."""
        return {"coherence_max": float(self.largest.max()), "coherence_mean": float(self.mean.mean())}


def measure_coherence(matrix: Float[Tensor, "S d_model"]) -> Coherence:
    """The coherence of a matrix's rows, of which there are two at least.

    >>> measure_coherence(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])).mean.tolist()
    [0.0, 0.5, 0.5]
    """
    cosines = cosine_matrix(matrix)
    size = cosines.abs().fill_diagonal_(0.0)
    pairs = cosines[torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)]
    counts, _ = np.histogram(pairs.clamp(-1, 1).cpu().numpy(), bins=EDGES)
    return Coherence(
        largest=size.amax(dim=1).double().cpu().numpy(),
        mean=(size.sum(dim=1) / (len(matrix) - 1)).double().cpu().numpy(),
        density=counts / len(pairs),
    )
