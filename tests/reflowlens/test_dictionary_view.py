"""A dictionary's features as a signal view: sums that lose nothing, ablations that keep the error, clear refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import reflowlens as rl
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionary_view import dictionary_view
from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView, random_rotation, rotate, signal_view, varimax_view, view_of
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import assert_close, random_model

PROMPT = "The capital"
MODELS = ["reflow", "gpt2_new", "gpt2_own_readout", "llama_untied"]
ACTIVATIONS = ["relu", "topk", "jumprelu"]


def viewed(name: str, activation: str = "topk", layer: int | None = None) -> SignalView:
    model = random_model(name)
    return signal_view(model, dictionary_of(model, "sae", activation), layer=layer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("turned", ["own", "rotated", "varimax"])
def test_features_constant_and_error_sum_to_the_logits(name, activation, turned):
    view = viewed(name, activation)
    if turned == "rotated":
        view = rotate(view, random_rotation(view.n_signals, 1))
    if turned == "varimax":
        view = varimax_view(view)
    logits, cache = view.model.run_with_cache(PROMPT)
    readout = view.readout(cache.resid())
    assert readout.shape[-1] == view.n_signals + 1 + view.model.cfg.d_model
    assert_close(view.logits(readout), logits, 1e-5)
    parts = view.contributions(cache.resid(), "e")
    assert parts.shape[-1] == view.n_signals + 2
    token = ord("e")
    assert_close(parts.sum(-1) + view.bias_of(torch.tensor(token)), logits[..., token], 1e-5)


@pytest.mark.parametrize("name", ["reflow", "gpt2_own_readout"])
def test_the_parts_are_those_of_plain_arithmetic(name):
    """The oracle: encode, decode and read each part through the norm's weight under the stream's own divisor."""
    view = viewed(name)
    model, layer = view.model, view.dictionary.layers[-1]
    x = model.final_stream(PROMPT)[0, -1]
    a = layer.encode(x)
    error = x - a @ layer.W_dec[:, 0] - layer.b_dec
    centre = (lambda y: y - y.mean()) if model.ln_final.centered else (lambda y: y)
    scale = (centre(x).square().mean() + model.ln_final.eps).sqrt()
    through = lambda y: float(((centre(y) / scale * model.ln_final.w) @ model.W_U[:, 7]).detach())  # noqa: E731
    parts = view.contributions(x, 7)
    for feature in a.nonzero()[:, 0].tolist():
        assert float(parts[feature]) == pytest.approx(through(a[feature] * layer.W_dec[feature, 0]), abs=1e-4)
    assert float(parts[view.n_signals]) == pytest.approx(through(layer.b_dec), abs=1e-4)
    norm_bias = 0.0 if model.ln_final.b is None else float((model.ln_final.b @ model.W_U[:, 7]).detach())
    assert float(parts[-1]) == pytest.approx(through(error) + norm_bias, abs=1e-4)
    assert set(parts[: view.n_signals].nonzero()[:, 0].tolist()) <= set(a.nonzero()[:, 0].tolist())


def test_the_readout_splits_into_the_parts_of_the_stream():
    """Linear once the divisor and the active features are held: attribution to heads and MLPs loses nothing."""
    for turn in (False, True):
        view = viewed("gpt2_own_readout")
        view = rotate(view, random_rotation(view.n_signals, 0)) if turn else view
        x = view.model.final_stream(PROMPT)[0]
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + view.norm.eps).sqrt()
        part = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        split = sum(view.readout_of_part(each, scale, x) for each in (part, x - part)) + view.readout_of_bias(scale, x)
        assert_close(split, view.readout(x), 1e-4)


BITS = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}


@pytest.mark.parametrize(("of_model", "of_dictionary"), [(32, 16), (16, 32), (16, 16), (64, 32), (32, 64)])
def test_types_that_differ_are_widened_and_parts_add_up(of_model, of_dictionary):
    """Of a dictionary that was kept in 16 bits the parts are those of its numbers in 32; it stays as it was."""
    model = random_model("gpt2_own_readout").to(BITS[of_model])
    dictionary = dictionary_of(model, "sae", "jumprelu").to(BITS[of_dictionary])
    view = signal_view(model, dictionary)
    assert view.recipe.dtype == view.basis.dtype == view.logit_rows.dtype == BITS[max(32, of_model, of_dictionary)]
    assert {each.dtype for each in dictionary.parameters()} == {BITS[of_dictionary]}
    x = model.final_stream(PROMPT)[0]
    wide = x.to(view.basis.dtype)
    scale = ((wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + model.ln_final.eps).sqrt()
    parts = torch.stack([0.3 * wide, 0.7 * wide])
    split = view.readout_of_part(parts, scale, x).sum(dim=0) + view.readout_of_bias(scale, x)
    assert_close(split[:, : view.n_signals], view.readout(x)[:, : view.n_signals], 1e-5)
    assert_close(view.logits(split), view.logits(view.readout(x)), 1e-5)


def test_recipes_are_the_features_of_each_token_alone():
    model = random_model("reflow")
    dictionary = dictionary_of(model, "sae")
    view = signal_view(model, dictionary, layer=0)
    (begin,) = model.text_start(prepend_bos=True)
    _, cache = model.run_with_cache(torch.tensor([[begin, 65], [begin, 200]]))
    stream = cache["resid_post", 0][:, 1]
    assert_close(view.recipe[[65, 200]], dictionary.layers[0].encode(stream), 1e-5)
    assert_close(view.embedding[[65, 200]], stream, 1e-5)
    whole = view.write(view.recipe) + dictionary.layers[0].b_dec + view.recipe_error
    assert_close(whole[: view.n_tokens], view.embedding[: view.n_tokens], 1e-5)
    assert view.site == 1


def test_ablating_a_feature_removes_its_write_and_keeps_the_error():
    """The closed form against the feature's hook point, in the model that the dictionary is spliced into."""
    model = random_model("reflow")
    dictionary = dictionary_of(model, "sae")
    view = signal_view(model, dictionary)
    metric = rl.metrics.target_prob("e")
    x = model.final_stream(PROMPT)[0, -1]
    active = dictionary.layers[-1].encode(x).nonzero()[:, 0].tolist()
    removed = rl.ablate_upstream(model, PROMPT, metric, view.site, signals=active, view=view, progress=False)
    with dictionary.spliced(model, layers=view.site - 1):
        for feature, value in zip(active, removed.values[:, 0].tolist(), strict=True):
            logits = rl.run(model, PROMPT, rl.Ablate("features", layer=view.site - 1, index=feature))
            assert value == pytest.approx(float(logits[0, -1].softmax(-1)[ord("e")]), abs=1e-4)


