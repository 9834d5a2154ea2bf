"""How sure a mean over prompts is, of many columns at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import sparse

Vector = np.ndarray
_COLUMNS_AT_ONCE = 4096


def mean_intervals(
    values: Any, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[Float[Vector, " column"], Float[Vector, " column"]]:
    """Percentile bootstrap intervals of the means of the columns of ``values`` [prompt, column], dense or sparse.

    Whole prompts are drawn, the same ones for every column. Of a single prompt both ends are NaN.

    >>> mean_intervals(np.array([[0.0, 1.0], [0.0, 1.0]]))
    (array([0., 1.]), array([0., 1.]))
    """
    columns = sparse.csc_array(values)
    n, n_columns = columns.shape
    low, high = np.full((2, n_columns), np.nan)
    if n > 1:
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).T / n
        tail = (1 - confidence) / 2
        for start in range(0, n_columns, _COLUMNS_AT_ONCE):
            part = slice(start, start + _COLUMNS_AT_ONCE)
            means = columns[:, part].T.toarray() @ weights
            low[part], high[part] = np.quantile(means, [tail, 1 - tail], axis=1, overwrite_input=True)
    return low, high
