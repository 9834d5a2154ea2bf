"""Attribution graphs of many prompts: each is that of its prompt alone; merged, they are what pandas makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import reflowlens as rl
from reflowlens.circuits.attribution import many
from reflowlens.circuits.attribution.scores.intervals import mean_intervals
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of
from tests.support.processes import two_processes
from tests.support.tiny import random_model

PROMPTS = ["a ragged list", "of prompts", "a list", "of three lengths"]
TARGETS = ["a", "b", "a", "c"]
OTHERS = ["b", "a", "c", "a"]


def assert_same_graph(found: Any, expected: Any) -> None:
    pd.testing.assert_frame_equal(found.nodes, expected.nodes)
    largest = abs(expected.matrix).max()
    np.testing.assert_allclose(found.matrix.toarray(), expected.matrix.toarray(), rtol=0, atol=1e-6 * largest)
    assert found.scores() == pytest.approx(expected.scores(), rel=1e-6)


@pytest.mark.parametrize("kind", ["plt", "clt", "neurons"])
def test_each_prompt_has_the_graph_that_it_has_alone(kind, tiny_models):
    model = tiny_models["gpt2_biased"]
    dictionary = None if kind == "neurons" else dictionary_of(model, kind)
    options: Any = {"neurons": 5, "progress": False}
    graphs = rl.attribute_each(model, PROMPTS, dictionary, TARGETS, against=OTHERS, **options)
    for graph, prompt, target, other in zip(graphs, PROMPTS, TARGETS, OTHERS, strict=True):
        alone = rl.attribute(model, prompt, dictionary, target, against=other, **options)
        assert_same_graph(graph, alone.prune())
        assert graph.traced is None
    tokens = [model.to_tokens(prompt)[0] for prompt in PROMPTS]
    of_tokens = rl.attribute_each(model, tokens, dictionary, TARGETS, against=OTHERS, **options)
    for graph, expected in zip(of_tokens, graphs, strict=True):
        assert_same_graph(graph, expected)


def test_scores_over_prompts_are_those_of_each_and_their_means(tiny_models):
    model = tiny_models["gpt2"]
    graphs = rl.attribute_each(model, PROMPTS, dictionary_of(model), progress=False)
    scores = graphs.scores()
    alone = [rl.attribute(model, prompt, dictionary_of(model), progress=False).scores() for prompt in PROMPTS]
    assert scores["prompt"].tolist() == PROMPTS
    pd.testing.assert_frame_equal(scores[list(alone[0])], pd.DataFrame(alone), rtol=1e-5)
    assert scores["usable"].tolist() == [score["replacement"] >= 0.5 for score in alone]
    summary = graphs.summary(resamples=500)
    for score in ("replacement", "completeness", "usable"):
        assert summary.loc[score, "mean"] == pytest.approx(scores[score].mean())
    values = scores["replacement"].to_numpy()
    rng = np.random.default_rng(1)
    resampled = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    ends, spread = np.quantile(resampled, [0.025, 0.975]), np.ptp(values)
    np.testing.assert_allclose(summary.loc["replacement", ["low", "high"]].astype(float), ends, atol=0.05 * spread)


def test_graphs_are_validated_before_they_are_pruned(tiny_models):
    model = tiny_models["gpt2"]
    graphs = rl.attribute_each(model, PROMPTS[:2], dictionary_of(model), validate=True, progress=False)
    alone = [rl.attribute(model, prompt, dictionary_of(model), progress=False).faithfulness() for prompt in PROMPTS[:2]]
    for found, expected in zip(graphs.faithfulness, alone, strict=True):
        assert found["verdict"] == expected["verdict"]
        assert found["faithfulness"] == pytest.approx(expected["faithfulness"], rel=1e-4)
    assert graphs.scores()["trustworthy"].tolist() == [each["trustworthy"] for each in alone]
    np.testing.assert_allclose(graphs.scores()["correlation"], [each["correlation"] for each in alone], rtol=1e-4)
    assert graphs.summary().loc["trustworthy", "mean"] == np.mean([each["trustworthy"] for each in alone])
    assert graphs[1:].faithfulness == graphs.faithfulness[1:]


def test_directions_are_merged_by_their_names(tiny_models):
    model = tiny_models["gpt2"]
    generator = torch.Generator().manual_seed(0)
    asked = [rl.DirectionAt(torch.randn(32, generator=generator), layer=1, name=name) for name in ("one", "other")]
    graphs = rl.attribute_each(model, PROMPTS, dictionary_of(model), [asked] * 4, progress=False)
    ends = graphs.merged().nodes.query("kind == 'direction'")
    assert set(ends["node"]) == {"direction:1.one", "direction:1.other"}
    assert ends["share"].tolist() == [1.0, 1.0]


def plain_merge(graphs: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over prompts and shares of nodes and edges, by the frames of the graphs."""
    nodes, edges = [], []
    for number, graph in enumerate(graphs):
        frame = graph.nodes.copy()
        frame["key"] = [
            "logit" if row.kind == "logit" and pd.isna(row.feature) else f"{row.kind} {row.layer} {row.feature}"
            for row in frame.itertuples()
        ]
        key = frame.set_index("node")["key"]
        nodes.append(frame.groupby("key")["influence"].sum().rename(number))
        own = graph.edges.astype({"source": str, "target": str})
        ends = [own["source"].map(key).rename("source"), own["target"].map(key).rename("target")]
        edges.append(own["weight"].groupby(ends).sum().rename(number))
    found = []
    for parts in (nodes, edges):
        table = pd.concat(parts, axis=1)
        found.append(pd.DataFrame({"mean": table.fillna(0).mean(axis=1), "share": table.notna().mean(axis=1)}))
    return found[0], found[1]