def test_at_the_readout_only_features_are_removed():
    view = viewed("gpt2_own_readout")
    model = view.model
    x = model.final_stream(PROMPT)[0, -1:]
    a, rows = view.readout(x), view.logit_rows
    alone = rl.ablate_readout(model, PROMPT, view=view)
    assert alone.logit("e").shape == (1, view.n_signals)
    for feature in (0, 3, int(a[0, : view.n_signals].argmax())):
        left = a.clone()
        left[:, feature] = 0
        expected = view.logits(left).log_softmax(-1)[0]
        assert_close(alone.probability("e")[0, feature], expected[ord("e")].exp(), 1e-5)
    nothing_left = rl.ablate_progressively(model, PROMPT, "e", view=view, counts=[view.n_signals])
    carried = view.logits(torch.cat([torch.zeros(1, view.n_signals), a[:, view.n_signals :]], dim=1))
    assert_close(nothing_left.logit("e")[0], carried[:, ord("e")], 1e-5)
    assert rows.shape == (model.cfg.d_vocab, view.n_signals + view.n_carried)


def test_an_exact_dictionary_has_no_error_and_a_blind_one_nothing_else():
    model = random_model("reflow")
    cfg = dataclasses.replace(dictionary_of(model, "sae", "relu").cfg, n_features=64)
    exact = Dictionary(cfg).requires_grad_(False)
    for layer in exact.each_layer():
        layer.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        layer.W_dec.copy_(torch.cat([torch.eye(32), -torch.eye(32)])[:, None])
        layer.b_enc.zero_()
        layer.b_dec.zero_()
    x = model.final_stream(PROMPT)
    view = signal_view(model, exact)
    assert view.error_share(x) < 1e-10
    assert view.error_share() < 1e-10
    assert float(view.contributions(x, "e")[..., -1].abs().max()) < 1e-4
    for layer in exact.each_layer():
        layer.W_enc.zero_()
    assert signal_view(model, exact).error_share() >= 1


