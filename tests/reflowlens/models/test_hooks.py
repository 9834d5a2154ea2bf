"""The named activation points: that each fires, what it holds, and what editing it does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.activations.cache import ActivationCache
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import FACTORED, assert_close, bias, random_model, random_tokens, tiny_config

BLOCK = {
    "hook_resid_pre": "b p d",
    "hook_attn_out": "b p d",
    "hook_resid_mid": "b p d",
    "hook_mlp_in": "b p d",
    "hook_mlp_out": "b p d",
    "hook_resid_post": "b p d",
    "ln1.hook_scale": "b p 1",
    "ln1.hook_normalized": "b p d",
    "ln2.hook_scale": "b p 1",
    "ln2.hook_normalized": "b p d",
    "attn.hook_q_input": "b p h d",
    "attn.hook_k_input": "b p g d",
    "attn.hook_v_input": "b p g d",
    "attn.hook_q": "b p h e",
    "attn.hook_k": "b p g e",
    "attn.hook_v": "b p g e",
    "attn.hook_attn_scores": "b h p p",
    "attn.hook_pattern": "b h p p",
    "attn.hook_z": "b p h e",
    "attn.hook_result": "b p h d",
    "mlp.hook_pre": "b p m",
    "mlp.hook_post": "b p m",
}
OWN_KEYS = {"attn.hook_attn_in": "b p h d"}
ROTARY = {"attn.hook_rot_q": "b p h e", "attn.hook_rot_k": "b p g e"}
GATED = {"mlp.hook_pre_linear": "b p m"}
TOP = {"hook_embed": "b p d", "ln_final.hook_scale": "b p 1", "ln_final.hook_normalized": "b p d"}
SIGNALS = {"hook_recipe": "b p s", "hook_basis": "s d", "unembed.hook_signal": "b p s"}
SQUARES_AND_COPIES = ("scores", "pattern", "result", "_input", "mlp_in", "attn_in")


def documented(model: HookedModel) -> dict[str, str]:
    cfg = model.cfg
    rotary, gated = cfg.positional_embedding_type == "rotary", bool(cfg.gated_mlp)
    block = BLOCK | (ROTARY if rotary else {}) | (GATED if gated else {})
    block |= OWN_KEYS if cfg.kv_heads == cfg.n_heads else {}
    top = TOP | (SIGNALS if cfg.is_factored else {}) | ({} if rotary else {"hook_pos_embed": "b p d"})
    return top | {f"blocks.{i}.{name}": axes for i in range(cfg.n_layers) for name, axes in block.items()}


def sizes(model: HookedModel, batch: int, pos: int) -> dict[str, int]:
    cfg = model.cfg
    widths = {"d": cfg.d_model, "h": cfg.n_heads, "g": cfg.kv_heads, "e": cfg.d_head, "m": cfg.d_mlp}
    return {"b": batch, "p": pos, "1": 1, "s": cfg.n_signals or 0, **widths}


def everything(name: str) -> bool:
    return True


# ------------------------------------------------------------------------------------------------------- that they fire


def test_every_point_fires_once_a_pass_in_its_documented_shape(model: HookedModel, tokens: Tensor) -> None:
    fired: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(tensor: Tensor, hook: HookPoint) -> None:
        fired[hook.name or ""] += 1
        shapes[hook.name or ""] = tuple(tensor.shape)

    names = documented(model)
    assert set(model.hook_dict) == set(names)
    model.run_with_hooks(tokens, fwd_hooks=[(name, note) for name in names])
    assert fired == dict.fromkeys(names, 1)
    size = sizes(model, *tokens.shape)
    assert shapes == {name: tuple(size[axis] for axis in axes.split()) for name, axes in names.items()}


def test_every_point_has_a_gradient(model: HookedModel, tokens: Tensor) -> None:
    """And it is that point's: a small step along it changes the loss by what it predicts."""
    _, cache = model.run_with_cache(tokens, "loss", names_filter=everything, incl_bwd=True, return_cache_object=False)
    model.zero_grad(set_to_none=True)
    for name in documented(model):
        gradient = cache[f"{name}_grad"]
        assert gradient.shape == cache[name].shape
        step = gradient * (0.002 / gradient.square().sum())
        with torch.no_grad():
            up, down = (model.run_with_hooks(tokens, "loss", fwd_hooks=[(name, plus(s))]) for s in (step, -step))
        assert (up - down).item() == pytest.approx(0.004, rel=0.05), name


