"""Attribution graphs of planted circuits: expected against found, and what shows that a dictionary has lost a hop."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import torch

import reflowlens as rl
from analyses.features.jacobians import jacobian_match
from analyses.features.planted_circuits import (
    OTHER,
    PlantedCircuit,
    collapsed,
    exact_dictionary,
    gate,
    suppression,
    two_hop,
)
from analyses.result import Finding, Result
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.performed.effects import predicted_changes
from reflowlens.dictionaries.dictionary import Dictionary

TEXTS = ("..A", "..A.", "xA.y", "x.yA..", "zzA")  # of the derivatives
SHOWN = 1e-5  # weights below this are rounding


def planted_graphs() -> Result:
    """What graphs of the planted circuits show, by the neurons and by each kind of dictionary.

    Returns:
        Frames: ``edges`` (:func:`expected_against_found`), ``removals`` (:func:`removals`, of the gates), ``features``
        (:func:`feature_removals`, of two hops) and ``jacobians``. Metrics: the largest relative error of a weight with
        faithful dictionaries; edges of theirs that should not be there; of the collapsed one, the share of the
        derivative in block 1 that it lacks, and by how much more B falls than its graph says when f is removed.

    >>> planted_graphs().metrics["edges_too_many"]
    0.0
    """
    edges, jacobians, removed = [], [], []
    hops = two_hop()
    for circuit in (hops, gate("and"), gate("or"), suppression()):
        for kind, dictionary in dictionaries_of(circuit).items():
            edges.append(expected_against_found(circuit, dictionary, kind))
    for kind, dictionary in dictionaries_of(hops).items():
        if dictionary is not None:
            jacobians.append(jacobian_match(hops.model, dictionary, TEXTS).assign(dictionary=kind))
            removed.append(feature_removals(hops, dictionary).assign(dictionary=kind))
    frames = {
        "edges": pd.concat(edges, ignore_index=True),
        "removals": pd.concat([removals(gate(kind)) for kind in ("and", "or")], ignore_index=True),
        "features": pd.concat(removed, ignore_index=True),
        "jacobians": pd.concat(jacobians, ignore_index=True),
    }
    is_faithful = frames["edges"]["dictionary"] != "collapsed"
    faithful, lost = frames["edges"][is_faithful], frames["edges"][~is_faithful]
    second = frames["jacobians"].query("layer == 1").set_index("dictionary")["unexplained"]
    first = frames["features"].query("removed == 'f'").set_index("dictionary")
    ratio = first["observed"] / first["predicted"]
    controls = ("per layer", "cross-layer")
    findings = {
        "largest_relative_error": Finding(faithful["relative_error"].max(), definition="over edges that are expected"),
        "edges_too_many": Finding(float((faithful["expected"] == 0).sum()), definition="of faithful dictionaries"),
        "collapsed_edges_wrong": Finding(
            float((lost["relative_error"] > 1e-3).sum() + (lost["expected"] == 0).sum()),
            definition="edges of the collapsed dictionary's graph that are missing or that the model does not have",
        ),
        "collapsed_derivative_missing": Finding(
            second["collapsed"],
            controls={kind: second[kind] for kind in controls},
            definition="share of the derivative of block 1's MLP that its features lack",
        ),
        "collapsed_removal_ratio": Finding(
            ratio["collapsed"],
            controls={kind: ratio[kind] for kind in controls},
            definition="fall of B's logit when f is removed, over what the graph says",
        ),
    }
    return Result("planted_graphs", "Planted Circuits", frames=frames, findings=findings)


def dictionaries_of(circuit: PlantedCircuit) -> dict[str, Dictionary | None]:
    """The kinds that a circuit is looked at with; None are its neurons."""
    found: dict[str, Dictionary | None] = {
        "neurons": None,
        "per layer": exact_dictionary(circuit.model),
        "cross-layer": exact_dictionary(circuit.model, cross_layer=True),
    }
    return found | ({"collapsed": collapsed(circuit)} if circuit.name == "two hops" else {})


def graph_of(circuit: PlantedCircuit, dictionary: Dictionary | None) -> AttributionGraph:
    return rl.attribute(circuit.model, circuit.prompt, dictionary, circuit.target, progress=False)


def expected_against_found(circuit: PlantedCircuit, dictionary: Dictionary | None, kind: str) -> pd.DataFrame:
    """Edges of a graph beside those of the circuit.

    Returns:
        A row an edge: ``circuit``, ``dictionary``, ``source``, ``target``, ``expected`` and ``found`` weight, 0 where
        there is none, ``relative_error`` (missing of an edge that is not expected), and ``pruned``: whether pruning
        keeps it. Edges of constants are listed where they are expected.
    """
    graph = graph_of(circuit, dictionary)
    unit = "neuron" if dictionary is None else "feature"
    names = {circuit.node(name, unit): name for edge in circuit.edges for name in edge}
    found = _weights(graph, names)
    kept = _weights(graph.prune(), names)
    rows = []
    for edge in [*circuit.edges, *(edge for edge in found if edge not in circuit.edges and edge[0] != "bias")]:
        expected, weight = circuit.edges.get(edge, 0.0), found.get(edge, 0.0)
        error = abs(weight - expected) / abs(expected) if expected else math.nan
        rows.append((circuit.name, kind, *edge, expected, weight, error, edge in kept))
    columns = ["circuit", "dictionary", "source", "target", "expected", "found", "relative_error", "pruned"]
    return pd.DataFrame(rows, columns=columns)


def _weights(graph: AttributionGraph, names: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Weights of edges into nodes through which something goes, those of the circuit by its names."""
    node = graph.nodes.set_index("node")
    reached = set(node.index[(node["influence"] > 0) | (node["target"] > 0)])
    edges = graph.edges[graph.edges["target"].isin(reached) & (graph.edges["weight"].abs() > SHOWN)]
    ends = [edges[end].map(lambda node: names.get(node, node)) for end in ("source", "target")]
    return dict(zip(zip(*ends, strict=True), edges["weight"].astype(float), strict=True))


