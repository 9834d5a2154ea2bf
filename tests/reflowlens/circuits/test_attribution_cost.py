"""What a graph takes is told before it is made, and batches of targets are all of it."""

from __future__ import annotations

import importlib

import pytest
import torch

import reflowlens as rl
from reflowlens.circuits.attribution.edges.rows import BYTES_AN_EDGE
from reflowlens.errors import ReflowlensError
from reflowlens.progress import bar
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_tokens

CASES = [("gpt2", {}, 1.25), ("reflow", {"signals": True}, 1.1), ("llama_untied", {"heads": True}, 3.0)]


@pytest.mark.parametrize(("name", "options", "most"), CASES)
def test_nodes_and_edges_are_told_before(name, options, most, tiny_models):
    """Some edges that there can be are zero: of biases that a model has not, or with heads between positions."""
    model = tiny_models[name]
    tokens, dictionary = random_tokens(model.cfg, 1, 9)[0], dictionary_of(model, "clt")
    cost = rl.graph_cost(model, tokens, dictionary, **options)
    graph = rl.attribute(model, tokens, dictionary, progress=False, **options)
    assert cost.nodes == len(graph.nodes)
    assert graph.matrix.nnz <= cost.edges <= most * graph.matrix.nnz
    assert cost.bytes > BYTES_AN_EDGE * cost.edges
    assert cost.seconds > 0
    bounded = rl.graph_cost(model, tokens, dictionary, edges_per_node=5, **options)
    assert bounded.edges < cost.edges
    assert bounded.multiply_adds == cost.multiply_adds
    assert f"{cost.nodes:,} nodes, at most {cost.edges:,} edges" in str(cost)


def test_multiply_adds_are_those_of_the_plan(tiny_models):
    """A product with each source that there can be, and nothing else where no block lies between."""
    model = tiny_models["gpt2"]
    tokens, dictionary = random_tokens(model.cfg, 1, 6)[0], dictionary_of(model)
    graph = rl.attribute(model, tokens, dictionary, rl.FeatureAt(0, 3, -1), progress=False)
    cost = rl.graph_cost(model, tokens, dictionary, rl.FeatureAt(0, 3, -1))
    assert graph.nodes["kind"].value_counts()["feature"] == 1
    sources = graph.matrix.shape[1] - 1
    assert cost.multiply_adds == pytest.approx(model.cfg.d_model * sources)
    assert rl.graph_cost(model, tokens, dictionary).multiply_adds > 100 * cost.multiply_adds


def test_a_bar_ends_with_all_targets(tiny_models, monkeypatch):
    bars = []
    module = importlib.import_module("reflowlens.circuits.attribution.attribute")
    monkeypatch.setattr(module, "bar", lambda **options: bars.append(bar(**options)) or bars[-1])
    model = tiny_models["reflow"]
    graph = rl.attribute(model, "abcdefgh", dictionary_of(model), signals=True, progress=True)
    assert bars[0].n == bars[0].total == graph.nodes["value"].notna().sum()


def test_a_cost_is_asked_as_a_graph_is(tiny_models):
    """The same errors, and under autocast the same graph."""
    model = tiny_models["gpt2"]
    tokens = random_tokens(model.cfg, 1, 6)[0]
    for ask in (rl.graph_cost, rl.attribute):
        with pytest.raises(ReflowlensError, match="memory"):
            ask(model, tokens, memory=-1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cost = rl.graph_cost(model, tokens)
    assert cost.edges == rl.graph_cost(model, tokens).edges
