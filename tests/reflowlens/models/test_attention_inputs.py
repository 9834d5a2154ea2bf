"""What heads read, a copy of the stream each: TransformerLens's values, its names, and edits of them."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import reflowlens as rl
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.families import ours, quiet, theirs
from tests.support.tiny import assert_close, random_model, random_tokens

FAMILIES = ["gpt2", "gpt_neox", "gpt_neox_sequential"]  # parallel attention and MLP among them
TOKENS = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(3))
INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input")
Hook = tuple[str, Any]


@functools.cache
def bridge(name: str) -> Any:
    """TransformerLens's view of a family's random model."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs(name).save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=theirs(name))


def switched(model: Any, switch: str) -> dict[str, Tensor]:
    getattr(model, f"set_{switch}")(True)
    try:
        with torch.no_grad():
            return dict(model.run_with_cache(TOKENS)[1])
    finally:
        getattr(model, f"set_{switch}")(False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("switch", "points"),
    [
        ("use_attn_in", ["attn.hook_attn_in"]),
        ("use_split_qkv_input", [f"attn.{point}" for point in INPUTS]),
        ("use_hook_mlp_in", ["hook_mlp_in"]),
    ],
)
def test_switched_on_they_hold_what_transformer_lens_has(name: str, switch: str, points: list[str]) -> None:
    own, wanted = switched(ours(name), switch), switched(bridge(name), switch)
    for layer in range(3):
        for point in (f"blocks.{layer}.{point}" for point in points):
            assert_close(own[point], wanted[point], what=point)
    assert not any(point.endswith(tuple(points)) for point in ours(name).run_with_cache(TOKENS)[1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("point", ["hook_attn_in", *INPUTS])
def test_edits_do_what_they_do_in_transformer_lens(name: str, point: str) -> None:
    """Under the name that its short form stands for."""

    def edit(copies: Tensor, hook: Any) -> Tensor:
        copies = copies.clone()
        copies[:, 2, 1] *= 0.5
        copies[:, 4, 3, ::3] += 0.7
        return copies

    theirs_, hooks = bridge(name), [(f"blocks.1.{point}", edit)]
    switch = "set_use_attn_in" if point == "hook_attn_in" else "set_use_split_qkv_input"
    getattr(theirs_, switch)(True)
    with torch.no_grad():
        wanted = theirs_.run_with_hooks(TOKENS, fwd_hooks=hooks)
        getattr(theirs_, switch)(False)
        plain, actual = ours(name)(TOKENS), ours(name).run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert_close(actual, wanted)
    assert (actual - plain).abs().max() > 1e-3


def own_heads(model: HookedModel) -> HookedModel:
    if model.cfg.kv_heads != model.cfg.n_heads:
        pytest.skip("its heads share keys and values")
    return model


def test_a_heads_copy_is_what_its_query_key_and_value_read(model: HookedModel) -> None:
    """Also where an edit writes in place, and where copies of the copy are edited after it."""
    tokens = random_tokens(own_heads(model).cfg, pos=6)

    def halve(copies: Tensor, hook: Any) -> Tensor:
        copies[:, 1:4, 2] *= 0.5
        return copies

    def shift(copies: Tensor, hook: Any) -> Tensor:
        return copies + 0.3

    at_once = [("blocks.1.attn.hook_attn_in", halve)]
    one_by_one = [(f"blocks.1.attn.{point}", halve) for point in INPUTS]
    with torch.no_grad():
        together, apart = (model.run_with_hooks(tokens, fwd_hooks=hooks) for hooks in (at_once, one_by_one))
        assert_close(together, apart)
        after = ("blocks.1.attn.hook_k_input", shift)
        together, apart = (model.run_with_hooks(tokens, fwd_hooks=[*hooks, after]) for hooks in (at_once, one_by_one))
        assert_close(together, apart)


@pytest.mark.parametrize("mode", ["exact", "gradient"])
@pytest.mark.parametrize("name", ["gpt2_biased", "reflow"])
def test_sweeps_there_equal_plain_hooks(tiny_models: dict[str, HookedModel], name: str, mode: Any) -> None:
    model, metric = tiny_models[name], rl.metrics.logit_diff(65, 66)
    clean, corrupted = (random_tokens(model.cfg, pos=6, seed=seed) for seed in (1, 2))
    cells = [rl.Patch("attn_in", layer=1, head=head, position=[1, 3]) for head in range(4)]
    values = rl.sweep(model, clean, corrupted, cells, metric, mode=mode)
    point = "blocks.1.hook_attn_in"
    source, before = (model.run_with_cache(t, names_filter=point)[1]["attn_in", 1].detach() for t in (clean, corrupted))
    for head, value in enumerate(values.effect()):
        added, there = torch.zeros_like(source, requires_grad=True), before + 0.0
        if mode == "exact":
            there[:, [1, 3], head] = source[:, [1, 3], head]

        def patch(copies: Tensor, hook: Any, there: Tensor = there + added) -> Tensor:
            return there

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(point, patch)])[:, -1]
        score = logits[:, 65] - logits[:, 66]
        if mode == "exact":
            wanted = score.detach() - values.baseline
        else:
            product = torch.autograd.grad(score.sum(), added)[0] * (source - before)
            wanted = product[:, [1, 3], head].sum(dim=(1, 2))
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_short_names_of_what_heads_read(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow_lite"]
    _, cache = model.run_with_cache("abc", names_filter=["blocks.0.hook_k_input", "blocks.1.attn.hook_v_input"])
    assert sorted(cache) == ["blocks.0.attn.hook_k_input", "blocks.1.attn.hook_v_input"]
    assert cache["k_input", 0].shape == cache["v_input", 1].shape == (1, 3, 2, 32)
    by_name = [rl.run(model, "abc", rl.Ablate(name, layer=0, head=1)) for name in ("q_input", "attn.hook_q_input")]
    torch.testing.assert_close(*by_name, rtol=0, atol=0)


def test_models_without_a_point_say_so_where_it_is_switched_on() -> None:
    grouped, (bdh, tokens) = random_model("reflow_lite"), (random_bdh(), torch.arange(4)[None])
    for call in (lambda: grouped.set_use_attn_in(True), lambda: rl.run(grouped, "abc", rl.Ablate("attn_in", layer=0))):
        with pytest.raises(rl.ReflowlensError, match=r"share keys and values \(n_key_value_heads=2 for n_heads=4\)"):
            call()
    for switch, point in (
        ("use_attn_in", "hook_attn_in"),
        ("use_split_qkv_input", "hook_q_input"),
        ("use_attn_result", "hook_result"),
        ("use_hook_mlp_in", "hook_mlp_in"),
    ):
        with pytest.raises(rl.ReflowlensError, match=f"a BDH has no {point}"):
            getattr(bdh, f"set_{switch}")(True)
        getattr(bdh, f"set_{switch}")(False)
    assert set(bdh.run_with_cache(tokens)[1]) == {name for name in bdh.hook_dict if bdh.default_names(name)}
