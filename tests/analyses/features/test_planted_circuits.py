"""Planted circuits: graphs show what is known to be there, and derivatives and removals what a dictionary has lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reflowlens as rl
from analyses.features.jacobians import jacobian_match, mlp_derivative
from analyses.features.planted_circuits import collapsed, exact_dictionary, gate, suppression, two_hop
from analyses.features.planted_graphs import (
    dictionaries_of,
    expected_against_found,
    graph_of,
    planted_graphs,
    removals,
)
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of
from tests.support.planted_circuits import fit, kept

CIRCUITS = {
    "two hops": two_hop,
    "three circuits": lambda: two_hop(3, present=2),
    "and": gate,
    "or": lambda: gate("or"),
    "suppression": suppression,
    "copies": lambda: suppression(3),
}


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize("kind", ["neurons", "per layer", "cross-layer"])
def test_a_graph_has_the_edges_of_the_circuit_and_no_others(name, kind):
    circuit = CIRCUITS[name]()
    edges = expected_against_found(circuit, dictionaries_of(circuit)[kind], kind)
    assert [*zip(edges["source"], edges["target"], strict=True)] == [*circuit.edges]
    np.testing.assert_allclose(edges["found"], edges["expected"], rtol=1e-4)
    kept = edges["pruned"] | (edges["source"] == "bias")
    assert kept.all() or name == "three circuits"  # of which the second does next to nothing to B


def test_the_model_computes_what_is_said_of_it():
    for circuit in (two_hop(2), *(make() for make in CIRCUITS.values())):
        logits, cache = circuit.model.run_with_cache(circuit.prompt)
        for name, (block, index) in circuit.units.items():
            found = float(cache[f"blocks.{block}.mlp.hook_post"][0, -1, index])
            assert found == pytest.approx(circuit.activation[name], rel=1e-5)
        assert int(logits[0, -1].argmax()) == ord(circuit.target)
    for text in ("...", "C..", "..x"):
        assert not gate().model.run_with_cache(text)[1]["blocks.0.mlp.hook_post"][0, -1].any()
        assert not two_hop().model(text)[0, -1].any()


def test_the_edge_of_what_suppresses_is_negative_and_pruning_keeps_it():
    circuit = suppression()
    weights = graph_of(circuit, exact_dictionary(circuit.model)).prune().edges.set_index(["source", "target"])["weight"]
    s, g = circuit.node("s"), circuit.node("g")
    assert weights[s, g] == pytest.approx(circuit.edges["s", "g"], rel=1e-4)
    assert weights[s, g] < 0
    without = float(circuit.model("A..")[0, -1, ord("B")])
    assert without > float(circuit.model(circuit.prompt)[0, -1, ord("B")]) + 0.1


def test_a_collapsed_dictionary_is_exact_and_its_graph_has_one_hop():
    circuit = two_hop()
    dictionary = collapsed(circuit)
    for text in ("A..", "..A.A", "xyz", "AAAA"):
        cache = circuit.model.run_with_cache(text)[1]
        said = dictionary([cache[point] for point in dictionary.cfg.reads])
        for point, of_layer in zip(dictionary.cfg.writes, said, strict=True):
            torch.testing.assert_close(of_layer, cache[point], rtol=1e-5, atol=1e-6)
    edges = expected_against_found(circuit, dictionary, "collapsed").set_index(["source", "target"])["found"]
    assert edges["f", "g"] == edges["g", "B"] == 0
    assert edges["f", "B"] == pytest.approx(circuit.edges["g", "B"], rel=1e-4)
    scores = graph_of(circuit, dictionary).scores()
    assert scores["replacement"] == pytest.approx(1, abs=1e-5)  # nothing in the scores tells
    norms = [exact_dictionary(circuit.model, cross_layer=True), dictionary]
    penalty = [_penalty(circuit, of) for of in norms]
    assert penalty[1] < penalty[0]  # and the penalty of training prefers it


def _penalty(circuit, dictionary):
    """Activations times decoder norms, on the prompt's last position."""
    cache = circuit.model.run_with_cache(circuit.prompt)[1]
    features = dictionary.encode([cache[point][0, -1] for point in dictionary.cfg.reads])
    return sum(float(of_layer @ dictionary.decoder_norms(i)) for i, of_layer in enumerate(features))


def test_the_result_tells_the_collapsed_dictionary_from_the_others():
    result = planted_graphs()
    assert result.metrics["largest_relative_error"] < 1e-4
    assert result.metrics["edges_too_many"] == 0
    assert result.metrics["collapsed_edges_wrong"] == 3
    missing, ratio = (result.findings[f"collapsed_{name}"] for name in ("derivative_missing", "removal_ratio"))
    assert missing.value == pytest.approx(1)
    assert max(missing.controls.values()) < 1e-10
    assert ratio.value == pytest.approx(2, abs=0.1)
    assert list(ratio.controls.values()) == pytest.approx([1, 1], rel=1e-5)


