"""What the published TinyTranscoder gets wrong where it traces a feature, each beside what holds here.

The numbers are those of its defects; the others, of its training and its interventions, are tested where these are:

    8   what is written has the scale of the MLP's output     tests/pretraining/dictionaries/test_published_faults.py
    9   a frozen model that is trained on reads as evaluated  tests/pretraining/dictionaries/test_train.py
    10  padding is of no window                               tests/pretraining/dictionaries/test_harvest.py
    11  held-out metrics, dead features, nulls; forced values in units of what is observed
                                                              tests/analyses/features/test_evaluation.py,
                                                              tests/analyses/experiments/test_circuit_tracing.py
"""

from __future__ import annotations

import numpy as np
import pytest

import reflowlens as rl
from tests.reference.attribution import Frozen
from tests.reference.graph_paths import all_paths, published_search
from tests.reference.tiny_transcoder import GPT, PublishedTracing, in_their_names
from tests.support.dictionaries import dictionary_of
from tests.support.planted import chained_lexicon, chained_model
from tests.support.tiny import assert_close, random_model, random_tokens, tiny_config

TOKENS = random_tokens(None, 1, 5)[0]  # type: ignore[arg-type] # of the models' bytes
POSITION = 3


@pytest.fixture(scope="module")
def model():
    """The published architecture: learned positions, LayerNorm, ReLU, heads that do not make up d_model."""
    return random_model(tiny_config("gpt2_own_readout", d_model=30)).requires_grad_(False)


@pytest.fixture(scope="module")
def dictionary(model):
    return dictionary_of(model, "plt")


@pytest.fixture(scope="module")
def published(model, dictionary):
    cfg = model.cfg
    gpt = GPT(cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx)
    gpt.load_state_dict(in_their_names(dict(model.named_parameters())))
    layers = dictionary.each_layer()
    return PublishedTracing(
        gpt.requires_grad_(False), TOKENS, [each.W_enc for each in layers], [each.W_dec[:, 0] for each in layers], 6
    )


@pytest.fixture(scope="module")
def traced(model, dictionary):
    """An active feature of block 1: its graph, its number, and its edges by autograd."""
    whole = rl.attribute(model, TOKENS, dictionary, progress=False)
    index = int(whole.nodes.query("kind == 'feature' and layer == 1 and pos == @POSITION")["feature"].iloc[0])
    graph = rl.attribute(model, TOKENS, dictionary, rl.FeatureAt(1, index, POSITION), progress=False)
    frozen = Frozen(model, TOKENS[: POSITION + 1], dictionary)
    return graph, index, frozen.edges(frozen.units[1][POSITION, index])


def edges_into(graph, index):
    """By the names of their sources."""
    edges = graph.edges
    return edges[edges["target"] == f"feature:1.{index}@{POSITION}"].set_index("source")["weight"]


def test_defect_1_a_path_goes_on_from_where_it_is():
    """Published: each round takes the best sources of the root again, so that the second step repeats the first."""
    model, prompt = chained_model(), chained_lexicon().factual[0].prompt
    graph = rl.attribute(model, prompt, targets=chained_lexicon().factual[0].target, signals=False, progress=False)
    nodes = graph.nodes
    weights = graph.matrix.toarray() * ~nodes["kind"].isin(["bias", "rest"]).to_numpy()
    root = len(nodes) - 1
    first = {path[1] for path in published_search(weights, root, branches=5, rounds=1)}
    theirs = published_search(weights, root, branches=5, rounds=2)
    assert {path[2] for path in theirs} <= first, "the second step is a first step"
    assert weights[theirs[0][1], theirs[0][2]] == 0, "and no edge"
    begin = nodes["kind"].isin(["embedding", "error"]).to_numpy()
    best = max(all_paths(np.abs(weights), nodes["target"].to_numpy(), begin).items(), key=lambda item: item[1])[0]
    found = graph.paths(1)["path"][0]
    assert found == tuple(nodes["node"].iloc[list(best)])
    assert [name.split("@")[0] for name in found[1:3]] == ["neuron:1.0", "neuron:3.0"]


def test_defect_2_all_contributors_are_found(published, traced):
    """Published: the routine returns inside its loop, with the first."""
    graph, index, _ = traced
    assert len(published.first_contributor(1, index, POSITION)) == 1
    edges = edges_into(graph, index)
    assert len(edges) > 20
    value = graph.nodes.set_index("node")["value"][f"feature:1.{index}@{POSITION}"]
    assert edges.sum() == pytest.approx(value, rel=1e-4)
    assert abs(edges.iloc[0] - value) > 0.1 * abs(value)


