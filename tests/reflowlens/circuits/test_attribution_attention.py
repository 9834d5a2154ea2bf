"""Attention explained: scores split into pairs of sources, and edges by the heads that carried them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

import reflowlens as rl
from reflowlens.circuits.attribution.edges.largest import largest_products
from reflowlens.circuits.attribution.edges.table import nodes_of
from reflowlens.errors import ReflowlensError
from tests.reference.attention import last_heads, score_parts, watched
from tests.reference.attribution import Frozen, FrozenBDH
from tests.reflowlens.circuits.test_attribution import NODES, TOKENS, graph_of
from tests.support.dictionaries import dictionary_of
from tests.support.exactness import OPTIONS, directions_of, expected_row, model_of, targets_of
from tests.support.tiny import NAMES

LAST = len(TOKENS) - 1
PAIRS = [(name, kind, {}) for name in NAMES for kind in NODES]
PAIRS += [(name, "neurons", {"heads": True}) for name in ("gpt2_biased", "llama_untied")]
PAIRS += [("reflow", "plt", {"signals": True}), ("reflow", "neurons", {"signals": False})]


def frozen_as(graph: Any, model: Any, kind: str) -> functools.partial[Frozen]:
    dictionary = None if kind == "neurons" else dictionary_of(model, kind)  # type: ignore[arg-type]
    kinds = set(graph.nodes["kind"])
    return functools.partial(
        Frozen, model, TOKENS, dictionary, neurons=8, signals="signal" in kinds, heads="head" in kinds
    )


def rows_of(graph: Any, edges: list[Any]) -> np.ndarray:
    """Edges by autograd in the order of the nodes; 0 of nodes that come later."""
    nodes = list(graph.nodes.itertuples())
    return np.array([expected_row(nodes, each) for each in edges])


# -- why a head looks where it does -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "options"), PAIRS)
def test_every_pair_and_marginal_is_that_of_autograd_and_they_add_up(name, kind, options, tiny_models):
    model = tiny_models[name]
    graph = graph_of(model, kind, **options)
    why = graph.why_attended(1, 2, -1, -3, top=10**6)
    parts = score_parts(frozen_as(graph, model, kind), model, 1, 2, LAST, LAST - 2)
    q, k = (rows_of(graph, each) for each in parts[:2])
    expected, names = q.T @ k, graph.nodes["node"]
    found = why.pairs.iloc[:-1].pivot(index="query_source", columns="key_source", values="weight")
    found = found.reindex(index=names, columns=names).fillna(0.0).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for frame, edges in ((why.queries, parts[2]), (why.keys, parts[3])):
        marginal = frame.set_index("source")["weight"].reindex(names).fillna(0.0).to_numpy()
        (row,) = rows_of(graph, [edges])
        np.testing.assert_allclose(marginal, row, rtol=0, atol=1e-5 * np.abs(row).max())
        assert frame["weight"].abs().is_monotonic_decreasing
    assert why.pairs["weight"].iloc[:-1].abs().is_monotonic_decreasing
    assert abs(why.pairs["weight"].iloc[-1]) < 1e-4 * np.abs(expected).max()


def test_pairs_and_marginals_add_up_to_the_models_own_score_wherever_a_head_may_look(model):
    graph = graph_of(model, "plt")
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith(("attn_scores", "hook_pattern")))
    for layer in range(2):
        scores, pattern = (cache[f"blocks.{layer}.attn.hook_{name}"][0] for name in ("attn_scores", "pattern"))
        for head in (0, 3):
            for query, key in ((0, 0), (LAST, LAST), (LAST, 1)):
                why = graph.why_attended(layer, head, query, key, top=7)
                largest = scores[head][scores[head].isfinite()].abs().max().item()
                assert why.score == pytest.approx(scores[head, query, key].item(), abs=1e-5 * largest)
                assert why.pattern == pytest.approx(pattern[head, query, key].item(), abs=1e-5)
                for sums in (why.pairs, why.queries, why.keys, why.by("kind")):
                    total = sums["weight"].sum() if "weight" in sums else sums.to_numpy().sum()
                    assert total == pytest.approx(why.score, abs=1e-4 * largest)


@pytest.mark.parametrize(("query", "key"), [(4, 2), (3, 0)])
def test_scores_of_bdh_are_split_by_active_neurons_as_by_autograd(query, key):
    model = model_of("bdh")
    graph = rl.attribute(model, TOKENS, neurons=8, progress=False)
    for layer in range(2):
        for head in range(2):
            why = graph.why_attended(layer, head, query, key, top=10**6)
            frozen = FrozenBDH(model, TOKENS)
            stream, read = frozen.streams[f"blocks.{layer}.hook_resid_pre"], model.neurons.W_x.detach()[head]
            active = frozen.cache[f"blocks.{layer}.hook_x_sparse"][0, :, head] > 0
            turned = model.neurons.turn((active * (stream @ read))[None, :, None], slice(0, len(TOKENS)))[0, 0]
            q, k = (rows_of(graph, [frozen.edges(channel) for channel in turned[place]]) for place in (query, key))
            expected, names = q.T @ k, graph.nodes["node"]
            found = why.pairs.iloc[:-1].pivot(index="query_source", columns="key_source", values="weight")
            found = found.reindex(index=names, columns=names).fillna(0.0).to_numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            scores = frozen.cache[f"blocks.{layer}.hook_attn_scores"][0, head]
            assert why.score == pytest.approx(scores[query, key].item(), abs=1e-5 * scores.max().item())
            for sums in (why.pairs, why.queries, why.keys):
                assert sums["weight"].sum() == pytest.approx(why.score, abs=1e-4 * scores.max().item())
            difference = why.compared(1)
            expected_difference = (scores[query, key] - scores[query, 1]).item()
            assert difference.pairs["weight"].sum() == pytest.approx(
                expected_difference, abs=1e-4 * scores.max().item()
            )
    with pytest.raises(ReflowlensError, match="key 3 is not before query 3"):
        graph.why_attended(0, 0, 3, 3)
    for ask in (lambda: graph.heads("logit:97"), lambda: why.heads("key")):
        with pytest.raises(ReflowlensError, match="edges of a BDH pass no head but"):
            ask()


def test_only_the_largest_pairs_are_kept_and_the_rest_is_one_row(tiny_models):
    graph = graph_of(tiny_models["gpt2_biased"])
    whole, few = (graph.why_attended(1, 0, 4, 2, top=top) for top in (10**6, 12))
    assert len(few.pairs) == 13
    np.testing.assert_allclose(few.pairs["weight"][:-1], whole.pairs["weight"][:12], rtol=1e-5)
    assert few.pairs.iloc[-1].tolist()[:2] == ["rest", "rest"]
    assert few.pairs["weight"].sum() == pytest.approx(whole.pairs["weight"].sum(), abs=1e-5)


@pytest.mark.parametrize("n", [1, 30, 10**5])
def test_the_largest_products_are_found_without_forming_all(n, monkeypatch):
    monkeypatch.setattr("reflowlens.circuits.attribution.edges.largest._NUMBERS_AT_ONCE", 100)
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(m, 3, generator=generator) * torch.rand(m, 1, generator=generator) ** 4 for m in (40, 30))
    q[::3] = 0
    i, j, weights = largest_products(q, k, n)
    products = q @ k.T
    order = products.flatten().abs().sort(descending=True).values
    n = min(n, int((order > 0).sum()))
    torch.testing.assert_close(weights.abs(), order[:n])
    torch.testing.assert_close(weights, products[i, j])
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == n


def test_two_keys_are_compared_pair_by_pair(tiny_models):
    model = tiny_models["llama_untied"]
    graph = graph_of(model, "clt")
    one, other = (graph.why_attended(1, 3, 4, key, top=10**6) for key in (1, 3))
    why = one.compared(3)
    assert (why.key, why.other_key) == (1, 3)
    assert why.score == pytest.approx(one.score - other.score, rel=1e-5)
    assert why.score == pytest.approx(np.log(one.pattern / other.pattern), rel=1e-4)
    assert why.pairs["weight"].sum() == pytest.approx(why.score, rel=1e-4)
    index = ["query_source", "key_source"]
    pairs = [each.pairs.iloc[:-1].set_index(index)["weight"] for each in (why, one, other)]
    expected = pairs[1].sub(pairs[2], fill_value=0.0)
    found = pairs[0].reindex(expected.index, fill_value=0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_groups_of_nodes_sum_their_pairs(tiny_models):
    graph = graph_of(tiny_models["gpt2_biased"], "clt")
    why = graph.why_attended(1, 1, 4, 2, top=10**6)
    nodes = nodes_of(graph.traced).set_index("node")
    pairs = why.pairs.iloc[:-1]
    kinds = [nodes["kind"].reindex(pairs[side]).to_numpy() for side in ("query_source", "key_source")]
    expected = pairs["weight"].groupby(kinds).sum().unstack()
    found = why.by("kind")
    np.testing.assert_allclose(found, expected.loc[found.index, found.columns], rtol=0, atol=1e-5)
    assert found.shape == expected.shape
    assert why.by("kind", "layer").to_numpy().sum() == pytest.approx(why.score, abs=1e-4)
    with pytest.raises(ReflowlensError, match="no column 'colour'"):
        why.by("colour")
    with pytest.raises(ReflowlensError, match="nodes are grouped by"):
        why.by()


def test_lists_have_the_shape_that_published_graphs_have(tiny_models):
    why = graph_of(tiny_models["gpt2"]).why_attended(1, 1, 4, 2, top=5)
    lists = why.top(3)
    assert lists["pair_wise_contributors"] == [tuple(row) for row in why.pairs.to_numpy()[:3]]
    assert lists["top_q_marginal_contributors"] == [
        tuple(row) for row in why.queries[["source", "weight"]].to_numpy()[:3]
    ]
    assert lists["top_k_marginal_contributors"] == [tuple(row) for row in why.keys[["source", "weight"]].to_numpy()[:3]]
    assert len(why.top(50)["pair_wise_contributors"]) == 5  # the rest is no pair


def test_positions_are_numbers_or_tokens_that_occur_once(tiny_models):
    model = tiny_models["gpt2"]
    graph = rl.attribute(model, "abcad", progress=False)
    why = graph.why_attended(0, 0, "d", "b")
    assert (why.query, why.key) == (4, 1)
    assert graph.why_attended(0, 0, "last", -4).score == why.score
    with pytest.raises(ReflowlensError, match="occurs at positions 0, 3"):
        graph.why_attended(0, 0, "d", "a")
    with pytest.raises(ReflowlensError, match="does not occur"):
        graph.why_attended(0, 0, "z", 0)


def test_a_pruned_graph_and_one_of_features_are_explained_too(tiny_models):
    model = tiny_models["gpt2"]
    whole = graph_of(model)
    why = whole.why_attended(1, 0, 3, 1)
    pruned = whole.prune(0.3, 0.5).why_attended(1, 0, 3, 1)
    assert pruned.pairs.equals(why.pairs)
    active = whole.nodes.query("kind == 'feature' and layer == 1 and pos == 3").iloc[0]
    of_feature = graph_of(model, "plt", rl.FeatureAt(1, active["feature"], 3))
    np.testing.assert_allclose(of_feature.why_attended(1, 0, 3, 1).pairs["weight"], why.pairs["weight"], atol=1e-5)
    with pytest.raises(ReflowlensError, match="this graph has blocks 0 to 0"):
        graph_of(model, "plt", rl.FeatureAt(0, 1)).why_attended(1, 0, 3, 1)


def test_a_notebook_shows_what_is_compared(tiny_models):
    why = graph_of(tiny_models["gpt2"]).why_attended(1, 2, 4, 2)
    shown, compared = why._repr_html_(), why.compared(1)._repr_html_()
    assert "1.2 at" in shown
    assert "rest" in shown
    assert why.keys["source"][0] in shown
    assert "and not at" in compared
    assert "pairs=" not in repr(why)


# -- the heads that carried an edge -----------------------------------------------------------------------------------


HEADS = [(name, kind) for name in ("gpt2_biased", "llama_untied", "reflow_lite") for kind in NODES]
HEADS += [(name, "skip") for name in OPTIONS]


def check_split(parts: Any, graph: Any, expected: list[Any], sums: np.ndarray) -> None:
    """Every part against its row of edges by autograd, and each source's sum."""
    exact = rows_of(graph, [edges for _, edges in expected])
    largest, found = np.abs(sums).max(), np.zeros_like(exact)
    rows = {place: row for row, (place, _) in enumerate(expected)}
    columns = {node: column for column, node in enumerate(graph.nodes["node"])}
    for part in parts.itertuples():
        place = None if part.route == "direct" else (part.layer, part.head, part.key)
        found[rows[place], columns[part.source]] += part.weight
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(found.sum(0), sums, rtol=0, atol=1e-5 * largest)
    assert set(parts["route"]) == {"direct", "head"} if len(expected) > 1 else {"direct"}


