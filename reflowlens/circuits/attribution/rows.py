"""Incoming edges of targets as the rows of a sparse matrix, the largest of a row where they are too many to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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

    def add(self, first: int, values: Float[Tensor, "row column"]) -> None:
        """Rows from node ``first`` on; columns that they lack are zero."""
        if self.per_row is not None and values.shape[1] - self.n_kept > self.per_row:
            values = self._largest(first, values)
        rows, columns = values.nonzero().unbind(1)
        end = self.n_edges + len(rows)
        self.weights[self.n_edges : end] = values[rows, columns].float().cpu()
        self.sources[self.n_edges : end] = columns.cpu()
        self.counts[first : first + len(values)] = rows.bincount(minlength=len(values)).cpu()
        self.n_edges = end

    def _largest(self, first: int, values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        others = values[:, self.n_kept :]
        places = others.abs().topk(self.per_row or 0, dim=1, sorted=False).indices
        kept = torch.zeros_like(others).scatter(1, places, others.gather(1, places))
        rest = others - kept
        self.dropped[first : first + len(values)] = rest.abs().sum(1, dtype=torch.float64).cpu()
        kept = torch.cat([values[:, : self.n_kept], kept], dim=1)
        kept[:, REST] = rest.sum(1)
        return kept

    def matrix(self) -> Any:
        """The rows as a matrix [target, source]."""
        starts = np.concatenate([[0], self.counts.cumsum()])
        parts = self.weights[: self.n_edges], self.sources[: self.n_edges], starts
        return sparse.csr_array(parts, shape=(self.n_nodes, self.n_nodes))
