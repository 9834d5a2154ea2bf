"""`rl.attribute` against autograd: attribution graphs of packaged transcoders, of a few tokens and of many."""

from __future__ import annotations

import copy
import lzma
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.benchmarks.autograd_graph import DenseGraph, autograd_graph
from reflowlens.benchmarks.peak_memory import forget_peak, peak_resident
from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import alternate, ratio
from reflowlens.checkpoints import load_model
from reflowlens.circuits.attribution.attribute import attribute
from reflowlens.circuits.attribution.graph import LEFT_OUT, AttributionGraph
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import load_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.examples import ASSETS
from reflowlens.models.decoder import Decoder
from reflowlens.progress import bar

MODELS = {"reflow-nano-plt": "reflow-nano", "reflow-nano-clt": "reflow-nano", "gpt2-new-nano-plt": "gpt2-new-nano"}
OURS, TUNED, COPIES = "ours", "tuned", "copies"
_SECONDS = 60  # of a comparison, after which it takes no further round
_ALL_EDGES = 1e12  # bytes: no bound where edges are compared
_LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class GraphCase:
    """A graph to make.

    Args:
        compared: whether autograd makes it too; otherwise ``rl.attribute`` keeps the edges that its default memory
            holds, and all of them elsewhere.
    """

    name: str
    model: Decoder
    dictionary: Dictionary
    tokens: Int[Tensor, " pos"]
    compared: bool = True

    def make(self, way: str) -> AttributionGraph | DenseGraph:
        if way != OURS:
            return autograd_graph(self.model, self.tokens, self.dictionary, way)
        if not self.compared:
            return attribute(self.model, self.tokens, self.dictionary, progress=False)
        return attribute(self.model, self.tokens, self.dictionary, memory=_ALL_EDGES, progress=False)


def make_case(name: str, n_tokens: int, k: int | None = None, compared: bool = True) -> GraphCase:
    """A packaged dictionary on the first tokens of the packaged plays.

    Args:
        k: how many features of a layer are active at a position, where other than in training.
        compared: as of :class:`GraphCase`.
    """
    model, dictionary = cast(Decoder, load_model(MODELS[name])), load_dictionary(name)
    if k is not None:
        dictionary = copy.deepcopy(dictionary)
        for layer in dictionary.each_layer():
            layer.k = k
    text = lzma.decompress((ASSETS / "shakespeare.txt.xz").read_bytes())[:10_000].decode()
    return GraphCase(name, model, dictionary, torch.tensor(model.tokenizer.encode(text)[:n_tokens]), compared)


def bench_graph(
    n_tokens: Sequence[int] = (16, 32, 64, 128, 256),
    dictionaries: Sequence[str] = tuple(MODELS),
    *,
    k: Sequence[int] = (8, 16, 32, 64),
    most: int = 128,
    rounds: int = 5,
) -> Iterator[Row]:
    """Time whole graphs, forward pass, features, edges and influence, in turns in one process, after comparing their
    edges, and measure their memory, each in a process of its own.

    Args:
        n_tokens: of the prompts.
        dictionaries: packaged transcoders.
        k: active features a layer and position, for which the first dictionary is measured at 64 tokens or the most.
        most: tokens, above which autograd, whose matrix is dense, is left out.
        rounds: of all in turn, but none begins after a minute.

    Yields:
        One row a case: ``dictionary``, ``tokens``, ``features``, ``nodes``, ``edges``, ``ours_s`` (median), ``growth``
        (a: time is as features to the power of a, against the row above), ``ours_mb``, and of autograd, ``tuned`` and
        by ``copies`` as circuit-tracer does it, seconds, ratio (median of its time / ours) and memory, and
        ``difference``, the largest between edges, of the largest edge.

    Raises:
        ReflowlensError: edges are not the same.
    """
    if not n_tokens or not dictionaries:
        raise ReflowlensError("bench_graph needs numbers of tokens and dictionaries")
    cases: list[tuple[str, int, int | None]] = [(name, n, None) for name in dictionaries for n in n_tokens]
    middle = max((n for n in n_tokens if n <= 64), default=min(n_tokens))
    cases += [(dictionaries[0], middle, active) for active in k]
    rows: list[dict[str, Any]] = []
    for name, n, active in bar(cases, show=True, unit="graph"):
        case = make_case(name, n, active, compared=n <= most and active is None)
        row = measure(case, rounds)
        for way in ways_of(case):
            row[f"{way}_mb"] = round(_peak_memory(way, name, n, active, case.compared) / 2**20)
        rows.append(row | {"growth": _growth(rows, row)})
        yield rows[-1]


