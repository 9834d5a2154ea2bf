"""Graphs performed: against plain hooks, against the edges, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.performing import change_of, factors_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.bdh import BDH as BDHModel
from tests.reference.performing import Performed, PerformedBDH
from tests.reflowlens.circuits.test_attribution import BDH, NODES, TOKENS, graph_of
from tests.support.dictionaries import dictionary_of
from tests.support.exactness import OPTIONS, model_of
from tests.support.tiny import FACTORED, NAMES, random_model

LEVELS = ("direct", "constrained", "free", "model")
CASES: list[Any] = [(name, kind, {}) for name in NAMES for kind in NODES]
CASES += [(name, "plt", {"signals": True}) for name in FACTORED] + [("reflow", "neurons", {"signals": False})]
CASES += [(name, kind, {"heads": True}) for name in ("gpt2_biased", "reflow_lite") for kind in ("clt", "neurons")]
CASES += [("bdh", "neurons", {})]
CASES += [(name, kind, options) for name in OPTIONS for kind, options in (("neurons", {}), ("clt", {"heads": True}))]
FREE = {"constrained": False, "free": True, "model": "model"}


def some_nodes(graph: Any) -> list[str]:
    """Of every kind that can be set one a block, the last that has edges."""
    has_edges = np.diff(graph.matrix.tocsc().indptr) > 0
    able = graph.nodes[~graph.nodes["kind"].isin(("rest", "bias", "logit")) & has_edges]
    return able.groupby(["kind", "layer"])["node"].nth(-1).tolist()


def plain(model: HookedModel, graph: Any, factors: dict[str, float], level: str) -> np.ndarray:
    """Values of all nodes by plain hooks."""
    nodes = {node.node: node for node in graph.nodes.itertuples()}
    places: dict[tuple[str, int, int, int], float] = {}
    for name, factor in factors.items():
        node = nodes[name]
        is_whole = node.kind in ("embedding", "position", "error")
        places[node.kind, node.layer, node.pos, 0 if is_whole else node.feature] = factor
    kinds = set(graph.nodes["kind"])
    run: Any
    if isinstance(model, BDHModel):
        run = PerformedBDH(model, TOKENS, places, level)
    else:
        options = {"signals": "readout" in kinds, "heads": "head" in kinds}
        run = Performed(model, TOKENS, graph.traced.dictionary, places, level, **options)
    read = {
        "feature": lambda node: run.units[node.layer][node.pos, node.feature],
        "neuron": lambda node: run.units[node.layer][node.pos, node.feature],
        "readout": lambda node: run.readout[node.feature],
        "head": lambda node: run.heads[node.layer][node.pos, node.feature],
        "logit": lambda node: run.logits[node.feature] - run.logits.mean(),
    }
    return np.array([float(read[node.kind](node)) if node.kind in read else np.nan for node in nodes.values()])


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, HookedModel]) -> dict[str, HookedModel]:
    return tiny_models | {"bdh": random_model(BDH)} | {name: model_of(name) for name in OPTIONS}


@pytest.fixture(scope="module")
def graphs(models: dict[str, HookedModel]) -> Callable[..., Any]:
    """The graph of a case, made once."""
    return cache(lambda name, kind, **options: graph_of(models[name], kind, **options))


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_performing_is_what_plain_hooks_do(name, kind, options, models, graphs):
    model = models[name]
    graph = graphs(name, kind, **options)
    nodes = some_nodes(graph)
    asked = [dict.fromkeys(nodes[::2], 2.5), {nodes[1]: -1.0, nodes[-2]: 0.0}, {nodes[-1]: 5.0}]
    changes = [change_of(graph, factors_of(graph, each)) for each in asked]
    for level in LEVELS:
        found = performed(graph, changes, level).values
        scale = np.nanmax(np.abs(found))
        for row, factors in zip(found, [{}, *asked], strict=True):
            np.testing.assert_allclose(row, plain(model, graph, factors, level), rtol=0, atol=1e-5 * scale)
    assert np.nanmax(np.abs(found[1] - found[0])) > 0.05 * scale


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_with_all_else_held_a_change_is_the_edge(name, kind, options, graphs):
    graph = graphs(name, kind, **options)
    nodes, edges = some_nodes(graph), graph.matrix.toarray()
    changes = [change_of(graph, factors_of(graph, {node: 3.0})) for node in nodes]
    values = performed(graph, changes, "direct").values
    numbers = [graph.nodes.index[graph.nodes["node"] == node][0] for node in nodes]
    has_value = graph.nodes["value"].notna().to_numpy()
    expected = 2.0 * edges[np.ix_(has_value, numbers)].T
    np.testing.assert_allclose(
        values[1:, has_value] - values[0, has_value], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
    assert np.abs(expected).max(axis=1).min() > 0


@pytest.mark.parametrize("kind", ["plt", "clt", "skip", "neurons"])
@pytest.mark.parametrize("name", ["gpt2_biased", "reflow_lite"])
def test_constrained_the_effect_of_the_last_block_on_logits_is_its_edges(name, kind, tiny_models):
    graph = graph_of(tiny_models[name], kind, signals=False)
    last = graph.nodes.query("kind in ('feature', 'neuron') and layer == 1 and pos == 4 and activation > 0")["node"]
    found = graph.perform([{node: 1.01} for node in last], free=False)
    found["source"] = last.to_numpy()[found["intervention"]]
    found = found.query("kind == 'logit'").merge(graph.edges, left_on=["source", "node"], right_on=["source", "target"])
    scale = found["weight"].abs().max()
    assert len(found) == 10 * len(last)
    np.testing.assert_allclose(found["change"] / 0.01, found["weight"], rtol=0, atol=1e-3 * scale)
    np.testing.assert_allclose(
        graph.perform({last.iloc[0]: 3.0}, free=False).query("kind == 'logit'")["change"],
        2 * found.query("source == @last.iloc[0]")["weight"],
        rtol=0,
        atol=1e-4 * scale,
    )


@pytest.mark.parametrize("free", FREE.values())
def test_a_factor_of_one_changes_nothing(free, tiny_models):
    for kind in ("clt", "neurons"):
        graph = graph_of(tiny_models["gpt2_new"], kind)
        found = graph.perform(dict.fromkeys(some_nodes(graph), 1), free=free)
        np.testing.assert_allclose(found["after"], found["before"], rtol=0, atol=1e-5 * found["before"].abs().max())
        values = graph.nodes.set_index("node")["value"]
        np.testing.assert_allclose(found["before"], values[found["node"]], rtol=0, atol=1e-5 * values.abs().max())


def test_a_feature_in_the_model_is_changed_as_by_an_intervention_on_its_point(tiny_models):
    model, dictionary = tiny_models["reflow"], dictionary_of(tiny_models["reflow"], "clt")
    graph = graph_of(model, "clt", ["a", "b"])
    node = graph.nodes.query("kind == 'feature' and layer == 0 and pos == 2 and activation > 0.1").iloc[0]
    found = graph.perform({node["node"]: 0}, free="model").query("kind == 'logit'")["after"]
    with torch.no_grad(), dictionary.spliced(model):
        off = rl.Ablate("features", layer=0, index=int(node["feature"]), position=2)
        logits = rl.run(model, TOKENS[None], off)[0, -1]
    expected = logits[[ord("a"), ord("b")]] - logits.mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("memory", [None, 1.0])
def test_several_interventions_are_what_each_is_alone(memory, tiny_models):
    graph = graph_of(tiny_models["llama_untied"], "plt")
    nodes = some_nodes(graph)
    asked = [{node: factor} for node in nodes for factor in (-1, 0, 5)] + [{tuple(nodes[-4:-1]): 2}]
    together = graph.perform(asked, free=True, memory=memory)
    alone = pd.concat([graph.perform(each).assign(intervention=i) for i, each in enumerate(asked)], ignore_index=True)
    pd.testing.assert_frame_equal(together.drop(columns=["before", "after", "change"]), alone.iloc[:, :5])
    scale = alone["before"].abs().max()
    for column in ("before", "after", "change"):
        np.testing.assert_allclose(together[column], alone[column], rtol=0, atol=1e-5 * scale)


def test_nodes_that_are_set_are_not_among_what_is_read_and_pruned_graphs_read_their_own(tiny_models):
    graph = graph_of(tiny_models["gpt2"], "plt")
    small = graph.prune(0.9, 0.95)
    nodes = small.nodes.query("kind == 'feature' and activation > 0")["node"].tolist()[:2]
    found, whole = small.perform({tuple(nodes): 0}), graph.perform({tuple(nodes): 0})
    assert set(found["node"]) == set(small.nodes["node"][small.nodes["value"].notna()]) - set(nodes)
    both = found.merge(whole, on="node")
    np.testing.assert_allclose(both["after_x"], both["after_y"], rtol=0, atol=1e-6 * whole["after"].abs().max())


def test_a_graph_of_features_is_performed_up_to_them(tiny_models):
    model = tiny_models["gpt2_biased"]
    whole = graph_of(model, "clt")
    target = whole.nodes.query("kind == 'feature' and layer == 1 and pos == 3").iloc[0]
    graph = graph_of(model, "clt", rl.FeatureAt(1, target["feature"], 3))
    node = graph.nodes.query("kind == 'feature' and layer == 0 and activation > 0")["node"].iloc[-1]
    for free in FREE.values():
        found, expected = (g.perform({node: 3}, free=free).set_index("node")["after"] for g in (graph, whole))
        assert found[target["node"]] == pytest.approx(expected[target["node"]], rel=1e-5)
        assert found.notna().all()


@pytest.mark.parametrize(
    ("at", "layer"),
    [("resid_pre", 0), ("ln1.hook_normalized", 1), ("resid_mid", 1), ("ln2.hook_normalized", 0), ("resid_post", 1)],
)
def test_directions_are_read_where_they_lie(at, layer, tiny_models):
    model, vector = tiny_models["gpt2_biased"], torch.linspace(-1, 1, 32)
    graph = graph_of(model, "neurons", rl.DirectionAt(vector, layer, 3, at=at, name="d"), heads=True)
    node, source = f"direction:{layer}.d@3", "embedding@3"
    edge = graph.edges.query("source == @source and target == @node")["weight"].item()
    found = performed(graph, [change_of(graph, factors_of(graph, {source: 3}))], "direct").values[:, -1]
    assert found[0] == pytest.approx(graph.nodes.iloc[-1]["value"], rel=1e-4)
    assert found[1] - found[0] == pytest.approx(2 * edge, abs=1e-4 * abs(found[0]))
    point = f"blocks.{layer}.{'hook_' if at.startswith('resid') else ''}{at}"
    with model.hooks([("hook_embed", lambda x, hook: x * (torch.arange(x.shape[1]) != 3)[:, None])]):
        stream = model.run_with_cache(TOKENS[None], names_filter=[point])[1][point][0, 3].detach()
    seen = graph.perform({source: 0}, free="model").set_index("node").loc[node, "after"]
    assert seen == pytest.approx(float(stream @ vector), rel=1e-4)


@pytest.mark.parametrize(
    ("interventions", "match"),
    [
        ({"feature:0.9999@1": 0}, "no node 'feature:0.9999@1' in this graph"),
        ({"logit:1": 0}, "no node 'logit:1' in this graph"),
        ({"bias:0": 0}, "'bias:0' cannot be set"),
        ({"error:0@1": float("nan")}, "the factor of 'error:0@1' must be a number"),
        ({"error:0@1": float("inf")}, "must be finite"),
        ({"error:0@1": "twice"}, "the factor of 'error:0@1' must be a number"),
        ({}, "says by node what its activation is multiplied with"),
        ([], "no intervention"),
        ({(): 0}, "a node or a tuple of names"),
        ({3: 0}, "a node or a tuple of names"),
        ({"error:0@1": 0, ("error:0@1",): 2}, "set twice"),
    ],
)
def test_what_cannot_be_performed_is_refused(interventions, match, tiny_models):
    graph = graph_of(tiny_models["gpt2"], "plt")
    with pytest.raises(ReflowlensError, match=match):
        graph.perform(interventions)


def test_an_unsuitable_graph_or_model_is_refused(tiny_models):
    model, off = tiny_models["gpt2"], {"error:0@1": 0}
    graph = graph_of(model, "plt")
    with pytest.raises(ReflowlensError, match="free must be True, False or 'model', got 'much'"):
        graph.perform(off, free="much")
    with pytest.raises(ReflowlensError, match="comes without its model"):
        dataclasses.replace(graph, traced=None).perform(off)
    with rl.intervene(model, rl.Ablate("z", layer=0)):
        model("abcde")  # else the block says that nothing ran in it
        with pytest.raises(ReflowlensError, match="something is attached"):
            graph.perform(off)
    for name in ("ln_final.w", "blocks.0.mlp.W_out"):
        with rl.edit(model, rl.ScaleWeights(name, 1.5)), pytest.raises(ReflowlensError, match="is not what it was"):
            graph.perform(off)
    layer = dictionary_of(model, "plt").each_layer()[1]
    features = layer.encode(model.run_with_cache(TOKENS)[1]["blocks.1.ln2.hook_normalized"][0, -1])
    graph = graph_of(model, "plt", rl.FeatureAt(1, int((features == 0).nonzero()[0])))
    with pytest.raises(ReflowlensError, match="is not active on this prompt"):
        graph.perform({graph.nodes.query("target > 0")["node"].item(): 2})


def test_autocast_rounds_neither_a_graph_nor_what_is_performed(tiny_models):
    graph = graph_of(tiny_models["reflow"], "plt")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = graph_of(tiny_models["reflow"], "plt")
        found = graph.perform({"embedding@1": 0})
    np.testing.assert_array_equal(rounded.matrix.data, graph.matrix.data)
    np.testing.assert_array_equal(found["after"], graph.perform({"embedding@1": 0})["after"])