def test_gradients_are_of_a_loss(model: HookedModel, tokens: Tensor) -> None:
    for return_type in ("logits", "both"):
        with pytest.raises(ReflowlensError, match="incl_bwd needs a loss"):
            model.run_with_cache(tokens, return_type, incl_bwd=True)
    with torch.no_grad(), pytest.raises(ReflowlensError, match="incl_bwd needs a loss"):
        model.run_with_cache(tokens, "loss", incl_bwd=True)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def test_points_are_named_by_text(model: HookedModel, tokens: Tensor) -> None:
    with pytest.raises(ReflowlensError, match="named by its text"):
        model.run_with_cache(tokens, names_filter=[everything])  # type: ignore[list-item]


def plus(step: Tensor) -> Any:
    return lambda x, hook: x + step


def test_default_cache_leaves_squares_and_copies_out(model: HookedModel, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    missing = set(documented(model)) - set(cache.keys())
    assert missing == {name for name in documented(model) if name.endswith(SQUARES_AND_COPIES)}


def test_switches_add_to_the_default_cache() -> None:
    model = random_model("reflow_lite")
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    _, cache = model.run_with_cache("abc")
    missing = set(documented(model)) - set(cache.keys())
    assert {name.rsplit("_", 1)[-1] for name in missing} == {"scores", "pattern"}


def test_names_filter_in_every_form(model: HookedModel, tokens: Tensor) -> None:
    wanted = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"]
    for names_filter in (wanted, tuple(wanted), lambda name: name in wanted):
        logits, cache = model.run_with_cache(tokens, names_filter=names_filter, return_cache_object=False)
        assert set(cache) == set(wanted)
        assert_close(logits, model(tokens))
    _, cache = model.run_with_cache(tokens, names_filter=wanted[0], return_cache_object=False)
    assert list(cache) == wanted[:1]


def test_position_slices_cut_positions(model: HookedModel, tokens: Tensor) -> None:
    """Also where heads come last but one (rotated queries, forks), and not the rows of the basis."""
    _, whole = model.run_with_cache(tokens, names_filter=everything)
    for pos_slice, positions in ((-1, [6]), ((2, 5), [2, 3, 4]), ([0, 3], [0, 3])):
        _, cut = model.run_with_cache(tokens, names_filter=everything, pos_slice=pos_slice)
        for name, axes in documented(model).items():
            expected = whole[name]
            if "p" in axes:
                expected = expected.index_select(axes.split().index("p"), torch.tensor(positions))
            assert torch.equal(cut[name], expected), name


def test_batch_dimension_can_be_dropped(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=1)
    _, whole = model.run_with_cache(tokens, names_filter=everything)
    _, single = model.run_with_cache(tokens, names_filter=everything, remove_batch_dim=True)
    for name, axes in documented(model).items():
        assert torch.equal(single[name], whole[name][0] if "b" in axes else whole[name]), name


def test_cache_of_a_part_of_the_model(model: HookedModel, tokens: Tensor) -> None:
    """What the pass reaches is cached; a point that was named and not reached is an error."""
    resid, cache = model.run_with_cache(tokens, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in cache
    assert "blocks.1.hook_resid_pre" not in cache
    _, later = model.run_with_cache(resid, start_at_layer=1)
    assert torch.equal(later["blocks.1.hook_resid_pre"], resid)
    assert "hook_embed" not in later
    with pytest.raises(ReflowlensError, match=r"the hook on 'blocks.1.hook_mlp_out' never ran.*stop_at_layer"):
        model.run_with_cache(tokens, stop_at_layer=1, names_filter=["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"])


# -------------------------------------------------------------------------------------------------------- what edits do


@pytest.mark.parametrize("name", FACTORED)
def test_editing_the_basis_changes_both_ends(tiny_models: dict[str, HookedModel], name: str) -> None:
    model = tiny_models[name]
    tokens = random_tokens(model.cfg)
    basis = model.embed.W_basis.detach().clone()
    edited = basis.clone()
    edited[3] = 0
    other = random_model(name)
    with torch.no_grad():
        other.embed.W_basis.copy_(edited)
    logits, cache = other.run_with_cache(tokens)
    seen: dict[str, Tensor] = {}
    hooks: list[tuple[str, Any]] = [("hook_basis", lambda x, hook: edited)]
    hooks += [(point, lambda x, hook: seen.update({hook.name: x})) for point in ("hook_embed", "unembed.hook_signal")]
    assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), logits)
    assert_close(seen["hook_embed"], cache["hook_embed"])
    assert_close(seen["unembed.hook_signal"], cache["unembed.hook_signal"])
    assert (seen["unembed.hook_signal"][..., 3] == 0).all()
    assert torch.equal(model.embed.W_basis, basis)


