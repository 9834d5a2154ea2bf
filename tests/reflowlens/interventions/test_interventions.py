"""Interventions as values: what each does, where it acts, and every way to ask for something impossible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens.utilities import get_act_name

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Intervention, from_json, to_json
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model, random_tokens


def by_hand(model: HookedModel, tokens: Tensor, name: str, change: object) -> Tensor:
    """Logits with a hook that changes a copy of the activation by an assignment written out in the test."""

    def hook(activation: Tensor, hook: object) -> Tensor:
        copy = activation.clone()
        change(copy)  # type: ignore[operator]
        return copy

    return model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_zero_ablation_of_a_head_at_some_positions(model: HookedModel, tokens: Tensor) -> None:
    def change(z: Tensor) -> None:
        z[:, [1, 3], 2] = 0

    actual = rl.run(model, tokens, rl.Ablate("z", layer=1, head=2, position=[1, 3]))
    assert_equal(actual, by_hand(model, tokens, "blocks.1.attn.hook_z", change))
    assert (actual != model(tokens)).any()


def test_mean_ablation_takes_the_mean_over_positions_and_prompts(model: HookedModel, tokens: Tensor) -> None:
    reference = random_tokens(model.cfg, seed=5)
    mean = model.run_with_cache(reference)[1]["blocks.0.hook_mlp_out"].mean(dim=(0, 1))

    def change(mlp_out: Tensor) -> None:
        mlp_out[:, 2:4] = mean

    actual = rl.run(model, tokens, rl.Ablate("mlp_out", layer=0, position=slice(2, 4), by="mean", reference=reference))
    assert_equal(actual, by_hand(model, tokens, "blocks.0.hook_mlp_out", change))


def test_a_mean_over_texts_of_different_lengths_leaves_their_padding_out(model: HookedModel, tokens: Tensor) -> None:
    texts = ["abcdef", "xy"]
    rows = [model.run_with_cache(text)[1]["blocks.0.hook_mlp_out"][0] for text in texts]
    mean = torch.cat(rows).mean(dim=0)

    def change(mlp_out: Tensor) -> None:
        mlp_out[:] = mean

    actual = rl.run(model, tokens, rl.Ablate("mlp_out", layer=0, by="mean", reference=texts))
    expected = by_hand(model, tokens, "blocks.0.hook_mlp_out", change)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_resampling_draws_whole_places_of_the_reference(model: HookedModel, tokens: Tensor) -> None:
    reference = random_tokens(model.cfg, seed=5)
    places = model.run_with_cache(reference)[1]["blocks.0.hook_resid_post"].flatten(0, 1)
    seen = {}

    def keep(activation: Tensor, hook: object) -> None:
        seen["changed"] = activation

    ablation = rl.Ablate("resid_post", layer=0, by="resample", reference=reference, seed=3)
    with rl.intervene(model, ablation), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", keep)]):
        model(tokens)
    rows = seen["changed"].flatten(0, 1)
    found = (rows[:, None] == places[None]).all(dim=-1)
    assert found.any(dim=1).all()
    assert len(found.int().argmax(dim=1).unique()) > 1
    assert_equal(rl.run(model, tokens, ablation), rl.run(model, tokens, ablation))


def test_patch_takes_the_other_prompts_activation(model: HookedModel, tokens: Tensor) -> None:
    other = random_tokens(model.cfg, seed=7)
    cache = model.run_with_cache(other)[1]

    def change(resid: Tensor) -> None:
        resid[:, -2] = cache["blocks.1.hook_resid_pre"][:, -2]

    expected = by_hand(model, tokens, "blocks.1.hook_resid_pre", change)
    assert_equal(rl.run(model, tokens, rl.Patch("resid_pre", other, layer=1, position=-2)), expected)
    assert_equal(rl.run(model, tokens, rl.Patch("blocks.1.hook_resid_pre", cache, position=-2)), expected)


def test_patch_from_another_position_and_one_prompt_for_all(model: HookedModel, tokens: Tensor) -> None:
    other = random_tokens(model.cfg, seed=7)[:1]
    vector = model.run_with_cache(other)[1]["blocks.1.hook_resid_mid"][0, -1]

    def change(resid: Tensor) -> None:
        resid[:, 0] = vector

    actual = rl.run(model, tokens, rl.Patch("resid_mid", other, layer=1, position=0, from_position="last"))
    assert_equal(actual, by_hand(model, tokens, "blocks.1.hook_resid_mid", change))


def test_steer_replace_and_scale_in_order(model: HookedModel, tokens: Tensor) -> None:
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))

    def change(resid: Tensor) -> None:
        resid[:, -1] = (resid[:, -1] + 2.5 * direction) * 0.5
        resid[:, 0, [3, 5]] = 0.25

    interventions: list[Intervention] = [
        rl.Steer("resid_post", direction, 2.5, layer=0, position="last"),
        rl.Scale("resid_post", 0.5, layer=0, position="last"),
        rl.Replace("resid_post", 0.25, layer=0, position=0, index=[3, 5]),
    ]
    assert_equal(rl.run(model, tokens, interventions), by_hand(model, tokens, "blocks.0.hook_resid_post", change))


def test_several_layers_at_once(model: HookedModel, tokens: Tensor) -> None:
    one_by_one = [rl.Ablate("mlp_out", layer=layer, position=1) for layer in range(model.cfg.n_layers)]
    expected = rl.run(model, tokens, one_by_one)
    assert_equal(rl.run(model, tokens, rl.Ablate("mlp_out", layer="all", position=1)), expected)
    assert_equal(rl.run(model, tokens, rl.Ablate("mlp_out", layer=[0, -1], position=1)), expected)


def test_attention_squares_and_several_lists_select_a_product(model: HookedModel, tokens: Tensor) -> None:
    def change(pattern: Tensor) -> None:
        for head in (0, 3):
            for query in (2, 4):
                for key in (0, 1):
                    pattern[:, head, query, key] = 0

    ablation = rl.Ablate("pattern", layer=1, head=[0, 3], position=[2, 4], index=[0, 1])
    assert_equal(rl.run(model, tokens, ablation), by_hand(model, tokens, "blocks.1.attn.hook_pattern", change))


def test_rows_of_the_basis(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    tokens = random_tokens(model.cfg)

    def change(basis: Tensor) -> None:
        basis[[4, 9]] = 0

    assert_equal(
        rl.run(model, tokens, rl.Ablate("hook_basis", index=[4, 9])), by_hand(model, tokens, "hook_basis", change)
    )


def test_last_and_token_positions_follow_each_prompt(model: HookedModel) -> None:
    texts = ["abcX", "aX"]
    for position, places in (("last", [3, 1]), ("X", [3, 1]), ("a", [0, 0])):
        actual = rl.run(model, texts, rl.Ablate("resid_pre", layer=1, position=position))
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            alone = rl.run(model, text, rl.Ablate("resid_pre", layer=1, position=place))
            torch.testing.assert_close(actual[row, : len(text)], alone[0], rtol=1e-5, atol=1e-5)


def test_generation_counts_positions_from_the_start_of_the_text(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    direction = 20 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    for position in (1, 5, slice(2, 6), None):
        with rl.intervene(model, rl.Steer("resid_mid", direction, layer=1, position=position)):
            tokens = model.generate("abcd", 4, temperature=0, return_type="tokens")
            whole = model(tokens)
        assert whole[0, 3:-1].argmax(dim=-1).tolist() == tokens[0, 4:].tolist()


def test_the_model_comes_back_as_it_was(model: HookedModel, tokens: Tensor) -> None:
    before = model(tokens)

    def interrupted(activation: Tensor, hook: object) -> None:
        raise KeyboardInterrupt

    late = [("blocks.1.hook_resid_post", interrupted)]
    with pytest.raises(KeyboardInterrupt), rl.intervene(model, rl.Ablate("resid_pre", layer=0)):
        model.run_with_hooks(tokens, fwd_hooks=late)
    assert "forward" not in model.__dict__
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)


def test_activations_of_earlier_points_stay_as_they_were(model: HookedModel, tokens: Tensor) -> None:
    clean = model.run_with_cache(tokens)[1]
    with rl.intervene(model, rl.Ablate("hook_resid_pre", layer=1)):
        cache = model.run_with_cache(tokens)[1]
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], clean["blocks.0.hook_resid_post"], rtol=0, atol=0)
    assert (cache["blocks.1.hook_resid_pre"] == 0).all()


def test_nested_contexts_act_together(model: HookedModel, tokens: Tensor) -> None:
    a, b = rl.Ablate("z", layer=0, head=1), rl.Scale("mlp_out", 2.0, layer=1, position="last")
    with rl.intervene(model, a), rl.intervene(model, b):
        nested = model(tokens)
    assert_equal(nested, rl.run(model, tokens, [a, b]))


def test_a_compiled_model_is_changed_too() -> None:
    model = random_model("reflow")
    tokens = random_tokens(model.cfg)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(tokens)
    ablation = rl.Ablate("resid_pre", layer=1, position=0)
    with rl.intervene(compiled, ablation):
        changed = compiled(tokens)
    assert_equal(changed, rl.run(model, tokens, ablation))
    assert_equal(compiled(tokens), plain)


@pytest.mark.parametrize(
    "intervention",
    [
        rl.Ablate("unembed.hook_signal", index=17),
        rl.Ablate("z", layer=[0, 1], head=2, by="mean", reference=["some text", "other text"], position="last"),
        rl.Patch("resid_pre", "The king", layer="all", position=slice(0, None, 2), from_position="last"),
        rl.Scale("mlp.hook_post", 0.5, layer=1, index=[5, 7]),
    ],
)
def test_json_round_trip(intervention: Intervention) -> None:
    assert from_json(to_json([intervention])) == [intervention]


def test_json_keeps_directions() -> None:
    direction = torch.randn(4)
    (restored,) = from_json(to_json([rl.Steer("resid_pre", direction, 2.0, layer=0)]))
    assert isinstance(restored, rl.Steer)
    assert isinstance(restored.direction, Tensor)
    assert torch.equal(restored.direction, direction)
    assert restored == rl.Steer("resid_pre", direction, 2.0, layer=0)


def test_interventions_with_tensors_compare_and_go_into_sets() -> None:
    direction = torch.randn(3)
    steer = rl.Steer("resid_pre", direction, layer=[0, 1])
    assert steer == rl.Steer("resid_pre", direction.clone(), layer=[0, 1])
    assert len({steer, rl.Steer("resid_pre", direction.clone(), layer=[0, 1])}) == 1
    for other in (
        rl.Steer("resid_pre", direction + 1, layer=[0, 1]),
        rl.Steer("resid_pre", direction[:1], layer=[0, 1]),
        rl.Steer("resid_pre", direction.tolist(), layer=[0, 1]),
        rl.Steer("resid_pre", direction, layer=[0]),
        rl.Replace("resid_pre", direction, layer=[0, 1]),
    ):
        assert steer != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not a JSON list"),
        ("{}", "must be a JSON list"),
        ('[{"kind": "ablat", "hook": "z"}]', "did you mean 'ablate'"),
        ('[{"kind": "ablate", "hook": "z", "hed": 1}]', "unknown field 'hed' of 'ablate'; did you mean 'head'"),
    ],
)
def test_json_errors(text: str, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        from_json(text)


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (rl.Ablate("resid_pree", layer=0), "did you mean"),
        (rl.Ablate("resid_pre"), "say which with layer="),
        (rl.Ablate("resid_pre", layer=2), "layer=2 is out of range: this model has blocks 0 to 1"),
        (rl.Ablate("blocks.7.hook_resid_pre"), "this model has blocks 0 to 1"),
        (rl.Ablate("resid_pre", layer=0, position=99), "position=99 is out of range"),
        (rl.Ablate("resid_pre", layer=0, position="é"), "token"),
        (rl.Ablate("resid_pre", layer=0, head=0), "has no heads"),
        (rl.Ablate("z", layer=0, head=4), "head=4 is out of range"),
        (rl.Ablate("mlp.hook_post", layer=0, index=48), "index=48 is out of range"),
        (rl.Ablate("hook_basis", index=0, position=0), "has no positions"),
        (rl.Patch("hook_basis", "abc"), "nothing to take from another"),
        (rl.Patch("resid_pre", "ab", layer=0), "the source has 2 tokens"),
        (rl.Patch("resid_pre", layer=0), "needs a prompt"),
        (rl.Patch("resid_pre", ["abcd", "ab"], layer=0, from_position=2), "prompt 1 of the source has 2 tokens"),
        (rl.Ablate("pattern", layer=0, by="mean", reference=["abcd", "ab"]), r"equal length, got \[4, 2\] tokens"),
        (rl.Patch("resid_pre", ["abcd"] * 3, layer=0), "the source has 3 prompts"),
        (rl.Steer("resid_pre", torch.ones(5), layer=0), r"Steer.direction has shape \[5\]"),
    ],
)
def test_impossible_interventions(
    tiny_models: dict[str, HookedModel], intervention: Intervention, message: str
) -> None:
    model = tiny_models["reflow"]
    with pytest.raises(ReflowlensError, match=message):
        rl.run(model, ["abcd", "efgh"], intervention)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert "forward" not in model.__dict__


def test_ablate_checks_its_fields() -> None:
    with pytest.raises(ReflowlensError, match="'zero', 'mean' or 'resample'"):
        rl.Ablate("z", layer=0, by="median")  # type: ignore[arg-type]
    with pytest.raises(ReflowlensError, match="hook must be a hook point's name, got 3"):
        rl.Ablate(3)  # type: ignore[arg-type]
    with pytest.raises(ReflowlensError, match="needs a reference"):
        rl.Ablate("z", layer=0, by="mean")
    with pytest.raises(ReflowlensError, match="takes no reference"):
        rl.Ablate("z", layer=0, reference="abc")


def test_an_intervention_that_no_pass_reaches_is_an_error(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    with pytest.raises(ReflowlensError, match="never ran"), rl.intervene(model, rl.Ablate("resid_pre", layer=1)):
        model("abc", stop_at_layer=1)
    with (
        pytest.raises(ReflowlensError, match="never reached"),
        rl.intervene(model, rl.Ablate("resid_pre", layer=1, position=20)),
    ):
        model.generate("abc", 2)
    with (
        pytest.raises(ReflowlensError, match=r"index=20 at 'blocks.1.attn.hook_pattern' was never reached"),
        rl.intervene(model, rl.Ablate("pattern", layer=1, index=20)),
    ):
        model.generate("abc", 2)


def test_short_names_are_transformer_lens_s(model: HookedModel, tokens: Tensor) -> None:
    for short in ("resid_pre", "q", "z", "pattern", "mlp_out", "post", "ln1.hook_scale"):
        full = get_act_name(short, 1) if "hook" not in short else f"blocks.1.{short}"
        assert_equal(rl.run(model, tokens, rl.Scale(short, 0.5, layer=1)), rl.run(model, tokens, rl.Scale(full, 0.5)))


def test_a_cached_activation_can_be_put_back_at_every_point(model: HookedModel, tokens: Tensor) -> None:
    """Numbers are given in a point's own order of axes, whichever of them are its positions or features."""
    tokens = tokens[:, :4]  # as many as heads: a square that was turned would still fit
    cache = model.run_with_cache(tokens, names_filter=lambda name: True)[1]
    logits = model(tokens)
    for name in cache:  # attention that is watched is computed in squares, and so rounds otherwise
        actual = rl.run(model, tokens, rl.Replace(name, cache[name]))
        torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-5)


