"""Influence, pruning and scores of an attribution graph over a dense matrix, as their definitions are written.

Rows are targets. ``kinds`` [node]: "feature", "error", "input", "logit" or, left out of all of it, "constant".
"""

from __future__ import annotations

import numpy as np


def normalised(weights: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    size = np.abs(weights) * (kinds != "constant")
    return size / np.maximum(size.sum(axis=1, keepdims=True), 1e-30)


def influence(shares: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p ((1 − Â)⁻¹ − 1)."""
    return p @ (np.linalg.inv(np.eye(len(p)) - shares) - np.eye(len(p)))


def scores(weights: np.ndarray, kinds: np.ndarray, p: np.ndarray) -> dict[str, float]:
    shares = normalised(weights, kinds)
    through = influence(shares, p)
    errors, inputs = through[kinds == "error"].sum(), through[kinds == "input"].sum()
    complete = 1 - shares[:, kinds == "error"].sum(axis=1)
    return {
        "replacement": inputs / (inputs + errors),
        "completeness": (complete * (through + p)).sum() / (through + p).sum(),
        "error_influence": errors / through.sum(),
    }


def pruned(
    weights: np.ndarray, kinds: np.ndarray, p: np.ndarray, node_threshold: float, edge_threshold: float
) -> tuple[set[int], set[tuple[int, int]]]:
    """Kept nodes, and edges (target, source)."""
    through = influence(normalised(weights, kinds), p)
    kept = set(_largest(through, node_threshold)) | {i for i, kind in enumerate(kinds) if kind in ("input", "logit")}
    kept = {i for i in kept if kinds[i] != "constant"}
    mask = np.isin(np.arange(len(p)), list(kept))
    shares = normalised(weights * mask[:, None] * mask, kinds)
    score = shares * (influence(shares, p) + p)[:, None]
    edges = {divmod(i, len(p)) for i in _largest(score.ravel(), edge_threshold)}
    while True:
        sources, targets = {s for _, s in edges}, {t for t, _ in edges}
        lost = {
            i
            for i in kept
            if (kinds[i] in ("feature", "error") and i not in sources) or (kinds[i] == "feature" and i not in targets)
        }
        if not lost:
            return kept, edges
        kept -= lost
        edges = {(t, s) for t, s in edges if t in kept and s in kept}


def _largest(scores: np.ndarray, share: float) -> list[int]:
    """Indices of the largest scores, ties with the last of them included, that reach a share of all."""
    ordered = np.sort(scores)[::-1]
    n = min(int((ordered.cumsum() < share * scores.sum()).sum()), len(ordered) - 1)
    return [int(i) for i in np.flatnonzero((scores > 0) & (scores >= ordered[n]))]