@pytest.mark.parametrize("targets", [(None, None), (TARGETS, OTHERS)])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_merged_graphs_are_what_a_plain_table_makes_of_them(targets, share, tiny_models):
    model = tiny_models["reflow"]
    graphs = rl.attribute_each(model, PROMPTS, dictionary_of(model, "clt"), targets[0], against=targets[1])
    merged = graphs.merged(share, resamples=200)
    nodes, edges = (table[table["share"] >= share] for table in plain_merge(graphs))
    key = {
        row.node: "logit" if row.node == "logit" else f"{row.kind} {row.layer} {row.feature}"
        for row in merged.nodes.itertuples()
    }
    assert len(merged.nodes) == len(nodes)
    for row in merged.nodes.itertuples():
        expected = nodes.loc[key[row.node]]
        assert (row.share, row.influence) == pytest.approx((expected["share"], expected["mean"]), rel=1e-5, abs=1e-9)
        assert row.low <= row.influence + 1e-9
        assert row.high >= row.influence - 1e-9
    assert len(merged.edges) == len(edges) > 10
    largest = float(edges["mean"].abs().max())
    for row in merged.edges.itertuples():
        expected = edges.loc[key[row.source], key[row.target]]
        assert row.share == pytest.approx(expected["share"])
        assert row.weight == pytest.approx(expected["mean"], abs=1e-5 * largest)
    units = merged.nodes[merged.nodes["kind"] == "feature"]
    assert merged.features == list(zip(units["layer"], units["feature"], strict=True))
    assert merged.nodes["influence"].is_monotonic_decreasing
    assert merged.nodes["node"].is_unique


def test_intervals_of_sparse_columns_are_those_of_dense_ones():
    values = np.random.default_rng(0).normal(size=(9, 5)) * (np.arange(45).reshape(9, 5) % 3 > 0)
    for sparsely, densely in zip(mean_intervals(sparse.csr_array(values)), mean_intervals(values), strict=True):
        np.testing.assert_allclose(sparsely, densely)
    low, high = mean_intervals(values, resamples=4000)
    error = values.std(axis=0) / 3
    np.testing.assert_allclose(high - low, 2 * 1.96 * error, rtol=0.12)
    assert np.isnan(mean_intervals(values[:1])).all()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a text", {}, "several prompts are asked for"),
        ([], {}, "there is no prompt"),
        (["abc", "a"], {}, r"prompt 1 \('a'\): an attribution graph needs a prompt of two tokens"),
        (["abc", "ab"], {"targets": ["a", "b", "c"]}, "targets has 3 entries for 2 prompts"),
        (["abc", "ab"], {"targets": ["a", "no token"]}, r"prompt 1 \('ab'\): .*token"),
        (["abc", "ab"], {"targets": "a", "against": ["b", "a"]}, r"prompt 1 \('ab'\): 'a' is compared with itself"),
    ],
)
def test_an_error_names_its_prompt(prompts, options, message, tiny_models):
    with pytest.raises(ReflowlensError, match=message):
        rl.attribute_each(tiny_models["gpt2"], prompts, **options)


def test_prompts_are_looked_at_before_anything_is_run(tiny_models, monkeypatch):
    monkeypatch.setattr(many, "attribute", lambda *_, **__: pytest.fail("a graph was made"))
    for prompts, targets in ((["abc", "ab", "a"], "a"), (["abc", "ab", "abc"], ["a", "a", "no token"])):
        with pytest.raises(ReflowlensError, match="prompt 2"):
            rl.attribute_each(tiny_models["gpt2"], prompts, targets=targets)


def test_a_prompt_without_active_features_is_named(tiny_models):
    model = tiny_models["gpt2"]
    dictionary = dictionary_of(model, activation="jumprelu")
    with torch.no_grad():
        for layer in dictionary.each_layer():
            layer.threshold.fill_(1e9)
    with pytest.raises(ReflowlensError, match=r"prompt 0 \('abc'\): no feature of the dictionary is active"):
        rl.attribute_each(model, ["abc", "ab"], dictionary)


# -- several processes ------------------------------------------------------------------------------------------------


def _shared(rank: int, out: Path) -> None:
    model = random_model("gpt2")
    graphs = rl.attribute_each(model, PROMPTS, dictionary_of(model), progress=False)
    merged = graphs.merged(0.5)
    try:
        rl.attribute_each(model, PROMPTS, dictionary_of(model), "a", against=["b", "a", "b", "b"], progress=False)
    except ReflowlensError as error:
        pd.to_pickle((graphs, merged, str(error)), out / f"{rank}.pickle")


def test_two_processes_share_the_prompts(tmp_path: Path) -> None:
    two_processes(_shared, tmp_path)
    model = random_model("gpt2")
    expected = rl.attribute_each(model, PROMPTS, dictionary_of(model), progress=False)
    for rank in (0, 1):
        graphs, merged, error = pd.read_pickle(tmp_path / f"{rank}.pickle")
        assert len(graphs) == len(PROMPTS)
        for graph, alone in zip(graphs, expected, strict=True):
            assert_same_graph(graph, alone)
        pd.testing.assert_frame_equal(merged.edges, expected.merged(0.5).edges)
        assert error.startswith("prompt 1 ('of prompts'): ")
