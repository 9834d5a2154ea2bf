"""How much of the targets goes through each node, and which nodes and edges are left when little of it may be lost.

Rows of a matrix are targets, columns sources. Â is |A| with rows that sum to 1, without the columns of constants; p is
the share of each target. The influence of the nodes is p (Â + Â² + …), which ends, for no node makes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

Vector = np.ndarray
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Shares:
    """Â of a graph, and p.

    Args:
        matrix: Â, a sparse matrix [target, source].
        rest: what is missing from the sum of each row: the share of edges that are not in the matrix.
        targets: p, which sums to 1.
    """

    matrix: Any
    rest: Float[Vector, " node"]
    targets: Float[Vector, " node"]

    @classmethod
    def of(
        cls,
        weights: Any,
        targets: Float[Vector, " node"],
        left_out: Bool[Vector, " node"],
        dropped: Float[Vector, " node"] | None = None,
    ) -> Shares:
        """Of a matrix of edge weights.

        Args:
            weights: A.
            targets: how much each node counts as a target, not normalised.
            left_out: sources that do not count: constants, and what stands for edges that were not kept.
            dropped: Σ|weight| of the edges of each target that were not kept.
        """
        size, sources, starts = np.abs(weights.data), weights.indices, weights.indptr
        counted = (~left_out).astype(size.dtype)
        sums = np.zeros(len(targets)) if dropped is None else dropped.copy()
        for first in range(0, len(targets), _ROWS_AT_ONCE):  # copies of whole matrices would be most of the memory
            last = min(first + _ROWS_AT_ONCE, len(targets))
            part, counts = size[starts[first] : starts[last]], np.diff(starts[first : last + 1])
            part *= counted[sources[starts[first] : starts[last]]]
            filled, here = counts > 0, sums[first:last]
            if filled.any():
                here[filled] += np.add.reduceat(part, starts[first:last][filled] - starts[first], dtype=np.float64)
            part /= np.repeat(np.where(here > 0, here, 1.0).astype(size.dtype), counts)
        matrix = sparse.csr_array((size, sources, starts), shape=weights.shape)
        rest = np.zeros(len(targets)) if dropped is None else dropped / np.where(sums > 0, sums, 1.0)
        return cls(matrix, rest, targets / targets.sum())

    def influence(self) -> Float[Vector, " node"]:
        """Of every node, over paths of any number of edges, which are fewer than nodes: where groups of nodes lead back
        to themselves (only there) longer ones are left out."""
        current, total = self.targets.astype(self.matrix.dtype), np.zeros(len(self.targets))
        for _ in range(len(self.targets)):
            current = self.matrix.T @ current
            if not current.any():
                break
            total += current
        return total

    def of_edges(self, influence: Float[Vector, " node"]) -> Float[Vector, " edge"]:
        """Â_ts (I_t + p_t) of every edge."""
        through = (influence + self.targets).astype(self.matrix.dtype)
        return self.matrix.data * np.repeat(through, np.diff(self.matrix.indptr))


class Kept(NamedTuple):
    """The numbers of the nodes that are kept, and the weights of the edges among them that are."""

    nodes: Int[Vector, " kept"]
    weights: Any


def prune(
    weights: Any,
    shares: Shares,
    kinds: Kinds,
    node_threshold: float,
    edge_threshold: float,
) -> Kept:
    """The nodes of most influence and, among them, the edges of the highest score.

    Args:
        weights: A, of which ``shares`` are.
        kinds: what the nodes are.
        node_threshold, edge_threshold: the share of all influence, and of all edge scores, that is kept.
    """
    influence = np.where(kinds.left_out, 0.0, shares.influence())
    nodes = np.flatnonzero(((influence > 0) & (influence >= cut(influence, node_threshold))) | kinds.always)
    always, leaves, left_out = (each[nodes] for each in kinds)
    among = weights[nodes][:, nodes]
    left = Shares.of(among, shares.targets[nodes], left_out)
    score = left.of_edges(left.influence())
    edges = (score > 0) & (score >= cut(score, edge_threshold))
    targets, sources, n = np.repeat(np.arange(len(nodes)), np.diff(among.indptr)), among.indices, len(nodes)
    connected = np.ones(n, dtype=bool)
    while True:
        goes_out, comes_in = (np.bincount(ends[edges], minlength=n) > 0 for ends in (sources, targets))
        still = connected & (always | (goes_out & (comes_in | leaves)))
        if (still == connected).all():
            break
        connected = still
        edges &= connected[targets] & connected[sources]
    among.data[~edges] = 0.0
    among.eliminate_zeros()
    return Kept(nodes[connected], among[connected][:, connected])


class Kinds(NamedTuple):
    """What nodes are to pruning.

    Args:
        always: those that are kept: inputs and targets.
        leaves: those that nothing goes into.
        left_out: those that do not count, and are not kept: constants, and the rest.
    """

    always: Bool[Vector, " node"]
    leaves: Bool[Vector, " node"]
    left_out: Bool[Vector, " node"]


def cut(scores: Float[Vector, " item"], share: float) -> float:
    """The smallest of the largest scores that together reach a share of all.

    >>> cut(np.array([1.0, 5.0, 4.0]), 0.85)
    4.0
    """
    if not len(scores):
        return 0.0
    ordered = np.sort(scores)[::-1]
    running = ordered.cumsum(dtype=np.float64)
    place = np.searchsorted(running, share * running[-1])
    return float(ordered[min(int(place), len(ordered) - 1)])
