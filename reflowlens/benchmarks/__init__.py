"""Benchmarks: each a ratio of two ways of doing one thing, alternated in one process so that both meet one machine."""

from __future__ import annotations

import pandas as pd

from reflowlens.benchmarks.decode import bench_decode as bench_decode
from reflowlens.benchmarks.dictionary import bench_dictionary as bench_dictionary
from reflowlens.benchmarks.graph import bench_graph as bench_graph
from reflowlens.benchmarks.hooks import bench_hooks as bench_hooks
from reflowlens.benchmarks.score import bench_score as bench_score
from reflowlens.benchmarks.steps import TrainBench as TrainBench
from reflowlens.benchmarks.sweep import bench_sweep as bench_sweep
from reflowlens.benchmarks.train import bench_train as bench_train


def run_benchmarks(which: str = "all") -> pd.DataFrame:
    """Run ``hooks``, ``decode`` or ``all`` of both.

    Returns:
        One row a comparison: ``benchmark``, ``ours_ms``, ``other_ms`` (medians), ``ratio`` (the median of other / ours
        over the rounds: above 1 we are faster) and ``of``, what was compared.
    """
    rows = bench_hooks() if which in ("hooks", "all") else []
    if which in ("decode", "all"):
        rows.append(bench_decode())
    return pd.DataFrame(rows)