def test_rows_of_the_basis_are_replaced_by_vectors_of_the_stream(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(2))
    with rl.edit(random_model("reflow"), rl.SetWeights("embed.W_basis", vector, rows=17)) as edited:
        expected = edited("abc")
    assert_equal(rl.run(model, "abc", rl.Replace("hook_basis", vector, index=17)), expected)
    with pytest.raises(ReflowlensError, match=r"has shape \[32\], the selected part \[2, 4, 5, 3\]"):
        rl.run(model, ["abcde", "fghij"], rl.Replace("pattern", vector, layer=0, index=[0, 1, 2]))


def test_a_row_takes_nothing_from_behind_the_end_of_its_source(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    sources = ["klmno", "pq"]
    with pytest.raises(ReflowlensError, match="prompt 1 of the source has 2 tokens, but position 4 is asked of it"):
        rl.run(model, ["abcde", "fghij"], rl.Patch("resid_pre", sources, layer=1, position="last"))
    both = rl.run(model, ["abcde", "fg"], rl.Patch("resid_pre", sources, layer=1, position="last"))
    for row, (text, source) in enumerate([("abcde", "klmno"), ("fg", "pq")]):
        alone = rl.run(model, text, rl.Patch("resid_pre", source, layer=1, position="last"))[0]
        torch.testing.assert_close(both[row, : len(text)], alone, rtol=1e-5, atol=1e-5)


def test_lengths_count_where_a_run_starts_at_a_layer(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    tokens, lengths = model.tokens_and_lengths(["abcde", "fg"])
    ablation = rl.Ablate("resid_mid", layer=1, position="last")
    with rl.intervene(model, ablation, lengths=lengths):
        actual = model(model(tokens, stop_at_layer=1), start_at_layer=1)
    torch.testing.assert_close(actual[1, :2], rl.run(model, "fg", ablation)[0], rtol=1e-5, atol=1e-5)


def test_a_layer_is_named_once(tiny_models: dict[str, HookedModel]) -> None:
    with pytest.raises(ReflowlensError, match=r"layer=\[1, -1\] names a block twice"):
        rl.run(tiny_models["reflow"], "abc", rl.Ablate("z", layer=[1, -1]))


def test_a_cache_that_was_cut_is_no_source(tiny_models: dict[str, HookedModel]) -> None:
    """Its first position is another's."""
    model = tiny_models["reflow"]
    for name in ("hook_resid_pre", "attn.hook_q"):
        cache = model.run_with_cache("abcde", pos_slice=-2)[1]
        with pytest.raises(ReflowlensError, match=r"the cache has 1 positions of .*, of 5 tokens: .* pos_slice"):
            rl.run(model, "fghij", rl.Patch(f"blocks.1.{name}", cache, position=0))


EACH = [[1, -1], [], [0]]


def test_positions_of_each_prompt(tiny_models):
    model, texts = tiny_models["gpt2"], ["abcde", "abc", "abcd"]
    edit = rl.Scale("mlp_out", 3.0, layer=0, position=EACH)
    assert from_json(to_json(edit)) == [edit] == [rl.Scale("mlp_out", 3.0, layer=0, position=[[1, -1], (), [0]])]
    together = rl.run(model, texts, edit)
    for row, (text, own) in enumerate(zip(texts, EACH, strict=True)):
        alone = rl.run(model, text, rl.Scale("mlp_out", 3.0, layer=0, position=own)) if own else model(text)
        torch.testing.assert_close(together[row, : len(text)], alone[0], rtol=1e-5, atol=1e-5)


def test_a_position_of_each_source(tiny_models):
    model, texts, sources = tiny_models["gpt2"], ["abcde", "abc"], ["xyz", "uvwxy"]
    together = rl.run(model, texts, rl.Patch("resid_pre", sources, layer=1, position=[[2], [0]], from_position=[1, -2]))
    for row, (at, taken) in enumerate([(2, 1), (0, 3)]):
        one = rl.Patch("resid_pre", sources[row], layer=1, position=at, from_position=taken)
        torch.testing.assert_close(
            together[row, : len(texts[row])], rl.run(model, texts[row], one)[0], rtol=1e-5, atol=1e-5
        )


def test_positions_of_each_prompt_in_generation(tiny_models):
    model, texts = tiny_models["gpt2"], ["abcde", "abc"]
    with rl.intervene(model, rl.Scale("mlp_out", -5.0, layer=0, position=[[4, 6], [3]])):
        together = model.generate(texts, 4, temperature=0.0, return_type="tokens")
    for row, (text, own) in enumerate(zip(texts, [[4, 6], [3]], strict=True)):
        with rl.intervene(model, rl.Scale("mlp_out", -5.0, layer=0, position=own)):
            alone = model.generate(text, 4, temperature=0.0, return_type="tokens")
        assert together[row].tolist()[: alone.shape[1]] == alone[0].tolist()


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ([[0]], "positions are given for 1 prompts, but this pass has 2"),
        ([[0], [3]], "position=3 is out of range: prompt 1 has 3 tokens"),
        ([[0], [True]], "a list of these for each prompt"),
        ([[0], 1], "a list of these for each prompt"),
    ],
)
def test_positions_of_each_prompt_that_do_not_fit(tiny_models, position, message):
    with pytest.raises(ReflowlensError, match=message):
        rl.run(tiny_models["gpt2"], ["abcd", "abc"], rl.Scale("mlp_out", 3.0, layer=0, position=position))