@pytest.mark.parametrize("name", FACTORED)
def test_editing_a_recipe_changes_one_token(tiny_models: dict[str, HookedModel], name: str) -> None:
    """Giving position 3 another token's recipe is reading that token there, and leaves the readout alone."""
    model = tiny_models[name]
    tokens, other = random_tokens(model.cfg), 200

    def give(recipe: Tensor, hook: HookPoint) -> Tensor:
        edited = recipe.clone()
        edited[:, 3] = model.W_E.A[other]
        return edited

    replaced = tokens.clone()
    replaced[:, 3] = other
    assert_close(model.run_with_hooks(tokens, fwd_hooks=[("hook_recipe", give)]), model(replaced))


def test_zeroing_a_readout_signal_removes_its_contribution(tiny_models: dict[str, HookedModel]) -> None:
    for name in FACTORED:
        model = tiny_models[name]
        tokens = random_tokens(model.cfg)
        logits, cache = model.run_with_cache(tokens)

        def zero(a: Tensor, hook: HookPoint) -> Tensor:
            return a * (torch.arange(a.shape[-1]) != 5)

        lost = logits - model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_signal", zero)])
        assert_close(lost, cache["unembed.hook_signal"][..., 5, None] * model.unembedding.A[:, 5], 1e-4)


def test_forks_reach_one_input_of_one_head(model: HookedModel, tokens: Tensor) -> None:
    """An edited fork changes that projection of that head, as if the head read another stream, and nothing else."""
    _, cache = model.run_with_cache(tokens, names_filter=everything)
    block = model.blocks[1]
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        x[:, :, 1] += direction  # in place, as TransformerLens's own setters write
        return x

    watched = [f"blocks.1.attn.hook_{letter}" for letter in "qkv"] + ["blocks.1.hook_resid_mid"]
    watch: list[tuple[str, Any]] = [(name, lambda x, hook: seen.update({hook.name: x})) for name in watched]
    for letter in "qkv":
        W, b = (getattr(block.attn, f"{kind}_{letter.upper()}") for kind in "Wb")
        model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.attn.hook_{letter}_input", edit), *watch])
        for other in "qkv":
            name = f"blocks.1.attn.hook_{other}"
            expected = cache[name].clone()
            if other == letter:
                expected[:, :, 1] = block.ln1(cache["resid_pre", 1] + direction) @ W[1] + bias(b)[1 % len(bias(b))]
            assert_close(seen[name], expected, what=name)
        attn_out = seen["blocks.1.hook_resid_mid"] - cache["resid_pre", 1]
        assert (attn_out - cache["attn_out", 1]).abs().max() > 1e-3


def test_norms_can_be_edited_while_forks_are_watched(model: HookedModel, tokens: Tensor) -> None:
    """Watching must not change what an intervention on the norm does."""

    def damp(x: Tensor, hook: HookPoint) -> Tensor:
        return x * torch.linspace(0, 1, x.shape[-1])

    edit = ("blocks.0.ln1.hook_normalized", damp)
    expected = model.run_with_hooks(tokens, fwd_hooks=[edit])
    watch = [(f"blocks.0.attn.hook_{letter}_input", lambda x, hook: None) for letter in "qkv"]
    assert_close(model.run_with_hooks(tokens, fwd_hooks=[edit, *watch]), expected)
    assert (expected - model(tokens)).abs().max() > 1e-2


def test_writing_in_place_changes_what_the_point_feeds_and_no_more(model: HookedModel, tokens: Tensor) -> None:
    """Neither the weights, nor the residual stream past a fork, nor the stream that the caller passed in."""
    ramp = torch.linspace(0, 1, model.cfg.d_model)
    names = [n for n in model.hook_dict if n.endswith(("hook_basis", "hook_pos_embed", "hook_mlp_in"))]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in names:
        with torch.no_grad():
            outplace = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * ramp)])
            inplace = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.mul_(ramp))])
        assert torch.equal(inplace, outplace), name
        assert (inplace - model(tokens)).abs().max() > 1e-3
    resid = model(tokens, stop_at_layer=1)
    copy = resid.clone()
    with torch.no_grad():
        model.run_with_hooks(
            resid, start_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x.mul_(0))]
        )
    assert torch.equal(resid, copy)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --------------------------------------------------------------------------------------------------------------- errors


