"""What statistics take: finite numbers, and enough units to say how sure a figure is of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reflowlens.errors import ReflowlensError


def finite(values: ArrayLike, name: str, dimensions: int | None = None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if dimensions is not None and array.ndim != dimensions:
        raise ReflowlensError(f"{name}: {dimensions} dimension(s) expected, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ReflowlensError(
            f"{name}: finite numbers expected, got {np.count_nonzero(~np.isfinite(array))} that are not"
        )
    return array


def several(array: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    units = len(array) if array.ndim else 1
    if units < 2:
        raise ReflowlensError(f"{name}: at least 2 units of replication are needed to say how sure it is, got {units}")
    return array
