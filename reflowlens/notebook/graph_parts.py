"""What a page of an attribution graph holds: its nodes and edges up to a bound, and what was left out of each sum."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from reflowlens.circuits.attribution.graph import LEFT_OUT, PROMPT
from reflowlens.circuits.attribution.scores.influence import Shares
from reflowlens.circuits.attribution.scores.sums import sums_of
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.notebook.feature_files import digits
from reflowlens.notebook.graph_words import words_of

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Vector = np.ndarray
Groups = Sequence[Sequence[str]]
NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98  # of the influence, and of the edges' scores, as graph.prune has them
_STRONGEST = 8  # edges into each node, and out of it, that are kept whatever their score


def page_parts(graph: AttributionGraph, groups: Groups, max_nodes: int, max_edges: int) -> dict[str, Any]:
    """A graph as JSON, pruned to what a page can show.

    Kept are the nodes that ``graph.prune()`` keeps, fewer where they are more than ``max_nodes`` beside inputs and
    targets, those of groups, and among them the edges of the highest score, ``max_edges`` or little more: each node's
    strongest stay. A graph that is pruned already is kept as it is, within the same bounds.

    Args:
        groups: ``[[label, node, ...], ...]``.

    Returns:
        ``nodes``: a list; ``left`` of each is what the edges into it that are not on the page add up to. ``edges``:
        columns in base64, those of the highest score first. ``all``: how many there were.
    """
    nodes = graph.nodes
    named = [node for group in checked_groups(graph, groups) for node in group[1:]]
    chosen = np.flatnonzero(_kept(graph, max_nodes) | nodes["node"].isin(named).to_numpy())
    among = graph.matrix[chosen][:, chosen]
    targets = nodes["target"].to_numpy()[chosen]
    shares = Shares.of(among, targets, np.zeros(len(chosen), dtype=bool))
    scores = shares.of_edges(shares.influence())
    ends, sources = np.repeat(np.arange(len(chosen)), np.diff(among.indptr)), among.indices
    edges = _strongest_edges(ends, sources, among.data, scores, max_edges)
    kept = pd.DataFrame({"target": ends[edges], "weight": among.data[edges].astype(np.float64)})
    return {
        "tokens": list(graph.tokens),
        "nodes": _nodes(graph, chosen, kept.groupby("target")["weight"].agg(["sum", "count"]), sources[edges]),
        "edges": {
            "source": _packed(sources[edges], "<u2"),
            "target": _packed(ends[edges], "<u2"),
            "weight": _packed(among.data[edges], "<f4"),
            "score": _packed(scores[edges] / max(scores.sum(), 1e-30), "<f4"),
        },
        "all": {
            "nodes": int((~nodes["kind"].isin(LEFT_OUT)).sum()),
            "edges": int(graph.matrix.nnz),
            "kept": digits(_kept_influence(nodes, chosen)),
        },
    }


def checked_groups(graph: AttributionGraph, groups: Groups) -> Groups:
    """Raise unless groups are ``[[label, node, ...], ...]`` of nodes that exist, each in one group."""
    names, seen = set(graph.nodes.loc[~graph.nodes["kind"].isin(LEFT_OUT), "node"]), set[str]()
    for group in groups:
        is_list = isinstance(group, Sequence) and not isinstance(group, str)
        if not is_list or len(group) < 2 or not all(isinstance(each, str) for each in group):
            raise ReflowlensError(f"a group is [label, node, ...] with one node at least, got {group!r}")
        for node in group[1:]:
            if node not in names:
                raise ReflowlensError(f"no node {node!r} for group {group[0]!r}{nearest(node, list(names))}")
            if node in seen:
                raise ReflowlensError(f"node {node!r} is in two groups, or twice in one: a node is in one at most")
            seen.add(node)
    return groups


def _kept(graph: AttributionGraph, max_nodes: int) -> Any:
    """Which nodes the page holds."""
    nodes = graph.nodes
    always = (nodes["kind"].isin(PROMPT) | (nodes["target"] > 0)).to_numpy()
    is_constant = nodes["kind"].isin(LEFT_OUT).to_numpy()
    cumulative = nodes["cumulative"].to_numpy()
    others = np.sort(cumulative[~always & ~is_constant])
    threshold = 1.0
    if len(others) > max_nodes:  # amid two nodes, for pruning has sums of its own, which are rounded otherwise
        last = max_nodes if graph.is_pruned else max_nodes - 1
        threshold = float(others[last - 1 : last + 1].mean())
    if graph.is_pruned:
        return always | (cumulative <= threshold)
    return nodes["node"].isin(graph.prune(min(threshold, NODE_THRESHOLD), EDGE_THRESHOLD).nodes["node"]).to_numpy()


def _kept_influence(nodes: pd.DataFrame, chosen: Int[Vector, " kept"]) -> float:
    """The share of all influence that chosen nodes have; what all have is told by the node of most."""
    influence = np.where(nodes["kind"].isin(LEFT_OUT), 0.0, nodes["influence"].to_numpy(dtype=np.float64))
    most = int(influence.argmax())
    if influence[most] == 0:
        return 1.0
    return float(influence[chosen].sum() * nodes["cumulative"].to_numpy()[most] / influence[most])


def _strongest_edges(
    ends: Int[Vector, " edge"],
    sources: Int[Vector, " edge"],
    weights: Float[Vector, " edge"],
    scores: Float[Vector, " edge"],
    max_edges: int,
) -> Int[Vector, " kept"]:
    """The edges of the highest score, and the strongest of each node; those of the highest score first."""
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(order), dtype=bool)
    kept[order[:max_edges]] = True
    frame = pd.DataFrame({"target": ends, "source": sources, "size": np.abs(weights)})
    for end in ("target", "source"):
        kept |= (frame.groupby(end)["size"].rank(method="first", ascending=False) <= _STRONGEST).to_numpy()
    return order[kept[order] & (weights[order] != 0)]


def _nodes(
    graph: AttributionGraph, chosen: Int[Vector, " kept"], into: pd.DataFrame, sources: Int[Vector, " edge"]
) -> list[dict[str, Any]]:
    nodes, sums = graph.nodes.iloc[chosen], sums_of(graph, chosen)
    into = into.reindex(range(len(chosen)), fill_value=0)
    unseen = sums["sum"].to_numpy() - sums["bias"].to_numpy() - sums["rest"].to_numpy() - into["sum"].to_numpy()
    n_unseen = sums["into"].to_numpy() - into["count"].to_numpy()
    n_unseen_out = sums["out"].to_numpy() - np.bincount(sources, minlength=len(chosen))
    words, found = words_of(graph, nodes), []
    for i, (row, of) in enumerate(zip(nodes.to_dict("records"), sums.to_dict("records"), strict=True)):
        node = {
            "id": row["node"],
            "kind": row["kind"],
            "layer": int(row["layer"]),
            "pos": _integer(row["pos"]),
            "feature": _integer(row["feature"]),
            "label": row["label"],
            "activation": digits(row["activation"]),
            "value": _long(row["value"]),
            "influence": digits(row["influence"]),
            "share": digits(row["cumulative"]),
            "target": digits(row["target"]),
            "probability": digits(row["probability"]),
            "size": digits(of["size"]),
            "unseenOut": int(n_unseen_out[i]),
        }
        if of["into"]:
            node["left"] = {
                "bias": _long(of["bias"]),
                "rest": _long(of["rest"]),
                "unseen": _long(unseen[i]),
                "n": int(n_unseen[i]),
                "sum": _long(of["sum"]),
            }
        if row["node"] in words:
            node["up"], node["down"] = words[row["node"]]
        found.append(node)
    return found


def _integer(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _long(value: float) -> float | None:
    """To seven digits: numbers that are added up."""
    return float(f"{value:.7g}") if np.isfinite(value) else None


def _packed(values: Any, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
