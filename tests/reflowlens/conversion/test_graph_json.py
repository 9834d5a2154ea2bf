"""Attribution graphs in the published JSON: its schema, unique ids, and sums that folding leaves as they are."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

import reflowlens as rl
from reflowlens.circuits.attribution.graph import INPUTS
from reflowlens.conversion.graph_json import LIST, graph_json, write_graph_json
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_tokens

TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str,
    "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "influence": float,
}  # fmt: skip


def graph_of(tiny_models, name: str, kind: str | None, **how) -> rl.AttributionGraph:
    model = tiny_models[name]
    dictionary = None if kind is None else dictionary_of(model, kind, "relu")
    return rl.attribute(model, random_tokens(model.cfg, 1, 6)[0], dictionary, progress=False, **how)


CASES = [("gpt2_biased", "plt"), ("gpt2_biased", None), ("reflow", "clt"), ("reflow", None), ("llama_untied", "skip")]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_is_the_published_schema(name, kind, pruned, tiny_models):
    graph = graph_of(tiny_models, name, kind)
    found = graph_json(graph.prune() if pruned else graph, "slug")
    assert set(found) == {"metadata", "qParams", "nodes", "links"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    metadata = found["metadata"]
    assert metadata["slug"] == "slug"
    assert metadata["schema_version"] == 1
    assert len(metadata["prompt_tokens"]) == 6
    assert metadata["prompt"] == graph.prompt
    assert 0 < metadata["node_threshold"] <= 1 + 1e-9
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in found["nodes"]:
        assert all(isinstance(node[field], of) for field, of in NODE.items())
        assert node["feature_type"] in TYPES
        assert 0 <= node["ctx_idx"] < 6
        assert (node["layer"] == "E") == (node["feature_type"] == "embedding")
        if node["feature_type"] == "logit":
            assert f"(p={node['token_prob']:.3f})" in node["clerp"]
            assert node["layer"] == str(tiny_models[name].cfg.n_layers + 1)
        if node["feature_type"] == "mlp reconstruction error":
            assert node["feature"] == -1
    assert {end for link in found["links"] for end in (link["source"], link["target"])} <= set(ids)
    pairs = [(link["source"], link["target"]) for link in found["links"]]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_folded_still_adds_up(name, kind, tiny_models):
    """Links and biases of every target are its value, where positions and signals have become tokens and links."""
    graph = graph_of(tiny_models, name, kind)
    found = graph_json(graph, "slug")
    sums: dict[str, float] = defaultdict(float)
    for link in found["links"]:
        sums[link["target"]] += link["weight"]
    dense, kinds = graph.matrix.toarray().astype(np.float64), graph.nodes["kind"].to_numpy()
    biases = dense[:, np.isin(kinds, ["bias", "rest"])].sum(1)
    value = graph.nodes["value"].to_numpy(float)
    if (kinds == "readout").any():
        share = np.where(kinds == "readout", biases / np.where(kinds == "readout", value, 1.0), 0.0)
        biases = biases + dense @ share
    expected = (value - biases)[kinds == "logit"]
    logits = [node["node_id"] for node in found["nodes"] if node["feature_type"] == "logit"]
    np.testing.assert_allclose([sums[name] for name in logits], expected, rtol=1e-4, atol=1e-5)
    features = [node["node_id"] for node in found["nodes"] if node["feature_type"] == "cross layer transcoder"]
    expected = (value - biases)[np.isin(kinds, ["feature", "neuron"])]
    np.testing.assert_allclose([sums[name] for name in features], expected, rtol=1e-4, atol=1e-5)


def test_errors_and_features_of_the_first_block_are_told_apart(tiny_models):
    graph = graph_of(tiny_models, "gpt2_biased", "plt")
    nodes = {node["node_id"]: node for node in graph_json(graph, "slug")["nodes"]}
    first = [node for node in graph.nodes.to_dict("records") if node["kind"] == "feature" and node["layer"] == 0]
    for node in first:
        shown = nodes[f"0_{node['feature']}_{node['pos']}"]
        assert shown["feature_type"] == "cross layer transcoder"
        assert shown["feature"] == node["feature"] * (node["feature"] + 3) // 2
    assert sum(node["feature_type"] == "mlp reconstruction error" for node in nodes.values()) == 6 * 2


def test_a_difference_of_logits_is_a_logit(tiny_models):
    graph = graph_of(tiny_models, "gpt2_biased", "plt", targets=65, against=66)
    logits = [node for node in graph_json(graph, "slug")["nodes"] if node["feature_type"] == "logit"]
    assert [node["clerp"] for node in logits] == ['Output "A − B" (p=1.000)']


def test_groups_and_pinned_nodes_are_ids(tiny_models):
    graph = graph_of(tiny_models, "gpt2_biased", "plt").prune()
    names = graph.nodes["node"][graph.nodes["kind"] == "feature"].tolist()[:3]
    found = graph_json(graph, "slug", groups=[["both", *names[:2]]], pinned=names[2:], labels={names[0]: "<b>"})
    ids = [name.replace("feature:", "").replace(".", "_").replace("@", "_") for name in names]
    assert found["qParams"]["supernodes"] == [["both", *ids[:2]]]
    assert found["qParams"]["pinnedIds"] == ids[2:]
    assert {node["node_id"]: node["clerp"] for node in found["nodes"]}[ids[0]] == "<b>"
    with pytest.raises(ReflowlensError, match="no node 'feature:9"):
        graph_json(graph, "slug", pinned=["feature:9.9@9"])


def test_a_folder_lists_its_graphs_once(tiny_models, tmp_path):
    graph = graph_of(tiny_models, "gpt2_biased", "plt").prune()
    for name in ("a", "b", "a"):
        path = write_graph_json(graph, tmp_path / f"{name}.json")
        assert json.loads(path.read_text())["metadata"]["slug"] == name
    listed = json.loads((tmp_path / LIST).read_text())["graphs"]
    assert [each["slug"] for each in listed] == ["b", "a"]
    (tmp_path / LIST).write_text("[1]")
    with pytest.raises(ReflowlensError, match="is no list of graphs"):
        write_graph_json(graph, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["gpt2_biased", "reflow"])
def test_why_a_head_attended_stands_at_its_node(name, layer, tiny_models):
    """By the ids of nodes; positions and recipes' signals are added up in their token."""
    graph = graph_of(tiny_models, name, "plt", heads=True)
    why = graph.why_attended(layer, 2, 5, 3, top=10**6)
    found = {node["node_id"]: node for node in graph_json(graph, "slug", attended=[why])["nodes"]}
    (own,) = [node for node in found.values() if "qk_tracing_results" in node]
    assert own["node_id"] == f"head:{layer}.2@5"
    results = own["qk_tracing_results"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert set(results) == set(why.top(1))

    def id_of(source: str) -> str:
        kind, _, place = source.partition(":") if source.startswith("feature") else (source.split("@")[0], "", "")
        if kind == "feature":
            return place.replace(".", "_").replace("@", "_")
        if kind.split(":")[0] in INPUTS:
            position = int(source.rsplit("@", 1)[1])
            return f"E_{int(graph.traced.tokens[position])}_{position}"
        return source

    for key, frame in (("top_q_marginal_contributors", why.queries), ("top_k_marginal_contributors", why.keys)):
        sums: dict[str, float] = defaultdict(float)
        for source, weight in zip(frame["source"], frame["weight"], strict=True):
            sums[id_of(source)] += weight
        largest = sorted(sums.items(), key=lambda each: -abs(each[1]))[:10]
        assert [id for id, _ in results[key]] == [id for id, _ in largest]
        np.testing.assert_allclose([weight for _, weight in results[key]], [weight for _, weight in largest], rtol=1e-5)
        assert {id for id, _ in results[key] if not id.startswith("bias")} <= set(found)
    pairs: dict[tuple[str, str], float] = defaultdict(float)
    for query, key, weight in why.pairs.iloc[:-1].itertuples(index=False):
        pairs[id_of(query), id_of(key)] += weight
    query, key, weight = results["pair_wise_contributors"][0]
    assert weight == pytest.approx(pairs[query, key], rel=1e-5)
    assert abs(weight) == pytest.approx(max(map(abs, pairs.values())), rel=1e-5)
    if layer == 0:
        assert any(id.startswith("E_") for id, _ in results["top_k_marginal_contributors"])
    assert not any("qk_tracing_results" in node for node in graph_json(graph, "slug")["nodes"])


def test_what_cannot_stand_at_a_node_is_refused(tiny_models):
    graph = graph_of(tiny_models, "gpt2_biased", "plt", heads=True)
    why = graph.why_attended(1, 2, 5, 3)
    for twice in ([why, why], [why.compared(2)]):
        with pytest.raises(ReflowlensError, match="a node has one score to explain"):
            graph_json(graph, "slug", attended=twice)
    without = graph_of(tiny_models, "gpt2_biased", "plt")
    with pytest.raises(ReflowlensError, match=r"no node 'head:1\.2@5' in the graph that is drawn"):
        graph_json(without, "slug", attended=[without.why_attended(1, 2, 5, 3)])
