"""What the edges into each node of a graph add up to: what pruning leaves out of a row can be told afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int

from reflowlens.circuits.attribution.scores.influence import Vector

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_ROWS_AT_ONCE = 512  # copies of whole matrices would be most of the memory


def sums_of(graph: AttributionGraph, nodes: Int[Vector, " chosen"]) -> pd.DataFrame:
    """What goes into some nodes, before pruning.

    Args:
        nodes: their numbers.

    Returns:
        A row a node. ``sum``: of the weights of all edges into it. ``bias`` and ``rest``: of those from constants, and
        from what was not kept. ``size``: of the absolute weights of the others, and ``into`` how many these are.
        ``out``: how many edges go out of it.

    Example: ``sums_of(graph.prune(), np.arange(3))["sum"]``
    """
    if graph._sums is not None:
        return graph._sums.iloc[nodes].reset_index(drop=True)
    kind = graph.nodes["kind"].to_numpy()
    is_bias, is_rest = kind == "bias", kind == "rest"
    parts = []
    for first in range(0, len(nodes), _ROWS_AT_ONCE):
        rows = graph.matrix[nodes[first : first + _ROWS_AT_ONCE]].astype(np.float64)
        bias, rest, total = rows @ is_bias, rows @ is_rest, rows.sum(1)
        into = np.diff(rows.indptr)
        rows.data[:] = np.abs(rows.data)
        size = rows @ ~(is_bias | is_rest)
        rows.data[:] = 1.0
        into = into - (rows @ (is_bias | is_rest)).astype(int)
        parts.append(pd.DataFrame({"sum": total, "bias": bias, "rest": rest, "size": size, "into": into}))
    out = np.bincount(graph.matrix.indices, minlength=len(kind))[nodes]
    return pd.concat(parts, ignore_index=True).assign(out=out)
