"""Graphs validated: predictions against small changes and a dense solution, agreement, verdicts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import reflowlens as rl
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.effects import _correlations, agreement, predicted_changes, relative_size
from reflowlens.circuits.attribution.performed.faithful import _judged
from reflowlens.circuits.attribution.performed.matched import Matched
from reflowlens.circuits.attribution.performed.performing import change_of, place_of
from reflowlens.circuits.attribution.performed.validation import strongest
from reflowlens.errors import ReflowlensError
from tests.reflowlens.circuits.test_attribution import BDH, NODES, TOKENS, graph_of
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import FACTORED, NAMES, random_model

CASES = [(name, kind, None) for name in NAMES for kind in NODES]
CASES += [(name, "plt", True) for name in FACTORED] + [("bdh", "neurons", None)]


@pytest.fixture(scope="module")
def exact_models() -> dict[str, Any]:
    """In float64, where a small change is small and not rounding."""
    return {name: random_model(BDH if name == "bdh" else name).double() for name in [*NAMES, "bdh"]}


def relu_graph(model: Any, kind: str, signals: bool | None = None) -> Any:
    """Of features that a small change neither switches on nor off."""
    dictionary = None if kind == "neurons" else dictionary_of(model, kind, "relu").to(model.ln_final.w.dtype)  # type: ignore[arg-type]
    return rl.attribute(model, TOKENS, dictionary, neurons=8, signals=signals, progress=False)


@pytest.mark.parametrize(("name", "kind", "signals"), CASES)
def test_predictions_are_what_small_changes_do_with_patterns_and_norms_held(name, kind, signals, exact_models):
    graph = relu_graph(exact_models[name], kind, signals)
    chosen = [*strongest(graph, 4), *graph.nodes.query("kind in ('embedding', 'signal', 'error')").index[[1, -1]]]
    step = 1e-4
    both = [[change_of(graph, {number: 1 + sign * step}) for number in chosen] for sign in (1, -1)]
    values = performed(graph, [*both[0], *both[1]], "constrained").values[1:]
    observed = (values[: len(chosen)] - values[len(chosen) :]) / (2 * step)
    predicted = predicted_changes(graph, [{int(number): 2.0} for number in chosen])
    has_value = graph.nodes["value"].notna()
    others = np.array([has_value & (graph.nodes.index != number) for number in chosen])
    np.testing.assert_allclose(predicted[others], observed[others], rtol=0, atol=1e-5 * np.nanmax(np.abs(observed)))
    assert (np.abs(predicted) > 1e-3 * np.abs(predicted).max()).sum() > 30


@pytest.mark.parametrize("kind", ["clt", "neurons"])
def test_predictions_solve_the_equations_of_the_graph(kind, tiny_models):
    graph = graph_of(tiny_models["gpt2_new"], kind)
    factors = [{int(n): 3.0} for n in strongest(graph, 3)] + [dict.fromkeys(map(int, strongest(graph, 4)), 0.0)]
    A = graph.matrix.toarray().astype(np.float64)
    answer = np.nan_to_num(1 / graph.nodes["activation"].to_numpy(np.float64)) * graph.nodes["value"].notna()
    for predicted, each in zip(predicted_changes(graph, factors), factors, strict=True):
        is_set = np.isin(np.arange(len(A)), list(each))
        start = np.where(is_set, next(iter(each.values())) - 1, 0.0)
        expected = np.linalg.solve(np.eye(len(A)) - A * np.where(is_set, 0, answer), A @ start)
        np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_pruned_graph_predicts_by_its_own_edges(tiny_models):
    graph = graph_of(tiny_models["gpt2"], "plt").prune(0.9, 0.9)
    source = int(strongest(graph, 1)[0])
    one_edge = dataclasses.replace(graph, matrix=graph.matrix.copy())
    one_edge.matrix.data[:] = 0
    assert not predicted_changes(one_edge, [{source: 5.0}]).any()
    assert predicted_changes(graph, [{source: 5.0}]).any()


# -- random nodes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NODES)
def test_random_nodes_write_as_much_at_the_same_place_and_are_no_nodes_there(kind, tiny_models):
    graph = graph_of(tiny_models["gpt2_biased"], kind)
    matched, norms = Matched(graph.traced, seed=0), []
    names = set(graph.nodes["node"][graph.nodes["activation"] != 0])
    for number in strongest(graph, 12):
        place = place_of(graph, int(number))
        other, ratio = matched.draw(place)
        assert other[:3] == place[:3]
        assert f"{other.kind}:{other.block}.{other.unit}@{other.position}" not in names
        sizes = matched.norms(place.block)
        assert ratio * float(sizes[other.unit]) == pytest.approx(float(sizes[place.unit]), rel=1e-5)
        norms.append(ratio)
    assert len(set(norms)) > 6


# -- agreement --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 5))
def test_agreement_is_scipys_and_resamples_are_of_whole_nodes(seed, n_nodes, per_node):
    rng = np.random.default_rng(seed)
    node = np.arange(n_nodes).repeat(per_node) * 7
    x, y = rng.normal(size=(2, len(node)))
    y = y + x
    found = agreement(x, y, node, seed)
    if len(x) > 2:
        assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
        assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert -1 - 1e-9 <= found.pearson_low <= found.pearson_high <= 1 + 1e-9
    counts = rng.multinomial(n_nodes, np.full(n_nodes, 1 / n_nodes))
    repeated = np.concatenate([np.flatnonzero(node == 7 * i) for i in np.arange(n_nodes).repeat(counts)])
    expected = np.corrcoef(x[repeated], y[repeated])[0, 1] if np.ptp(x[repeated]) else np.nan
    resampled = _correlations(x, y, node // 7, np.array([counts], dtype=float))[0]
    assert resampled == pytest.approx(expected, abs=1e-7, nan_ok=True)


def test_what_does_not_vary_has_no_correlation():
    node = np.arange(6) // 2
    found = agreement(np.zeros(6), np.arange(6.0), node)
    assert np.isnan([found.pearson, found.pearson_low, found.spearman, found.slope]).all()
    assert relative_size(np.full(6, -3.0), np.full(6, 1.5), node) == pytest.approx((2, 2, 2))


# -- a validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "plt"), ("reflow", "neurons"), ("llama_untied", "clt")])
def test_a_validation_is_what_performing_gives_beside_what_is_predicted(name, kind, tiny_models):
    graph = graph_of(tiny_models[name], kind)
    validation = graph.validate(6, (0, 3), free=(False, True))
    rows = validation.rows
    assert rows["node"].nunique() == 6
    for level, free in (("constrained", False), ("free", True)):
        part = rows[rows["level"] == level]
        nodes = part["node"].unique().tolist()
        asked = [{node: factor} for node in nodes for factor in (0, 3)]
        seen = graph.perform(asked, free=free)
        seen["source"], seen["factor"] = (
            np.repeat(nodes, 2)[seen["intervention"]],
            np.tile([0.0, 3.0], 6)[seen["intervention"]],
        )
        both = part.merge(seen, left_on=["node", "factor", "target"], right_on=["source", "factor", "node"])
        assert len(both) == len(part) > 100
        np.testing.assert_allclose(both["observed"], both["change"], rtol=0, atol=1e-5 * seen["before"].abs().max())
        unread = seen[~seen["node"].isin(part["target"])]
        assert len(unread) < len(seen)
    numbers = {node: number for number, node in enumerate(graph.nodes["node"])}
    one = rows.iloc[50]
    predicted = predicted_changes(graph, [{numbers[one["node"]]: one["factor"]}])[0, numbers[one["target"]]]
    assert one["predicted"] == pytest.approx(predicted)
    summary = validation.summary.set_index(["level", "kind"])
    logits = rows[(rows["kind"] == "logit") & (rows["level"] == "free")]
    assert summary.loc[("free", "logit"), "pearson"] == pytest.approx(logits["predicted"].corr(logits["observed"]))
    assert summary.loc[("free", "logit"), "control"] == pytest.approx(logits["predicted"].corr(logits["control"]))
    by = [logits["node"], logits["factor"]]
    centred = {c: logits[c] - logits.groupby(by, observed=True)[c].transform("mean") for c in ("predicted", "observed")}
    expected = centred["predicted"].corr(centred["observed"])
    assert summary.loc[("free", "logit difference"), "pearson"] == pytest.approx(expected)
    assert summary.loc[("constrained", "logit"), "pearson"] > 0.8
    again = graph.validate(6, (0, 3), free=(False, True))
    pd.testing.assert_frame_equal(again.rows, rows)
    assert not graph.validate(6, (0, 3), free=(False, True), seed=1).rows["control"].equals(rows["control"])
    assert "pearson" in validation._repr_html_()
    assert len(validation.figure().data) == len(validation.figure("logit").data) == 4


def test_targets_lie_behind_what_is_set(tiny_models):
    graph = graph_of(tiny_models["gpt2_new"], "plt")
    rows = graph.validate(8, (0,), free=True).rows
    places = graph.nodes[["layer", "pos"]].to_numpy(float, na_value=np.nan)
    source, target = places[rows["node"].cat.codes], places[rows["target"].cat.codes]
    assert (target[:, 0] > source[:, 0]).all()
    assert (target[:, 1] >= source[:, 1]).all()
    assert set(rows["kind"]) == {"feature", "logit"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_nodes": 1}, "n_nodes must be an integer and at least 2"),
        ({"factors": (1, 1.0)}, "factors names none but 1"),
        ({"factors": (float("nan"),)}, "a factor must be a number"),
        ({"factors": (0, float("inf"))}, "a factor must be finite"),
        ({"free": ()}, "got none"),
        ({"free": ("all",)}, "free must be True, False or 'model', got 'all'"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_what_cannot_be_validated_is_refused(options, match, tiny_models):
    graph = graph_of(tiny_models["gpt2"], "plt")
    with pytest.raises(ReflowlensError, match=match):
        graph.validate(**options)


def test_a_graph_without_nodes_to_set_is_refused(tiny_models):
    graph = graph_of(tiny_models["gpt2"], "plt")
    nodes = graph.nodes.assign(influence=0.0)
    with pytest.raises(ReflowlensError, match="needs two nodes at least that can be set, and this graph has 0"):
        dataclasses.replace(graph, nodes=nodes).validate()
    with pytest.raises(ReflowlensError, match="no target is a 'head': there are 'feature', 'logit'"):
        graph.validate(2, (0,), free=True).figure("head")


# -- faithfulness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NODES)
def test_faithfulness_is_that_of_circuits_by_plain_hooks(kind, tiny_models):
    model = tiny_models["reflow_lite"]
    graph = graph_of(model, kind)
    found = graph.faithfulness()
    logits = {"all": model(TOKENS)[0, -1]}
    kept = graph.prune().nodes.query("kind in ('feature', 'neuron') and activation != 0")
    nodes = graph.nodes.query("kind in ('feature', 'neuron')")
    for name, outside in (("none", nodes), ("circuit", nodes[~nodes["node"].isin(kept["node"])]), ("without", kept)):
        removed = [outside.query("layer == @b")[["pos", "feature"]].to_numpy(int).T for b in range(2)]
        alone = [kept.query("layer == @b")[["pos", "feature"]].to_numpy(int).T for b in range(2)]

        def remove(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x, (pos, unit) = x.clone(), removed[hook.layer()]  # noqa: B023 (called before the next round)
            if kind == "neurons" or name == "without":  # noqa: B023
                x[0, pos, unit] = 0
                return x
            only = torch.zeros_like(x)  # features that are not active on the prompt are removed, too
            if name == "circuit":  # noqa: B023
                pos, unit = alone[hook.layer()]  # noqa: B023
                only[0, pos, unit] = x[0, pos, unit]
            return only

        if kind == "neurons":
            logits[name] = model.run_with_hooks(
                TOKENS[None], fwd_hooks=[(f"blocks.{b}.mlp.hook_post", remove) for b in (0, 1)]
            )[0, -1]
        else:
            with graph.traced.dictionary.spliced(model):
                hooks = [(f"blocks.{b}.hook_features", remove) for b in (0, 1)]
                logits[name] = model.run_with_hooks(TOKENS[None], fwd_hooks=hooks)[0, -1]
    p = logits["all"].log_softmax(-1)
    kl = {name: float((p.exp() * (p - each.log_softmax(-1))).sum().detach()) for name, each in logits.items()}
    assert found["faithfulness"] == pytest.approx(1 - kl["circuit"] / kl["none"], abs=1e-3)
    assert found["completeness"] == pytest.approx(1 - kl["without"] / kl["none"], abs=1e-3)
    assert np.isfinite(found["faithfulness_control"])
    assert found["error_influence"] == graph.scores()["error_influence"]


def test_faithfulness_removes_the_strongest_nodes_in_the_model(tiny_models):
    graph = graph_of(tiny_models["gpt2_new"], "clt", "a")
    found = graph.faithfulness()
    rows = graph.validate(24, (0,), free="model", seed=0).rows.query("kind == 'logit'")
    assert len(rows) == 24
    assert found["correlation"] == pytest.approx(rows["predicted"].corr(rows["observed"]), abs=1e-4)
    assert found["control"] == pytest.approx(rows["predicted"].corr(rows["control"]), abs=1e-4)
    assert found["low"] <= found["correlation"] <= found["high"]
    assert graph.faithfulness() == found
    assert graph.faithfulness() is not found


def test_every_kind_of_graph_has_a_faithfulness(tiny_models):
    model = tiny_models["reflow"]
    target = graph_of(model).nodes.query("kind == 'feature' and layer == 1 and pos == 3")["feature"].iloc[0]
    graphs = [
        graph_of(random_model(BDH), "neurons"),
        graph_of(model, "clt", heads=True),
        graph_of(model, "neurons"),
        graph_of(model, "clt", signals=True),
        graph_of(model).prune(0.95),
    ]
    graphs += [graph_of(model, "plt", rl.FeatureAt(1, target, 3)), graph_of(model, "plt", "a", against="b")]
    for graph in graphs:
        found = graph.faithfulness()
        assert np.isfinite([found["correlation"], found["faithfulness"], found["completeness"]]).all()
        assert found["verdict"].startswith("trustworthy" if found["trustworthy"] else "not trustworthy")


@pytest.mark.parametrize(
    ("changed", "n_nodes", "reason", "sentence"),
    [
        (
            {},
            24,
            "",
            "trustworthy: predicted and observed effects correlate at 0.80 (0.60 to 0.90); errors have 10% of",
        ),
        ({"error_influence": 0.62}, 24, "errors", "not trustworthy: errors have 62% of the influence"),
        ({"error_influence": np.nan}, 24, "errors", "not trustworthy: errors"),
        ({}, 3, "few nodes", "not trustworthy: it has 3 features or neurons that can be removed, and 4 are needed"),
        (
            {"low": -0.1},
            24,
            "correlation",
            "not trustworthy: predicted and observed effects correlate at 0.80 (-0.10 to",
        ),
        ({"low": np.nan, "correlation": np.nan}, 24, "correlation", "not trustworthy: predicted and observed"),
        (
            {"control": 0.7},
            24,
            "control",
            "not trustworthy: predicted and observed effects correlate at 0.80 (0.60 to 0.90)",
        ),
        (
            {"faithfulness": 0.4},
            24,
            "faithfulness",
            "not trustworthy: its nodes alone keep 40% of the prediction, random ones",
        ),
        (
            {"faithfulness_control": 0.95},
            24,
            "faithfulness",
            "not trustworthy: its nodes alone keep 90% of the prediction",
        ),
        (
            {"faithfulness": np.nan},
            24,
            "faithfulness",
            "not trustworthy: without its features the prediction is the same",
        ),
    ],
)
def test_the_verdict_says_what_fails(changed, n_nodes, reason, sentence):
    found = {"correlation": 0.8, "low": 0.6, "high": 0.9, "control": 0.1, "error_influence": 0.1}
    found |= {"faithfulness": 0.9, "faithfulness_control": 0.2} | changed
    judged = _judged(found, n_nodes)
    assert judged["trustworthy"] is (reason == "")
    assert judged["reason"] == reason
    assert judged["verdict"].startswith(sentence)


def test_a_graph_shows_itself_while_it_cannot_be_performed(tiny_models):
    model = tiny_models["gpt2"]
    graph = graph_of(model)
    with rl.intervene(model, rl.Ablate("z", layer=0)):
        model("abcde")
        shown = graph._repr_html_()
    assert "something is attached to" in shown
    assert "something is attached to" not in graph._repr_html_()


def test_graphs_of_neurons_are_validated_in_inference_mode(tiny_models):
    """The slope of the activation function is a gradient."""

    def summary():
        return rl.attribute(tiny_models["gpt2_biased"], "to be", neurons=4, progress=False).validate(4).summary

    expected = summary()
    with torch.inference_mode():
        pd.testing.assert_frame_equal(summary(), expected)
