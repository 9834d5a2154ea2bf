"""Attribution graphs as the JSON that the viewers of circuit-tracer and Neuronpedia read.

    {slug}.json              {"metadata", "qParams", "nodes", "links"}
    graph-metadata.json      {"graphs": [metadata, ...]}, the list of a folder

They know features, errors, tokens and logits. What else there is in a graph is folded into these, so that a target's
links still add up to what they did: learned positions and the signals of recipes into their token, signals of the
readout into the links of what writes them to the logits. Neurons and heads are drawn as features, a direction that is
explained as a logit. Biases, and edges that were not kept, have no place there. Ids of errors are our own: theirs are
also ids of features of block 0.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import sparse

from reflowlens.circuits.attribution.edges.table import nodes_of
from reflowlens.circuits.attribution.explained.attention import WhyAttended
from reflowlens.circuits.attribution.graph import INPUTS, LEFT_OUT, AttributionGraph
from reflowlens.circuits.attribution.traced import traced_of
from reflowlens.conversion.qk_tracing import qk_tracing_results
from reflowlens.errors import ReflowlensError
from reflowlens.notebook.feature import cantor
from reflowlens.storage.atomic import replacing
from reflowlens.storage.opening import as_path, read_json

LIST = "graph-metadata.json"
FEATURE = "cross layer transcoder"  # of per-layer ones too
_TYPES = {"feature": FEATURE, "neuron": FEATURE, "head": FEATURE, "error": "mlp reconstruction error"}


def write_graph_json(graph: AttributionGraph, path: str | Path, **fields: Any) -> Path:
    """Write :func:`graph_json` to a file, named by its slug, and list it in the folder's ``graph-metadata.json``.

    Args:
        path: ``out/capital.json`` has the slug ``capital``.
        fields: of :func:`graph_json`.

    Raises:
        ReflowlensError: the folder's list is something else.

    Example: ``write_graph_json(graph.prune(), "out/capital.json")``
    """
    path = as_path(path)
    listed = path.parent / LIST
    graphs = _listed(listed)
    content = graph_json(graph, path.stem, **fields)
    with replacing(path) as new:
        new.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    others = [each for each in graphs if each.get("slug") != path.stem]
    with replacing(listed) as new:
        new.write_text(
            json.dumps({"graphs": [*others, content["metadata"]]}, ensure_ascii=False, indent=1), encoding="utf-8"
        )
    return path


def graph_json(
    graph: AttributionGraph,
    slug: str,
    *,
    groups: Iterable[Sequence[str]] = (),
    pinned: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    features: str | None = None,
    attended: Iterable[WhyAttended] = (),
) -> dict[str, Any]:
    """A graph as plain lists and dictionaries, by the published schema, version 1.

    Args:
        graph: usually a pruned one: a viewer draws what it is given.
        slug: the graph's name in a viewer.
        groups: supernodes, each a label and the names of its nodes.
        pinned: names of nodes that are shown in the subgraph from the start.
        labels: of nodes by their names; of other features a viewer shows what the feature's file says.
        features: the address of a folder of feature files, ``{features}/{number}.json``.
        attended: explanations of heads that are nodes (``graph.why_attended``), which become their
            ``qk_tracing_results`` (:mod:`reflowlens.conversion.qk_tracing`); at most one a head and query.

    Raises:
        ReflowlensError: a group, a pinned node or an explanation names something that is not in the graph.

    Example: ``graph_json(graph, "capital", attended=[graph.why_attended(layer=3, head=0, query=12, key=3)])``
    """
    attended = list(attended)
    nodes, links = _folded(graph)
    ids = dict(zip(nodes["node"], nodes["id"], strict=True))
    heads = nodes["node"][nodes["kind"] == "head"]
    traced = qk_tracing_results(attended, heads, _ids_of_sources(graph)) if attended else {}
    features_and_errors = nodes["cumulative"][nodes["kind"].isin(_TYPES)]
    scores = ", ".join(f"{name} {value:.3f}" for name, value in graph.scores().items())
    metadata = {
        "slug": slug,
        "scan": graph.of,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": float(features_and_errors.max()) if len(features_and_errors) else None,
        "schema_version": 1,
        "info": {
            "description": f"{graph.of}: {scores}",
            "generator": {"name": "reflowlens", "version": importlib.metadata.version("reflowlens"), "url": ""},
            "create_time_ms": int(time.time() * 1000),
        },
    }
    if features is not None:
        metadata["feature_details"] = {"feature_json_base_url": features}
    return {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": _ids_of(pinned, ids),
            "supernodes": [[label, *_ids_of(names, ids)] for label, *names in groups],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            _node(node, len(graph.tokens), labels or {})
            | ({"qk_tracing_results": traced[node["node"]]} if node["node"] in traced else {})
            for node in _records(nodes)
        ],
        "links": [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in links],
    }


def _folded(graph: AttributionGraph) -> tuple[pd.DataFrame, list[tuple[str, str, float]]]:
    """Nodes of the four types that there are, with their ids, and the links between them."""
    nodes, matrix = graph.nodes.reset_index(drop=True), graph.matrix.astype(np.float64)
    names, kinds = nodes["node"].to_numpy(), nodes["kind"].to_numpy()
    readout = (kinds == "readout") & (nodes["value"].to_numpy(float, na_value=0.0) != 0)
    if readout.any():  # a logit is a sum over signals, and each signal a sum over what was written into it
        per_unit = np.divide(1.0, nodes["value"].to_numpy(float), out=np.zeros(len(nodes)), where=readout)
        matrix = matrix + matrix @ sparse.diags_array(per_unit) @ matrix
    drawn_as = np.where(np.isin(kinds, (*LEFT_OUT, "readout")), -1, np.arange(len(nodes)))
    token_nodes: dict[int, int] = {}  # by position
    for i in np.flatnonzero(np.isin(kinds, INPUTS)):
        drawn_as[i] = token_nodes.setdefault(int(nodes["pos"][i]), int(i))
    folded = np.flatnonzero(drawn_as >= 0)
    fold = sparse.csr_array((np.ones(len(folded)), (drawn_as[folded], folded)), shape=matrix.shape)
    weights = (fold @ matrix @ fold.T).tocoo()
    links = [
        (names[source], names[target], float(weight))
        for target, source, weight in zip(*weights.coords, weights.data, strict=True)
        if weight != 0
    ]
    nodes["cumulative"] = nodes["cumulative"].groupby(drawn_as).min().reindex(nodes.index)
    nodes.loc[list(token_nodes.values()), "kind"] = "embedding"
    if not readout.any():
        nodes.loc[kinds == "logit", "layer"] += 1  # there is a layer of the readout between
    nodes = nodes[drawn_as == np.arange(len(nodes))]
    return nodes.assign(id=[_id(node, graph) for node in _records(nodes)]), links


def _ids_of_sources(graph: AttributionGraph) -> dict[str, str]:
    """Ids of all nodes of the whole graph, pruned or not; of what is folded into a token, the token's."""
    nodes = nodes_of(traced_of(graph))
    token = nodes["kind"].isin(INPUTS)
    nodes = nodes.assign(kind=nodes["kind"].mask(token, "embedding"))
    return {node["node"]: _id(node, graph) for node in _records(nodes)}


