"""Benchmarks: each a ratio of two ways of doing one thing, alternated in one process so that both meet one machine."""

from __future__ import annotations

from reflowlens.benchmarks.catalogue import BENCHMARKS as BENCHMARKS
from reflowlens.benchmarks.catalogue import Benchmark as Benchmark
from reflowlens.benchmarks.collection import bench_collection as bench_collection
from reflowlens.benchmarks.decode import bench_decode as bench_decode
from reflowlens.benchmarks.dictionary import bench_dictionary as bench_dictionary
from reflowlens.benchmarks.generate import bench_generate as bench_generate
from reflowlens.benchmarks.graph import bench_graph as bench_graph
from reflowlens.benchmarks.hooks import bench_hooks as bench_hooks
from reflowlens.benchmarks.load import bench_load as bench_load
from reflowlens.benchmarks.machine import machine as machine
from reflowlens.benchmarks.score import bench_score as bench_score
from reflowlens.benchmarks.steps import TrainBench as TrainBench
from reflowlens.benchmarks.sweep import bench_sweep as bench_sweep
from reflowlens.benchmarks.train import bench_train as bench_train
