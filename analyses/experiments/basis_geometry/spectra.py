"""Shapes of spectra: how many directions a matrix uses, what a Gaussian one would, and how alike its rows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from analyses.statistics.draws import derive_generator, derive_rng, derive_seed


def effective_rank(singular_values: ArrayLike) -> float:
    """exp of the entropy of the energies σ² / Σσ², as `reflowlens inspect` has it (Roy and Vetterli, 2007, take σ).

    >>> round(effective_rank([1, 1, 1, 0]), 6)
    3.0
    """
    return float(np.exp(stats.entropy(np.square(np.asarray(singular_values, dtype=float)))))


def stable_rank(singular_values: ArrayLike) -> float:
    """‖M‖_F² / ‖M‖₂² = Σσ² / max σ²."""
    energy = np.square(np.asarray(singular_values, dtype=float))
    return float(energy.sum() / energy.max())


def participation_ratio(singular_values: ArrayLike) -> float:
    """Participation ratio of the energies, (Σσ²)² / Σσ⁴: how many directions share the variance."""
    energy = np.square(np.asarray(singular_values, dtype=float))
    return float(energy.sum() ** 2 / np.square(energy).sum())


def condition_number(singular_values: ArrayLike) -> float:
    """max σ / min σ; infinite for a matrix that loses a dimension."""
    values = np.asarray(singular_values, dtype=float)
    return float(values.max() / values.min()) if values.min() > 0 else float("inf")


def factored_singular_values(
    recipe: Float[Tensor, "d_vocab S"], basis: Float[Tensor, "S d_model"]
) -> NDArray[np.float64]:
    """Singular values of E = R B, largest first, without forming E: those of T B, where R = Q T.

    They are at most min(S, d_model) many.
    """
    T = torch.linalg.qr(recipe, mode="r").R
    return np.asarray(torch.linalg.svdvals(T.double() @ basis.double()).cpu())


def gaussian_singular_values(rows: int, columns: int, variance: float, seed: int) -> NDArray[np.float64]:
    """Singular values of a matrix of independent Gaussian entries, largest first.

    Drawn through Bartlett's decomposition (1933): the triangular factor of such a matrix has independent entries too,
    so that a tall matrix costs no more than a square one.
    """
    tall, wide = max(rows, columns), min(rows, columns)
    rng = derive_rng(seed, "singular_values")
    triangle = np.triu(rng.standard_normal((wide, wide)), 1)
    np.fill_diagonal(triangle, np.sqrt(rng.chisquare(tall - np.arange(wide))))
    return np.sqrt(variance) * np.linalg.svd(triangle, compute_uv=False)


def marchenko_pastur_edges(rows: int, columns: int, variance: float = 1.0) -> tuple[float, float]:
    """Between which singular values those of a large Gaussian matrix lie: √variance · |√rows ± √columns|.

    Marchenko and Pastur (1967), whose law is of σ² / rows. Of a finite matrix the largest exceeds the upper edge by a
    little (Tracy and Widom).

    >>> marchenko_pastur_edges(9, 4)
    (1.0, 5.0)
    """
    scale = variance**0.5
    return scale * abs(rows**0.5 - columns**0.5), scale * (rows**0.5 + columns**0.5)


def entry_variance(singular_values: ArrayLike, rows: int) -> float:
    """Mean square of the entries of a matrix of ``rows`` rows and as many columns as singular values."""
    values = np.asarray(singular_values, dtype=float)
    return float(np.square(values).sum() / (rows * len(values)))


def above_upper_edge(singular_values: ArrayLike, rows: int) -> int:
    """How many singular values exceed Marchenko and Pastur's upper edge for the shape and variance of their matrix."""
    values = np.asarray(singular_values, dtype=float)
    _, upper = marchenko_pastur_edges(rows, len(values), entry_variance(values, rows))
    return int((values > upper).sum())


def gaussian_matrix(rows: int, columns: int, variance: float, seed: int) -> Float[Tensor, "rows columns"]:
    """Independent Gaussian entries."""
    return variance**0.5 * torch.randn(rows, columns, generator=derive_generator(seed, "gaussian"))


def random_subspace(dimension: int, size: int, seed: int) -> Float[Tensor, "dimension size"]:
    """Orthonormal columns that span a uniformly drawn subspace: the control `random_direction`, of several at once."""
    gaussian = torch.randn(dimension, size, generator=derive_generator(seed, "random_direction"))
    return torch.linalg.qr(gaussian).Q


SPECTRAL_MEASURES: dict[str, Callable[[ArrayLike], float]] = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "condition_number": condition_number,
}
"""From the singular values of a matrix to one number, by the name of the metric."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix and of what it is held against, each largest first.

    Args:
        own: of the matrix.
        untrained: of the same matrix at initialisation, by the name of the draw.
        gaussian: of Gaussian matrices of its shape and variance, [draw, value].
        rows: the longer side of that shape; the shorter has as many as there are values.
    """

    own: NDArray[np.float64]
    untrained: Mapping[str, NDArray[np.float64]]
    gaussian: NDArray[np.float64]
    rows: int

    def edges(self) -> tuple[float, float]:
        """Marchenko and Pastur's, for the matrix's shape and variance."""
        return marchenko_pastur_edges(self.rows, len(self.own), entry_variance(self.own, self.rows))


def compare_spectrum(
    own: NDArray[np.float64], untrained: Mapping[str, NDArray[np.float64]], rows: int, draws: int, seed: int
) -> Spectrum:
    """A spectrum beside those of ``draws`` Gaussian matrices of ``rows`` rows and the same mean sum of squares."""
    variance = entry_variance(own, rows)
    gaussian = [gaussian_singular_values(rows, len(own), variance, derive_seed(seed, i)) for i in range(draws)]
    return Spectrum(own, untrained, np.stack(gaussian), rows)
