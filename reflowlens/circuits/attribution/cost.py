"""What an attribution graph takes, before it is made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from reflowlens.circuits.attribution.attribute import empty_rows, trace, unrounded
from reflowlens.circuits.attribution.edges.engine import BYTES_AT_ONCE
from reflowlens.circuits.attribution.edges.rows import BYTES_AN_EDGE, SparseRows
from reflowlens.circuits.attribution.targets import Targets
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded
from reflowlens.sweeps.batching import check_budget

_BYTES_A_NODE = 500  # of the frame
_SECONDS_AN_EDGE = 2e-8  # of influence


@dataclass(frozen=True)
class GraphCost:
    """What a graph takes.

    Args:
        nodes, edges: how many there are; of edges the most that there can be, or that are kept.
        multiply_adds: of all targets, counted as if each were carried over every position up to its own.
        bytes: of memory, above that of the model and the dictionary.
        seconds: on this machine as it is now.
    """

    nodes: int
    edges: int
    multiply_adds: float
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.nodes:,} nodes, at most {self.edges:,} edges, {self.bytes / 1e9:.2f} GB, "
            f"{self.multiply_adds / 1e9:,.1f} billion multiply-adds, about {self.seconds:.3g} s"
        )


@guarded(changing, lower="the length of the prompt, or neurons=")
@unrounded
@torch.no_grad()
def graph_cost(
    model: Any,
    prompt: TextInput,
    dictionary: Dictionary | None = None,
    targets: Targets = None,
    *,
    against: str | int | None = None,
    neurons: int = 32,
    heads: bool = False,
    signals: bool | None = None,
    edges_per_node: int | None = None,
    memory: float = 1e9,
    other_model: bool = False,
) -> GraphCost:
    """What :func:`reflowlens.attribute` takes with the same arguments: nodes, edges, memory, time.

    The model runs on the prompt, so that features are counted and not guessed. For the time one batch of targets of
    every block is made, the one of the last positions, and all targets of the block take as long by their
    multiply-adds: of a long prompt that is a hundredth of the work.

    Raises:
        ReflowlensError: as :func:`reflowlens.attribute`.

    Example: ``print(rl.graph_cost(model, "The capital of France is", dictionary))``
    """
    check_budget(memory)
    traced, _ = trace(model, prompt, dictionary, targets, against, neurons, heads, signals, other_model)
    engine = traced.engine
    rows = empty_rows(engine, edges_per_node, memory)
    batches, n_edges = engine.batches(), len(rows.weights)
    seconds = 0.0
    for _, group in groupby((batch for batch in batches if batch.work), key=lambda batch: batch.stage):
        *_, last = of_stage = list(group)
        began = time.perf_counter()
        values = last.values()
        SparseRows(rows.n_nodes, values.numel(), rows.n_kept, rows.per_row).add(last.first, values)
        seconds += (time.perf_counter() - began) * sum(batch.work for batch in of_stage) / last.work
    return GraphCost(
        nodes=rows.n_nodes,
        edges=n_edges,
        multiply_adds=sum(batch.work for batch in batches),
        bytes=BYTES_AN_EDGE * n_edges + _BYTES_A_NODE * rows.n_nodes + 4 * BYTES_AT_ONCE,
        seconds=seconds + _SECONDS_AN_EDGE * n_edges,
    )
