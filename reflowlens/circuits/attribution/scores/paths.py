"""The strongest paths through an attribution graph, exactly: how much of what is explained goes along each.

The strength of a path from where it begins to a target t is p_t times the product of Â along it (Â: |edges|, rows
normalised to 1, constants left out). Complete paths, from inputs and errors to targets, share out all of the influence
that the graph kept: their strengths sum to 1.
"""

from __future__ import annotations

import heapq
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from reflowlens.arguments import whole_number
from reflowlens.circuits.attribution.scores.influence import Shares, Vector

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph


class Path(NamedTuple):
    """A way through a graph.

    Args:
        share: of what is explained.
        nodes: their numbers, from where the path begins to its target.
    """

    share: float
    nodes: tuple[int, ...]


def strongest_paths(graph: AttributionGraph, k: int = 10, *, edges: int = 2, errors: bool = True) -> pd.DataFrame:
    """The k complete paths of the largest shares, in descending order.

    Args:
        k: how many; fewer if the graph has no more.
        edges: the fewest edges of a path: with 2, what goes from an input to a target by itself is left out.
        errors: whether paths may begin at errors, or at inputs alone.

    Returns:
        A row a path: its ``share`` of what is explained, ``sign`` (1: it speaks for its target, -1: against), how many
        ``edges`` it has, and ``path``, the names of its nodes from where it begins to its target.

    Raises:
        ReflowlensError: k or edges is no whole number of 1 or more.

    Example: ``strongest_paths(rl.attribute(model, "The capital of France is"), k=3)``
    """
    k, edges = whole_number(k, "k", 1), whole_number(edges, "edges", 1)
    found, names = best_paths(graph.shares, beginnings(graph, errors), k, edges), graph.nodes["node"].to_numpy()
    rows = [
        {
            "share": path.share,
            "sign": int(np.prod([np.sign(graph.matrix[t, s]) for s, t in pairwise(path.nodes)])),
            "edges": len(path.nodes) - 1,
            "path": tuple(names[list(path.nodes)]),
        }
        for path in found
    ]
    return pd.DataFrame(rows, columns=["share", "sign", "edges", "path"])


def beginnings(graph: AttributionGraph, errors: bool = True) -> Bool[Vector, " node"]:
    """The nodes that complete paths begin at: inputs and, if wanted, errors."""
    from reflowlens.circuits.attribution.graph import INPUTS

    return graph.nodes["kind"].isin((*INPUTS, "error") if errors else INPUTS).to_numpy()


def best_paths(shares: Shares, begin: Bool[Vector, " node"], k: int, edges: int) -> list[Path]:
    """The k strongest paths of at least so many edges, by best-first search from the targets.

    What the rest of a path can hold at most is known exactly beforehand, so that paths are completed in the order of
    their shares, and of the ways on from a path only the k best can be among the answers.
    """
    ahead = _best_ahead(shares.matrix, begin, edges)
    order = count()  # of equal paths the one that was found first
    queue: list[tuple[float, int, float, tuple[int, ...]]] = []
    for target in np.flatnonzero(shares.targets * ahead[edges] > 0):
        share = float(shares.targets[target])
        queue.append((-share * float(ahead[edges][target]), next(order), share, (int(target),)))
    heapq.heapify(queue)
    found: list[Path] = []
    while queue and len(found) < k:
        _, _, share, nodes = heapq.heappop(queue)
        left = max(0, edges - len(nodes) + 1)
        if not left and begin[nodes[0]]:
            found.append(Path(share, nodes))
            continue
        row = slice(*shares.matrix.indptr[nodes[0] : nodes[0] + 2])
        sources, weights = shares.matrix.indices[row], shares.matrix.data[row].astype(np.float64)
        whole = share * weights * ahead[max(0, left - 1)][sources]
        for i in np.argsort(-whole, kind="stable")[:k]:
            if whole[i] > 0:
                longer = (int(sources[i]), *nodes)
                heapq.heappush(queue, (-float(whole[i]), next(order), share * float(weights[i]), longer))
    return found


def _best_ahead(matrix: Any, begin: Bool[Vector, " node"], edges: int) -> list[Float[Vector, " node"]]:
    """By how many edges must still come at least, of each node the largest product of Â on the way to a beginning."""
    best = begin.astype(np.float64)
    while True:
        longer = np.maximum(begin, _best_step(matrix, best))
        if (longer == best).all():
            break
        best = longer
    ahead = [best]
    for _ in range(edges):
        ahead.append(_best_step(matrix, ahead[-1]))
    return ahead


def _best_step(matrix: Any, best: Float[Vector, " node"]) -> Float[Vector, " node"]:
    """Of each row the largest of its entries times what is best at their columns; 0 of an empty one."""
    found = np.zeros(matrix.shape[0])
    full = np.flatnonzero(np.diff(matrix.indptr))
    if len(full):
        found[full] = np.maximum.reduceat(matrix.data * best[matrix.indices], matrix.indptr[full])
    return found


def share_by_length(shares: Shares, begin: Bool[Vector, " node"]) -> Float[Vector, " length"]:
    """How much of what is explained comes by complete paths of 1, 2, … edges."""
    current, found = shares.targets, []
    while current.any():
        current = shares.matrix.T @ current
        found.append(float(current[begin].sum()))
    return np.array(found[: np.flatnonzero(found)[-1] + 1] if any(found) else [0.0])
