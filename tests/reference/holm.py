"""Holm's adjusted p-values by closed testing: slow, and nothing like the step-down formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def closed_bonferroni(pvalues: Sequence[float]) -> list[float]:
    """A test's adjusted p is the largest Bonferroni p of any set of tests that holds it (Marcus et al. 1976)."""
    tests = range(len(pvalues))
    subsets = [subset for size in range(1, len(pvalues) + 1) for subset in combinations(tests, size)]
    return [max(min(1.0, len(s) * min(pvalues[j] for j in s)) for s in subsets if test in s) for test in tests]
