"""The strongest paths of a graph against all of its paths, written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

import reflowlens as rl
from reflowlens.circuits.attribution.scores.influence import Shares
from reflowlens.circuits.attribution.scores.paths import beginnings, best_paths, share_by_length
from reflowlens.errors import ReflowlensError
from tests.reference.graph_paths import all_paths
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_tokens

TOKENS = random_tokens(None, 1, 3)[0]  # type: ignore[arg-type] # of the models' bytes


def drawn_graph(seed: int, n: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of random edges from lower to higher numbers, the targets' shares, and where paths begin."""
    rng = np.random.default_rng(seed)
    weights = np.tril(rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.6), -1).astype(np.float32)
    weights[:4] = 0
    weights = weights[mixed := rng.permutation(n)][:, mixed]  # no order of the numbers is promised
    begin = ~weights.any(axis=1)
    return weights, rng.random(n) * ~weights.any(axis=0), begin


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("edges", [1, 2, 4])
def test_best_paths_are_the_best_of_all(seed, edges):
    weights, targets, begin = drawn_graph(seed)
    shares = Shares.of(sparse.csr_array(weights), targets, np.zeros(len(targets), dtype=bool))
    expected = all_paths(np.abs(weights), targets, begin)
    expected = {nodes: share for nodes, share in expected.items() if len(nodes) > edges}
    found = best_paths(shares, begin, 10, edges)
    assert len(found) == min(10, len(expected))
    assert len({path.nodes for path in found}) == len(found)
    np.testing.assert_allclose([path.share for path in found], sorted(expected.values(), reverse=True)[:10], rtol=1e-5)
    for path in found:
        assert path.share == pytest.approx(expected[path.nodes], rel=1e-5)


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_complete_paths_share_out_all_influence(kind, tiny_models):
    model = tiny_models["gpt2_biased"]
    graph = rl.attribute(model, TOKENS, dictionary_of(model, kind), ["a", "b"], progress=False)
    is_left_out = graph.nodes["kind"].isin(["bias", "rest"]).to_numpy()
    weights = np.abs(graph.matrix.toarray()) * ~is_left_out
    expected = all_paths(weights, graph.nodes["target"].to_numpy(), beginnings(graph))
    assert sum(expected.values()) == pytest.approx(1, rel=1e-4)
    lengths = [len(nodes) - 1 for nodes in expected]
    by_length = np.bincount(lengths, weights=list(expected.values()))[1:]
    np.testing.assert_allclose(share_by_length(graph.shares, beginnings(graph)), by_length, rtol=1e-4)
    names = graph.nodes["node"]
    for edges, errors in ((2, True), (3, False)):
        found = graph.paths(25, edges=edges, errors=errors)
        allowed = {
            nodes: share
            for nodes, share in expected.items()
            if len(nodes) > edges and (errors or not names[nodes[0]].startswith("error"))
        }
        np.testing.assert_allclose(found["share"], sorted(allowed.values(), reverse=True)[:25], rtol=1e-4)
        by_name = {tuple(names[list(nodes)]): nodes for nodes in allowed}
        for row in found.itertuples():
            nodes = by_name[row.path]
            signs = [np.sign(graph.matrix[nodes[i + 1], nodes[i]]) for i in range(row.edges)]
            assert row.sign == np.prod(signs)


def test_a_graph_without_paths_that_long_has_none(tiny_models):
    graph = rl.attribute(tiny_models["gpt2"], TOKENS, neurons=2, progress=False)
    assert graph.paths(edges=9).empty
    assert list(graph.paths(edges=9)) == ["share", "sign", "edges", "path"]
    assert graph.prune().paths(3)["share"].is_monotonic_decreasing


@pytest.mark.parametrize("options", [{"k": 0}, {"edges": 0}, {"k": 2.5}])
def test_counts_are_whole_numbers(options, tiny_models):
    graph = rl.attribute(tiny_models["gpt2"], TOKENS, neurons=2, progress=False)
    with pytest.raises(ReflowlensError, match=next(iter(options))):
        graph.paths(**options)
