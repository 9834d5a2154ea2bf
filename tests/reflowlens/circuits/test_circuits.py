"""Faithfulness and completeness, against runs put together by hand and TransformerLens; controls; growing circuits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import attribution_patch
from transformer_lens.tools.analysis import faithfulness as transformer_lens_faithfulness
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig

import reflowlens as rl
from reflowlens import metrics
from reflowlens.circuits import circuits
from reflowlens.circuits.circuits import Match, greedy_edges, matched_circuits
from reflowlens.circuits.graph import Edge, Graph
from reflowlens.circuits.runs import Ablation, CircuitRuns, mask_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reference.graph import Written, edge_of, everything, graph_run
from tests.support.tiny import assert_close, random_tokens

A, B = 65, 66
METRIC = metrics.logit_diff(A, B)
NODES = ["a0.h0", "a0.h3", "m0", "a1.h1", "m1"]


@pytest.fixture(autouse=True)
def _no_gradients_unless_asked() -> Any:
    with torch.no_grad():
        yield


def pair(model: HookedModel) -> tuple[Tensor, Tensor]:
    return random_tokens(model.cfg, pos=5, seed=1), random_tokens(model.cfg, pos=5, seed=2)


def measured(logits: Tensor) -> Tensor:
    return logits[:, -1, A] - logits[:, -1, B]


def some_edges(graph: Graph) -> list[Edge]:
    """Two of three."""
    return [edge for i, edge in enumerate(graph.edges) if i % 3]


def by_hand(model: HookedModel, edges: set[Edge], ablation: Ablation) -> Tensor:
    """The clean run in which a node reads along these edges, and elsewhere what a corrupted sender wrote."""
    clean, corrupted = (model(tokens, stop_at_layer=0) for tokens in pair(model))
    replaced = graph_run(model, corrupted)[1]
    if ablation == "mean":
        replaced = {name: x.mean(dim=0, keepdim=True) if x.ndim == 3 else x for name, x in replaced.items()}

    def reads(receiver: str, written: Written) -> Tensor:
        return everything(receiver, {u: x if (u, receiver) in edges else replaced[u] for u, x in written.items()})

    return measured(graph_run(model, clean, reads)[0])


@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_circuits_equal_runs_by_hand(model: HookedModel, ablation: Ablation) -> None:
    graph = Graph.of(model)
    edges = some_edges(graph)
    of_nodes = {(sender, receiver) for sender, receiver in graph.edges if sender in {*NODES, "embed"}}
    embedding = {edge for edge in graph.edges if edge[0] == "embed"}
    rest = set(graph.edges) - of_nodes | embedding
    full = measured(model(pair(model)[0]))
    for circuit, kept, left, nothing in (
        (edges, set(edges), set(graph.edges) - set(edges), set()),
        (NODES, of_nodes, rest, embedding),
    ):
        empty = by_hand(model, nothing, ablation)
        for function, remaining in ((rl.faithfulness, kept), (rl.completeness, left)):
            score = function(model, *pair(model), circuit, METRIC, ablation=ablation, controls=0)
            expected = by_hand(model, remaining, ablation)
            assert_close(score.full, full)
            assert_close(score.metric, expected)
            assert_close(score.empty, empty.expand(2))
            share = (expected - empty).mean() / (full - empty).mean()
            assert score.value == pytest.approx(share.item(), rel=1e-3)
            assert math.isnan(score.pvalue)


def test_edges_read_from_json(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    edges = some_edges(Graph.of(model))
    lists: Any = [list(edge) for edge in edges]
    scores = [rl.faithfulness(model, *pair(model), circuit, METRIC, controls=2) for circuit in (edges, lists)]
    assert scores[0].value == scores[1].value
    assert scores[0].null == scores[1].null


def test_the_ends(model: HookedModel) -> None:
    """The whole model is the clean run; without any edge it is the corrupted one."""
    clean, corrupted = pair(model)
    graph = Graph.of(model)
    for circuit in (graph.edges, list(graph.senders)):
        assert rl.faithfulness(model, clean, corrupted, circuit, METRIC, controls=0).value == pytest.approx(1)
        assert rl.completeness(model, clean, corrupted, circuit, METRIC, controls=0).value == pytest.approx(0, abs=1e-5)
    score = rl.faithfulness(model, clean, corrupted, [("embed", "logits")], METRIC, controls=0)
    assert_close(score.empty, measured(model(corrupted)))
    assert (score.size, score.total) == (1, len(graph.edges))


def test_equals_transformer_lens(model: HookedModel) -> None:
    if model.cfg.kv_heads != model.cfg.n_heads:
        pytest.skip("TransformerLens refuses grouped keys and values")
    clean, corrupted = (tokens[:1] for tokens in pair(model))
    edges = some_edges(Graph.of(model))

    def metric(logits: Tensor) -> Tensor:
        return measured(logits).mean()

    with torch.enable_grad():
        config = EdgeAttributionConfig(granularity="edge")
        everywhere = attribution_patch(model, clean, corrupted, metric, config).edge_scores
    circuit = [edge for edge in everywhere if edge_of(edge) in edges]
    expected = transformer_lens_faithfulness(model, clean, corrupted, metric, circuit)
    actual = rl.faithfulness(model, clean, corrupted, edges, METRIC, controls=0)
    assert actual.value == pytest.approx(expected.recovered, rel=1e-3)


def test_many_circuits_at_once_in_little_memory(model: HookedModel) -> None:
    graph = Graph.of(model)
    circuits = [NODES[:n] for n in range(1, 6)] * 4
    runs = CircuitRuns(model, *pair(model), METRIC)
    masks = [mask_of(graph, circuit) for circuit in circuits]
    together = runs.values(masks)
    assert_close(runs.values(masks, memory=300_000), together)
    assert_close(together[3], runs.values([masks[3]])[0])


def test_prompts_of_different_lengths(model: HookedModel) -> None:
    edges = some_edges(Graph.of(model))
    clean, corrupted = ["abcde", "xy"], ["fgcij", "zy"]
    together = rl.faithfulness(model, clean, corrupted, edges, metrics.loss(), controls=0).metric
    for i in (0, 1):
        alone = rl.faithfulness(model, clean[i], corrupted[i], edges, metrics.loss(), controls=0).metric
        assert_close(together[i], alone[0])


# ------------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("match", ["kind", "layer"])
def test_controls_are_like_the_circuit(match: Match) -> None:
    graph = Graph(n_layers=3, n_heads=4, n_key_value_heads=2)

    def kinds(circuit: Any) -> list[Any]:
        nodes = [graph.sender_places[part] for part in circuit if isinstance(part, str)]
        ends = [graph.places(part) for part in circuit if not isinstance(part, str)]
        if match == "kind":
            return sorted([node.kind for node in nodes] + [(a.kind, b.kind) for a, b in ends])
        return sorted(
            [(node.kind, node.layer) for node in nodes] + [(a.kind, a.layer, b.kind, b.layer) for a, b in ends]
        )

    for circuit in (["a0.h1", "a0.h2", "a2.h0", "m1"], graph.edges[::5]):
        controls = matched_circuits(graph, circuit, 30, match)
        assert all(kinds(control) == kinds(circuit) for control in controls)
        assert all(len(set(control)) == len(circuit) for control in controls)
        assert len({frozenset(control) for control in controls}) > 5
        assert controls == matched_circuits(graph, circuit, 30, match)
        assert controls != matched_circuits(graph, circuit, 30, match, seed=1)


def test_the_pvalue_counts_controls_that_do_as_well(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    circuit = ["a0.h1", "a1.h2", "a1.h3"]
    faithful = rl.faithfulness(model, clean, corrupted, circuit, METRIC, controls=9, seed=3)
    complete = rl.completeness(model, clean, corrupted, circuit, METRIC, controls=9, seed=3)
    tie = 1e-6
    assert faithful.pvalue == (1 + sum(x >= faithful.value - tie for x in faithful.null)) / 10
    assert complete.pvalue == (1 + sum(x <= complete.value + tie for x in complete.null)) / 10
    for control, value in zip(matched_circuits(Graph.of(model), circuit, 9, seed=3), faithful.null, strict=True):
        alone = rl.faithfulness(model, clean, corrupted, control, METRIC, controls=0)
        assert alone.value == pytest.approx(value, rel=1e-4, abs=1e-5)
    everything_else = rl.faithfulness(model, clean, corrupted, list(Graph.of(model).senders), METRIC, controls=5)
    assert everything_else.pvalue == 1  # every control of the whole model is the whole model


# -------------------------------------------------------------------------------------------------------------- growing


def test_greedy_edges_are_the_best_that_lead_to_the_circuit(model: HookedModel) -> None:
    with torch.enable_grad():
        scores = rl.edge_attribution(model, *pair(model), METRIC)
    graph, strength = scores.graph, scores.matrix.abs()
    order = greedy_edges(scores)
    assert sorted(order) == sorted(graph.edges)
    for n in range(0, len(order), 7):
        taken = order[:n]
        reached = {"logits", *itertools.chain(*(graph.reads_of(sender) for sender, _ in taken))}
        open_edges = [edge for edge in graph.edges if edge[1] in reached and edge not in taken]
        assert order[n] == max(open_edges, key=lambda edge: strength.loc[edge])


def test_a_circuit_grows_to_the_whole_model(model: HookedModel) -> None:
    with torch.enable_grad():
        scores = rl.edge_attribution(model, *pair(model), METRIC)
    for of, total in (("edges", len(scores.graph.edges)), ("nodes", len(scores.graph.senders) - 1)):
        grown = rl.grow_circuit(model, *pair(model), scores, METRIC, of=of)  # type: ignore[arg-type]
        frame = grown.frame
        assert frame["size"].is_monotonic_increasing
        assert (frame["size"].iloc[0], frame["size"].iloc[-1]) == (0, total)
        assert frame.faithfulness.iloc[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-4)
        assert frame.completeness.iloc[[0, -1]].tolist() == pytest.approx([1, 0], abs=1e-4)
        middle = len(frame) // 2
        for function, column in ((rl.faithfulness, "faithfulness"), (rl.completeness, "completeness")):
            alone = function(model, *pair(model), grown.circuits[middle], METRIC, controls=0)
            assert alone.value == pytest.approx(frame[column].iloc[middle], rel=1e-3, abs=1e-5)
    strongest = scores.nodes.drop("embed").abs().idxmax()
    assert grown.circuits[1] == [strongest]
    smallest = grown.smallest(0.5)
    assert frame.faithfulness[frame["size"] == len(smallest)].item() >= 0.5
    assert (frame.faithfulness[frame["size"] < len(smallest)] < 0.5).all()
    with pytest.raises(ReflowlensError, match="no circuit reaches a faithfulness of 1000"):
        grown.smallest(1000)


def test_circuits_of_many_nodes_grow_by_shares(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "_EVERY_SIZE", 3)
    with torch.enable_grad():
        scores = rl.edge_attribution(model, *pair(model), METRIC)
    few = rl.grow_circuit(model, *pair(model), scores, METRIC, of="nodes").frame
    every = rl.grow_circuit(model, *pair(model), scores, METRIC, of="nodes", sizes=few["size"].tolist()).frame
    assert few["size"].iloc[[0, 1, -1]].tolist() == [0, 1, len(scores.graph.senders) - 1]
    assert few["size"].diff().dropna().is_monotonic_increasing
    pd.testing.assert_frame_equal(few, every)


@pytest.mark.parametrize(
    ("circuit", "arguments", "message"),
    [
        (["a0.h9"], {}, "no sender 'a0.h9'"),
        ([("a0.h1", "embed")], {}, "no receiver 'embed'"),
        ([("m1", "m0")], {}, "no edge from 'm1' to 'm0'"),
        ([], {}, "at least one"),
        (["m0", ("m0", "logits")], {}, "not of both"),
        (["m0"], {"match": "size"}, "not by 'size'"),
        (["m0"], {"ablation": "zero"}, "ablation must be"),
        (["m0"], {"corrupted": "abcd"}, "as many tokens"),
        (["m0"], {"corrupted": ["abx", "ab"], "ablation": "mean"}, "as many tokens"),
        (["m0"], {"corrupted": "abc"}, "nothing to explain"),
        (["m0"], {"metric": metrics.recovery(METRIC)}, "without recovery"),
    ],
)
def test_impossible_circuits(
    tiny_models: dict[str, HookedModel], circuit: Any, arguments: dict[str, Any], message: str
) -> None:
    model = tiny_models["reflow_lite"]
    with pytest.raises(ReflowlensError, match=message):
        rl.faithfulness(model, "abc", circuit=circuit, **{"corrupted": "xyz", "metric": METRIC, **arguments})


def test_what_has_no_heads_has_no_graph() -> None:
    with pytest.raises(ReflowlensError, match="a BDH has no graph"):
        Graph.of(rl.load_model("bdh-nano"))