def test_unknown_points_come_with_the_nearest(model: HookedModel, tokens: Tensor) -> None:
    hook = lambda x, hook: None  # noqa: E731
    cases = {
        "blocks.0.hook_resid_prey": r"no hook 'blocks.0.hook_resid_prey'; did you mean 'blocks.0.hook_resid_pre'",
        "blocks.9.hook_resid_pre": r"no hook 'blocks.9.hook_resid_pre': this model has blocks 0 to 1",
        "zzz": r"no hook 'zzz'; model.hook_dict lists them",
    }
    for name, message in cases.items():
        for attempt in (
            lambda name=name: model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]),
            lambda name=name: model.run_with_hooks(tokens, bwd_hooks=[(name, hook)], reset_hooks_end=False),
            lambda name=name: model.run_with_cache(tokens, names_filter=name),
            lambda name=name: model.run_with_cache(tokens, names_filter=["hook_embed", name]),
            lambda name=name: model.add_hook(name, hook),
        ):
            with pytest.raises(ReflowlensError, match=message):
                attempt()


def test_filters_that_match_nothing(model: HookedModel, tokens: Tensor) -> None:
    for names_filter in ([], lambda name: "attention" in name):
        with pytest.raises(ReflowlensError, match="names_filter matches none of the model's hook points"):
            model.run_with_cache(tokens, names_filter=names_filter)
    with pytest.raises(ReflowlensError, match="name filter matches none"):
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: False, lambda x, hook: None)])


def test_a_hook_that_never_ran_is_an_error(model: HookedModel, tokens: Tensor) -> None:
    hooks = [("blocks.1.hook_mlp_out", lambda x, hook: None)]
    with pytest.raises(ReflowlensError, match=r"the hook on 'blocks\.1\.hook_mlp_out' never ran"):
        model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=hooks)
    with pytest.raises(ReflowlensError, match="never ran"), model.hooks(fwd_hooks=hooks):
        pass
    model.run_with_hooks(tokens, fwd_hooks=hooks)


def test_hooks_are_gone_after_an_exception(model: HookedModel, tokens: Tensor) -> None:
    """The exception is the hook's own, and the model is as it was (the fixture checks that nothing is attached)."""

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("mine")

    expected = model(tokens)
    with pytest.raises(RuntimeError, match="mine"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("hook_embed", lambda x, hook: x * 0), ("blocks.0.attn.hook_pattern", fail)]
        )
    assert torch.equal(model(tokens), expected)


def test_hooks_may_come_from_an_iterator(model: HookedModel, tokens: Tensor) -> None:
    names, functions = ["blocks.0.hook_mlp_out"], [lambda x, hook: torch.zeros_like(x)]
    actual = model.run_with_hooks(tokens, fwd_hooks=zip(names, functions, strict=True))
    assert torch.equal(actual, model.run_with_hooks(tokens, fwd_hooks=list(zip(names, functions, strict=True))))
    assert not torch.equal(actual, model(tokens))


def test_a_point_passes_on_at_once_and_hooks_of_every_kind_still_fire(tiny_models):
    """TransformerLens's hooks, torch's own of one module, and torch's of all modules; and no longer once removed."""
    model = tiny_models["reflow"]
    point, x = model.blocks[0].hook_resid_mid, torch.ones(2, 3, 4, requires_grad=True)
    assert point(x) is x
    fired = []
    point.add_hook(lambda x, hook: fired.append("fwd"))
    point.add_hook(lambda x, hook: fired.append("bwd"), dir="bwd")
    handles = [
        point.register_forward_hook(lambda *_: fired.append("torch")),
        point.register_forward_pre_hook(lambda *_: fired.append("before")),
        torch.nn.modules.module.register_module_forward_hook(lambda *_: fired.append("all")),
    ]
    point(x).sum().backward()
    assert sorted(fired) == ["all", "before", "bwd", "fwd", "torch"]
    for handle in handles:
        fired.clear()
        handle.remove()
        point(x)
        assert len(fired) == 4 - handles.index(handle) - 1
    point.add_hook(lambda x, hook: fired.append("permanent"), is_permanent=True)
    point.add_hook(lambda x, hook: fired.append("level"), level=3)
    kept = [({"level": 3}, ["fwd", "permanent"]), ({}, ["permanent"]), ({"including_permanent": True}, [])]
    for removed, left in kept:
        point.remove_hooks("fwd", **removed)
        fired.clear()
        point(x)
        assert fired == left
    assert len(point.bwd_hooks) == 1
    with pytest.raises(ValueError, match="Invalid direction"):
        point.remove_hooks("forward")  # type: ignore[arg-type] # as TransformerLens's own
    point.remove_hooks("both")
    assert point(x) is x


