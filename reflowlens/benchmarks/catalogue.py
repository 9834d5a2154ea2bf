"""The benchmarks by name: what each measures in full and quickly, and how its rows are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from reflowlens.benchmarks.collection import bench_collection
from reflowlens.benchmarks.decode import bench_decode
from reflowlens.benchmarks.dictionary import bench_dictionary
from reflowlens.benchmarks.generate import bench_generate
from reflowlens.benchmarks.graph import COPIES, TUNED, bench_graph
from reflowlens.benchmarks.hooks import bench_hooks
from reflowlens.benchmarks.load import LLAMA_135M, bench_load
from reflowlens.benchmarks.machine import machine
from reflowlens.benchmarks.score import bench_score
from reflowlens.benchmarks.steps import OURS, TrainBench
from reflowlens.benchmarks.sweep import bench_sweep, quick_cases
from reflowlens.benchmarks.table import Row, lines, named
from reflowlens.benchmarks.train import bench_train

_COMPARED = ("ours_ms", "other_ms", "ratio", "difference")
_GRAPHS = ("features", "nodes", "edges", "ours_s", "growth", "ours_mb", "tuned_s", TUNED, "copies_s", COPIES)


@dataclass(frozen=True)
class Benchmark:
    """Comparisons of two ways of doing one thing.

    Args:
        rows: the function that yields them.
        quick: the same in less than two minutes on two cores.
        numbers, texts: columns of its table; the texts name a row.
        ratios: columns above 1 where ours is faster.
    """

    rows: Callable[..., Iterable[Row]]
    quick: Callable[..., Iterable[Row]]
    numbers: Sequence[str] = _COMPARED
    texts: Sequence[str] = ("of",)
    ratios: Sequence[str] = ("ratio",)

    def lines(self, rows: Iterable[Row]) -> Iterator[str]:
        """The machine, then a header and each row as it comes."""
        yield machine()
        yield from lines(rows, self.numbers, self.texts)

    def ratios_of(self, rows: Iterable[Row]) -> Iterator[tuple[str, float]]:
        """The name of each ratio, and the ratio."""
        for row in rows:
            for column in self.ratios:
                if column in row:
                    of = named(row, self.texts)
                    yield of if column == "ratio" else f"{of}: {column}", row[column]


def _train(steps: int, **changes: Any) -> Iterator[Row]:
    frame = bench_train(TrainBench.named(**changes), steps=steps).frame.dropna(subset="ratio")
    yield from frame[frame["variant"] != OURS].to_dict("records")  # type: ignore[misc] # columns are texts


BENCHMARKS = {
    "hooks": Benchmark(bench_hooks, partial(bench_hooks, compiled=False, rounds=9)),
    "decode": Benchmark(bench_decode, partial(bench_decode, steps=8)),
    "generate": Benchmark(bench_generate, partial(bench_generate, new_tokens=16, rounds=3), _COMPARED[:3]),
    "sweep": Benchmark(
        bench_sweep,
        lambda: bench_sweep(quick_cases(), patches=200, rounds=2),
        ("cells", *_COMPARED, "flops", "floor"),
        ("of", "case"),
    ),
    "score": Benchmark(
        bench_score,
        partial(bench_score, rounds=3),
        ("tokens", "ours_tokens_per_s", "bare_tokens_per_s", "ratio", "difference"),
    ),
    "collection": Benchmark(bench_collection, partial(bench_collection, batches=2, rounds=3)),
    "load": Benchmark(
        bench_load,
        partial(bench_load, dataclasses.replace(LLAMA_135M, n_layers=6)),
        ("seconds", "peak_mb", "weights_mb", "relative", "ratio"),
    ),
    "train": Benchmark(
        partial(_train, steps=10),
        partial(_train, steps=3, batch=4),
        ("tokens_per_s", "ratio", "memory_mb", "memory_ratio", "mfu"),
        ("variant",),
    ),
    "dictionary": Benchmark(
        bench_dictionary,
        partial(bench_dictionary, (2048,), rounds=3),
        ("tokens_per_s", "against_dense", "peak_mb", "loss"),
        ("step", "features"),
        ("against_dense",),
    ),
    "graph": Benchmark(
        bench_graph,
        partial(bench_graph, (16, 32), ("reflow-nano-plt",), k=(), rounds=2),
        (*_GRAPHS, "difference"),
        ("dictionary", "tokens"),
        (TUNED, COPIES),
    ),
}
