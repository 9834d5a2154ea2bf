"""Incoming edges of targets as the rows of a sparse matrix, the largest of a row where they are too many to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

BYTES_AN_EDGE = 12  # its weight, its source, and a copy of the weights while influence is computed
REST = 0  # the column of what is summed


class SparseRows:
    """Collects rows, in the order of the nodes.

    Args:
        n_nodes: rows and columns.
        capacity: most edges that there can be; room for them costs memory only as it is filled.
        n_kept: of the first columns, whose entries are always kept.
        per_row: most other entries of a row; None: all.
    """

    def __init__(self, n_nodes: int, capacity: int, n_kept: int, per_row: int | None) -> None:
        self.n_nodes, self.n_kept, self.per_row = n_nodes, n_kept, per_row
        self.weights = np.empty(capacity, dtype=np.float32)
        self.sources = np.empty(capacity, dtype=np.int32)
        self.counts = np.zeros(n_nodes, dtype=np.int64)
        self.dropped = np.zeros(n_nodes, dtype=np.float64)
        self.n_edges = 0
        self._columns = np.arange(n_nodes, dtype=np.int32)

    def add(self, first: int, values: Float[Tensor, "row column"]) -> None:
        """Rows from node ``first`` on; columns that they lack are zero."""
        rows = values.float().cpu().numpy()
        if self.per_row is not None and rows.shape[1] - self.n_kept > self.per_row:
            rows = self._largest(first, rows, self.per_row)
        present = rows != 0
        counts = np.count_nonzero(present, axis=1)
        end = self.n_edges + int(counts.sum())
        self.weights[self.n_edges : end] = rows[present]
        self.sources[self.n_edges : end] = np.broadcast_to(self._columns[: rows.shape[1]], rows.shape)[present]
        self.counts[first : first + len(rows)] = counts
        self.n_edges = end

    def _largest(self, first: int, rows: Float[np.ndarray, "row column"], n: int) -> Float[np.ndarray, "row column"]:
        others = rows[:, self.n_kept :]
        crowded = np.flatnonzero(np.count_nonzero(others, axis=1) > n)
        if not len(crowded):
            return rows
        columns = np.flatnonzero(others[crowded].any(axis=0))  # many equal zeros would make partitions slow
        candidates = others[np.ix_(crowded, columns)]
        lost = np.argpartition(np.abs(candidates), -n, axis=1)[:, :-n]
        rest = np.take_along_axis(candidates, lost, axis=1)
        self.dropped[first + crowded] = np.abs(rest).sum(axis=1, dtype=np.float64)
        bounded = rows.copy()
        bounded[crowded[:, None], self.n_kept + columns[lost]] = 0.0
        bounded[crowded, REST] = rest.sum(axis=1)
        return bounded

    def matrix(self) -> Any:
        """The rows as a matrix [target, source]."""
        starts = np.concatenate([[0], self.counts.cumsum()])
        if self.n_edges < 2**31:  # scipy has one type for both, and would copy all sources
            starts = starts.astype(np.int32)
        parts = self.weights[: self.n_edges], self.sources[: self.n_edges], starts
        return sparse.csr_array(parts, shape=(self.n_nodes, self.n_nodes))
