"""Varimax by planar rotations, two columns at a time, as Kaiser wrote it down (1958)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def varimax_by_planes(rows: NDArray[np.float64], sweeps: int = 100) -> NDArray[np.float64]:
    """Rows scaled to length √S and turned until no plane turns further."""
    n, n_columns = rows.shape
    turned = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.sqrt(n_columns)
    for _ in range(sweeps):
        largest = 0.0
        for i in range(n_columns):
            for j in range(i + 1, n_columns):
                x, y = turned[:, i].copy(), turned[:, j].copy()
                u, v = x**2 - y**2, 2 * x * y
                numerator = 2 * (n * (u * v).sum() - u.sum() * v.sum())
                denominator = n * (u**2 - v**2).sum() - (u.sum() ** 2 - v.sum() ** 2)
                angle = np.arctan2(numerator, denominator) / 4
                turned[:, i] = np.cos(angle) * x + np.sin(angle) * y
                turned[:, j] = -np.sin(angle) * x + np.cos(angle) * y
                largest = max(largest, abs(angle))
        if largest < 1e-9:
            break
    return turned