@torch.no_grad()
def removals(circuit: PlantedCircuit) -> pd.DataFrame:
    """What the edges into f say of tokens that are taken out, and what comes of it.

    Returns:
        A row a set of tokens: ``circuit``, ``removed``, and of the activation of f and of the target's logit the
        change that is ``predicted`` (the sum of the tokens' edges, times the edge from f over f's activation) and the
        one ``observed``: with other tokens in their place.
    """
    (block, index), activation = circuit.units["f"], circuit.activation["f"]
    point, token = f"blocks.{block}.mlp.hook_post", ord(circuit.target)

    def run(prompt: str) -> tuple[float, float]:
        logits, cache = circuit.model.run_with_cache(prompt, names_filter=[point])
        return float(cache[point][0, -1, index]), float(logits[0, -1, token] - logits[0, -1].mean())

    before, rows = run(circuit.prompt), []
    inputs = [source for source, target in circuit.edges if target == "f" and source != "bias"]
    for removed in [*inputs, "".join(inputs)]:
        prompt = circuit.prompt
        for each in removed:
            prompt = prompt.replace(each, OTHER)
        after = run(prompt)
        change = -sum(circuit.edges[each, "f"] for each in removed)
        through = change * circuit.edges["f", circuit.target] / activation
        rows.append((circuit.name, removed, change, after[0] - before[0], through, after[1] - before[1]))
    columns = ["circuit", "removed", "predicted_f", "observed_f", "predicted_logit", "observed_logit"]
    return pd.DataFrame(rows, columns=columns)


def feature_removals(circuit: PlantedCircuit, dictionary: Dictionary) -> pd.DataFrame:
    """What a graph says of the target when a feature of two hops is taken out, and what comes of it.

    Returns:
        A row a feature that is active: ``removed``, and of the target's logit the change that is ``predicted``, over
        all paths of the graph, and ``observed`` in the model, everything behind computed anew.
    """
    graph = graph_of(circuit, dictionary)
    nodes = graph.nodes["node"].tolist()
    active = {name: circuit.node(name) for name in circuit.units if circuit.node(name) in nodes}
    predicted = predicted_changes(graph, [{nodes.index(node): 0.0} for node in active.values()])
    done = graph.perform([{node: 0.0} for node in active.values()], free="model")
    target = circuit.node(circuit.target)
    observed = done[done["node"] == target]["change"]
    return pd.DataFrame(
        {"removed": list(active), "predicted": predicted[:, nodes.index(target)], "observed": observed.to_numpy()}
    )
