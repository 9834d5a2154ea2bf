"""Graphs are compared with equal edges, by both ways of autograd; what is known of a row is right."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from reflowlens.benchmarks import graph as bench
from reflowlens.benchmarks.autograd_graph import BATCH, DenseGraph
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_tokens

ROW = ["dictionary", "tokens", "features", "nodes", "edges", "ours_s"]
AUTOGRAD = ["tuned_s", "tuned", "copies_s", "copies", "difference"]


def case_of(model, kind="plt", activation="topk", n=7, **changes) -> bench.GraphCase:
    dictionary = dictionary_of(model, kind, activation)
    return bench.GraphCase("tiny", model, dictionary, random_tokens(model.cfg, 1, n)[0], **changes)


@pytest.mark.parametrize(
    ("name", "kind", "activation"),
    [("gpt2", "plt", "topk"), ("llama_untied", "clt", "relu"), ("reflow", "clt", "topk")],
)
def test_graphs_by_autograd_have_our_edges(name, kind, activation, tiny_models, monkeypatch):
    monkeypatch.setitem(BATCH, "copies", 17)  # targets of several blocks and positions
    case = case_of(tiny_models[name], kind, activation)
    row = bench.measure(case, rounds=1)
    assert list(row) == [*ROW, *AUTOGRAD]
    assert row["difference"] < 1e-5
    nodes = case.make(bench.OURS).nodes["kind"].value_counts()
    assert row["features"] == nodes["feature"] > 7 * case.model.cfg.n_layers
    assert row["nodes"] == nodes.sum()


def test_other_edges_are_an_error(tiny_models, monkeypatch):
    case = case_of(tiny_models["gpt2"])
    other = case.make(bench.TUNED)
    edges = other.edges.clone()
    edges[-1, 0] += 0.01 * edges.abs().max()
    monkeypatch.setattr(bench, "autograd_graph", lambda *_: DenseGraph(edges, other.influence))
    with pytest.raises(ReflowlensError, match="edges by 'tuned' differ from ours by 1"):
        bench.measure(case, rounds=1)


def test_a_row_a_case(tiny_models, monkeypatch):
    model = tiny_models["gpt2"]

    def made(name: str, n_tokens: int, k: int | None = None, compared: bool = True) -> bench.GraphCase:
        case = case_of(model, n=n_tokens, compared=compared)
        for layer in case.dictionary.each_layer():
            layer.k = k or layer.k
        return case

    monkeypatch.setattr(bench, "make_case", made)
    monkeypatch.setattr(bench, "_peak_memory", lambda way, *_: 2**20 * len(way))
    frame = pd.DataFrame(bench.bench_graph((4, 8, 16), ("tiny",), k=(2, 4), most=8, rounds=1))
    assert frame["tokens"].tolist() == [4, 8, 16, 16, 16]
    assert frame["features"].diff().iloc[[1, 2, 4]].gt(0).all()
    assert frame["copies"].notna().tolist() == [True, True, False, False, False]
    assert frame["ours_mb"].tolist() == [4] * 5
    assert [math.isnan(growth) for growth in frame["growth"]] == [True, False, False, True, False]
    seconds, features = frame["ours_s"], frame["features"]
    expected = math.log(seconds[1] / seconds[0]) / math.log(features[1] / features[0])
    assert frame["growth"][1] == pytest.approx(expected, abs=0.01)