def test_defect_3_features_write_with_what_topk_keeps(model, dictionary, published, traced):
    """Published: with pre-activations, those of features that are not active too."""
    graph, index, exact = traced
    active = dictionary.each_layer()[0].encode(model.run_with_cache(TOKENS)[1]["blocks.0.ln2.hook_normalized"][0])
    theirs = published.contributions(1, index, POSITION)
    n_theirs = sum(name[0] == "feature" and contribution != 0 for name, contribution in theirs.items())
    edges = edges_into(graph, index)
    ours = [name for name in edges.index if name.startswith("feature:0.") and name.endswith(f"@{POSITION}")]
    assert len(ours) == int((active[POSITION] > 0).sum()) < n_theirs == 40
    activation = graph.nodes.set_index("node")["activation"]
    for name in ours:
        feature = int(name.split(".")[1].split("@")[0])
        assert activation[name] == pytest.approx(active[POSITION, feature].item(), rel=1e-5)
        assert edges[name] == pytest.approx(exact["unit", 0][POSITION, feature].item(), rel=1e-4, abs=1e-6)


def test_defect_4_errors_are_of_what_the_mlp_reads(model, dictionary, published, traced):
    """Published: the reconstruction reads the attention's norm, ln1."""
    cache = model.run_with_cache(TOKENS[: POSITION + 1])[1]
    written = traced[0].traced.engine.replacement.written[0]
    out, read = cache["blocks.0.hook_mlp_out"][0], cache["blocks.0.ln2.hook_normalized"][0]
    assert_close(written.error, out - dictionary.reconstruct(0, dictionary.encode([read, read]), read))
    theirs = out - published.reconstruction(0)[: POSITION + 1]
    assert (written.error - theirs).norm() > 0.5 * written.error.norm()


def test_defect_5_directions_go_back_through_a_head_by_its_transpose(model, dictionary, published):
    """Published: by OV, which takes vectors forward."""
    cache = model.run_with_cache(TOKENS, names_filter=lambda name: True)[1]
    block, f = model.blocks[0], dictionary.each_layer()[0].W_enc[3]

    def before_norm(gradient, norm, place):
        scaled = gradient / cache[f"blocks.0.{norm}.hook_scale"][0, place]
        return scaled - scaled.mean()

    behind = before_norm(f, "ln2", POSITION)
    edges = {"right": [], "published": []}
    for place in range(POSITION):
        for name, back in (
            ("right", lambda head: block.attn.W_V[head] @ block.attn.W_O[head] @ behind),
            ("published", lambda head: published.pulled_back(0, head, behind)),
        ):
            pattern = cache["blocks.0.attn.hook_pattern"][0, :, POSITION, place]
            row = sum(
                pattern[head] * before_norm(back(head) * block.ln1.w, "ln1", place) for head in range(model.cfg.n_heads)
            )
            edges[name].append((row @ published.embeddings[place]).item())
    graph = rl.attribute(model, TOKENS, dictionary, rl.FeatureAt(0, 3, POSITION), progress=False)
    ours = graph.edges[graph.edges["target"] == f"feature:0.3@{POSITION}"].set_index("source")["weight"]
    ours = ours[[f"embedding@{place}" for place in range(POSITION)]].to_numpy()
    np.testing.assert_allclose(ours, edges["right"], rtol=1e-4)
    assert np.linalg.norm(ours - edges["published"]) > 0.5 * np.linalg.norm(ours)


def test_defect_6_the_attention_of_a_features_own_layer_is_followed(model, dictionary, published):
    """Published: it is skipped, though the MLP reads what it has just written."""
    graph = rl.attribute(model, TOKENS, dictionary, rl.FeatureAt(0, 3, POSITION), progress=False)
    frozen = Frozen(model, TOKENS[: POSITION + 1], dictionary)
    exact = frozen.edges(frozen.units[0][POSITION, 3])
    edges = graph.edges.query("target == 'feature:0.3@3'").set_index("source")["weight"]
    theirs = published.contributions(0, 3, POSITION)
    assert set(theirs) == {("embedding", str(POSITION))}, "nothing from other positions"
    for position in range(POSITION):
        assert edges[f"embedding@{position}"] == pytest.approx(exact["embedding",][position].item(), rel=1e-4)
        assert abs(edges[f"embedding@{position}"]) > 1e-3


def test_defect_7_norms_positions_and_biases_are_counted(model, dictionary, published, traced):
    """Published: they are ignored, and contributions add up to something else than the feature's pre-activation."""
    graph, index, exact = traced
    layer, cache = dictionary.each_layer()[1], model.run_with_cache(TOKENS)[1]
    value = layer.preactivations(cache["blocks.1.ln2.hook_normalized"][0, POSITION])[index].item()
    edges = edges_into(graph, index)
    assert edges.sum() == pytest.approx(value, rel=1e-4)
    assert abs(sum(published.contributions(1, index, POSITION).values()) - value) > 0.1 * abs(value)
    assert edges[[f"position@{place}" for place in range(POSITION + 1)]].abs().min() > 0
    for block in range(2):
        assert edges[f"bias:{block}"] == pytest.approx(exact["bias",][block].item(), rel=1e-3, abs=1e-5)
        assert edges[f"bias:{block}"] != 0
    ours, plain = edges[f"embedding@{POSITION}"], published.embeddings[POSITION] @ layer.W_enc[index]
    assert ours == pytest.approx(exact["embedding",][POSITION].item(), rel=1e-4)
    assert abs(ours - plain.item()) > 0.1 * abs(ours)
