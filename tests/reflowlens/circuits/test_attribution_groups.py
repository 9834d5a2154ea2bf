"""Groups of nodes: known ones are found, told, tested by removal and edited; edges between them are sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reflowlens as rl
from analyses.features.dashboards import feature_dashboards
from analyses.features.planted_circuits import PlantedCircuit, exact_dictionary, gate, suppression
from reflowlens.circuits.attribution.grouped.alike import similarity, tree_of, written_by
from reflowlens.circuits.attribution.grouped.groups import Groups
from reflowlens.circuits.attribution.grouped.jointly import Removals
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of


def planted(copies: int = 3) -> tuple[PlantedCircuit, Groups]:
    circuit = suppression(copies, weight=-0.1)
    graph = rl.attribute(circuit.model, circuit.prompt, exact_dictionary(circuit.model), "B", progress=False)
    return circuit, graph.groups()


LOOSE = {"similar": 0.3, "alike": -1.0, "tolerance": 0.2}


@pytest.fixture(scope="module")
def groups(tiny_models) -> Groups:
    model = tiny_models["gpt2"]
    graph = rl.attribute(model, "abcdef", dictionary_of(model, "clt"), progress=False)
    return graph.prune(0.99, 1.0).groups(**LOOSE)


def test_copies_of_a_feature_are_one_group_and_nothing_else_is():
    circuit, groups = planted()
    (label,) = groups.members
    assert groups.members[label] == tuple(circuit.node(name) for name in ("f", "f2", "f3"))
    row = groups.summary.iloc[0]
    assert row["similarity"] == pytest.approx(1, abs=1e-6)
    assert row["likeness"] == pytest.approx(1, abs=1e-3)
    assert row["deviation"] < 0.2
    assert row["agrees"]
    assert groups.to_list() == [[label, *groups.members[label]]]
    weights = groups.edges.set_index(["source", "target"])["weight"]
    g, a = circuit.node("g"), circuit.node("A")
    assert weights[label, g] == pytest.approx(3 * circuit.edges["f", "g"], rel=1e-5)
    assert weights[a, label] == pytest.approx(3 * circuit.edges["A", "f"], rel=1e-5)


def test_a_name_says_what_the_members_promote_and_where_they_are_active():
    circuit, groups = planted()
    with torch.no_grad():
        coordinate = int(exact_dictionary(circuit.model).each_layer()[0].W_dec[0, 0].argmax())
        circuit.model.unembed.W_U[coordinate, [ord("x"), ord("y")]] = torch.tensor([5.0, 7.0])
    named = rl.attribute(circuit.model, circuit.prompt, exact_dictionary(circuit.model), "B", progress=False).groups()
    assert list(named.members) == ["→ y, x · on ."]
    assert list(groups.members) == ["on ."]


def test_with_feature_pages_a_name_says_on_which_words_of_a_text(tmp_path):
    circuit, groups = planted()
    texts = ["ABCABC", "AAA.A.", "xyA..A"]
    pages = feature_dashboards(circuit.model, texts, exact_dictionary(circuit.model), n_removed=0, around=(1, 1))
    pages.save(tmp_path / "pages", json=True)
    words = pages.feature(0, 0)[0].words(pages.text)
    assert words
    for features in (pages, tmp_path / "pages"):
        (name,) = groups.whole.groups(features=features).members
        assert name == f"on {', '.join(words)}"


@pytest.mark.parametrize("name", ["reflow", "gpt2_biased"])
def test_neurons_have_groups_too(name, tiny_models):
    graph = rl.attribute(tiny_models[name], "abcdef", neurons=6, progress=False)
    groups = graph.prune(0.99, 1.0).groups(similar=0.1, alike=-1.0, tolerance=1.0)
    assert len(groups) > 2
    assert set(groups.nodes["kind"]) == {"neuron"}
    assert groups.summary["deviation"].between(0, 1).all()


def test_similarity_is_the_mean_of_three_cosines(groups):
    graph = groups.whole
    numbers = np.flatnonzero(graph.nodes["kind"] == "feature")[[0, 3, -1]].tolist()
    found, weights = similarity(graph, numbers), graph.matrix.toarray().astype(float)
    share = weights / np.maximum(np.abs(weights).sum(1, keepdims=True), 1e-30)
    through = graph.nodes["influence"].to_numpy() + graph.nodes["target"].to_numpy()
    scores = share * through[:, None]
    rows = graph.nodes.iloc[numbers]
    layers = graph.traced.dictionary.each_layer()
    for i, a in enumerate(rows.itertuples()):
        for j, b in enumerate(rows.itertuples()):
            write = [layers[of.layer].W_dec[of.feature].sum(0).numpy() * of.activation for of in (a, b)]
            pairs = [write, share[[numbers[i], numbers[j]]], scores[:, [numbers[i], numbers[j]]].T]
            cosines = [u @ v / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-30) for u, v in pairs]
            assert found[i, j] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_agreement_is_that_of_removals_by_themselves(groups):
    graph = groups.whole
    names = next(iter(groups.members.values()))
    numbers = tuple(sorted(graph.nodes.index[graph.nodes["node"].isin(names)]))
    (found,) = groups.removals.agreement([numbers])
    done = graph.perform([{names: 0.0}, *({name: 0.0} for name in names)], free="model")
    change = done[~done["node"].isin(names)].pivot(index="node", columns="intervention", values="change")
    into = np.abs(graph.matrix).sum(axis=1)
    through = (graph.nodes["influence"] + graph.nodes["target"]).to_numpy() / np.where(into > 0, into, np.inf)
    change = change.to_numpy() * through[graph.nodes.set_index("node").index.get_indexer(change.index)][:, None]
    joint, single = change[:, 0], change[:, 1:]
    total = single.sum(1)
    expected = np.abs(joint - total).sum() / max(np.abs(joint).sum(), np.abs(total).sum())
    assert found.deviation == pytest.approx(expected, rel=1e-3, abs=1e-5)
    size, pairs = np.linalg.norm(single, axis=0), np.triu_indices(len(names), 1)
    likeness = (single.T @ single / np.outer(size, size))[pairs].mean()
    assert found.likeness == pytest.approx(likeness, abs=1e-3)


def test_copies_of_which_one_is_enough_are_alike_and_no_sum():
    circuit = suppression(3)  # where s takes most of g, which is silent without any of the three
    graph = rl.attribute(circuit.model, circuit.prompt, exact_dictionary(circuit.model), "B", progress=False)
    groups = graph.groups()
    assert len(groups) == 0
    first = groups.tested.iloc[0]
    assert (first["outcome"], first["n"]) == ("split", 3)
    assert first["likeness"] == pytest.approx(1, abs=1e-3)
    assert first["deviation"] > 0.4
    assert len(graph.groups(tolerance=1.0)) == 1


def test_both_inputs_of_a_gate_removed_do_less_than_the_sum():
    circuit = gate()
    graph = rl.attribute(circuit.model, circuit.prompt, exact_dictionary(circuit.model), "B", progress=False).prune()
    number = {node: i for i, node in enumerate(graph.nodes["node"])}
    (found,) = Removals(graph, "model").agreement([tuple(number[circuit.node(name)] for name in "AC")])
    assert found.deviation > 0.3  # each of the two silences f alone, and both can do no more
    assert found.likeness > 0.99


def test_candidates_that_fail_are_split_or_dissolved_and_that_is_said(groups):
    tested = groups.tested
    passes = (tested["deviation"] <= groups.tolerance) & (tested["likeness"] >= groups.alike)
    assert (passes == (tested["outcome"] == "kept")).all()
    kept = tested[passes]
    assert dict(zip(kept["group"], kept["members"], strict=True)) == dict(groups.members)
    assert (tested.loc[~passes, "group"] == "").all()
    everything = {frozenset(members): row for members, row in zip(tested["members"], tested.itertuples(), strict=True)}
    for row in tested[tested["outcome"] == "split"].itertuples():
        assert any(part < set(row.members) and everything[part].round == row.round + 1 for part in everything)
    strict = groups.whole.groups(similar=0.3, alike=1.0, tolerance=0.0)
    assert len(strict) == 0
    assert set(strict.tested["outcome"]) <= {"split", "dissolved"}
    assert "dissolved" in strict._repr_html_()


def test_the_same_graph_has_the_same_groups(groups):
    assert groups.whole.groups(**LOOSE).to_list() == groups.to_list()
    shares = groups.summary["influence"].to_numpy()
    assert (np.diff(shares) <= 1e-12).all()
    assert len(groups) >= 3


def test_the_small_graph_sums_its_members(groups):
    small, whole = groups.graph, groups.whole
    assert len(small.nodes) == len(whole.nodes) - sum(len(nodes) - 1 for nodes in groups.members.values())
    for column in ("influence", "target"):
        assert small.nodes[column].sum() == pytest.approx(whole.nodes[column].sum())
    owner = {node: name for name, nodes in groups.members.items() for node in nodes}
    edges = whole.edges.astype({"source": str, "target": str})
    edges["source"], edges["target"] = (
        edges[end].map(lambda node: owner.get(node, node)) for end in ("source", "target")
    )
    expected = edges[edges["source"] != edges["target"]].groupby(["source", "target"])["weight"].sum()
    found = groups.edges.astype({"source": str, "target": str}).set_index(["source", "target"])["weight"]
    assert set(found.index) <= set(expected.index)
    np.testing.assert_allclose(found, expected[found.index], rtol=1e-4, atol=1e-6)
    assert small.scores() == whole.scores()
    assert "group" in set(small.nodes["kind"])
    assert small.prune(1.0, 1.0).nodes["influence"].notna().all()
    assert small._repr_html_()
    assert small.figure().data


def test_editing_makes_new_groups(groups):
    first, second, *_ = groups.members
    before = groups.to_list()
    merged = groups.merge(first, second)
    assert merged.members[first] == groups.members[first] + groups.members[second]
    assert second not in merged.members
    assert set(merged.summary["group"]) == set(merged.members)
    split = merged.split(first)
    parts = [nodes for name, nodes in split.members.items() if name not in groups.members]
    assert set().union(*parts) <= set(merged.members[first])
    assert groups.rename(first, "a name").members["a name"] == groups.members[first]
    without = groups.without(first)
    assert len(without) == len(groups) - 1
    again = without.with_group("again", groups.members[first])
    assert set(again.nodes.query("group == 'again'")["node"]) == set(groups.members[first])
    free = [f"embedding@{i}" for i in range(2)]
    assert not np.isnan(groups.with_group("tokens", free).summary.iloc[-1]["deviation"])
    assert groups.to_list() == before


def test_groups_are_saved_with_the_graph(groups, tmp_path):
    text = groups.whole.save(tmp_path / "graph.json", groups=groups.to_list()).read_text(encoding="utf8")
    assert '"supernodes"' in text
    page = groups.whole.save(tmp_path / "graph.html", groups=groups.to_list()).read_text(encoding="utf8")
    assert all(node in page for nodes in groups.members.values() for node in nodes)


def test_what_units_write_is_summed_over_the_blocks(groups):
    graph = groups.whole
    rows = graph.nodes[graph.nodes["kind"] == "feature"].iloc[[0, -1, 2]]
    layers = graph.traced.dictionary.each_layer()
    expected = [layers[of.layer].W_dec[of.feature].sum(0) * of.activation for of in rows.itertuples()]
    torch.testing.assert_close(written_by(graph.traced, rows), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert tree_of(graph, []) is None
    assert tree_of(graph, [7]).parts == ()


def test_bad_input_is_one_clear_error(groups, tiny_models):
    name = next(iter(groups.members))
    node = groups.members[name][0]
    cases = {
        "no group 'x'": lambda: groups.without("x"),
        "cannot be merged with itself": lambda: groups.merge(name, name),
        "is the name of another": lambda: groups.rename(name, node),
        "is a text": lambda: groups.rename(name, " "),
        "no node 'feature:9'": lambda: groups.with_group("x", ["feature:9", node]),
        "is in the group": lambda: groups.with_group("x", [node, "embedding@0"]),
        "two nodes or more": lambda: groups.with_group("x", ["embedding@0", "embedding@0"]),
        "must be removable": lambda: groups.with_group("x", [groups.whole.nodes["node"].iloc[-1], "embedding@0"]),
        "similar must be from -1 to 1": lambda: groups.whole.groups(similar=2),
        "tolerance must be from 0": lambda: groups.whole.groups(tolerance=-1),
        "free must be": lambda: groups.whole.groups(free="yes"),
        "comes without its model": lambda: groups.graph.groups(),
    }
    for message, call in cases.items():
        with pytest.raises(ReflowlensError, match=message):
            call()
    model = tiny_models["gpt2"]
    graph = rl.attribute(model, "abcdef", dictionary_of(model, "clt"), progress=False)
    with pytest.raises(ReflowlensError, match="no features or neurons to group"):
        graph.prune(0.0, 0.0).groups()