def ways_of(case: GraphCase) -> tuple[str, ...]:
    return (OURS, TUNED, COPIES) if case.compared else (OURS,)


def measure(case: GraphCase, rounds: int) -> dict[str, Any]:
    """A row of :func:`bench_graph` without its memory."""
    graph = cast(AttributionGraph, case.make(OURS))
    row: dict[str, Any] = {
        "dictionary": case.name,
        "tokens": len(case.tokens),
        "features": int((graph.nodes["kind"] == "feature").sum()),
        "nodes": len(graph.nodes),
        "edges": graph.matrix.nnz,
    }
    others = ways_of(case)[1:]
    differences = [difference(graph, cast(DenseGraph, case.make(way))) for way in others]
    for way, each in zip(others, differences, strict=True):
        if not each <= _LARGEST_DIFFERENCE:
            raise ReflowlensError(f"edges by {way!r} differ from ours by {each:.1e} of the largest")
    del graph
    calls: dict[str, Callable[[], object]] = {way: partial(case.make, way) for way in ways_of(case)}
    times = alternate(calls, rounds, warm_up=0, at_most=_SECONDS)
    row["ours_s"] = round(statistics.median(times[OURS]), 3)
    for way in others:
        row |= {f"{way}_s": round(statistics.median(times[way]), 3), way: round(ratio(times[way], times[OURS]), 1)}
    return row | ({"difference": max(differences)} if differences else {})


def difference(graph: AttributionGraph, other: DenseGraph) -> float:
    """The largest between edges, of the largest edge, or between influences, of the largest influence."""
    first = int(graph.nodes["kind"].isin(LEFT_OUT).sum())  # biases are no nodes of the other
    influence = torch.tensor(graph.nodes["influence"].to_numpy()[first:])
    largest = float((influence - other.influence).abs().max() / influence.max())
    size = float(other.edges.abs().max())
    for start in range(0, len(other.edges), 512):
        theirs = other.edges[start : start + 512]
        ours = torch.from_numpy(graph.matrix[first + start : first + start + len(theirs)].toarray()[:, first:])
        largest = max(largest, float((ours - theirs).abs().max()) / size)
    return largest


def _growth(above: list[dict[str, Any]], row: dict[str, Any]) -> float:
    if not above or above[-1]["dictionary"] != row["dictionary"] or above[-1]["features"] >= row["features"]:
        return math.nan
    last = above[-1]
    return round(math.log(row["ours_s"] / last["ours_s"]) / math.log(row["features"] / last["features"]), 2)


def _peak_memory(way: str, name: str, n_tokens: int, k: int | None, compared: bool) -> int:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = "import sys; from reflowlens.benchmarks.graph import print_memory; print_memory(*sys.argv[1:])"
    arguments = [way, name, str(n_tokens), str(k or ""), str(compared or "")]
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], capture_output=True, text=True, env=os.environ | threads
    )
    if done.returncode != 0:
        raise ReflowlensError(f"measuring the memory of {way!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def print_memory(way: str, name: str, n_tokens: str, k: str, compared: str) -> None:
    """Make a graph and print how far it raises the process's largest size."""
    make_case(name, 4).make(way)  # the libraries
    case = make_case(name, int(n_tokens), int(k) if k else None, bool(compared))
    forget_peak()
    before = peak_resident()
    graph = case.make(way)
    print(peak_resident() - before)
    del graph  # until now
