"""Every path of a graph, walked one by one; and the search that TinyTranscoder publishes."""

from __future__ import annotations

import numpy as np


def all_paths(weights: np.ndarray, targets: np.ndarray, begin: np.ndarray) -> dict[tuple[int, ...], float]:
    """Of each path from a beginning to a target: p times the product of its edges, rows [target] normalised to 1."""
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    found: dict[tuple[int, ...], float] = {}

    def walk(nodes: tuple[int, ...], share: float) -> None:
        if begin[nodes[0]]:
            found[nodes] = share
        for source in np.flatnonzero(shares[nodes[0]]):
            walk((int(source), *nodes), share * float(shares[nodes[0], source]))

    p = targets / targets.sum()
    for target in np.flatnonzero(p):
        walk((int(target),), float(p[target]))
    return found


def published_search(weights: np.ndarray, root: int, branches: int, rounds: int) -> list[tuple[int, ...]]:
    """TinyTranscoder's greedy search: a path is a list of nodes from the root on.

    Each round takes the best sources of the *root*, whichever path it extends: what it calls paths of two steps are the
    first step, and another first step behind it.
    """
    paths: list[tuple[int, ...]] = [(root,)]
    for _ in range(rounds):
        extended = []
        for path in paths:
            best = np.argsort(-np.abs(weights[root]), kind="stable")[:branches]
            extended += [(*path, int(source)) for source in best]
        paths = extended[:branches]
    return paths
