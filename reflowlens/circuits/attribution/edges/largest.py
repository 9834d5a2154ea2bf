"""The largest of many numbers, and what the others add up to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

_NUMBERS_AT_ONCE = 2**20  # products of pairs


def largest_products(
    q: Float[Tensor, "query_node channel"], k: Float[Tensor, "key_node channel"], n: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The pairs of rows with the n largest |products|, in descending order; none that are 0.

    Rows are taken in the order of their norms: |q_i · k_j| ≤ |q_i| |k_j| says which products cannot be among them, and
    those are not formed.
    """
    (q_norm, q_order), (k_norm, k_order) = (each.norm(dim=1).sort(descending=True) for each in (q, k))
    q, k = q[q_order], k[k_order]
    places, weights = q_order.new_zeros(0), q.new_zeros(0)
    n_keys = len(k)
    size, least = max(1, _NUMBERS_AT_ONCE // n_keys), 0.0
    for start in range(0, len(q), size):
        reach = int((q_norm[start] * k_norm > least).sum())
        if not reach:
            break
        products = q[start : start + size] @ k[:reach].T
        rows, columns = (products.abs() > least).nonzero().unbind(1)
        places = torch.cat([places, (start + rows) * n_keys + columns])
        weights = torch.cat([weights, products[rows, columns]])
        if len(weights) > n:
            kept = weights.abs().topk(n).indices
            places, weights = places[kept], weights[kept]
            least = float(weights[-1].abs())
    order = weights.abs().argsort(descending=True, stable=True)
    places, weights = places[order], weights[order]
    return q_order[places // n_keys].cpu(), k_order[places % n_keys].cpu(), weights.cpu()


class LargestParts:
    """Collects the parts of edges: the largest of them, and of each source how many there were and their sum.

    Args:
        n_nodes: from which edges may come.
        top: how many parts are kept.
        source: the only node whose edge counts, or None.
    """

    def __init__(self, n_nodes: int, top: int, source: int | None) -> None:
        self.top, self.source, self.least = top, source, 0.0
        self.totals = torch.zeros(n_nodes, dtype=torch.float64)
        self.counts = torch.zeros(n_nodes, dtype=torch.long)
        self.sources, self.routes, self.weights = self.counts[:0], self.counts[:0], torch.zeros(0)

    def add(self, edges: Float[Tensor, "part node"], routes: Int[Tensor, " part"]) -> None:
        """Of each route the part of every edge; columns that are missing are zero."""
        n, edges = edges.shape[1], edges.cpu()
        if self.source is not None:
            edges = torch.where(torch.arange(n) == self.source, edges, 0.0)
        self.totals[:n] += edges.sum(0, dtype=torch.float64)
        self.counts[:n] += edges.count_nonzero(0)
        part, source = (edges.abs() > self.least).nonzero().unbind(1)
        self.sources = torch.cat([self.sources, source])
        self.routes = torch.cat([self.routes, routes[part]])
        self.weights = torch.cat([self.weights, edges[part, source]])
        if len(self.weights) > self.top:
            kept = self.weights.abs().topk(self.top).indices
            self.sources, self.routes, self.weights = self.sources[kept], self.routes[kept], self.weights[kept]
            self.least = float(self.weights[-1].abs())

    def table(self, names: np.ndarray, n_positions: int, n_heads: int) -> pd.DataFrame:
        sources, routes, weights = (each.numpy() for each in (self.sources, self.routes, self.weights))
        frame = pd.DataFrame({"source": names[sources], "route": np.where(routes < 0, "direct", "head")})
        block, place = np.divmod(routes, n_heads * n_positions)
        head, key = np.divmod(place, n_positions)
        for name, value in (("layer", block), ("head", head), ("key", key)):
            frame[name] = pd.array(value, dtype="Int64")
            frame.loc[routes < 0, name] = pd.NA
        frame["weight"] = weights
        others = self.counts.numpy() - np.bincount(sources, minlength=len(names)) > 0
        rest = self.totals.numpy() - np.bincount(sources, weights, len(names))
        summed = pd.DataFrame({"source": names[others], "route": "rest", "weight": rest[others]})
        by_size = [each.sort_values("weight", key=np.abs, ascending=False) for each in (frame, summed) if len(each)]
        return pd.concat(by_size, ignore_index=True)[frame.columns]
