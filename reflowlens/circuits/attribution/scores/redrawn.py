"""The graph of the same frozen prompt with something else in place of its features."""

from __future__ import annotations

import torch

from reflowlens.circuits.attribution.edges.engine import Engine
from reflowlens.circuits.attribution.edges.layout import layout_of, possible_edges
from reflowlens.circuits.attribution.edges.rows import SparseRows
from reflowlens.circuits.attribution.edges.table import graph_of
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.linear.replacement import Replacement
from reflowlens.circuits.attribution.traced import Traced


@torch.no_grad()
def redrawn(traced: Traced, replacement: Replacement) -> AttributionGraph:
    """The whole graph of another replacement of the MLPs: patterns, norm scales, skips, inputs and targets stay.

    Args:
        traced: of a graph whose targets are tokens.
        replacement: whose written parts add up to what those of the graph do.
    """
    own = traced.engine
    layout = layout_of(replacement, own.inputs, own.end, len(traced.tokens))
    engine = Engine(own.frozen, replacement, own.inputs, own.end, layout)
    n_edges, _ = possible_edges(layout, replacement, own.inputs, own.frozen.alone)
    rows = SparseRows(layout.n_nodes, n_edges, layout.first_input[0], None)
    for batch in engine.batches():
        rows.add(batch.first, batch.values())
    return graph_of(Traced(traced.model, traced.dictionary, traced.tokens, engine), rows, [])