def test_a_cache_holds_what_plain_hooks_see_behind_all_others(model: HookedModel, tokens: Tensor) -> None:
    """Kept without hooks of its own, of every point, also where others change what passes."""
    seen: dict[str, Tensor] = {}
    changes = [("blocks.0.hook_mlp_out", lambda x, hook: 2 * x), ("blocks.1.attn.hook_z", lambda x, hook: x + 1)]
    with model.hooks(changes):
        logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
        with model.hooks([(lambda name: True, lambda x, hook: seen.update({hook.name: x.clone()}))]):
            plain = model(tokens)
    assert_close(logits, plain)
    assert list(cache) == list(seen)
    for name, expected in seen.items():
        assert_close(cache[name].nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0))  # scores of later keys


class Doubling(HookPoint):
    """A point of somebody's own class, which has a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("kind", [HookPoint, Doubling])
def test_points_of_other_classes_are_cached_as_ours_are(kind: type[HookPoint]) -> None:
    """A point of the stream, of a fork, and one that is put in place without `setup`."""
    plain, model = (random_model(tiny_config("reflow")) for _ in range(2))
    tokens = random_tokens(plain.cfg)
    name, fork, scale = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_in", 2 if kind is Doubling else 1
    for block, point in ((1, "hook_resid_post"), (0, "hook_mlp_in")):
        setattr(model.blocks[block], point, kind())
    model.setup()
    change = [(name, lambda x, hook: x + 1)]
    with plain.hooks([(fork, lambda x, hook: scale * x), (name, lambda x, hook: scale * x + 1)]):
        logits, expected = plain.run_with_cache(tokens, names_filter=lambda name: True)
    with model.hooks(change):
        found, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert list(cache) == list(expected)
    assert_close(found, logits)
    for each in (name, fork):
        assert_close(cache[each], expected[each])
    model.run_with_cache(tokens, names_filter=name)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    model.blocks[0].hook_mlp_in = HookPoint()  # as it is put there, without a name
    assert_close(model(tokens), _without_the_fork(plain, name, scale, tokens))


def _without_the_fork(plain: HookedModel, name: str, scale: int, tokens: Tensor) -> Tensor:
    with plain.hooks([(name, lambda x, hook: scale * x)]):
        return plain(tokens)


def test_keeping_ends_with_its_pass(model: HookedModel, tokens: Tensor) -> None:
    """Also of one that fails, or that runs within another's: each cache holds its own."""
    inner: dict[str, Tensor] = {}

    def run_another(x: Tensor, hook: HookPoint) -> None:
        if not inner:
            inner["other"] = x  # so that the inner pass does not come here again
            inner.update(model.run_with_cache(tokens[:1], names_filter="blocks.1.hook_resid_post")[1])

    def fail(x: Tensor, hook: HookPoint) -> None:
        raise KeyboardInterrupt

    with model.hooks([("blocks.0.hook_resid_post", run_another)]):
        _, cache = model.run_with_cache(tokens)
    assert inner["blocks.1.hook_resid_post"].shape[0] == 1
    assert len(cache["blocks.1.hook_resid_post"]) == len(tokens)
    with pytest.raises(KeyboardInterrupt), model.hooks([("blocks.0.hook_resid_post", fail)]):
        model.run_with_cache(tokens)
    assert all(point.keep is None for point in model.hook_dict.values())
    kept = len(cache)
    model(tokens[:, :1])
    assert len(cache) == kept
    assert cache["blocks.1.hook_resid_post"].shape[1] == tokens.shape[1]