@pytest.mark.parametrize(("name", "kind"), HEADS)
def test_edges_split_by_the_last_head_are_those_of_autograd_and_add_up(name, kind, tiny_models):
    model = model_of(name) if name in OPTIONS else tiny_models[name]
    graph = graph_of(model, kind)
    nodes, matrix = list(graph.nodes.itertuples()), graph.matrix.toarray()
    make = frozen_as(graph, model, kind)
    targets = targets_of(nodes, make(), {})
    unit = next(i for i in targets if nodes[i].layer == 1 and nodes[i].pos == LAST - 1)
    for i in (unit, next(i for i in targets if nodes[i].layer == 2)):
        expected = list(last_heads(make, model, lambda frozen, i=i: targets_of(nodes, frozen, {})[i], nodes[i].pos))
        check_split(graph.heads(nodes[i].node, top=10**6), graph, expected, matrix[i])


def test_directions_of_the_stream_are_split_wherever_they_are_read(tiny_models):
    model = tiny_models["gpt2_biased"]
    directions = directions_of(model)
    graph = graph_of(model, "skip", list(directions.values()))
    nodes, matrix = list(graph.nodes.itertuples()), graph.matrix.toarray()
    make = frozen_as(graph, model, "skip")
    for i, node in enumerate(nodes):
        if node.kind == "direction" and node.pos > 0:
            expected = list(
                last_heads(make, model, lambda frozen, i=i: targets_of(nodes, frozen, directions)[i], node.pos)
            )
            check_split(graph.heads(node.node, top=10**6), graph, expected, matrix[i])


