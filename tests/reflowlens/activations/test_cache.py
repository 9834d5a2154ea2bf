"""Activation caches: what goes in, parts of them, and the way to a file and back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.activations.cache import ActivationCache
from reflowlens.errors import ReflowlensError
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.base import HookedModel
from tests.support.tiny import assert_close, random_model, random_tokens


@pytest.fixture
def cache(model: HookedModel, tokens: Tensor) -> ActivationCache:
    return model.run_with_cache(tokens, names_filter=lambda name: True)[1]


def assert_same(actual: ActivationCache, expected: ActivationCache) -> None:
    assert set(actual) == set(expected)
    for name, activation in expected.items():
        assert actual[name].dtype == activation.dtype
        assert torch.equal(actual[name], activation), name


# ----------------------------------------------------------------------------------------------------------- on the way


def test_activations_are_converted_on_the_way_in(model: HookedModel, tokens: Tensor) -> None:
    logits, wide = model.run_with_cache(tokens)
    same, narrow = model.run_with_cache(tokens, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(same, logits)
    for name, activation in wide.items():
        assert torch.equal(narrow[name], activation.bfloat16()), name


def test_a_position_keeps_no_other_alive(model: HookedModel, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, pos_slice=-1)
    kept = cache["resid_post", 1]
    assert kept.untyped_storage().nbytes() == kept.nbytes == 2 * 32 * 4


def test_a_cache_knows_what_was_read(model: HookedModel) -> None:
    _, cache = model.run_with_cache(["abc", "defg"])
    assert torch.equal(cache.tokens, model.to_tokens(["abc", "defg"]))
    resid, _ = model.run_with_cache("abc", stop_at_layer=1)
    assert model.run_with_cache(resid, start_at_layer=1)[1].tokens is None
    past = KeyValueCache(model.cfg, batch=1)
    model("abc", past_kv_cache=past)
    _, later = model.run_with_cache(model.to_tokens("de"), past_kv_cache=past)
    assert later.tokens.shape == (1, 2)


def test_gradients_are_kept_beside_activations() -> None:
    model = random_model("reflow")
    names = ["blocks.1.hook_resid_pre"]
    _, cache = model.run_with_cache("abcd", return_type="loss", incl_bwd=True, names_filter=names)
    stream = cache[names[0]].clone().requires_grad_()
    loss = model(stream, start_at_layer=1, return_type="loss", targets=model.next_tokens(model.to_tokens("abcd"), [4]))
    assert_close(cache[names[0] + "_grad"], torch.autograd.grad(loss, stream)[0])


def test_one_prompt_without_batch_axis() -> None:
    model = random_model("reflow")
    with pytest.raises(ReflowlensError, match="remove_batch_dim needs one prompt, got 2"):
        model.run_with_cache(["abc", "def"], remove_batch_dim=True)


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (slice(1, 2), [1]), ((0, 2), [0, 1]), ([1, 0], [1, 0])])
def test_rows_of_a_cache(model: HookedModel, cache: ActivationCache, rows: object, expected: object) -> None:
    part = cache.apply_slice_to_batch_dim(rows)
    assert type(part) is ActivationCache
    assert part.has_batch_dim == (rows != 1)
    for name, activation in cache.items():
        wanted = activation[expected] if "batch" in model.hook_axes(name) else activation
        assert torch.equal(part[name], wanted), name
    assert torch.equal(part.tokens, cache.tokens[[expected] if expected == 1 else expected])
    assert_close(part.signals(layer=1), cache.signals(layer=1)[expected])


def test_a_basis_of_as_many_signals_as_prompts_stays_whole() -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache(random_tokens(model.cfg, batch=32, pos=2))
    assert cache["hook_basis"].shape[0] == 32
    assert torch.equal(cache.apply_slice_to_batch_dim(3)["hook_basis"], cache["hook_basis"])


def test_a_cache_without_batch_axis_has_no_rows() -> None:
    _, cache = random_model("reflow").run_with_cache("abc", remove_batch_dim=True)
    assert cache.apply_slice_to_batch_dim(None).signals().shape == (3, 32)
    with pytest.raises(ReflowlensError, match="holds one prompt"):
        cache.apply_slice_to_batch_dim(0)


def test_caches_stay_caches(cache: ActivationCache) -> None:
    assert type(cache.to("cpu")) is ActivationCache
    assert type(cache.apply_slice_to_batch_dim(slice(0, 1)).remove_batch_dim()) is ActivationCache


# -------------------------------------------------------------------------------------------------------------- on disk


def test_a_saved_cache_is_the_same(model: HookedModel, cache: ActivationCache, tmp_path: Path) -> None:
    cache.save(tmp_path / "cache")
    for given in (model, None):
        loaded = ActivationCache.load(tmp_path / "cache", given)
        assert_same(loaded, cache)
        assert torch.equal(loaded.tokens, cache.tokens)
    assert_close(
        ActivationCache.load(tmp_path / "cache", model).decompose_resid().sum(0), cache["resid_post", -1], what="parts"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_parts_and_added_entries_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache(["abc", "defg"], dtype=dtype)
    cache.compute_head_results()
    part = cache.apply_slice_to_batch_dim(1)
    part.save(tmp_path / "cache")
    loaded = ActivationCache.load(tmp_path / "cache", model)
    assert not loaded.has_batch_dim
    assert_same(loaded, part)


def test_a_loaded_cache_can_be_written_to_and_saved_again(tmp_path: Path) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache("abc")
    cache.save(tmp_path / "cache")
    loaded = ActivationCache.load(tmp_path / "cache", model)
    loaded.compute_head_results()
    assert loaded["result", 0].shape == (1, 3, 4, 32)
    loaded["hook_embed"].zero_()
    assert bool(ActivationCache.load(tmp_path / "cache")["hook_embed"].any())  # the file does not change
    without = ActivationCache.load(tmp_path / "cache")
    without.save(tmp_path / "again")
    assert_same(ActivationCache.load(tmp_path / "again", model), cache)  # and is still known as the model's
    cache.save(tmp_path / "cache")  # over a folder that is open
    assert_same(ActivationCache.load(tmp_path / "cache", model), cache)


def test_what_is_cached_under_two_names_is_written_once(tmp_path: Path) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache(random_tokens(model.cfg, batch=8, pos=16))
    cache.save(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["same_as"]["blocks.1.hook_resid_pre"] == "blocks.0.hook_resid_post"
    distinct = {x.data_ptr(): x.nbytes for x in cache.values()}
    assert (tmp_path / "cache" / "activations.safetensors").stat().st_size < sum(distinct.values()) + 10_000


@pytest.mark.parametrize("pos_slice", [77, -4, slice(50, 60), [0, 3], [], slice("a", None)])
def test_positions_that_no_pass_has(pos_slice: Any) -> None:
    model = random_model("reflow")
    with pytest.raises(ReflowlensError, match="selects nothing: this pass has positions 0 to 2"):
        model.run_with_cache("abc", pos_slice=pos_slice)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("pos_slice", ["x", 1.5, True])
def test_positions_are_indices(pos_slice: Any) -> None:
    with pytest.raises(ReflowlensError, match="pos_slice must be an index, a slice or several indices, got"):
        random_model("reflow").run_with_cache("abc", pos_slice=pos_slice)


@pytest.mark.parametrize("layer", ["x", 1.0, True, [1], 99, -1])
def test_a_layer_is_an_index(layer: Any) -> None:
    _, cache = random_model("reflow").run_with_cache("abc")
    for ask in (cache.signals, cache.resid, partial(cache.signal_contributions, "d")):
        with pytest.raises(ReflowlensError, match=r"layer must be between 0 and 2 .*, got"):
            ask(layer=layer)
    assert torch.equal(cache.signals(layer=np.int64(1)), cache.signals(layer=1))


@pytest.mark.parametrize("key", [5, None, (), ("resid_pre", "x"), ("resid_pre", 1.0), (3, "resid_pre")])
def test_an_activation_has_a_name(key: Any) -> None:
    _, cache = random_model("reflow").run_with_cache("abc")
    with pytest.raises(ReflowlensError, match="an activation is named by its point"):
        cache[key]


def test_a_generated_cache_knows_where_each_row_ends() -> None:
    model = random_model("reflow")
    _, cache = model.generate(["abcde", "fg"], 3, return_cache=True, stop_at_eos=False)
    assert cache.lengths == [8, 5]


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache("abc", names_filter=["hook_embed"])
    cache.save(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["model_hash"] == rl.model_hash(model)
    assert manifest["tokens"] == [[97, 98, 99]]
    assert manifest["points"] == {"hook_embed": {"shape": [1, 3, 32], "dtype": "float32"}}
    assert set(manifest["versions"]) == {"reflowlens", "torch", "transformer-lens", "safetensors"}
    assert not list(tmp_path.glob(".*"))


def test_without_its_model_a_cache_says_what_it_needs(tmp_path: Path) -> None:
    model = random_model("reflow")
    model.run_with_cache("abc")[1].save(tmp_path / "cache")
    cache = ActivationCache.load(tmp_path / "cache")
    assert cache["resid_pre", 1].shape == (1, 3, 32)
    for ask in (lambda: cache.signals(), lambda: cache.resid(), lambda: cache["resid_post", -1]):
        with pytest.raises(ReflowlensError, match=r"load\(folder, model\)"):
            ask()
    with pytest.raises(ReflowlensError, match=r"not in this cache.*'blocks\.1\.hook_resid_pre'"):
        cache["blocks.1.hook_resid_pr"]


def corrupt(folder: Path, how: str) -> None:
    manifest, tensors = folder / "manifest.json", folder / "activations.safetensors"
    if how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif how == "a list":
        manifest.write_text("[]")
    elif how == "another format":
        manifest.write_text(manifest.read_text().replace("reflowlens-activations-1", "reflowlens-9"))
    elif how == "a field less":
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "points"}))
    elif how == "no tensors":
        tensors.unlink()
    elif how == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "lengths of other rows":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"lengths": [3, 3]}))
    elif how == "other points":
        manifest.write_text(manifest.read_text().replace('"hook_embed"', '"hook_embod"'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no manifest", "has no manifest.json: it holds no activations"),
        ("half a manifest", "manifest.json is damaged"),
        ("a list", "holds no activations"),
        ("another format", "format 'reflowlens-9', expected 'reflowlens-activations-1'"),
        ("a field less", "is corrupt: KeyError"),
        ("no tensors", "lacks activations.safetensors"),
        ("half the tensors", "activations.safetensors is not a readable safetensors file"),
        ("lengths of other rows", "is corrupt: ValueError"),
        ("other points", "not the points that its manifest lists"),
    ],
)
def test_a_foreign_or_corrupt_folder_is_an_error(tmp_path: Path, how: str, message: str) -> None:
    random_model("reflow").run_with_cache("abc")[1].save(tmp_path / "cache")
    corrupt(tmp_path / "cache", how)
    with pytest.raises(ReflowlensError, match=message):
        ActivationCache.load(tmp_path / "cache")


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    model = random_model("reflow", seed=1)
    _, cache = model.run_with_cache("abc")
    cache.save(tmp_path / "cache")
    with pytest.raises(ReflowlensError, match="another model, or of other weights"):
        ActivationCache.load(tmp_path / "cache", random_model("reflow", seed=2))
    with pytest.raises(ReflowlensError, match="no folder"):
        ActivationCache.load(tmp_path / "cash", model)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ReflowlensError, match="holds other files"):
        cache.save(tmp_path / "notes")


def test_a_cache_on_disk_is_a_source_of_patches(tmp_path: Path) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache("abc")
    loaded = ActivationCache.load(cache.save(tmp_path / "cache"), model)
    patched = rl.run(model, "xbc", rl.Patch("resid_pre", loaded, layer=1))
    assert_close(patched, model("abc"))


def test_a_notebook_shows_points_and_sizes(tmp_path: Path) -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache(random_tokens(model.cfg, batch=8, pos=16), dtype=torch.bfloat16)
    html = cache._repr_html_()
    assert "blocks.*.hook_resid_pre" in html
    assert "8 × 16 × 32" in html
    assert "bfloat16" in html
    assert "in memory" in html
    loaded = ActivationCache.load(cache.save(tmp_path / "cache"))
    assert loaded._repr_html_() == html.replace("in memory", "on disk")


def test_a_target_is_one_token_or_one_a_position() -> None:
    """One a prompt would be read as one a position where there are as many."""
    model = random_model("reflow")
    cache = model.run_with_cache(["abc", "def", "ghi"])[1]
    with pytest.raises(ReflowlensError, match=r"one token or one a position, \[3, 3\], got \[3\]"):
        cache.signal_contributions(torch.tensor([1, 2, 3]))
    targets = torch.tensor([[1], [2], [3]]).expand(3, 3)
    expected = torch.stack([cache.signal_contributions(i + 1)[i] for i in range(3)])
    torch.testing.assert_close(cache.signal_contributions(targets), expected)
