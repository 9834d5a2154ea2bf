"""How alike the nodes of a graph are, by what goes into them, what comes out of them and what they write; clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import ClusterNode, linkage, to_tree
from scipy.spatial.distance import squareform
from torch import Tensor

from reflowlens.circuits.attribution.scores.influence import Vector
from reflowlens.circuits.attribution.traced import Traced

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Numbers = tuple[int, ...]
"""Of nodes, in ascending order."""


@dataclass(frozen=True)
class Cluster:
    """Nodes, the mean similarity of the two parts that they were joined of, and these parts."""

    nodes: Numbers
    similarity: float
    parts: tuple[Cluster, ...]


def similarity(graph: AttributionGraph, numbers: Sequence[int]) -> Float[Vector, "node node"]:
    """The mean of three cosines: of in-edges, of out-edges, and of what two nodes write on the prompt.

    In-edges of a node are weights as shares of all that goes into it. Out-edges are shares of what goes into their
    targets, times the influence of these: edge scores with a sign. What other nodes than features and neurons write has
    cosine 0 to everything.

    Args:
        numbers: of the nodes, in ``graph.nodes``.
    """
    weights, shares = graph.matrix.astype(np.float64), graph.shares
    sums = np.asarray(abs(weights).sum(axis=1))
    scaled = weights.multiply((1 / np.where(sums > 0, sums, 1.0))[:, None]).tocsr()
    through = graph.nodes["influence"].to_numpy() + shares.targets
    scores = scaled.multiply(through[:, None]).tocsc()
    chosen = np.asarray(numbers)
    profiles = [scaled[chosen].toarray(), scores[:, chosen].toarray().T]
    if graph.traced is not None:
        rows, written = graph.nodes.iloc[chosen], np.zeros((len(chosen), graph.traced.model.cfg.d_model))
        units = np.flatnonzero(rows["kind"].isin(UNITS))
        written[units] = written_by(graph.traced, rows.iloc[units]).double().cpu().numpy()
        profiles.append(written)
    units_ = [profile / np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-30) for profile in profiles]
    return np.mean([unit @ unit.T for unit in units_], axis=0)


UNITS = ("feature", "neuron")


def written_by(traced: Traced, rows: pd.DataFrame) -> Float[Tensor, "node d_model"]:
    """What features or neurons write on the prompt, summed over the blocks that they write to.

    Args:
        rows: theirs, of ``graph.nodes``.
    """
    replacement = traced.engine.replacement
    found = torch.zeros(len(rows), traced.model.cfg.d_model, device=traced.tokens.device)
    layers = rows["layer"].to_numpy()
    for layer in dict.fromkeys(layers.tolist()):
        units = replacement.units[layer]
        places = {place: i for i, place in enumerate(zip(units.index.tolist(), units.position.tolist(), strict=True))}
        here = rows[layers == layer]
        asked = zip(here["feature"].astype(int), here["pos"].astype(int), strict=True)
        numbers = torch.tensor([places[place] for place in asked], device=found.device)
        parts = [block.by_units[layer][numbers] for block in replacement.written if layer in block.by_units]
        found[torch.from_numpy(layers == layer)] = torch.stack(parts).sum(0).to(found)
    return found


def tree_of(graph: AttributionGraph, numbers: Sequence[int]) -> Cluster | None:
    """All nodes in one cluster, joined two by two in the order of their mean similarity; None of no node."""
    ordered = sorted(numbers)
    if not ordered:
        return None
    if len(ordered) == 1:
        return Cluster((ordered[0],), 1.0, ())
    distance = np.clip(1 - similarity(graph, ordered), 0.0, None)
    np.fill_diagonal(distance, 0.0)
    condensed = squareform((distance + distance.T) / 2, checks=False)

    def cluster(joined: ClusterNode | None) -> Cluster:
        assert joined is not None
        nodes = tuple(sorted(ordered[leaf] for leaf in joined.pre_order()))
        if joined.is_leaf():
            return Cluster(nodes, 1.0, ())
        return Cluster(nodes, 1 - joined.dist, (cluster(joined.left), cluster(joined.right)))

    return cluster(to_tree(linkage(condensed, "average")))


def at_least(cluster: Cluster, least: float) -> list[Cluster]:
    """The largest clusters within one whose similarity is at least that, single nodes included."""
    if cluster.similarity >= least or not cluster.parts:
        return [cluster]
    return [part for each in cluster.parts for part in at_least(each, least)]