@pytest.mark.parametrize("name", ["gpt2_biased", "llama_untied"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_queries_and_keys_are_split_by_the_heads_that_put_them_there(side, name, tiny_models):
    model = tiny_models[name]
    graph = graph_of(model, "skip")
    why, place = graph.why_attended(1, 3, 4, 2), {"query": 4, "key": 2}[side]
    make, turned = frozen_as(graph, model, "skip"), "rot_" if name == "llama_untied" else ""
    other = {"query": "k", "key": "q"}[side]
    _, fixed = watched(make, model, f"attn.hook_{turned}{other}")

    def product(seen: dict[int, Any]) -> Any:
        of = {side: seen[1][0], "query" if side == "key" else "key": fixed[1][0].detach()}
        return of["query"][4, 3] @ of["key"][2, -1] / 8**0.5

    def with_product() -> Frozen:
        frozen, seen = watched(make, model, f"attn.hook_{turned}{side[0]}")
        frozen.product = product(seen)  # type: ignore[attr-defined]
        return frozen

    expected = list(last_heads(with_product, model, lambda frozen: frozen.product, place))  # type: ignore[attr-defined]
    marginal = {"query": why.queries, "key": why.keys}[side].set_index("source")["weight"]
    parts = why.heads(side, top=10**6)
    check_split(parts, graph, expected, marginal.reindex(graph.nodes["node"]).fillna(0.0).to_numpy())
    source = parts.query("route == 'head'")["source"].iloc[0]
    one = why.heads(side, source)
    assert one["weight"].sum() == pytest.approx(marginal[source], abs=1e-5 * float(marginal.abs().max()))
    with pytest.raises(ReflowlensError, match=f"no path leads from 'error:1@0' to this {side}"):
        why.heads(side, "error:1@0")
    with pytest.raises(ReflowlensError, match="side must be 'query' or 'key'"):
        why.heads("value")
    with pytest.raises(ReflowlensError, match="those of one key"):
        why.compared(1).heads("key")


def test_parts_that_are_not_kept_are_summed_source_by_source(tiny_models):
    graph = graph_of(tiny_models["gpt2_biased"])
    target = graph.nodes["node"].iloc[-1]
    whole, few = graph.heads(target, top=10**6), graph.heads(target, top=20)
    kept = few[few["route"] != "rest"]
    np.testing.assert_allclose(kept["weight"], whole["weight"][:20], rtol=1e-4)
    sums = [each.groupby("source")["weight"].sum() for each in (whole, few)]
    np.testing.assert_allclose(sums[1].reindex(sums[0].index), sums[0], rtol=0, atol=1e-5)
    assert few[few["route"] == "rest"]["source"].is_unique
    assert few.loc[few["route"] != "head", ["layer", "head", "key"]].isna().all(axis=None)


def test_one_edge_is_split_as_in_all(tiny_models):
    graph = graph_of(tiny_models["llama_untied"], "clt").prune(0.9, 0.9)
    target = graph.nodes["node"].iloc[-1]
    whole = graph.heads(target, top=10**6)
    for source in ("embedding@1", "bias:1", whole.query("source.str.startswith('feature:1')")["source"].iloc[0]):
        parts, expected = graph.heads(target, source), whole.query("source == @source").reset_index(drop=True)
        assert parts[["source", "route", "layer", "head", "key"]].equals(expected.iloc[:, :-1])
        np.testing.assert_allclose(
            parts["weight"], expected["weight"], rtol=0, atol=1e-5 * expected["weight"].abs().max()
        )


@pytest.mark.parametrize("kind", ["skip", "neurons"])
def test_what_comes_through_a_head_is_its_output_times_the_gradient_of_autograd(kind, model):
    graph = graph_of(model, kind)
    nodes = list(graph.nodes.itertuples())
    frozen, z = watched(frozen_as(graph, model, kind), model, "attn.hook_z")
    targets = targets_of(nodes, frozen, {})
    for layer in (1, 2):
        i = next(i for i in targets if nodes[i].layer == layer)
        gradients = torch.autograd.grad(targets[i], list(z.values()), retain_graph=True)
        expected = torch.stack([(g * x)[0].sum(-1) for g, x in zip(gradients, z.values(), strict=True)]).detach()
        parts, found = graph.through_heads(nodes[i].node), torch.zeros_like(expected)
        found[tuple(torch.tensor(parts[["layer", "query", "head"]].to_numpy()).T)] = torch.tensor(parts["weight"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert parts["weight"].abs().is_monotonic_decreasing


# -- errors -----------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 2}, "no layer 2: this graph has blocks 0 to 1"),
    "negative layer": ({"layer": -1}, "no layer -1"),
    "head": ({"head": 4}, "no head 4: a block has heads 0 to 3"),
    "query": ({"query": 5}, "no query 5: the prompt has 5 tokens"),
    "key": ({"key": -6}, "no key -6"),
    "no position": ({"key": 1.5}, "no key 1.5"),
    "behind": ({"query": 1, "key": 3}, "key 3 comes behind query 1"),
    "several tokens": ({"key": "ab"}, "not a single token"),
    "top": ({"top": 0}, "top must be an integer and at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_exist_is_one_clear_error(case, tiny_models):
    changed, message = BAD[case]
    arguments = {"layer": 1, "head": 0, "query": 4, "key": 2} | changed
    with pytest.raises(ReflowlensError, match=message):
        graph_of(tiny_models["gpt2"]).why_attended(**arguments)


def test_comparisons_that_mean_nothing_are_refused(tiny_models):
    why = graph_of(tiny_models["gpt2"]).why_attended(1, 0, 3, 1)
    for other, message in ((1, "compared with itself"), (4, "key 4 comes behind query 3"), (9, "no key 9")):
        with pytest.raises(ReflowlensError, match=message):
            why.compared(other)
    with pytest.raises(ReflowlensError, match="a comparison already"):
        why.compared(2).compared(0)


def test_graphs_without_a_model_or_of_another_one_are_refused(tiny_models):
    model = tiny_models["gpt2"]
    graph = graph_of(model)
    alone = dataclasses.replace(graph, traced=None)
    for ask in (
        lambda: alone.why_attended(0, 0, 1, 0),
        lambda: alone.heads("logit:1"),
        lambda: alone.through_heads("a"),
    ):
        with pytest.raises(ReflowlensError, match="comes without its model"):
            ask()
    with rl.intervene(model, rl.Ablate("mlp_out", layer=0)):
        model(TOKENS)  # else the block says that nothing ran in it
        with pytest.raises(ReflowlensError, match="is attached to"):
            graph.why_attended(1, 0, 1, 0)
    target = graph.nodes.query("kind == 'feature' and layer == 1")["node"].iloc[-1]
    for weight, ask in (
        ("embed.W_E", lambda: graph.why_attended(1, 0, 3, 1)),
        ("blocks.0.attn.W_V", lambda: graph.heads(target)),
        ("blocks.1.attn.W_O", lambda: graph.through_heads(target)),
    ):
        with rl.edit(model, rl.ScaleWeights(weight, 3.0)), pytest.raises(ReflowlensError, match="make the graph anew"):
            ask()


def test_nodes_whose_edges_no_head_carries_are_refused(tiny_models):
    graph = graph_of(tiny_models["gpt2"])
    unit = graph.nodes.query("kind == 'feature' and layer == 0")["node"].iloc[0]
    asked = [
        (("features:0.1@2",), "no node 'features:0.1@2' in this graph; did you mean"),
        ((3,), "no node 3 in this graph"),
        (("embedding@1",), "nothing goes into 'embedding@1'"),
        ((graph.nodes["node"].iloc[-1], "embedding@9"), "no node 'embedding@9'"),
        ((unit, "error:1@4"), "no path leads from 'error:1@4'"),
    ]
    for arguments, message in asked:
        with pytest.raises(ReflowlensError, match=message):
            graph.heads(*arguments)
    signals = graph_of(tiny_models["reflow"], "neurons")
    with pytest.raises(ReflowlensError, match="signals of the readout: ask for one"):
        signals.heads(signals.nodes["node"].iloc[-1])
    with_heads = graph_of(tiny_models["gpt2"], heads=True)
    for ask in (
        lambda: with_heads.through_heads(with_heads.nodes["node"].iloc[-1]),
        lambda: with_heads.why_attended(1, 0, 3, 1).heads("key"),
    ):
        with pytest.raises(ReflowlensError, match="heads are nodes of this graph"):
            ask()