def test_a_name_or_a_folder_is_the_dictionary(tmp_path):
    model = random_model("reflow")
    dictionary = dictionary_of(model, "sae")
    rl.save_dictionary(tmp_path / "mine", dictionary)
    view = view_of(model, str(tmp_path / "mine"))
    assert torch.equal(view.basis, signal_view(model, dictionary).basis)


def test_another_models_dictionary_or_width_is_refused():
    model = random_model("reflow")
    theirs = dictionary_of(model, "sae", model_hash="0" * 64)
    with pytest.raises(ReflowlensError, match="trained on a model of other weights"):
        signal_view(model, theirs)
    with pytest.raises(ReflowlensError, match=r"expects activations \[batch, pos, 16\]"):
        signal_view(model, Dictionary.fresh(dataclasses.replace(dictionary_of(model, "sae").cfg, d_in=16, d_out=16)))
    with pytest.raises(ReflowlensError, match="several layers"):
        signal_view(model, dictionary_of(model, "clt"))
    with pytest.raises(ReflowlensError, match="blocks, 0, 1, got 7"):
        signal_view(model, dictionary_of(model, "sae"), layer=7)
    with pytest.raises(ReflowlensError, match="layer chooses among those of a dictionary"):
        signal_view(model, "svd", layer=1)


def test_two_points_of_a_block_are_told_apart():
    """The stream before a block and behind it: the block alone names neither."""
    model = random_model("reflow")
    points = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    dictionary = dictionary_of(model, "sae", reads=points, writes=points)
    with pytest.raises(ReflowlensError, match=r"'blocks.1.hook_resid_pre' \(of_layer=1\) and .*post' \(of_layer=2\)"):
        signal_view(model, dictionary, layer=1)
    assert [view.site for view in (signal_view(model, dictionary, layer=0), signal_view(model, dictionary))] == [0, 2]
    assert dictionary_view(model, dictionary, of_layer=1).site == 1


def test_a_dictionary_stands_where_a_view_does():
    model = random_model("reflow")
    dictionary = dictionary_of(model, "sae")
    view = signal_view(model, dictionary)
    found, expected = (
        rl.ablate_upstream(model, PROMPT, rl.metrics.target_prob("e"), view.site, view=one).values
        for one in (dictionary, view)
    )
    assert torch.equal(found, expected)
    _, cache = model.run_with_cache(PROMPT)
    assert torch.equal(cache.signals(view=dictionary), view.readout(cache.resid()))


def test_a_transcoder_has_recipes_and_no_readout():
    model = random_model("reflow")
    view = signal_view(model, dictionary_of(model, "plt"))
    assert view.recipe.shape == (model.cfg.d_vocab, 40)
    with pytest.raises(ReflowlensError, match=r"signal_flow, causal_ablation"):
        view.readout(model.final_stream(PROMPT))


def test_a_feature_is_removed_from_its_own_stream_alone():
    view = viewed("reflow", layer=0)
    with pytest.raises(ReflowlensError, match="site=1, got 'embed'"):
        rl.ablate_upstream(view.model, PROMPT, rl.metrics.target_prob("e"), "embed", view=view)
