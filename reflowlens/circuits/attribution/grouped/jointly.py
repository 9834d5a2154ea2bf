"""Whether nodes that are removed together do what they do one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from reflowlens.circuits.attribution.performed.changed_pass import Level
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.performing import change_of
from reflowlens.circuits.attribution.scores.influence import Vector

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph
    from reflowlens.circuits.attribution.grouped.alike import Numbers


class JointRemoval(NamedTuple):
    """What removing nodes together has to do with removing each.

    Args:
        deviation: Σ w |J − S| / max(Σ w |J|, Σ w |S|) over the graph's other nodes, J what becomes of a node's value
            when all are removed, S the sum of what becomes of it when each is, and w the weight of the node:
            its influence over the sum of the |weights| that go into it. 0: the group is the sum of its members.
        likeness: the mean cosine of what two members do to the others, weighted alike. 1: all do the same.
    """

    deviation: float
    likeness: float


class Removals:
    """Nodes of a graph removed, one by one and together; what was done for one group is not done again for the next."""

    def __init__(self, graph: AttributionGraph, level: Level) -> None:
        self.graph, self.level = graph, level
        sums = np.asarray(abs(graph.matrix).sum(axis=1), dtype=np.float64)
        influence = graph.nodes["influence"].to_numpy() + graph.nodes["target"].to_numpy()
        has_value = graph.nodes["value"].notna().to_numpy() & (sums > 0)
        self.weights = np.where(has_value, influence / np.where(sums > 0, sums, 1.0), 0.0)
        self.found: dict[Numbers, Float[Vector, " node"]] = {}

    def agreement(self, groups: Sequence[Numbers]) -> list[JointRemoval]:
        """Of each group of two nodes or more.

        Raises:
            ReflowlensError: a node cannot be set, or the graph cannot be performed.
        """
        asked = dict.fromkeys([*((node,) for group in groups for node in group), *groups])
        missing = [nodes for nodes in asked if nodes not in self.found]
        if missing:
            changes = [change_of(self.graph, dict.fromkeys(nodes, 0.0)) for nodes in missing]
            values = np.nan_to_num(performed(self.graph, changes, self.level).values)
            self.found |= zip(missing, (values[1:] - values[0]) * self.weights, strict=True)
        return [self._agreement(group) for group in groups]

    def _agreement(self, group: Numbers) -> JointRemoval:
        joint, single = self.found[group].copy(), np.stack([self.found[node,] for node in group])
        joint[list(group)], single[:, list(group)] = 0.0, 0.0
        total = single.sum(axis=0)
        largest = max(np.abs(joint).sum(), np.abs(total).sum())
        units = single / np.maximum(np.linalg.norm(single, axis=1, keepdims=True), 1e-30)
        pairs = np.triu_indices(len(group), 1)
        return JointRemoval(
            float(np.abs(joint - total).sum() / max(largest, 1e-30)), float((units @ units.T)[pairs].mean())
        )