def test_no_correlation_of_effects_tells_a_collapsed_dictionary():
    """Six circuits at once: enough nodes for a verdict, which is that of a faithful dictionary."""
    circuit = two_hop(6, present=6)
    for dictionary in (exact_dictionary(circuit.model, cross_layer=True), collapsed(circuit)):
        graph = rl.attribute(circuit.model, circuit.prompt, dictionary, list("BDFHJL"), progress=False)
        found = graph.faithfulness()
        assert found["trustworthy"]
        assert found["correlation"] > 0.99
        assert found["faithfulness"] == pytest.approx(1, abs=1e-4)


def test_graphs_of_circuits_of_a_unit_a_block_have_a_verdict():
    circuit = two_hop()
    for dictionary in dictionaries_of(circuit).values():
        assert graph_of(circuit, dictionary).faithfulness()["reason"] == "few nodes"


def test_linear_edges_are_the_same_for_and_and_or_and_a_removal_is_not():
    both = {kind: gate(kind) for kind in ("and", "or")}
    assert both["and"].edges["A", "f"] == both["or"].edges["A", "f"]
    table = {kind: removals(circuit).set_index("removed") for kind, circuit in both.items()}
    for removed in ("A", "C", "AC"):  # one is enough: f is gone
        assert table["and"].loc[removed, "observed_f"] == pytest.approx(-both["and"].activation["f"], rel=1e-5)
    assert table["and"].loc["AC", "predicted_f"] == pytest.approx(4 * table["and"].loc["AC", "observed_f"], rel=1e-4)
    assert table["or"].loc["A", "observed_f"] == pytest.approx(table["or"].loc["A", "predicted_f"], rel=0.05)
    assert table["or"].loc["AC", "observed_f"] == pytest.approx(-both["or"].activation["f"], rel=1e-5)


def test_derivatives_are_those_of_finite_differences(tiny_models):
    model = tiny_models["gpt2_biased"]
    x = model.run_with_cache("abcde")[1]["blocks.1.ln2.hook_normalized"][0].double()
    block = model.blocks[1]
    v = torch.randn(2, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def written(at):
        return block.double().mlp(at * block.ln2.w + block.ln2.b)

    try:
        found = mlp_derivative(block.double(), x, v)
        torch.testing.assert_close(found, (written(x + 1e-5 * v) - written(x - 1e-5 * v)) / 2e-5, rtol=1e-6, atol=1e-8)
    finally:
        block.float()


def test_the_derivative_of_random_features_explains_nothing(tiny_models):
    model = tiny_models["gpt2"]
    match = jacobian_match(model, dictionary_of(model, "skip"), ["abcde", "fghij"])
    assert match["layer"].tolist() == [0, 1]
    assert (match["unexplained"] > 0.9).all()
    assert match["cosine"].abs().max() < 0.3
    with pytest.raises(ReflowlensError, match="two tokens at least"):
        jacobian_match(model, dictionary_of(model, "clt"), ["a"])


def test_trained_transcoders_keep_the_second_hop_and_cross_layer_ones_lose_it():
    circuit = two_hop(2)
    found = {
        kind: kept(circuit, fit(circuit, 2, steps=500, kind=kind, activation="jumprelu", l0=1.0), 2)
        for kind in ("transcoder", "cross_layer")
    }
    per_layer, cross_layer = found["transcoder"], found["cross_layer"]
    assert per_layer["second_hop"] > 0.9
    assert cross_layer["second_hop"] < 0.1  # though it reconstructs what the MLPs write better
    assert max(cross_layer["fvu_0"], cross_layer["fvu_1"]) < 0.1
    assert cross_layer["unexplained"] > 0.95 > 0.8 > per_layer["unexplained"]


def test_bad_input_is_one_error(tiny_models):
    with pytest.raises(ReflowlensError, match="1 to 6 circuits and no more of them present"):
        two_hop(7)
    with pytest.raises(ReflowlensError, match="copies must be 1 or more"):
        suppression(0)
    with pytest.raises(ReflowlensError, match="weight must be between"):
        suppression(weight=-2.0)
    with pytest.raises(ReflowlensError, match="'and' or 'or'"):
        gate("xor")  # type: ignore[arg-type]
    with pytest.raises(ReflowlensError, match="ungated and their activation ReLU"):
        exact_dictionary(tiny_models["gpt2_new"])
