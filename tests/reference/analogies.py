"""Ranks of analogies' answers by plain loops over candidates: the oracle of `analyses.semantic_algebra`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

Vector = np.ndarray


def cosine(u: Vector, v: Vector) -> float:
    length = float(np.sqrt(np.sum(u * u)) * np.sqrt(np.sum(v * v)))
    return float(np.sum(u * v)) / length if length else 0.0


def score(method: str, rows: Vector, a: int, b: int, c: int, x: int) -> float:
    """How well row x completes a - b + c."""
    unit = {i: rows[i] / np.linalg.norm(rows[i]) for i in (a, b, c)}
    shifted: Callable[[int], float] = lambda i: (cosine(rows[x], rows[i]) + 1) / 2  # noqa: E731
    if method == "add":
        return cosine(rows[x], rows[a] - rows[b] + rows[c])
    if method == "add_unit":
        return cosine(rows[x], unit[a] - unit[b] + unit[c])
    if method == "mul":
        return shifted(a) * shifted(c) / (shifted(b) + 1e-3)
    if method == "c_alone":
        return cosine(rows[x], rows[c])
    if method == "a_plus_c":
        return cosine(rows[x], rows[a] + rows[c])
    raise ValueError(method)


def rank(method: str, rows: Vector, quadruple: Sequence[int], candidates: Collection[int], exclude: bool) -> int:
    """1 + the number of candidates that complete the analogy at least as well as the expected word."""
    a, b, c, expected = quadruple
    bar = score(method, rows, a, b, c, expected)
    rivals = set(candidates) - {expected} - ({a, b, c} if exclude else set())
    return 1 + sum(score(method, rows, a, b, c, x) >= bar for x in rivals)
