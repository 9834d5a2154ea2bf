"""Scores of graphs over prompts: what the nulls keep and change, and the table that comes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from analyses.features.graph_nulls import RandomFeatures, strongest_units, without_features
from analyses.features.graph_scores import graph_scores, summary
from reflowlens.circuits.attribution.linear.replacement import Replacement
from reflowlens.circuits.attribution.scores.redrawn import redrawn
from reflowlens.errors import ReflowlensError
from tests.reference import graph_scores as reference
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_model

PROMPTS = ["some text", "a prompt", "and a third one"]


def written(replacement: Replacement) -> list[Tensor]:
    """What the MLPs write, less bias and skip: the sum over units and the error."""
    found = []
    for here in replacement.written:
        total = here.error.clone()
        for source, vectors in here.by_units.items():
            for position, vector in zip(replacement.units[source].position.tolist(), vectors, strict=True):
                total[position] += vector
        found.append(total)
    return found


@pytest.fixture(scope="module", params=["plt", "clt", "skip"])
def graph(request):
    model = random_model("gpt2_biased")
    return rl.attribute(model, PROMPTS[2], dictionary_of(model, request.param), progress=False)


def test_the_same_features_drawn_again_are_the_same_graph(graph):
    again = redrawn(graph.traced, graph.traced.engine.replacement)
    np.testing.assert_allclose(again.matrix.toarray(), graph.matrix.toarray(), rtol=0, atol=1e-6)
    assert again.scores() == pytest.approx(graph.scores(), rel=1e-6)


def test_random_features_have_the_norms_and_activations_of_the_dictionarys(graph):
    traced = graph.traced
    own, model = traced.engine.replacement, traced.model
    cache = model.run_with_cache(traced.tokens[None])[1]
    read = [cache[f"blocks.{block}.ln2.hook_normalized"][0] for block in range(model.cfg.n_layers)]
    null = RandomFeatures(40, model.cfg.d_model, seed=0)(own, read)
    for units, same, x in zip(null.units, own.units, read, strict=True):
        torch.testing.assert_close(units.rows.norm(dim=1), same.rows.norm(dim=1))
        value = (units.rows * x[units.position]).sum(1) + units.constant
        torch.testing.assert_close(value, same.value, rtol=0, atol=1e-4)
        cosine = torch.cosine_similarity(units.rows, same.rows)
        assert cosine.mean() < 0.6
    for here, same in zip(null.written, own.written, strict=True):
        for source, vectors in here.by_units.items():
            torch.testing.assert_close(vectors.norm(dim=1), same.by_units[source].norm(dim=1))
            index = own.units[source].index
            directions = torch.nn.functional.normalize(vectors, dim=1)
            for feature in index.unique():  # one direction wherever it is active
                alike = directions[index == feature]
                torch.testing.assert_close(alike, alike[:1].expand_as(alike))
    for found, expected in zip(written(null), written(own), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    drawn = redrawn(traced, null)
    assert_sums(drawn)
    assert drawn.nodes["node"].tolist() == graph.nodes["node"].tolist()


def assert_sums(graph) -> None:
    """Edges add up to pre-activations and logits, in whatever way MLPs are written."""
    value = graph.nodes["value"]
    found = graph.matrix.sum(axis=1)[value.notna()]
    np.testing.assert_allclose(found, value.dropna(), rtol=0, atol=1e-4 * value.abs().max())


def test_without_features_all_is_error(graph):
    own = graph.traced.engine.replacement
    null = without_features(own)
    assert not any(len(units) for units in null.units)
    for here, expected in zip(null.written, written(own), strict=True):
        torch.testing.assert_close(here.error, expected, rtol=0, atol=1e-5)
    assert_sums(redrawn(graph.traced, null))


@pytest.mark.parametrize("name", ["gpt2_biased", "reflow"])
def test_as_many_neurons_stay_as_there_are_features_those_that_write_the_most(name, tiny_models):
    model = tiny_models[name]
    graph = rl.attribute(model, PROMPTS[0], neurons=20, signals=False if name == "reflow" else None, progress=False)
    own = graph.traced.engine.replacement
    counts = [torch.arange(len(PROMPTS[0])) + block for block in range(model.cfg.n_layers)]
    null = strongest_units(own, counts)
    cache = model.run_with_cache(PROMPTS[0])[1]
    for block, (units, count) in enumerate(zip(null.units, counts, strict=True)):
        after = cache[f"blocks.{block}.mlp.hook_post"][0]
        size = after.abs() * model.blocks[block].mlp.W_out.norm(dim=1)
        for position, n in enumerate(count.tolist()):
            expected = set(size[position].topk(n).indices.tolist())
            assert set(units.index[units.position == position].tolist()) == expected
    for found, expected in zip(written(null), written(own), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_sums(redrawn(graph.traced, null))


@pytest.fixture(scope="module")
def scores():
    model = random_model("gpt2")
    another = random_model("gpt2", 5)
    others = {"other": dictionary_of(model, "clt", seed=3), "of another model": (another, dictionary_of(another))}
    return graph_scores(model, dictionary_of(model), PROMPTS, against=others)


def test_every_row_has_the_scores_of_its_own_graphs(scores):
    model, other = random_model("gpt2"), random_model("gpt2", 5)
    assert scores["dictionary"].drop_duplicates().tolist() == [
        "dictionary", "neurons", "random", "none", "other", "of another model",
    ]  # fmt: skip
    for name, of, it in (
        ("dictionary", model, dictionary_of(model)),
        ("other", model, dictionary_of(model, "clt", seed=3)),
        ("of another model", other, dictionary_of(other)),
    ):
        own = scores[scores["dictionary"] == name]
        for row, prompt in zip(own.to_dict("records"), PROMPTS, strict=True):
            expected = rl.attribute(of, prompt, it, progress=False).scores()
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
            features = [(f > 0).float().sum(-1).mean().item() for f in features_of(of, it, prompt)]
            assert row["l0"] == pytest.approx(np.mean(features))
            assert row["usable"] == (expected["replacement"] >= 0.5)
    l0 = scores.pivot(index="prompt", columns="dictionary", values="l0")
    np.testing.assert_allclose(l0["random"], l0["dictionary"])
    np.testing.assert_allclose(l0["neurons"], l0["dictionary"])
    assert (l0["none"] == 0).all()


def features_of(model, dictionary, prompt) -> list[Tensor]:
    cache = model.run_with_cache(prompt)[1]
    return dictionary.encode([cache[point][0] for point in dictionary.cfg.reads])


def test_scores_of_a_null_are_those_of_their_definition(scores):
    """With the matrix that is drawn, over dense inverses."""
    model = random_model("gpt2")
    traced = rl.attribute(model, PROMPTS[0], dictionary_of(model), progress=False).traced
    drawn = redrawn(traced, without_features(traced.engine.replacement))
    kinds = drawn.nodes["kind"].replace({"embedding": "input", "position": "input", "bias": "constant"}).to_numpy()
    expected = reference.scores(drawn.matrix.toarray(), kinds, drawn.nodes["target"].to_numpy())
    row = scores[(scores["dictionary"] == "none") & (scores["prompt"] == PROMPTS[0])].iloc[0]
    assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-4)


def test_the_table_has_means_and_paired_differences(scores):
    table = summary(scores, resamples=200).set_index(["dictionary", "score"])
    wide = scores.pivot(index="prompt", columns="dictionary", values="replacement")
    for name in wide:
        row = table.loc[name, "replacement"]
        assert row["mean"] == pytest.approx(wide[name].mean())
        assert row["low"] <= row["mean"] <= row["high"]
        if name == "dictionary":
            assert np.isnan(row["difference"])
            continue
        paired = wide[name] - wide["dictionary"]
        assert row["difference"] == pytest.approx(paired.mean())
        assert paired.min() <= row["difference_low"] <= row["difference_high"] <= paired.max()
    assert (table.loc[(slice(None), "usable"), "high"] > table.loc[(slice(None), "usable"), "low"]).all()


def test_a_name_stands_for_one_row(tiny_models):
    model = tiny_models["gpt2"]
    with pytest.raises(ReflowlensError, match="'neurons' is already a row"):
        graph_scores(model, dictionary_of(model), PROMPTS, against={"neurons": dictionary_of(model)})
    with pytest.raises(ReflowlensError, match=r"prompt 1 \('a'\)"):
        graph_scores(model, dictionary_of(model), ["abc", "a"])
