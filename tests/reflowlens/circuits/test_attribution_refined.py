"""Attribution graphs of a TTTFlow: what is explained, performed and refused. Single edges: test_attribution_exact."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import reflowlens as rl
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.performing import change_of, factors_of
from reflowlens.errors import ReflowlensError
from tests.reference.attribution import FrozenTTTFlow
from tests.reflowlens.models.test_ttt_flow import filled, text
from tests.support.dictionaries import dictionary_of
from tests.support.exactness import expected_row

TOKENS = text(11)
REFINERS = [{}, {"ttt": False}, {"flow": False}, {"ttt": False, "flow": False}]


@functools.cache
def graph_of(heads: bool = False, **own: Any) -> Any:
    return rl.attribute(filled(**own), TOKENS, neurons=6, heads=heads, progress=False)


def some_nodes(graph: Any) -> list[str]:
    """Of every kind that can be set one a block, the last that has edges."""
    has_edges = np.diff(graph.matrix.tocsc().indptr) > 0
    able = graph.nodes[~graph.nodes["kind"].isin(("rest", "bias", "logit")) & has_edges]
    return able.groupby(["kind", "layer"])["node"].nth(-1).tolist()


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("own", REFINERS)
def test_what_is_explained_are_logits_in_front_of_the_cap_and_edges_add_up(own, heads):
    graph, model = graph_of(heads, **own), filled(**own)
    logits, cache = model.run_with_cache(TOKENS, names_filter="unembed.hook_logits_pre_cap")
    before = cache["unembed.hook_logits_pre_cap"][0, -1]
    rows = graph.nodes[graph.nodes["kind"] == "logit"]
    tokens = torch.tensor(rows["feature"].tolist())
    np.testing.assert_allclose(rows["value"], (before[tokens] - before.mean()).detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows["probability"], logits[0, -1].softmax(-1)[tokens].detach(), rtol=1e-4)
    value = graph.nodes["value"].to_numpy(float)
    off = np.abs(np.asarray(graph.matrix.sum(axis=1)).ravel() - value)
    assert np.nanmax(off) < 1e-5 * np.nanmax(np.abs(value))
    behind = graph.nodes[graph.nodes["layer"] >= 5]
    units = behind[behind["kind"].isin(("neuron", "head")) & (behind["pos"] == 10)]
    assert len(units) == (6 if own.get("flow", True) else 0) + (2 if heads and own.get("ttt", True) else 0)
    assert {"embedding", "bigram", "token_value"} < set(graph.nodes["kind"])


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("own", REFINERS)
def test_with_all_other_nodes_held_a_change_is_the_edge(own, heads):
    graph = graph_of(heads, **own)
    nodes = some_nodes(graph)
    factors = [factors_of(graph, {node: 1.7}) for node in nodes]
    values = performed(graph, [change_of(graph, each) for each in factors], "direct").values
    edges = graph.matrix.toarray()[:, [next(iter(each)) for each in factors]].T
    found = values[1:] - values[0]
    there = np.isfinite(values[0])
    np.testing.assert_allclose(found[:, there], 0.7 * edges[:, there], rtol=0, atol=1e-5 * np.abs(edges).max())


def removed_by_hand(model: Any, node: str) -> torch.Tensor:
    """Logits in front of the cap with a node at 0, by plain hooks."""
    where = node.partition(":")[2]
    points = {"embedding": "hook_embed", "bigram": "bigram.hook_bigram", "token_value": "values.hook_token_values"}
    place, _, position = node.rpartition("@")
    if place in points:
        point, index = points[place], (slice(None), int(position))
    else:
        block, unit = map(int, where.partition("@")[0].split("."))
        point = "flow.hook_flow_post" if block > 5 else f"blocks.{block}.mlp.hook_post"
        index = (slice(None), int(position), unit)  # type: ignore[assignment]

    def zero(x: Any, hook: Any) -> Any:
        x = x.clone()
        x[index] = 0.0
        return x

    with model.hooks([(point, zero)]):
        return (model.final_stream(TOKENS)[0, -1] @ model.W_U).detach()


def test_nodes_removed_from_the_model_are_those_of_plain_hooks():
    graph, model = graph_of(), filled()
    nodes = [node for node in some_nodes(graph) if not node.startswith("error")]
    found = graph.perform([{node: 0.0} for node in nodes], free="model")
    assert {"embedding", "bigram", "token_value", "neuron"} == {node.partition(":")[0].split("@")[0] for node in nodes}
    for number, node in enumerate(nodes):
        logits = removed_by_hand(model, node)
        rows = found[(found["intervention"] == number) & (found["kind"] == "logit")]
        tokens = torch.tensor([int(name.removeprefix("logit:")) for name in rows["node"]])
        np.testing.assert_allclose(rows["after"], logits[tokens] - logits.mean(), rtol=1e-3, atol=2e-5)


def test_small_changes_are_predicted_and_the_verdict_is_of_capped_logits():
    graph = graph_of()
    summary = graph.validate(8, (1.01,), free=False).summary.set_index("kind")
    assert summary.loc["logit", "pearson"] > 0.999
    assert abs(summary.loc["logit", "slope"] - 1) < 0.01
    verdict = graph.faithfulness()
    assert -1 < verdict["faithfulness"] < 1.5
    assert verdict["correlation"] > 0.5


def test_a_head_looks_where_it_does_for_sources_that_add_up_to_its_score():
    graph, model = graph_of(), filled()
    _, cache = model.run_with_cache(
        TOKENS, names_filter=lambda name: name.endswith(("attn_scores", "hook_q", "hook_k"))
    )
    frozen = FrozenTTTFlow(model, TOKENS, None, 6)
    for layer, head, query, key in ((0, 1, 4, 0), (3, 2, 10, 5), (4, 3, 10, 10)):
        why = graph.why_attended(layer, head, query, key, top=20)
        score = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, head, query, key].item()
        assert why.score == pytest.approx(score, abs=1e-5)
        for frame in (why.pairs, why.queries, why.keys):
            assert frame["weight"].sum() == pytest.approx(score, abs=2e-5)
        attn, norm = model.blocks[layer].attn, model.blocks[layer].ln1
        x = frozen.streams[f"blocks.{layer}.ln1.hook_normalized"] * norm.w
        with torch.enable_grad():
            k = x[key] @ attn.W_K[head // 2].detach()
            k = k / (cache[f"blocks.{layer}.attn.hook_k"][0, key, head // 2].pow(2).mean() + model.cfg.eps).sqrt()
            k = attn.turned(k[None, None, None], slice(key, key + 1))[0, 0, 0]
            q = cache[f"blocks.{layer}.attn.hook_q"][0, query, head]
            q = q / (q.pow(2).mean() + model.cfg.eps).sqrt() * attn.gain[head].detach()
            q = attn.turned(q[None, None, None], slice(query, query + 1))[0, 0, 0]
            edges = frozen.edges(q.detach() @ k / 6**0.5)
        expected = expected_row(list(graph.nodes.itertuples()), edges)
        found = why.keys.set_index("source")["weight"].reindex(graph.nodes["node"]).fillna(0.0).to_numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_graphs_of_features_and_what_is_made_of_graphs(tmp_path):
    model = filled()
    dictionary = dictionary_of(model, "plt")
    graph = rl.attribute(model, TOKENS, dictionary, progress=False)
    assert {"feature", "error"} < set(graph.nodes["kind"])
    assert "neuron" not in set(graph.nodes["kind"])  # of the flow step: it is error with a dictionary
    pruned = graph.prune()
    assert set(pruned.nodes["kind"]) > {"bigram", "token_value", "embedding", "feature", "logit"}
    assert len(graph.paths(3)) == 3
    pruned.save(tmp_path / "graph.html")
    pruned.save(tmp_path / "graph.json")
    feature = graph.nodes[(graph.nodes["kind"] == "feature") & (graph.nodes["layer"] == 2)].iloc[-1]
    of_one = rl.attribute(
        model, TOKENS, dictionary, rl.FeatureAt(2, int(feature["feature"]), int(feature["pos"])), progress=False
    )
    assert of_one.nodes.loc[of_one.nodes["kind"] == "feature", "layer"].max() == 2
    cost = rl.graph_cost(model, TOKENS, dictionary)
    assert cost.nodes == len(graph.nodes)
    assert cost.edges >= graph.matrix.nnz


def test_what_has_no_place_in_such_a_graph_is_refused():
    graph, with_heads, model = graph_of(), graph_of(heads=True), filled()
    target = graph.nodes["node"].iloc[-1]
    calls = [
        (lambda: graph.heads(target), "not split by heads"),
        (lambda: graph.through_heads(target), "not split by heads"),
        (lambda: graph.why_attended(2, 0, 5, 1).heads("key"), "not split by heads"),
        (lambda: with_heads.heads(target), "heads are nodes of this graph"),
        (lambda: graph.why_attended(5, 0, 5, 1), "no layer 5: this graph has blocks 0 to 4"),
        (lambda: rl.attribute(model, TOKENS, targets=rl.FeatureAt(6, 0)), "no layer 6"),
        (lambda: rl.attribute(model, TOKENS, signals=True), "models with recipes"),
        (lambda: rl.attribute(model, TOKENS, dictionary_of(model, "sae")), "needs transcoders of MLPs"),
    ]
    for call, message in calls:
        with pytest.raises(ReflowlensError, match=message):
            call()
