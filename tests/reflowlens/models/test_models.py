"""What must hold of every architecture, whatever its weights."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.model_protocol import TransformerLensModelWithWeights

from reflowlens.config import PRESETS
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model, parameter_shapes
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.base import HookedModel
from reflowlens.models.reflow import forming_is_cheaper
from reflowlens.models.reflow_topk import topk_rows
from tests.support.tiny import FACTORED, NAMES, assert_close, random_model, random_tokens, tiny_config

PIECES = [[7], [1, 6], [3, 3, 1], [1] * 7]

# ----------------------------------------------------------------------------------------------------- what it computes


def test_meets_the_protocol_of_transformer_lens(model: HookedModel) -> None:
    assert isinstance(model, TransformerLensModelWithWeights)


def test_shapes_are_known_without_building_the_model(model: HookedModel) -> None:
    assert parameter_shapes(model.cfg) == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert len(parameter_shapes(dataclasses.replace(model.cfg, n_layers=10_000))) > 50_000


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_of_the_published_models(name: str) -> None:
    built = build_model(name, device="meta")
    assert parameter_shapes(built.cfg) == {name: parameter.shape for name, parameter in built.named_parameters()}


def test_no_position_sees_a_later_one(model: HookedModel, tokens: Tensor) -> None:
    for p in range(tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, p + 1 :] = (changed[:, p + 1 :] + 1) % 256
        # To the bit: products of the same shapes, in which later positions have weight 0.
        assert torch.equal(model(changed)[:, : p + 1], model(tokens)[:, : p + 1])
        assert (model(changed)[:, p + 1] - model(tokens)[:, p + 1]).abs().max() > 1e-3


def test_a_row_does_not_depend_on_the_others(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=5)
    together = model(tokens)
    for row in range(5):
        assert_close(model(tokens[row]), together[row : row + 1])


def test_padding_changes_no_row(model: HookedModel) -> None:
    texts = ["Ada", "Grace Hopper", "G", "Emmy Noether"]
    together = model(texts)
    for row, text in enumerate(texts):
        assert_close(together[row : row + 1, : len(text)], model(text))


def test_loss_is_the_mean_over_the_texts_own_tokens(model: HookedModel) -> None:
    texts = ["Ada", "Grace Hopper", "G"]
    losses = []
    for text in texts[:2]:
        logits, ids = model(text)[0], model.to_tokens(text)[0]
        losses.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(model(texts, return_type="loss"), expected, rtol=1e-5, atol=1e-6)
    logits, loss = model(texts, return_type="both")
    assert torch.equal(logits, model(texts))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert model(texts, return_type=None) is None


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = (build_model(tiny_config("reflow_lite"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith(".w"))


@pytest.mark.parametrize("name", NAMES)
def test_initialisation(name: str) -> None:
    """Standard deviation 0.02, residual projections divided by √(2 L), norms 1, biases 0, the basis orthogonal."""
    cfg = tiny_config(name, d_model=128, d_mlp=512, d_head=64)
    model = build_model(cfg)
    assert not model.training
    for parameter, value in model.named_parameters():
        if parameter.endswith(".w"):
            assert torch.equal(value, torch.ones_like(value))
        elif parameter.rsplit(".", 1)[-1][0] == "b":
            assert torch.equal(value, torch.zeros_like(value))
        elif parameter != "embed.W_basis":
            expected = 0.02 / 2 if parameter.endswith(("W_O", "W_out")) else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.05), parameter
            assert abs(value.mean().item()) < 0.002
    if name in FACTORED:
        B = model.embed.W_basis
        assert_close(B @ B.T, torch.eye(cfg.n_signals or 0), 1e-5)  # S <= d_model: the rows are orthonormal
        gpt2_like = build_model(dataclasses.replace(cfg, basis_init="gpt2"))
        assert gpt2_like.embed.W_basis.std().item() == pytest.approx(0.02, rel=0.05)


def test_residual_projections_may_start_as_wide_as_the_rest() -> None:
    model = build_model(tiny_config("gpt2", d_model=128, d_mlp=512, d_head=64, scale_residual_init=False))
    for weights in (model.W_Q, model.W_O, model.W_in, model.W_out):
        assert weights.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["gpt2_own_readout", "reflow_lite"])
@torch.no_grad()
def test_what_dropout_drops_in_training(name: str, hooked: bool) -> None:
    """Entries of the pattern, whichever code path attends, and of both outputs; what is left is divided by 1 - p."""
    model, tokens, p = random_model(tiny_config(name, dropout=0.4)).train(), random_tokens(tiny_config(name), 200), 0.4
    points = ["attn.hook_v", "attn.hook_z", "hook_attn_out", "hook_mlp_out"]
    points += ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"]
    names = [f"blocks.1.{point}" for point in (*points, *(["attn.hook_pattern"] if hooked else []))]
    torch.manual_seed(0)
    _, cache = model.run_with_cache(tokens, names_filter=names)
    v, z, attn_out, mlp_out, pre, mid, post = (cache[f"blocks.1.{point}"] for point in points)
    first = v[:, 0].repeat_interleave(model.cfg.n_heads // model.cfg.kv_heads, dim=1)  # all that position 0 attends to
    for whole, left in ((first, z[:, 0]), (attn_out, mid - pre), (mlp_out, post - mid)):
        is_dropped = (left.abs() < 1e-4) & (whole.abs() > 1e-3)
        assert is_dropped.double().mean().item() == pytest.approx(p, abs=0.05)
        torch.testing.assert_close(left, torch.where(left.abs() < 1e-4, left, whole / (1 - p)), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.eval()(tokens), random_model(name)(tokens))


# -------------------------------------------------------------------------------------------------------------- signals


def with_embedding(model: HookedModel, recipe: Tensor, basis: Tensor) -> HookedModel:
    changed = random_model(dataclasses.replace(model.cfg, n_signals=basis.shape[0]))
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_({"embed.W_recipe": recipe, "embed.W_basis": basis}.get(name, model.get_parameter(name)))
    return changed


@pytest.mark.parametrize("name", ["reflow", "reflow_wide", "reflow_lite"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rotating_recipe_and_basis_changes_no_logit(tiny_models: dict[str, HookedModel], name: str, seed: int) -> None:
    """(R A, Aᵀ B) with A orthogonal, and (R A, A⁻¹ B) with any invertible A, are the same function."""
    model = tiny_models[name]
    R, B = model.embed.W_recipe.detach(), model.embed.W_basis.detach()
    gaussian = torch.randn(len(B), len(B), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = torch.linalg.qr(gaussian).Q
    tokens = random_tokens(model.cfg, seed=seed % 1000)
    assert_close(with_embedding(model, R @ A.float(), A.T.float() @ B)(tokens), model(tokens), 1e-5)
    C = A @ torch.diag(torch.linspace(0.5, 2, len(B), dtype=torch.float64)) @ torch.linalg.qr(gaussian.T).Q
    assert (C.T @ C - torch.eye(len(B))).abs().max() > 0.1
    assert_close(with_embedding(model, R @ C.float(), torch.linalg.inv(C).float() @ B)(tokens), model(tokens), 1e-4)


def test_pruning_breaks_the_gauge(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow_topk"]
    R, B = model.embed.W_recipe.detach(), model.embed.W_basis.detach()
    A = torch.linalg.qr(torch.randn(len(B), len(B), generator=torch.Generator().manual_seed(0))).Q
    tokens = random_tokens(model.cfg)
    assert (with_embedding(model, R @ A, A.T @ B)(tokens) - model(tokens)).abs().max() > 0.1


def test_signals_sum_to_the_logit(tiny_models: dict[str, HookedModel]) -> None:
    for name in FACTORED:
        model = tiny_models[name]
        tokens = random_tokens(model.cfg)
        logits, cache = model.run_with_cache(tokens)
        a, R = cache["unembed.hook_signal"], model.unembedding.A
        contributions = a[:, :, None, :] * R  # [batch, pos, d_vocab, S]
        assert contributions.shape[-1] == model.cfg.n_signals
        assert_close(contributions.sum(-1), logits)
        assert_close(a, cache["ln_final.hook_normalized"] * model.ln_final.w @ model.embed.W_basis.T)


@given(rows=st.lists(st.lists(st.integers(-4, 4), min_size=5, max_size=5), min_size=1, max_size=4), k=st.integers(1, 5))
def test_topk_keeps_the_largest_positive_entries(rows: list[list[int]], k: int) -> None:
    recipe = torch.tensor(rows, dtype=torch.float32)
    for row, kept in zip(recipe, topk_rows(recipe, k), strict=True):
        expected = sorted((x for x in row.tolist() if x > 0), reverse=True)[:k]
        assert sorted((x for x in kept.tolist() if x != 0), reverse=True) == expected
        assert all(y in (0, x) for x, y in zip(row.tolist(), kept.tolist(), strict=True))


def test_gradient_reaches_kept_entries_alone() -> None:
    model = random_model("reflow_topk")
    model(random_tokens(model.cfg), return_type="loss").backward()
    effective, gradient = model.W_E.A.detach(), model.embed.W_recipe.grad
    kept = effective > 0
    assert (kept.sum(dim=1) <= model.cfg.topk).all()
    assert kept.sum() > 0.9 * model.cfg.topk * model.cfg.d_vocab  # random rows have more positive entries than that
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()  # the readout's softmax moves every token's row
    recipe = model.embed.W_recipe.detach()
    smallest_kept = effective.masked_fill(~kept, float("inf")).min(dim=1).values
    assert (recipe.masked_fill(kept, -1).max(dim=1).values <= smallest_kept).all()


def test_embedding_as_a_factored_matrix(model: HookedModel) -> None:
    """W_E, its transpose W_U, and the rows that the tools ask for."""
    factored = model.cfg.is_factored
    assert isinstance(model.W_E, FactoredMatrix) == factored
    dense = model.W_E.AB if factored else model.W_E
    if not model.cfg.has_one_embedding:
        read = model.unembedding.AB if factored else model.unembed.W_U.T
        assert dense.shape == read.shape
        assert not torch.equal(dense, read)
        dense = read
    assert torch.equal(model.W_U, dense.T)
    assert model.W_U.shape == (model.cfg.d_model, model.cfg.d_vocab)
    ids = torch.tensor([[3, 280], [0, 3]])
    assert_close(model.unembedding_rows(ids), dense[ids])
    assert_close(model.tokens_to_residual_directions(ids), dense[ids] * model.ln_final.w)
    assert_close(model.tokens_to_residual_directions("a"), dense[ord("a")] * model.ln_final.w)
    assert_close(model.tokens_to_residual_directions(97), dense[97] * model.ln_final.w)


@pytest.mark.parametrize(
    ("n", "S", "cheaper"),
    [(1, 64, False), (20, 64, False), (30, 64, True), (1000, 16, False), (1020, 16, True), (10_000, 8, False)],
)
def test_embedding_is_formed_only_where_that_is_cheaper(n: int, S: int, cheaper: bool) -> None:
    """V = 1000, d = 16: forming pays above n = V d / (d + V - V d / S) positions, and never where S is much below d."""
    recipe, basis = torch.empty(1000, S, device="meta"), torch.empty(S, 16, device="meta")
    assert forming_is_cheaper(n, recipe, basis) is cheaper


def test_formed_and_factored_readouts_agree() -> None:
    cfg = tiny_config("reflow_wide", n_signals=64, d_vocab=256, d_model=8, n_ctx=64)
    model = random_model(cfg)
    recipe, basis = model.tied_weights()
    tokens = random_tokens(cfg, batch=20, pos=40)
    assert forming_is_cheaper(20 * 40, recipe, basis)
    watched = model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_signal", lambda x, hook: None)])  # factored
    assert_close(model(tokens), watched)


# ---------------------------------------------------------------------------------------- the same numbers, another way


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern", "hook_result", "hook_q_input", "hook_k_input"])
def test_watching_a_point_changes_no_number(model: HookedModel, tokens: Tensor, point: str) -> None:
    """SDPA or the explicit path, one projection or one a head."""
    expected = model(tokens)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.{point}"
        assert_close(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: None)]), expected)
    assert_close(model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda x, hook: None)]), expected)


def test_gradients_are_the_same_on_every_path(model: HookedModel, tokens: Tensor) -> None:
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens, return_type="loss"), parameters)
    with model.hooks(fwd_hooks=[(lambda name: True, lambda x, hook: None)]):
        actual = torch.autograd.grad(model(tokens, return_type="loss"), parameters)
    for (name, _), one, two in zip(model.named_parameters(), actual, expected, strict=True):
        if name.endswith("b_K") and model.cfg.positional_embedding_type == "standard":
            # Every key moved by the same vector: a query's scores change together, and the softmax does not.
            assert max(one.abs().max(), two.abs().max()) < 1e-6
        else:
            assert_close(one, two, 2e-5, name)


def test_starting_and_stopping_at_any_layer_composes(model: HookedModel, tokens: Tensor) -> None:
    logits, cache = model.run_with_cache(tokens)
    n_layers = model.cfg.n_layers
    for layer in range(n_layers + 1):
        resid = model(tokens, stop_at_layer=layer)
        expected = cache["resid_pre", layer] if layer < n_layers else cache["resid_post", n_layers - 1]
        assert_close(resid, expected)
        assert_close(model(resid, start_at_layer=layer), logits)
        if layer < n_layers:
            assert torch.equal(model(tokens, stop_at_layer=layer - n_layers), resid)  # the same call
    assert_close(model(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=1), cache["resid_post", 0])
    targets = tokens.roll(-1, 1)
    torch.testing.assert_close(
        model(cache["resid_pre", 1], "loss", start_at_layer=1, targets=targets), model(tokens, "loss", targets=targets)
    )


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_cached_keys_and_values_equal_the_whole_pass(model: HookedModel, pieces: list[int], hooked: bool) -> None:
    tokens = random_tokens(model.cfg, batch=3)
    expected = model(tokens)
    past = KeyValueCache(model.cfg, batch=3)
    hooks = [("blocks.1.attn.hook_pattern", lambda x, hook: None)] if hooked else []
    with torch.no_grad():
        parts = [model.run_with_hooks(x, past_kv_cache=past, fwd_hooks=hooks) for x in tokens.split(pieces, dim=1)]
    assert past.length == 7
    assert_close(torch.cat(parts, dim=1), expected)


def test_positions_are_relative_in_rotary_models_alone(tiny_models: dict[str, HookedModel]) -> None:
    """Attention scores of the same tokens are the same wherever they stand; learned positions tell them apart."""
    for name, model in tiny_models.items():
        tokens = random_tokens(model.cfg, batch=1, pos=5)
        resid = torch.cat([model(tokens, stop_at_layer=0)] * 2, dim=1)
        _, cache = model.run_with_cache(resid, start_at_layer=0, names_filter="blocks.0.attn.hook_attn_scores")
        scores = cache["blocks.0.attn.hook_attn_scores"]
        assert_close(scores[..., 5:, 5:].tril(), scores[..., :5, :5].tril(), 1e-5, name)
        within, across = scores[..., 5:, 5:].tril(), scores[..., 5:, :5].tril()
        differs = (within - across).abs().max() > 1e-3
        assert differs == (model.cfg.positional_embedding_type == "rotary")
        moved = model(torch.cat([tokens] * 2, dim=1), stop_at_layer=0)
        apart = (moved[:, :5] - moved[:, 5:]).abs().max() / moved.abs().max()
        assert apart < 1e-6 if model.cfg.positional_embedding_type == "rotary" else apart > 1e-2


def test_compiled_is_one_graph_with_the_same_numbers(tiny_models: dict[str, HookedModel]) -> None:
    """Traced without running a compiler for the machine: breaks would show here."""
    for name in ("gpt2", "reflow_lite"):
        model = tiny_models[name]
        tokens = random_tokens(model.cfg)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(tokens, "loss", targets=tokens), model(tokens, "loss", targets=tokens), 1e-6)
        torch.compiler.reset()


@pytest.mark.parametrize("name", ["gpt2", "reflow_lite"])
def test_autocast_keeps_the_residual_stream_wide(tiny_models: dict[str, HookedModel], name: str) -> None:
    model = tiny_models[name]
    tokens = random_tokens(model.cfg)
    with torch.autocast("cpu", torch.bfloat16):
        logits, cache = model.run_with_cache(tokens)
        loss = model(tokens, "loss")
    assert {x.dtype for point, x in cache.items() if "resid" in point} == {torch.float32}
    assert loss.dtype == torch.float32
    assert_close(logits.float(), model(tokens), 0.05)
    torch.testing.assert_close(loss, model(tokens, "loss"), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(tiny_models: dict[str, HookedModel], dtype: torch.dtype) -> None:
    for name in ("gpt2", "gpt2_new", "reflow_lite"):
        model = random_model(name).to(dtype)
        tokens = random_tokens(model.cfg, pos=24)
        logits, expected = model(tokens), tiny_models[name](tokens)
        assert logits.dtype == dtype
        assert (logits - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()


def test_in_sixty_four_bits(model: HookedModel) -> None:
    """The loss has the precision of its parameters: a difference of 1e-6 along the gradient shows to eight digits."""
    wide = copy.deepcopy(model).double()
    tokens = random_tokens(model.cfg)
    assert wide(tokens).dtype == torch.float64
    wide(tokens, "loss").backward()
    direction = {name: p.grad for name, p in wide.named_parameters()}
    slope = sum(gradient.square().sum() for gradient in direction.values()).item()
    step = 1e-6 / slope**0.5
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter += step * direction[name]
        up = wide(tokens, "loss").item()
        for name, parameter in wide.named_parameters():
            parameter -= 2 * step * direction[name]
        assert (up - wide(tokens, "loss").item()) / (2 * step) == pytest.approx(slope, rel=1e-7)


def test_rotary_angles_stay_exact_in_sixteen_bits() -> None:
    model = random_model("reflow")
    exact = model.blocks[0].attn.rotary.cos.clone()
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(model.to(dtype).blocks[0].attn.rotary.cos, exact)


# --------------------------------------------------------------------------------------------------------------- errors


def test_prompts_that_cannot_be_read(model: HookedModel) -> None:
    for empty in ("", [], ["a", ""], torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ReflowlensError, match="the prompt is empty"):
            model(empty)
    for long in ("x" * 25, ["a", "x" * 25], torch.zeros(1, 25, dtype=torch.long)):
        with pytest.raises(ReflowlensError, match=r"too long: 25 tokens, .* at most n_ctx=24"):
            model(long)
    for outside, named in ((288, "288"), (-1, "-1")):
        with pytest.raises(ReflowlensError, match=f"no token {named}: this model's ids are 0 to 287"):
            model(torch.tensor([3, outside, 5]))
    with pytest.raises(ReflowlensError, match=r"must be integers \[batch, pos\], got torch.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ReflowlensError, match=r"must be integers \[batch, pos\], got torch.int64 \[1, 1, 3\]"):
        model(torch.zeros(1, 1, 3, dtype=torch.long))
    with pytest.raises(ReflowlensError, match=r"must be integers \[batch, pos\], got torch.bool \[2\]"):
        model(torch.tensor([True, False]))
    for strange, shown in (
        ([1, 2], "a list with 1"),
        (["a", None], "a list with None"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
    ):
        with pytest.raises(ReflowlensError, match=f"a prompt is a text, a list of texts, .* got {shown}"):
            model(strange)
    with pytest.raises(ReflowlensError, match="a loss needs two tokens"):
        model(torch.zeros(0, 5, dtype=torch.long), "loss")


def test_tokens_of_every_integer_type(model: HookedModel) -> None:
    expected = model("Hi")
    for kind in (np.uint8, np.uint16, np.uint32, np.int64):
        array = np.array([[72, 105]], dtype=kind)
        assert torch.equal(model(array), expected)
        assert torch.equal(model(torch.from_numpy(array)), expected)
    assert model.generate(np.array([72, 105]), 2, temperature=0) == [model.generate("Hi", 2, temperature=0)]


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(ReflowlensError, match="cannot compute on device 'cdua'"):
        build_model(tiny_config("reflow"), device="cdua")


def test_a_vocabulary_smaller_than_the_tokenizers() -> None:
    model = random_model(tiny_config("reflow", d_vocab=100))
    assert model("A").shape == (1, 1, 100)
    with pytest.raises(ReflowlensError, match="no token 122: this model's ids are 0 to 99"):
        model("Az")


def test_the_cache_counts_towards_the_length(model: HookedModel) -> None:
    past = KeyValueCache(model.cfg, batch=1)
    model("x" * 20, past_kv_cache=past)
    with pytest.raises(ReflowlensError, match="too long: 25 tokens"):
        model("x" * 5, past_kv_cache=past)


def test_what_a_cache_cannot_keep_is_refused(model: HookedModel, tokens: Tensor) -> None:
    """A layer that is left out would leave a hole that later passes read; padding would be kept as text."""
    past = KeyValueCache(model.cfg, batch=2)
    for part in (
        {"stop_at_layer": 1},
        {"stop_at_layer": 0},
        {"start_at_layer": 0},
        {"start_at_layer": 1},
        {"start_at_layer": 1, "stop_at_layer": 2},
    ):
        input = tokens if "start_at_layer" not in part else torch.zeros(2, 5, model.cfg.d_model)
        with pytest.raises(ReflowlensError, match="a key-value cache goes with whole passes"):
            model(input, past_kv_cache=past, **part)
    with pytest.raises(ReflowlensError, match=r"texts of one length go with a key-value cache.* got 4, 1 tokens"):
        model(["abcd", "e"], past_kv_cache=past)
    assert past.length == 0


def test_layers_in_the_wrong_order(model: HookedModel) -> None:
    with pytest.raises(ReflowlensError, match="start_at_layer=1 lies behind stop_at_layer=0"):
        model(torch.zeros(1, 5, model.cfg.d_model), start_at_layer=1, stop_at_layer=0)


def test_targets_are_one_a_position_and_negative_where_nothing_counts(model: HookedModel) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    expected = F.cross_entropy(model(tokens)[0, :1], torch.tensor([5]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for nothing in (-100, -1):
                loss = model(tokens, "loss", targets=torch.tensor([[5, nothing, nothing]]))
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            with pytest.raises(ReflowlensError, match=r"targets must be \[batch, pos\] = \[1, 3\], got \[1, 1\]"):
                model(tokens, "loss", targets=torch.tensor([[5]]))


def test_a_residual_stream_longer_than_the_context(model: HookedModel) -> None:
    with pytest.raises(ReflowlensError, match=r"too long: 25 tokens, .* at most n_ctx=24"):
        model(torch.zeros(1, 25, model.cfg.d_model), start_at_layer=1)


def test_a_cache_of_another_batch(model: HookedModel, tokens: Tensor) -> None:
    past = KeyValueCache(model.cfg, batch=3)
    with pytest.raises(ReflowlensError, match="holds a batch of 3, and the input is a batch of 2"):
        model(tokens, past_kv_cache=past)
    with pytest.raises(ReflowlensError, match="holds a batch of 3, and the input is a batch of 1"):
        model(tokens[:1], past_kv_cache=past)


@pytest.mark.parametrize("other", ["same sizes", "a copy", "more layers", "longer", "other heads"])
@torch.no_grad()
def test_a_cache_of_another_model(other: str) -> None:
    model = random_model("reflow_lite")
    sizes = {"more layers": {"n_layers": 3}, "longer": {"n_ctx": 48}, "other heads": {"n_key_value_heads": 4}}
    changed = random_model(tiny_config("reflow_lite", **sizes.get(other, {})))
    reader = copy.deepcopy(model) if other == "a copy" else changed
    past = reader.make_cache(1)
    reader("ab", past_kv_cache=past)
    with pytest.raises(ReflowlensError, match="this key-value cache is another model's"):
        model("c", past_kv_cache=past)
    assert past.length == 2
    expected = reader("abc")[:, -1:]
    for own in (copy.deepcopy(past), pickle.loads(pickle.dumps(past)), past):
        assert_close(reader("c", past_kv_cache=own), expected)


def test_words_of_several_tokens(model: HookedModel) -> None:
    with pytest.raises(ReflowlensError, match="'no' is not a single token of bytes: it splits into 'n', 'o'"):
        model.to_single_token("no")
    assert model.to_single_token("n") == ord("n")


def test_layers_that_do_not_exist(model: HookedModel, tokens: Tensor) -> None:
    with pytest.raises(ReflowlensError, match="start_at_layer=3 is out of range: this model has blocks 0 to 1"):
        model(tokens, start_at_layer=3)
    with pytest.raises(ReflowlensError, match="stop_at_layer=-3 is out of range"):
        model(tokens, stop_at_layer=-3)
    with pytest.raises(ReflowlensError, match=r"must be a residual stream \[batch, pos, d_model\]"):
        model(tokens, start_at_layer=1)
    with pytest.raises(ReflowlensError, match="a loss needs targets"):
        model(model(tokens, stop_at_layer=1), "loss", start_at_layer=1)
    with pytest.raises(ReflowlensError, match="this residual stream is 31 wide, but d_model=32"):
        model(torch.zeros(1, 4, 31), start_at_layer=1)
    with pytest.raises(ReflowlensError, match=r"return_type must be .*, got 'logit'"):
        model(tokens, return_type="logit")


# ----------------------------------------------------------------------------------------------------------------- text


def test_text_in_and_out(model: HookedModel) -> None:
    assert model.to_tokens("Hi").tolist() == [[72, 105]]
    assert model.to_tokens(["Hi", "H"]).shape == (2, 2)
    assert model.to_tokens("Hi", prepend_bos=True).shape == (1, 3)
    assert model.to_string(torch.tensor([72, 105])) == "Hi"
    assert model.to_string([72, 105]) == "Hi"
    assert model.to_string(torch.tensor([[72, 105], [72, 72]])) == ["Hi", "HH"]
    assert model.to_str_tokens("Hi") == ["H", "i"]
    assert model.to_str_tokens(torch.tensor([72, 105])) == ["H", "i"]
    assert model.to_str_tokens(["Hi", "H"]) == [["H", "i"], ["H"]]
    assert model.to_single_str_token(72) == "H"
    assert "parameters" in model._repr_html_()