def _records(nodes: pd.DataFrame) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", nodes.to_dict("records"))


def _id(node: Mapping[str, Any], graph: AttributionGraph) -> str:
    kind, layer, pos, feature = (node[name] for name in ("kind", "layer", "pos", "feature"))
    if kind == "feature":
        return f"{layer}_{feature}_{pos}"
    if kind == "embedding":
        return f"E_{feature if graph.traced is None else int(graph.traced.tokens[pos])}_{pos}"
    if kind == "logit" and not pd.isna(feature):
        return f"{layer}_{feature}_{pos}"
    return str(node["node"])


def _node(node: Mapping[str, Any], n_positions: int, labels: Mapping[str, str]) -> dict[str, Any]:
    kind, name, pos = node["kind"], node["node"], int(node["pos"])
    shown: dict[str, Any] = {
        "node_id": node["id"],
        "feature": -1,
        "layer": "E" if kind == "embedding" else str(node["layer"]),
        "ctx_idx": pos,
        "feature_type": _TYPES.get(kind, kind),
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": n_positions - 1 - pos,
        "jsNodeId": node["id"],
        "clerp": labels.get(name, ""),
        "influence": float(node["cumulative"]),
        "activation": None,
    }
    if kind == "embedding":
        shown["feature"] = pos
    elif shown["feature_type"] == FEATURE:
        shown["activation"] = float(node["activation"])
        shown["feature"] = -1 if kind == "head" else cantor(int(node["layer"]), int(node["feature"]))
        shown["clerp"] = labels.get(name, "" if kind == "feature" else name)
    elif kind != "error":  # what is explained: a viewer reads its text and probability from here
        probability = 1.0 if pd.isna(node["probability"]) else float(node["probability"])
        text = labels.get(name) or node["label"] or name
        shown |= {"feature_type": "logit", "token_prob": probability, "is_target_logit": True}
        shown["clerp"] = f'Output "{text}" (p={probability:.3f})'
        shown["feature"] = -1 if pd.isna(node["feature"]) else int(node["feature"])
    return shown


def _ids_of(names: Iterable[str], ids: Mapping[str, str]) -> list[str]:
    names = list(names)
    for name in names:
        if name not in ids:
            raise ReflowlensError(
                f"no node {name!r} in the graph that is drawn: names are those of graph.nodes['node']"
            )
    return [ids[name] for name in names]


def _listed(path: Path) -> list[dict[str, Any]]:
    """The graphs of a folder's list, none where there is no list."""
    if not path.exists():
        return []
    content = read_json(path)
    graphs = content.get("graphs") if isinstance(content, dict) else None
    if not isinstance(graphs, list) or not all(isinstance(each, dict) for each in graphs):
        raise ReflowlensError(f'{path} is no list of graphs: it should be {{"graphs": [...]}}')
    return graphs
