"""What the edges into each node of a graph add up to: what pruning leaves out of a row can be told afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_ROWS_AT_ONCE = 512  # copies of whole matrices would be most of the memory


def sums_of(graph: AttributionGraph) -> pd.DataFrame:
    """A row a node.

    Returns:
        ``sum``: of the weights of all edges into it. ``bias`` and ``rest``: of those from constants, and from what was
        not kept. ``size``: of the absolute weights of the others, and ``into`` how many these are. ``out``: how many
        edges go out of it.

    Example: ``graph.prune().sums`` is of all edges before pruning.
    """
    kinds, n = graph.nodes["kind"].to_numpy(), len(graph.nodes)
    parts = []
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = graph.matrix[first : first + _ROWS_AT_ONCE].astype(np.float64)
        sizes, is_constant = abs(rows), np.isin(kinds, ["bias", "rest"])
        edges = sizes.astype(bool).astype(np.float64)
        of = {"sum": rows.sum(1), "bias": rows @ (kinds == "bias"), "rest": rows @ (kinds == "rest")}
        parts.append(pd.DataFrame(of | {"size": sizes @ ~is_constant, "into": edges @ ~is_constant}))
    found = pd.concat(parts, ignore_index=True).astype({"into": int})
    return found.assign(out=np.bincount(graph.matrix.indices, minlength=n))
