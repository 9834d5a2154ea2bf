"""One graph of many prompts: nodes of all positions and prompts that are the same feature are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from reflowlens.arguments import number_of_runs, real_number, whole_number
from reflowlens.circuits.attribution.graph import INPUTS, AttributionGraph
from reflowlens.circuits.attribution.scores.intervals import mean_intervals
from reflowlens.circuits.task import TaskPerformance
from reflowlens.errors import ReflowlensError

_ENDS = (*INPUTS, "readout", "logit")  # in no block


@dataclass(frozen=True, repr=False, eq=False)
class MergedGraph:
    """What the graphs of several prompts have in common; ``rl.attribute_each(...).merged()`` makes it.

    Nodes of the same ``kind``, ``layer`` and ``feature`` are one, whatever their position: prompts of a task differ in
    length, and the same word stands in other places. Tokens, at the input and as targets, are told apart, directions
    are by their names; all differences of two tokens are one node ``logit``, that of the task. The weight of an edge in
    a prompt is the sum over all pairs of positions, and 0 where it did not survive pruning, as where a feature is not
    active.

    Attributes:
        nodes: a row a node, those of most influence first: ``node``, its name, such as ``feature:2.17``, ``kind``,
            ``layer``, ``feature``, ``label``, ``share`` of the prompts where it survives pruning, and ``influence``,
            the mean over prompts of the sum over positions, with ``low`` and ``high``.
        edges: a row an edge, the strongest first: ``source``, ``target``, ``share``, and ``weight``, the mean over
            prompts, with ``low`` and ``high``. What the mean is where the edge survives is ``weight / share``.
        n_prompts: how many there are. Intervals are percentile bootstraps of 95% over them.
        performance: whether the model does the task, where the prompts came with right and wrong answers.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    n_prompts: int
    performance: TaskPerformance | None = None

    @property
    def features(self) -> list[tuple[int, int]]:
        """(layer, number) of the features or neurons, those of most influence first."""
        units = self.nodes[self.nodes["kind"].isin(["feature", "neuron"])]
        return [(int(layer), int(feature)) for layer, feature in zip(units["layer"], units["feature"], strict=True)]

    def __repr__(self) -> str:
        return f"MergedGraph({self.n_prompts} prompts, {len(self.nodes):,} nodes, {len(self.edges):,} edges)"


def merge(graphs: Sequence[AttributionGraph], share: float, resamples: int, seed: int) -> MergedGraph:
    """The graph of several pruned ones; :meth:`reflowlens.circuits.attribution.many.AttributionGraphs.merged`."""
    if not 0 <= real_number(share, "share") <= 1:
        raise ReflowlensError(f"share is a share of the prompts from 0 to 1, got {share!r}")
    resamples, seed = number_of_runs(resamples, "resamples", 1), whole_number(seed, "seed", 0)
    every = pd.concat([graph.nodes.assign(prompt=number) for number, graph in enumerate(graphs)], ignore_index=True)
    number, names = pd.factorize(merged_names(every))
    influence = _by_prompt(every["prompt"], number, every["influence"], (len(graphs), len(names)))
    first = every.drop_duplicates(subset="prompt").index  # of each graph's nodes
    found = []
    for graph, start, prompt in zip(graphs, first, range(len(graphs)), strict=True):
        own, matrix = number[start : start + len(graph.nodes)], graph.matrix.tocoo()
        pairs = own[matrix.row].astype(np.int64) * len(names) + own[matrix.col]
        found.append((np.full(len(pairs), prompt), pairs, matrix.data))
    prompts, pairs, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    pairs, edge = np.unique(pairs, return_inverse=True)
    weight = _by_prompt(prompts, edge, weights, (len(graphs), len(pairs)))
    targets, sources = np.divmod(pairs, len(names))

    described = every.assign(number=number, label=_labels(every, number)).drop_duplicates("number")
    nodes = described[["kind", "layer", "feature", "label"]].reset_index(drop=True)
    nodes.insert(0, "node", names)
    nodes = _with_means(nodes, "influence", influence, share, resamples, seed)
    ends = {end: pd.Categorical.from_codes(codes, names) for end, codes in (("source", sources), ("target", targets))}
    edges = _with_means(pd.DataFrame(ends), "weight", weight, share, resamples, seed)
    return MergedGraph(nodes, edges, len(graphs))


def merged_names(nodes: pd.DataFrame) -> pd.Series:
    """What nodes of graphs are called where positions do not count, such as ``feature:2.17``."""
    layer = nodes["layer"].astype("string").where(~nodes["kind"].isin(_ENDS), "")
    of_direction = nodes["label"].astype("string").where(nodes["kind"] == "direction", "")
    feature = nodes["feature"].astype("string").fillna(of_direction)
    point = np.where((layer != "") & (feature != ""), ".", "")
    place = layer + point + feature
    return (nodes["kind"].astype("string") + ":" + place).str.removesuffix(":")


def _by_prompt(prompt: Any, column: Any, values: Any, shape: tuple[int, int]) -> Any:
    """Sums of what falls together, sparse, [prompt, column]; sums that are zero are entries all the same."""
    return sparse.coo_array((np.asarray(values, dtype=np.float64), (prompt, column)), shape=shape).tocsc()


def _labels(nodes: pd.DataFrame, number: Any) -> pd.Series:
    """The label of each node, where all that are one with it have the same."""
    labels = nodes["label"].groupby(number)
    return nodes["label"].where(labels.transform("nunique") == 1, "")


def _with_means(frame: pd.DataFrame, name: str, values: Any, share: float, resamples: int, seed: int) -> pd.DataFrame:
    """With the share of prompts, the mean and its interval, of what is shared enough; the largest first."""
    n_prompts = values.shape[0]
    shares = np.diff(values.indptr) / n_prompts
    kept = np.flatnonzero(shares >= share)
    values = values[:, kept]
    low, high = mean_intervals(values, resamples, seed)
    columns = {"share": shares[kept], name: values.sum(axis=0) / n_prompts, "low": low, "high": high}
    frame = frame.iloc[kept].reset_index(drop=True).assign(**columns)
    return frame.sort_values(name, key=np.abs, ascending=False, kind="stable", ignore_index=True)
