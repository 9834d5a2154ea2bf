"""Attribution graphs: every edge against plain autograd, the sums, and what is explained."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from tests.reference.attribution import Frozen
from tests.support.dictionaries import KINDS, dictionary_of
from tests.support.exactness import BDH
from tests.support.tiny import random_tokens

TOKENS = random_tokens(None, 1, 5)[0]  # type: ignore[arg-type] # of the models' bytes
NODES = [*(kind for kind in KINDS if kind != "sae"), "neurons"]


def graph_of(model: HookedModel, kind: str = "plt", *args: Any, tokens: Tensor = TOKENS, **options: Any) -> Any:
    dictionary = None if kind == "neurons" else dictionary_of(model, kind)  # type: ignore[arg-type]
    return rl.attribute(model, tokens, dictionary, *args, neurons=8, progress=False, **options)


def test_the_frozen_model_of_the_reference_has_the_models_logits(model):
    for dictionary in (dictionary_of(model, "clt"), None):
        torch.testing.assert_close(Frozen(model, TOKENS, dictionary).logits, model(TOKENS)[0, -1], rtol=0, atol=1e-4)


def test_with_heads_as_nodes_nothing_else_passes_between_positions(tiny_models):
    graph = graph_of(tiny_models["llama_untied"], heads=True)
    nodes = graph.nodes.set_index("node")[["kind", "layer", "pos"]]
    edges = graph.edges.join(nodes.add_prefix("source_"), on="source").join(nodes.add_prefix("target_"), on="target")
    edges = edges[edges["source_pos"].notna()]
    from_elsewhere = edges[edges["source_pos"] != edges["target_pos"]]
    assert set(from_elsewhere["target_kind"]) == {"head"}
    assert (edges["source_pos"] <= edges["target_pos"]).all()
    within = edges.query("source_layer == target_layer and source_kind == 'head'")
    assert set(within["target_kind"]) == {"feature"}, "a head's block reads it in its MLP, and no other head does"
    heads = graph.nodes.query("kind == 'head'")
    assert len(heads) == 2 * 4 * len(TOKENS)
    pruned = graph.prune(0.5, 0.9)
    kept = set(pruned.nodes.query("kind == 'head'")["node"])
    assert kept
    assert kept < set(heads["node"])
    assert kept <= set(pruned.edges["source"]) & set(pruned.edges["target"])


def test_a_head_that_writes_nothing_is_no_node(tiny_models):
    model = tiny_models["gpt2_biased"]
    W_O = model.blocks[1].attn.W_O.detach().clone()
    W_O[2] = 0
    with rl.edit(model, rl.SetWeights("blocks.1.attn.W_O", W_O)) as silenced:
        nodes = graph_of(silenced, "neurons", heads=True).nodes.query("kind == 'head'")
    assert len(nodes) == 7 * len(TOKENS)
    assert nodes.query("layer == 1 and feature == 2").empty


# -- what is explained ------------------------------------------------------------------------------------------------


def test_the_likeliest_tokens_reach_their_mass_or_are_ten(tiny_models):
    model = tiny_models["gpt2"]
    logits = graph_of(model).nodes.query("kind == 'logit'")
    probability = model(TOKENS)[0, -1].softmax(-1).sort(descending=True)
    assert logits["feature"].tolist() == probability.indices[:10].tolist()
    expected = probability.values[:10] / probability.values[:10].sum()
    np.testing.assert_allclose(logits["target"], expected.detach(), rtol=1e-5)
    with torch.no_grad(), rl.edit(model, rl.ScaleWeights("ln_final.w", 30.0)) as sure:
        probability = sure(TOKENS)[0, -1].softmax(-1).sort(descending=True).values
        n = len(graph_of(sure).nodes.query("kind == 'logit'"))
    assert 1 <= n < 10
    assert probability[:n].sum() >= 0.95 > probability[: n - 1].sum()


@pytest.mark.parametrize("name", ["gpt2_own_readout", "reflow"])
@pytest.mark.parametrize("kind", ["clt", "neurons"])
def test_a_difference_is_explained_by_differences_of_edges(name, kind, tiny_models):
    model = tiny_models[name]
    graph = graph_of(model, kind, "a", against="b")
    each = graph_of(model, kind, ["a", "b"])
    both, difference = each.matrix.toarray()[-2:], graph.matrix.toarray()[-1]
    np.testing.assert_allclose(difference[:-1], both[0, :-2] - both[1, :-2], rtol=0, atol=1e-5 * np.abs(both).max())
    logits = model(TOKENS)[0, -1]
    last = graph.nodes.iloc[-1]
    assert last["value"] == pytest.approx((logits[ord("a")] - logits[ord("b")]).item(), rel=1e-4)
    assert last["label"] == "a − b"
    assert difference.sum() == pytest.approx(last["value"], abs=1e-4)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", NODES)
def test_features_as_targets_have_the_edges_of_the_whole_graph(kind, heads, tiny_models):
    model = tiny_models["gpt2_biased"]
    whole = graph_of(model, kind, heads=heads)
    chosen = whole.nodes.query("kind in ('feature', 'neuron') and layer == 1 and pos == 3").iloc[0]
    graph = graph_of(model, kind, rl.FeatureAt(1, chosen["feature"], -2), heads=heads)
    assert graph.nodes["pos"].max() == 3
    assert graph.nodes.query("target > 0")["node"].tolist() == [chosen["node"]]
    expected = whole.edges.query("target == @chosen.node").set_index("source")["weight"]
    found = graph.edges.query("target == @chosen.node").set_index("source")["weight"]
    assert set(found.index) == set(expected.index)
    np.testing.assert_allclose(found, expected[found.index], rtol=0, atol=1e-5 * expected.abs().max())


def test_a_feature_that_is_not_active_is_explained_too(tiny_models):
    model = tiny_models["gpt2"]
    dictionary = dictionary_of(model, "plt")
    features = dictionary.each_layer()[1].encode(model.run_with_cache(TOKENS)[1]["blocks.1.ln2.hook_normalized"][0])
    silent = int((features[4] == 0).nonzero()[0])
    graph = graph_of(model, "plt", rl.FeatureAt(1, silent))
    node = graph.nodes.query("target > 0").iloc[0]
    assert node["activation"] == 0
    assert graph.matrix.sum(axis=1)[node.name] == pytest.approx(node["value"], abs=1e-4)


def test_the_encoder_row_of_a_feature_as_a_direction_has_its_edges(tiny_models):
    model = tiny_models["gpt2_biased"]
    whole, layer = graph_of(model, "clt"), dictionary_of(model, "clt").each_layer()[1]
    feature = whole.nodes.query("kind == 'feature' and layer == 1 and pos == 3").iloc[0]
    row = layer.W_enc[feature["feature"]]
    graph = graph_of(model, "clt", rl.DirectionAt(row, 1, 3, "ln2.hook_normalized", "row"))
    node = graph.nodes.query("target > 0").iloc[0]
    assert (node["node"], node["kind"], node["label"]) == ("direction:1.row@3", "direction", "row")
    assert node["value"] + layer.b_enc[feature["feature"]].item() == pytest.approx(feature["value"], rel=1e-5)
    expected = whole.edges.query("target == @feature.node and source != 'bias:1'").set_index("source")["weight"]
    found = graph.edges.query("target == @node.node and source != 'bias:1'").set_index("source")["weight"]
    assert set(found.index) == set(expected.index)
    np.testing.assert_allclose(found, expected[found.index], rtol=0, atol=1e-5 * expected.abs().max())


def test_features_and_directions_share_what_is_explained(tiny_models):
    model = tiny_models["reflow"]
    vector = [1.0] * model.cfg.d_model
    targets = [
        rl.DirectionAt(vector, 1, at="resid_pre"),
        rl.FeatureAt(0, 7, 1),
        rl.DirectionAt(vector, 0, 2, name="sum"),
    ]
    graph = graph_of(model, "plt", targets)
    named = graph.nodes.query("target > 0").set_index("node")
    assert set(named.index) == {"feature:0.7@1", "direction:1.0@4", "direction:0.sum@2"}
    np.testing.assert_allclose(named["target"], 1 / 3)
    streams = model.run_with_cache(TOKENS)[1]
    assert named["value"]["direction:1.0@4"] == pytest.approx(streams["resid_pre", 1][0, 4].sum().item(), abs=1e-4)
    assert named["value"]["direction:0.sum@2"] == pytest.approx(streams["resid_post", 0][0, 2].sum().item(), abs=1e-4)
    units = graph.nodes.query("kind == 'feature'")
    assert units["layer"].max() == 0, "the second block lies behind all targets"
    assert set(graph.prune(0.5).nodes["node"]) >= set(named.index)
    first = graph_of(model, "plt", rl.DirectionAt(vector, 0, at="resid_pre"))
    assert first.edges["source"].tolist() == ["embedding@4"]
    with pytest.raises(ReflowlensError, match="no head lies before"):
        first.through_heads("direction:0.0@4")


# -- a bound on the edges ---------------------------------------------------------------------------------------------


def test_rows_of_bounded_edges_still_add_up_and_keep_the_largest(tiny_models):
    model = tiny_models["gpt2_biased"]
    whole, bounded = graph_of(model), graph_of(model, edges_per_node=5)
    few = whole.nodes["kind"].isin(["rest", "bias"]).to_numpy()
    exact, found = whole.matrix.toarray(), bounded.matrix.toarray()
    np.testing.assert_allclose(found.sum(axis=1), exact.sum(axis=1), rtol=0, atol=1e-4)
    assert (np.count_nonzero(found[:, ~few], axis=1) <= 5).all()
    kept = (found != 0) & ~few
    np.testing.assert_allclose(found[kept], exact[kept], rtol=1e-5)
    for row, mask in zip(np.abs(exact), kept, strict=True):
        assert not mask.any() or row[mask].min() >= np.sort(row[~few])[-6]
    assert graph_of(model, edges_per_node=10_000).scores() == whole.scores()
    share = bounded.scores()["rest_influence"]
    assert 0 < share < 1
    assert bounded.influence["rest"] > 0


def test_memory_bounds_the_edges_by_itself(tiny_models):
    model = tiny_models["gpt2"]
    graph = graph_of(model, memory=15_000)
    targets = int(graph.nodes["value"].notna().sum())
    others = ~graph.nodes["kind"].isin(["rest", "bias"]).to_numpy()
    assert np.count_nonzero(graph.matrix.toarray()[:, others], axis=1).max() == 15_000 // 12 // targets
    assert graph.influence["rest"] > 0


# -- the frames, and errors -------------------------------------------------------------------------------------------


def test_frames_name_what_the_matrix_holds(tiny_models):
    graph = graph_of(tiny_models["reflow_topk"], "neurons")
    assert isinstance(graph.edges, pd.DataFrame)
    assert graph.nodes["node"].is_unique
    number = {name: i for i, name in enumerate(graph.nodes["node"])}
    dense = graph.matrix.toarray()
    rows = list(graph.edges.itertuples())
    assert len(rows) == np.count_nonzero(dense)
    assert all(dense[number[row.target], number[row.source]] == np.float32(row.weight) for row in rows)
    kinds = set(graph.nodes["kind"])
    assert kinds == {"rest", "bias", "signal", "error", "neuron", "readout", "logit"}
    assert "replacement" in repr(graph)
    assert "the nodes of most influence" in graph._repr_html_()


ALONG = [1.0] * 32
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one token": ({"prompt": "a"}, "two tokens at least"),
    "two prompts": ({"prompt": ["ab", "cd"]}, "of one prompt, got 2"),
    "several tokens": ({"targets": "the"}, "is not a single token"),
    "no token": ({"targets": []}, "targets is empty"),
    "twice": ({"targets": ["a", "a"]}, "names a token twice"),
    "against without a token": ({"against": "a"}, "name a token there too"),
    "against itself": ({"targets": "a", "against": "a"}, "compared with itself"),
    "a mixture": ({"targets": ["a", rl.FeatureAt(0, 1)]}, "tokens, or features and directions, not both"),
    "no such block": ({"targets": rl.FeatureAt(7, 1)}, "no layer 7"),
    "no such position": ({"targets": rl.FeatureAt(0, 1, 9)}, "no position 9"),
    "no such feature": ({"targets": rl.FeatureAt(0, 40)}, "no feature 40: they are 0 to 39"),
    "a negative feature": ({"targets": rl.FeatureAt(0, -1)}, "index is its number"),
    "a mixture with a direction": (
        {"targets": ["a", rl.DirectionAt(ALONG, 0)]},
        "features and directions, not both",
    ),
    "no such block of a direction": ({"targets": rl.DirectionAt(ALONG, 2)}, "no layer 2 for a direction"),
    "no such place": (
        {"targets": rl.DirectionAt(ALONG, 0, at="mlp_out")},
        "got at='mlp_out'",
    ),
    "too short": ({"targets": rl.DirectionAt([1.0] * 31, 0)}, "a vector of d_model=32 finite numbers"),
    "a matrix": (
        {"targets": rl.DirectionAt(torch.ones(1, 32), 0, name="probe")},
        "that of 'direction:0.probe@4' is not",
    ),
    "NaN": ({"targets": rl.DirectionAt([float("nan")] * 32, 0)}, "a vector of d_model=32 finite numbers"),
    "zero": ({"targets": rl.DirectionAt(torch.zeros(32), 0)}, "not all zero"),
    "no numbers": ({"targets": rl.DirectionAt("north", 0)}, "a vector of d_model=32 finite numbers"),
    "two of a name": ({"targets": [rl.DirectionAt(ALONG, 0, name="a")] * 2}, "names a direction twice"),
    "directions against": ({"targets": rl.DirectionAt(ALONG, 0), "against": "a"}, "are features or directions"),
    "features against": ({"targets": rl.FeatureAt(0, 1), "against": "a"}, "the targets are features"),
    "no signals": ({"signals": True}, "a GPT2 has none"),
    "little memory": ({"memory": 100.0}, "hold 0 edges of each"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, tiny_models):
    changed, message = BAD[case]
    model = tiny_models["gpt2"]
    arguments = {"prompt": "abcde", "dictionary": dictionary_of(model, "plt")} | changed
    with pytest.raises(ReflowlensError, match=message):
        rl.attribute(model, **arguments)


def test_models_and_dictionaries_that_do_not_fit_are_refused(tiny_models, monkeypatch):
    model = tiny_models["gpt2"]
    with pytest.raises(ReflowlensError, match="needs transcoders of MLPs"):
        graph_of(model, "sae")
    with pytest.raises(ReflowlensError, match="of other weights"):
        rl.attribute(model, "abcde", dictionary_of(model, "plt", model_hash="0" * 64))
    silent = dictionary_of(model, "plt", activation="relu")
    for layer in silent.each_layer():
        layer.b_enc.fill_(-1e3)
    with pytest.raises(ReflowlensError, match="no feature of the dictionary is active"):
        rl.attribute(model, "abcde", silent)
    broken = dictionary_of(model, "plt")
    broken.each_layer()[1].W_dec[3] = torch.nan
    with pytest.raises(ReflowlensError, match="writes in block 1 holds NaN"):
        rl.attribute(model, "abcde", broken)
    with pytest.raises(ReflowlensError, match="no MLPs that a dictionary could stand for"):
        rl.attribute(build_model(BDH), "abcde", dictionary_of(model, "plt"))
    with pytest.raises(ReflowlensError, match="read at resid_pre, resid_post, got at='resid_mid'"):
        rl.attribute(build_model(BDH), "abcde", targets=rl.DirectionAt([1.0] * 16, 0, at="resid_mid"))
    with pytest.raises(ReflowlensError, match="write nothing but by their neurons"):
        rl.attribute(build_model(BDH), "abcde", heads=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "sublayers", ())
        with pytest.raises(ReflowlensError, match="of a GPT2 there is none"):
            rl.attribute(model, "abcde")
    with rl.intervene(model, rl.Ablate("mlp_out", layer=0)):
        model("abcde")  # else the block says that nothing ran in it
        with pytest.raises(ReflowlensError, match="is attached to"):
            rl.attribute(model, "abcde")
    change = rl.SetWeights("ln_final.w", torch.full((32,), torch.nan))
    with rl.edit(model, change), pytest.raises(ReflowlensError, match="are not all finite"):
        rl.attribute(model, "abcde")


@pytest.mark.parametrize("where", ["", "blocks.0.attn", "blocks.1.ln2"])
def test_a_model_whose_modules_are_hooked_is_refused(where, tiny_models):
    model = tiny_models["gpt2_biased"]
    handle = model.get_submodule(where).register_forward_hook(lambda module, inputs, output: output)
    try:
        with pytest.raises(ReflowlensError, match=f"is attached to '{where or 'the model'}'"):
            graph_of(model)
    finally:
        handle.remove()
    assert len(graph_of(model).nodes)


@pytest.mark.parametrize("error", [True, False])
def test_a_model_with_a_dictionary_in_it_is_refused(error, tiny_models):
    model = tiny_models["gpt2_biased"]
    graph = graph_of(model)
    with dictionary_of(model, "plt").spliced(model, error=error):
        for refused in (lambda: graph_of(model), lambda: graph_of(model, "neurons"), graph.faithfulness):
            with pytest.raises(ReflowlensError, match=r"is attached to 'blocks\.0\.hook_mlp_out'"):
                refused()


def test_tokens_that_are_all_but_impossible_are_explained(tiny_models):
    """In float32 their probabilities are 0, by which nothing can be divided."""
    model = tiny_models["gpt2_biased"]
    with rl.edit(model, rl.SetWeights("ln_final.w", 1e3 * model.ln_final.w.detach())):
        order = model(TOKENS)[0, -1].argsort()[:2]
        graph = graph_of(model, "plt", order)
        logits = model(TOKENS)[0, -1].detach().double()
    targets = graph.nodes.query("kind == 'logit'")
    assert (targets["probability"] == 0).all()
    np.testing.assert_allclose(np.log(targets["target"]), logits[order].log_softmax(0), rtol=1e-4, atol=1e-6)
    assert np.isfinite(list(graph.scores().values())).all()
    assert graph.nodes["influence"].notna().all()
    assert set(targets["node"]) <= set(graph.prune().nodes["node"])


def test_a_graph_of_a_model_that_computes_nothing_has_scores(tiny_models):
    model = build_model(tiny_models["gpt2"].cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    graph = graph_of(model)
    assert np.isfinite(list(graph.scores().values())).all()
    assert graph.nodes[["influence", "cumulative"]].notna().all(axis=None)


def test_ids_of_targets_may_be_an_array(tiny_models):
    model = tiny_models["gpt2_biased"]
    expected = graph_of(model, "plt", [3, 5]).nodes
    for ids in (torch.tensor([3, 5]), np.array([3, 5])):
        pd.testing.assert_frame_equal(graph_of(model, "plt", ids).nodes, expected)
    each = rl.attribute_each(model, TOKENS.expand(2, -1), targets=torch.tensor([3, 5]), neurons=2, progress=False)
    assert [list(graph.nodes.query("kind == 'logit'")["feature"]) for graph in each] == [[3], [5]], "one a prompt"


@pytest.mark.parametrize(("of_model", "of_dictionary"), [("float64", "float32"), ("float32", "bfloat16")])
def test_a_dictionary_of_another_type_is_refused(of_model, of_dictionary, tiny_models):
    model = build_model(tiny_models["gpt2"].cfg).to(getattr(torch, of_model))
    dictionary = dictionary_of(model, "plt").to(getattr(torch, of_dictionary))
    with pytest.raises(ReflowlensError, match=rf"is in torch.{of_dictionary} and the model in torch.{of_model}"):
        rl.attribute(model, TOKENS, dictionary)


def test_a_graph_is_itself_and_can_be_pickled_with_its_model(tiny_models):
    graph = graph_of(tiny_models["gpt2_biased"])
    other = pickle.loads(pickle.dumps(graph))
    assert graph in {graph}
    assert graph != other
    assert other.faithfulness() == graph.faithfulness()


def test_a_prompt_is_text_where_its_tokens_are_bytes(tiny_models, tmp_path):
    """The byte tokenizer has several tokens a character."""
    prompt = "日😀é"
    graph = rl.attribute(tiny_models["gpt2_biased"], prompt, neurons=2, progress=False)
    assert len(graph.tokens) == len(prompt.encode())
    assert graph.prompt == graph.prune().prompt == prompt
    assert f"<title>{prompt}" in graph.save(tmp_path / "graph.html").read_text("utf-8")
    assert graph.figure().layout.title.text == prompt
    each = rl.attribute_each(tiny_models["gpt2_biased"], [prompt], neurons=2, progress=False)
    assert list(each.scores()["prompt"]) == [prompt]


def test_a_feature_of_a_block_that_the_dictionary_leaves_out_is_an_error(tiny_models):
    model = tiny_models["gpt2_biased"]
    points = {"reads": ("blocks.1.ln2.hook_normalized",), "writes": ("blocks.1.hook_mlp_out",)}
    dictionary = dictionary_of(model, "plt", **points)
    with pytest.raises(ReflowlensError, match="no feature in block 0: this dictionary has layers for 1"):
        rl.attribute(model, TOKENS, dictionary, rl.FeatureAt(0, 1, -1))
    assert rl.attribute(model, TOKENS, dictionary, rl.FeatureAt(1, 1, -1)).matrix.nnz


def test_a_model_that_is_not_what_its_weights_say_is_refused(tiny_models):
    model = tiny_models["gpt2_biased"]
    mlp, forward = model.blocks[1].mlp, model.blocks[1].mlp.forward
    mlp.forward = lambda x: forward(x) + x  # type: ignore[method-assign]
    model.blocks[0].attn.forward, own = lambda *args: 2 * own(*args), model.blocks[0].attn.forward
    try:
        with pytest.raises(ReflowlensError, match="do not add up"):
            rl.attribute(model, TOKENS, progress=False)
    finally:
        del mlp.forward, model.blocks[0].attn.forward
