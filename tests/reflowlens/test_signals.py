from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reflowlens as rl
from analyses.experiments.sparsity_profile.experiment import sparsity_profile
from reflowlens.errors import ReflowlensError
from reflowlens.signals import VIEWS, random_rotation, rotate, signal_view, view_of
from tests.support.tiny import FACTORED, NAMES, assert_close, random_model

PROMPT = "The capital"


def views_of(name: str) -> list[str]:
    return [view for view in VIEWS if name in FACTORED or view != "native"]


CASES = [(name, view) for name in NAMES for view in views_of(name)]


@pytest.mark.parametrize(("name", "view_name"), CASES)
def test_every_view_of_every_model_reads_its_own_logits(name, view_name, tiny_models):
    model = tiny_models[name]
    view = signal_view(model, view_name)
    logits, cache = model.run_with_cache(PROMPT)
    assert_close(view.logits(cache.signals(view=view)), logits, 1e-5, f"{name} {view_name}")
    assert_close(view.recipe @ view.basis, model.W_U.T, 1e-5, f"{name} {view_name} embedding")


@pytest.mark.parametrize(("name", "view_name"), CASES)
def test_contributions_sum_to_the_logit(name, view_name, tiny_models):
    model = tiny_models[name]
    logits, cache = model.run_with_cache([PROMPT, "Another one"])
    parts = cache.signal_contributions("e", view=view_name)
    assert_close(parts.sum(-1) + model.b_U[ord("e")], logits[..., ord("e")], 1e-5)


def test_the_final_signals_are_what_the_model_reads_out():
    model = random_model("reflow")
    _, cache = model.run_with_cache(PROMPT)
    assert_close(cache.signals(), cache["unembed.hook_signal"])


def test_a_readout_is_seen_by_no_hook_of_the_model():
    model = random_model("reflow")
    view = signal_view(model)
    _, cache = model.run_with_cache(PROMPT)
    expected, seen = cache.signals(), []

    def double(x, hook):
        seen.append(hook.name)
        return 2 * x

    with model.hooks([("ln_final.hook_normalized", double)]):
        assert torch.equal(view.readout(cache.resid()), expected)
        assert seen == []
        model(PROMPT)


@pytest.mark.parametrize(("name", "view_name"), CASES)
def test_views_of_a_sixteen_bit_model_are_wide(name, view_name):
    model = random_model(name).bfloat16()
    logits, cache = model.run_with_cache(PROMPT)
    view = signal_view(model, view_name)
    assert cache.signals(view=view).dtype == torch.float32
    assert_close(view.logits(cache.signals(view=view)), logits.float(), 0.03)


def test_signals_of_a_layer_are_the_factored_logit_lens():
    model = random_model("reflow")
    _, cache = model.run_with_cache(PROMPT)
    lens = model.unembed(model.ln_final(cache["resid_pre", 1]))
    assert_close(signal_view(model).logits(cache.signals(layer=1)), lens)
    with pytest.raises(ReflowlensError, match="between 0 and 2"):
        cache.signals(layer=3)


def test_a_recipe_written_to_the_stream_enters_as_the_token_does():
    model = random_model("reflow")
    view = signal_view(model)
    _, cache = model.run_with_cache("e")
    assert_close(view.write(view.rows(["e"])), cache["hook_embed"][0])


@given(st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_rotations_are_orthogonal(n, seed):
    A = random_rotation(n, seed)
    assert torch.allclose(A @ A.T, torch.eye(n), atol=1e-5)


def test_a_view_of_fewer_tokens_keeps_their_biases():
    model = random_model("gpt2_own_readout")
    view = signal_view(model, "svd")
    logits, cache = model.run_with_cache(PROMPT)
    assert_close(view.of_tokens(256).logits(cache.signals(view=view)), logits[..., :256])
    assert torch.equal(view.bias_of(torch.tensor([3, 70])), model.b_U[[3, 70]])
    with pytest.raises(ReflowlensError, match="a view's bias has an entry for each row of its recipe, got 288 for 256"):
        dataclasses.replace(view, recipe=view.recipe[:256])


def test_a_rotation_changes_signals_and_keeps_cosines():
    view = signal_view(random_model("reflow"))
    turned = rotate(view, random_rotation(view.n_signals, 1))
    assert not torch.allclose(turned.recipe, view.recipe, atol=0.1)
    assert_close(turned.recipe @ turned.recipe.T, view.recipe @ view.recipe.T)


def test_the_codebook_lists_the_largest_entries_of_either_sign():
    model = random_model("reflow")
    view = signal_view(model)
    book = view.codebook(3, k=4)
    column = view.recipe[:256, 3]
    assert book["sign"].tolist() == [1] * 4 + [-1] * 4
    assert book["recipe"].tolist()[:4] == sorted(column.tolist(), reverse=True)[:4]
    assert book["recipe"].tolist()[4:] == sorted(column.tolist())[:4]
    assert book["z"].iloc[0] == pytest.approx(float((column.max() - column.mean()) / column.std()), rel=1e-5)
    assert book["token"].max() < 256  # padding rows are no tokens


def test_a_view_of_another_model_is_refused_wherever_one_is_taken():
    model, other = random_model("reflow"), random_model("reflow")
    view = signal_view(other)
    cache = model.run_with_cache("abc")[1]
    for ask in (
        lambda: cache.signals(view=view),
        lambda: rl.ablate_readout(model, "abc", view=view),
        lambda: rl.ablate_upstream(model, "abc", rl.metrics.logit_diff(1, 2), "embed", view=view),
        lambda: sparsity_profile(model, view=view),
    ):
        with pytest.raises(ReflowlensError, match="made from another model"):
            ask()
    assert view_of(model, own := signal_view(model)) is own
    compiled = torch.compile(model)
    assert view_of(compiled, compiled_view := signal_view(compiled)) is compiled_view
    assert torch.equal(view_of(model, "rotated", seed=3).recipe, signal_view(model, "rotated", seed=3).recipe)


def test_errors_say_what_there_is():
    model = random_model("gpt2_new")
    with pytest.raises(ReflowlensError, match="'identity' or 'svd'"):
        signal_view(model, "native")
    with pytest.raises(ReflowlensError, match="view must be one of 'native'"):
        signal_view(model, "varimacs")
    with pytest.raises(ReflowlensError, match="signals 0 to 31"):
        signal_view(model).codebook(32)
    _, cache = model.run_with_cache("abc")
    for target, message in (
        (288, "no token 288: ids are 0 to 287"),
        (-1, "no token -1"),
        (torch.tensor([1, 2, 999]), "999"),
    ):
        with pytest.raises(ReflowlensError, match=message):
            cache.signal_contributions(target)
