"""Influence, pruning and scores of attribution graphs: by hand, and against a dense plain form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import reflowlens as rl
from reflowlens.circuits.attribution.graph import INPUTS, LEFT_OUT, shares_of
from reflowlens.errors import ReflowlensError
from tests.reference import graph_scores as plain
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_tokens


def graph_from(kinds: list[str], edges: dict[tuple[int, int], float], targets: dict[int, float]) -> rl.AttributionGraph:
    """Of edges (target, source): weight."""
    nodes = pd.DataFrame({"node": [f"n{i}" for i in range(len(kinds))], "kind": kinds, "target": 0.0})
    nodes.loc[list(targets), "target"] = list(targets.values())
    dense = np.zeros((len(kinds), len(kinds)), dtype=np.float32)
    for place, weight in edges.items():
        dense[place] = weight
    matrix, dropped = sparse.csr_array(dense), np.zeros(len(kinds))
    nodes["influence"] = shares_of(nodes, matrix, dropped).influence()
    return rl.AttributionGraph(nodes, matrix, [], "hand", dropped)


def by_hand() -> rl.AttributionGraph:
    """Two tokens, an error, features 3 and 4, a logit, a bias; 5 ← 4 ← 3 ← 0, and 1 and 2 beside."""
    kinds = ["embedding", "embedding", "error", "feature", "feature", "logit", "bias"]
    edges = {(3, 0): 2.0, (3, 6): 100.0, (4, 3): -3.0, (4, 2): 1.0, (5, 4): 6.0, (5, 1): -2.0, (5, 6): 9.0}
    return graph_from(kinds, edges, {5: 1.0})


def test_influence_and_scores_by_hand():
    graph = by_hand()
    # 4 has 6/8 of the logit and 1 the other quarter; 3 has 3/4 of what 4 has, and the error a quarter
    expected = [0.5625, 0.25, 0.1875, 0.5625, 0.75, 0.0, 0.0]
    np.testing.assert_allclose(graph.influence, expected, rtol=1e-6)
    scores = graph.scores()
    assert scores["replacement"] == pytest.approx(0.8125 / (0.8125 + 0.1875))
    through = sum(expected) + 1
    assert scores["completeness"] == pytest.approx((through - 0.25 * 0.75) / through)
    assert scores["error_influence"] == pytest.approx(0.1875 / sum(expected))
    assert scores["rest_influence"] == 0


def test_pruning_by_hand():
    graph = by_hand()
    pruned = graph.prune(0.6, 1.0)  # 0.75 + 0.5625 of 2.3125 are less than that share: both 0.5625 come in
    assert pruned.nodes["node"].tolist() == ["n0", "n1", "n3", "n4", "n5"]
    assert set(zip(pruned.edges["target"], pruned.edges["source"], strict=True)) == {
        ("n3", "n0"),
        ("n4", "n3"),
        ("n5", "n4"),
        ("n5", "n1"),
    }
    assert pruned.scores() == graph.scores()
    # without 3, of 4 nothing is left that anything goes into
    assert graph.prune(0.3, 1.0).nodes["node"].tolist() == ["n0", "n1", "n5"]


@pytest.mark.parametrize("name", ["gpt2_biased", "llama_untied", "reflow"])
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 1.0)])
def test_sparse_and_dense_agree(name, thresholds, tiny_models):
    model = tiny_models[name]
    tokens = random_tokens(model.cfg, 1, 7)[0]
    graph = rl.attribute(model, tokens, dictionary_of(model, "clt", "relu"), progress=False)
    named = graph.nodes["kind"].replace(dict.fromkeys(INPUTS, "input") | dict.fromkeys(LEFT_OUT, "constant"))
    kinds, p = named.to_numpy(), graph.nodes["target"].to_numpy()
    dense = graph.matrix.toarray().astype(np.float64)
    np.testing.assert_allclose(graph.influence, plain.influence(plain.normalised(dense, kinds), p), rtol=0, atol=1e-6)
    scores = plain.scores(dense, kinds, p)
    assert {name: graph.scores()[name] for name in scores} == pytest.approx(scores, rel=1e-5)
    nodes, edges = plain.pruned(dense, kinds, p, *thresholds)
    pruned = graph.prune(*thresholds)
    names = graph.nodes["node"]
    assert set(pruned.nodes["node"]) == {names[i] for i in nodes}
    found = set(zip(pruned.edges["target"], pruned.edges["source"], strict=True))
    expected = {(names[target], names[source]) for target, source in edges}
    assert len(found ^ expected) <= (1 if thresholds[1] == 1.0 else 0)  # the last edge of all is rounded away
    weights = graph.edges.set_index(["target", "source"])["weight"]
    kept = pruned.edges.set_index(["target", "source"])["weight"]
    np.testing.assert_array_equal(weights[kept.index], kept)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "most"])
def test_thresholds_are_shares(threshold):
    with pytest.raises(ReflowlensError, match="node_threshold"):
        by_hand().prune(threshold)


def test_cumulative_influence_says_which_nodes_a_threshold_keeps():
    graph = rl.attribute(rl.load_model("reflow-nano"), "The capital of France is", signals=True)
    nodes = graph.nodes.set_index("node")
    counted = nodes[~nodes["kind"].isin(LEFT_OUT)].sort_values("influence", ascending=False, kind="stable")
    shares = counted["influence"].cumsum() / counted["influence"].sum()
    np.testing.assert_allclose(counted["cumulative"], shares, rtol=1e-6)
    pruned = graph.prune(0.8, 1.0).nodes.set_index("node")
    chosen = ~pruned["kind"].isin(["embedding", "position", "logit"])
    least = shares.iloc[np.searchsorted(shares, 0.8)]
    assert pruned["cumulative"][chosen].max() <= least
    assert pruned["cumulative"].equals(nodes["cumulative"][pruned.index])
