from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune

from reflowlens import checkpoints
from reflowlens.checkpoints import (
    find_model,
    list_models,
    load_model,
    model_hash,
    read_manifest,
    save_model,
    write_folder,
    write_tensors,
)
from reflowlens.cli import main
from reflowlens.conversion import export_hf, import_hf, import_nanogpt
from reflowlens.errors import ReflowlensError
from reflowlens.inspection import inspect_path
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.storage.opening import file_hash, read_tensor
from reflowlens.storage.tensor_folder import open_tensors, save_tensors
from tests.support.runs import run_python
from tests.support.tiny import CONFIGS, random_model, random_tokens


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "saved", random_model("reflow_lite"), {"step": 7})


def same_weights(one: HookedModel, two: HookedModel) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(two.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def listing(folder: Path) -> dict[str, str]:
    """Every file and its contents' hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------------------------- round trips


def test_round_trip_is_bit_for_bit(model: HookedModel, tokens: Tensor, tmp_path: Path) -> None:
    """From the folder and from the file alone."""
    folder = save_model(tmp_path / "saved", model)
    for path in (folder, str(folder), folder / "model.safetensors"):
        loaded = load_model(path)
        assert loaded.cfg == model.cfg
        assert not loaded.training
        assert same_weights(loaded, model)
        assert torch.equal(loaded(tokens), model(tokens))
        assert model_hash(loaded) == model_hash(model)


def test_memory_layout_is_that_of_a_fresh_model(model: HookedModel, tmp_path: Path) -> None:
    """Heads lie side by side, so that a projection of all of them is one product of unpermuted memory."""
    fresh = build_model(model.cfg)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(save_model(tmp_path / "saved", model), dtype=dtype)
        for (name, one), (_, two) in zip(fresh.named_parameters(), loaded.named_parameters(), strict=True):
            assert one.stride() == two.stride(), name
            assert two.dtype == dtype
    assert not fresh.blocks[0].attn.W_Q.is_contiguous()
    heads_as_columns = fresh.blocks[0].attn.W_Q.permute(1, 0, 2)
    assert heads_as_columns.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model("reflow_topk")
    folder = save_model(tmp_path / "saved", model, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    loaded = load_model(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).to(dtype).float())
    again = load_file(save_model(tmp_path / "again", loaded, dtype=dtype) / "model.safetensors")
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_manifest(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest["step"] == 7
    assert manifest["config"] == CONFIGS["reflow_lite"].to_dict()
    assert manifest["weights_sha256"] == listing(saved)["model.safetensors"]
    alone = saved.rename(saved.with_name("other")) / "model.safetensors"
    moved = alone.rename(saved.with_name("alone.safetensors"))
    assert read_manifest(moved) == {}


def test_hash_tells_models_apart() -> None:
    one, two = random_model("reflow"), random_model("reflow")
    assert model_hash(one) == model_hash(two)
    with torch.no_grad():
        two.ln_final.w[0] += 1e-6
    assert model_hash(one) != model_hash(two)
    assert model_hash(random_model("gpt2")) != model_hash(random_model("gpt2_new"))


def test_a_training_run_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        save_model(tmp_path / f"step_{step:07d}", random_model("gpt2", seed=step))
    (tmp_path / "step_0000200").mkdir()  # without weights: not complete
    assert find_model(tmp_path) == tmp_path / "step_0000100" / "model.safetensors"
    assert same_weights(load_model(tmp_path), random_model("gpt2", seed=100))


def test_packaged_models_load_by_name(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "ASSETS", tmp_path)
    assert list_models() == []
    for name in ("pico", "nano"):
        save_model(tmp_path / name, random_model("reflow"))
    (tmp_path / "draft").mkdir()
    assert list_models() == ["nano", "pico"]
    assert same_weights(load_model("nano"), random_model("reflow"))
    monkeypatch.chdir(tmp_path_factory.mktemp("runs"))
    own = save_model("nano/step_0000010", random_model("reflow", seed=1))
    for name in ("nano", "./nano", own):  # a run called as a packaged model is the run
        assert same_weights(load_model(name), random_model("reflow", seed=1))
    with pytest.raises(ReflowlensError, match=r"no model 'nan0': .* packaged \(nano, pico\) .*; did you mean 'nano'\?"):
        load_model("nan0")


# --------------------------------------------------------------------------------------------------------------- errors


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match="no model 'nowhere'"):
        load_model("nowhere")
    with pytest.raises(ReflowlensError, match=r"holds no model\.safetensors: expected a checkpoint folder"):
        load_model(tmp_path)


def test_truncated_and_corrupt_files(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for length in (0, 4, 8, 100, 8 + header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ReflowlensError, match=r"is not a readable safetensors file|is corrupt"):
            load_model(saved)
    for damaged in (
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"{" * header + whole[8 + header :],
        whole[:8] + b"\xff" * header + whole[8 + header :],
        whole[:8] + b"[]".ljust(header) + whole[8 + header :],
        b"PK\x03\x04" + whole,
    ):
        path.write_bytes(damaged)
        with pytest.raises(ReflowlensError, match=r"is not a readable safetensors file|is corrupt"):
            load_model(saved)


def test_a_damaged_manifest(saved: Path) -> None:
    manifest = saved / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" + whole, b"7"):
        manifest.write_bytes(damaged)
        with pytest.raises(ReflowlensError, match=r"manifest\.json is damaged: "):
            read_manifest(saved)


def test_files_of_others_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ReflowlensError, match="was not written by reflowlens"):
        load_model(path)
    save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ReflowlensError, match=r"was not written by reflowlens \(format 'pt', expected 'reflowlens-1'\)"
    ):
        load_model(path)

    pickled = tmp_path / "model.pt"
    torch.save({"payload": Payload()}, pickled)
    with pytest.raises(ReflowlensError, match="is not a readable safetensors file"):
        load_model(pickled)
    assert not Payload.ran


class Payload:
    """Leaves a trace when it is unpickled."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Payload, "ran", True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no readable configuration"),
        ("{", "holds no readable configuration"),
        ("[1]", "holds no readable configuration"),
        ('{"architecture": "mamba"}', "lacks d_head"),
        (json.dumps(CONFIGS["gpt2"].to_dict() | {"n_layers": -1}), "n_layers must be a positive integer"),
        (json.dumps(CONFIGS["gpt2"].to_dict() | {"depth": 2}), "unknown model field 'depth'"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, config: str | None, message: str) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"format": "reflowlens-1"} | ({} if config is None else {"config": config})
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ReflowlensError, match=message):
        load_model(path)


def rewrite(saved: Path, change: Any) -> None:
    """Change the stored tensors and leave the configuration; no manifest records what they were."""
    (saved / "manifest.json").unlink(missing_ok=True)
    path = saved / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    config = json.dumps(CONFIGS["reflow_lite"].to_dict())
    save_file(tensors, path, metadata={"format": "reflowlens-1", "config": config})


def test_weights_that_do_not_fit_the_configuration(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop("ln_final.w"))
    with pytest.raises(ReflowlensError, match=r"lacks 'ln_final.w' \(1 parameters missing\)"):
        load_model(saved)
    rewrite(saved, lambda tensors: tensors.update({"ln_final.w": torch.ones(32), "head": torch.ones(2)}))
    with pytest.raises(ReflowlensError, match="holds 'head', which its configuration does not have"):
        load_model(saved)
    rewrite(saved, lambda tensors: (tensors.pop("head"), tensors.update({"ln_final.w": torch.ones(31)})))
    with pytest.raises(ReflowlensError, match=r"ln_final.w has shape \[31\], expected \[32\]"):
        load_model(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(saved: Path, bad: float) -> None:
    rewrite(saved, lambda tensors: tensors["blocks.1.mlp.W_in"][3].fill_(bad))
    with pytest.raises(ReflowlensError, match=r"blocks.1.mlp.W_in holds NaN or infinite values"):
        load_model(saved)


def test_storing_in_sixteen_bits_must_not_overflow(tmp_path: Path) -> None:
    model = random_model("reflow")
    with torch.no_grad():
        model.ln_final.w[0] = 1e6
    with pytest.raises(ReflowlensError, match=r"ln_final\.w holds values that are not finite in torch\.float16"):
        save_model(tmp_path / "saved", model, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- replacing a checkpoint


def test_a_new_checkpoint_replaces_the_old_one(saved: Path) -> None:
    (saved / "stray").write_text("of the old checkpoint")
    save_model(saved, random_model("gpt2"))
    assert load_model(saved).cfg == CONFIGS["gpt2"]
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ReflowlensError, match="holds other files and no checkpoint to replace"):
        save_model(tmp_path, random_model("gpt2"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(ReflowlensError, match=r"my\.safetensors is a file: choose a new folder"):
        save_model(path, random_model("gpt2"))
    with pytest.raises(ReflowlensError, match=r"my\.safetensors is a file: choose a new folder"):
        save_tensors(path, "cache", {"x": torch.zeros(2)}, {})
    assert main(["export", "reflow-nano", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path} is a file: choose a new folder\n"
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as the safetensors library reports it
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    before = listing(saved)

    def fail(path: Path, tensors: Any, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(checkpoints, "write_tensors", fail)
    with pytest.raises(ReflowlensError, match=r"cannot write .*saved: the disk is full; nothing was changed"):
        save_model(saved, random_model("gpt2"))
    assert listing(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_real_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def write(folder: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)

    with pytest.raises(ReflowlensError, match="the disk is full; nothing was changed"):
        write_folder(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []


def test_failing_to_move_into_place_puts_the_old_one_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = listing(saved), Path.rename

    def fail(source: Path, target: Path) -> Path:
        if Path(target) == saved and "old" not in source.parent.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ReflowlensError, match=r"cannot write .*saved: .*Input/output error; nothing was changed"):
        save_model(saved, random_model("gpt2"))
    monkeypatch.undo()
    assert listing(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_an_interruption_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(saved)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, random_model("gpt2"))
    assert listing(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ReflowlensError, match=r"cannot write .*; nothing was changed"):
        save_model(tmp_path / "file" / "saved", random_model("gpt2"))


def test_loading_needs_no_more_than_the_weights(saved: Path) -> None:
    """The manifest is for people: a model opens without it."""
    (saved / "manifest.json").unlink()
    tokens = random_tokens(CONFIGS["reflow_lite"])
    assert torch.equal(load_model(saved)(tokens), random_model("reflow_lite")(tokens))
    assert read_manifest(saved) == {}


def test_the_hash_of_a_pruned_model_is_that_of_its_masks_too() -> None:
    model = random_model("gpt2_new")
    hashes = {model_hash(model)}
    for kept in (1, 2):
        pruned = random_model("gpt2_new")
        W = pruned.blocks[0].attn.W_Q
        prune.custom_from_mask(pruned.blocks[0].attn, "W_Q", (torch.arange(W.numel()) % 3 < kept).view_as(W))
        hashes.add(model_hash(pruned))
    assert len(hashes) == 3


def test_only_what_can_be_loaded_again_is_saved(tmp_path: Path) -> None:
    larger = random_model("gpt2_new")
    larger.embed.W_E = torch.nn.Parameter(torch.zeros(300, 32))
    with pytest.raises(ReflowlensError, match=r"embed\.W_E has shape \[300, 32\], and model\.cfg says \[288, 32\]"):
        save_model(tmp_path / "saved", larger)
    more = random_model("gpt2_new")
    more.register_parameter("probe", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ReflowlensError, match="has a parameter 'probe', which its configuration does not have"):
        save_model(tmp_path / "saved", more)
    assert not (tmp_path / "saved").exists()


def test_the_manifest_of_another_checkpoint_does_not_stand_for_this_one(saved: Path, tmp_path: Path) -> None:
    again = save_model(tmp_path / "again", random_model("gpt2"), read_manifest(saved), dtype=torch.float16)
    manifest = read_manifest(again)
    assert manifest["weights_sha256"] == listing(again)["model.safetensors"]
    assert manifest["config"] == CONFIGS["gpt2"].to_dict()
    assert manifest["step"] == 7


# ----------------------------------------------------------------------------------------------- what is not as written


def flip(path: Path, at: float = 0.9) -> None:
    """One bit of a file, in the last digits of one weight."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data)) // 4 * 4] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_another_model_and_is_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    flip(weights)
    for path in (saved, weights):
        with pytest.raises(
            ReflowlensError, match=r"is not the file that manifest\.json was written with .*verify=False"
        ):
            load_model(path)
    damaged = load_model(saved, verify=False)
    assert not same_weights(damaged, random_model("reflow_lite"))
    again = str(tmp_path / "again")
    assert main(["export", str(saved), again]) == 2
    assert main(["export", str(saved), again, "--no-verify"]) == 0
    assert same_weights(load_model(again), damaged)


def test_only_a_recorded_hash_is_held_against_a_file(saved: Path, tmp_path: Path) -> None:
    flip(saved / "model.safetensors")
    manifest = json.loads((saved / "manifest.json").read_text())
    for recorded in ("", "0" * 64, 7, {}):
        (saved / "manifest.json").write_text(json.dumps(manifest | {"weights_sha256": recorded}))
        with pytest.raises(ReflowlensError, match="its SHA-256 differs"):
            load_model(saved)
    del manifest["weights_sha256"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    opened = load_model(saved)
    alone = shutil.copy(saved / "model.safetensors", tmp_path / "alone.safetensors")
    assert same_weights(load_model(alone), opened)


def test_a_manifest_of_another_configuration_is_refused(saved: Path, tmp_path: Path) -> None:
    """Whichever of the two was edited, a tokenizer with as many tokens would read other texts."""
    manifest = json.loads((saved / "manifest.json").read_text())
    edited = manifest["config"] | {"tokenizer_name": "gpt2_1k"}
    for config, name in ((edited, "tokenizer_name"), ({}, "architecture"), (7, "architecture")):
        (saved / "manifest.json").write_text(json.dumps(manifest | {"config": config}))
        with pytest.raises(
            ReflowlensError, match=rf"states {name}=.* and manifest\.json beside it {name}=.*verify=False"
        ):
            load_model(saved)
        assert load_model(saved, verify=False).cfg.tokenizer_name == "bytes"
    again = str(tmp_path / "again")
    assert main(["export", str(saved), again]) == 2
    assert main(["export", str(saved), again, "--no-verify"]) == 0
    assert load_model(again).cfg.tokenizer_name == "bytes"
    del manifest["config"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert load_model(saved).cfg.tokenizer_name == "bytes"


def test_a_file_is_hashed_a_piece_at_a_time(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # several pieces
    (tmp_path / "file").write_bytes(data)
    tracemalloc.start()
    assert file_hash(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) / 2


def test_equal_models_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    """In processes of their own too: text is hashed by another seed in each."""
    first = listing(save_model(tmp_path / "0", random_model("reflow")))
    assert all(listing(save_model(tmp_path / str(i), random_model("reflow"))) == first for i in range(1, 9))
    header = (tmp_path / "0" / "model.safetensors").read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"config":')


def test_metadata_of_any_text_is_written_whole(tmp_path: Path) -> None:
    metadata = {"z": 'quote " slash \\ / Grüße 世界 \u2028 \x7f \x01\n', "a": "", "ü": "𝄞"}
    tensors = {"b": torch.arange(3.0), "ä\n": torch.ones(2, dtype=torch.float16)}
    write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------------------------------------- what comes from outside


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 200_000}, "n_layers must be at most 16,384, got 200,000"),
        ({"n_layers": 16_000}, r"its configuration has n_layers 16,000, and the file \d+ tensors"),
        ({"n_ctx": 10**8}, "n_ctx must be at most 16,777,216"),
        ({"n_signals": 10**18}, "n_signals must be at most"),
        ({"n_signals": 10**7}, "its configuration has n_signals 10,000,000, and the file"),
        ({"d_model": 2**64}, "d_model must be at most"),
        ({"d_model": 2**20, "n_heads": 2**14, "d_head": 2**20}, "its configuration has d_model 1,048,576"),
        ({"eps": float("inf")}, "eps must be a positive number"),
        ({"rotary_base": 10**400}, "rotary_base must be a positive number"),
        ({"n_layers": True}, "n_layers must be a positive integer"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(saved: Path, changes: dict[str, Any], message: str) -> None:
    path = saved / "model.safetensors"
    config = json.dumps(CONFIGS["reflow_lite"].to_dict() | changes)
    save_file(load_file(path), path, metadata={"format": "reflowlens-1", "config": config})
    began = time.process_time()
    with pytest.raises(ReflowlensError, match=message):
        load_model(path)
    assert time.process_time() - began < 2


def test_a_model_larger_than_the_memory_is_not_begun() -> None:
    large = dataclasses.replace(CONFIGS["reflow"], d_model=1 << 20, d_mlp=1 << 24)
    long = dataclasses.replace(CONFIGS["reflow"], n_ctx=1 << 24, n_layers=1 << 10, d_head=1 << 10)
    with pytest.raises(ReflowlensError, match=r"this model takes [\d,.]+ GiB .*and this machine has [\d,.]+"):
        build_model(large)
    with pytest.raises(ReflowlensError, match=r"of them the angles of n_ctx=16,777,216 positions"):
        build_model(long)


def header_alone(path: Path, header: bytes, claimed: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header)
    return path


@pytest.mark.parametrize("nested", [b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"[" * 10_000, b'{"a":1}'])
def test_headers_that_are_no_headers(tmp_path: Path, nested: bytes) -> None:
    path = header_alone(tmp_path / "model.safetensors", nested)
    with pytest.raises(ReflowlensError, match="is not a readable safetensors file"):
        load_model(path)
    assert inspect_path(path).problems


def test_a_header_beyond_the_format_is_not_read(tmp_path: Path) -> None:
    path = header_alone(tmp_path / "model.safetensors", b"{", claimed=3 << 30)
    with path.open("r+b") as file:
        file.truncate((3 << 30) + 100)  # a hole: nothing on the disk
    tracemalloc.start()
    with pytest.raises(ReflowlensError, match="is not a readable safetensors file"):
        load_model(path)
    assert "beyond the 100,000,000 that the format allows" in "".join(inspect_path(path).problems)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_configuration_or_manifest_nested_too_deep(saved: Path) -> None:
    path, deep = saved / "model.safetensors", "[" * 200_000 + "]" * 200_000
    (saved / "manifest.json").write_text(deep)
    with pytest.raises(ReflowlensError, match=r"manifest\.json is damaged"):
        load_model(saved)
    save_file(load_file(path), path, metadata={"format": "reflowlens-1", "config": deep})
    with pytest.raises(ReflowlensError, match="holds no readable configuration"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_types_are_not_converted(saved: Path, dtype: torch.dtype) -> None:
    rewrite(saved, lambda tensors: tensors.update({"ln_final.w": torch.ones(32).to(dtype)}))
    with pytest.raises(ReflowlensError, match=r"ln_final\.w is of type \w+, expected F32, F16, BF16, F64"):
        load_model(saved)


@pytest.mark.parametrize("name", [None, 7, 2.5, b"reflow-nano", ["reflow-nano"], "x" * 5000, "null\0character"])
def test_what_is_no_path(name: Any) -> None:
    for use in (load_model, read_manifest, inspect_path, import_hf, import_nanogpt, lambda at: open_tensors(at, "x")):
        with pytest.raises(ReflowlensError, match=r"a path or a name was expected, got|cannot look up '") as error:
            use(name)
        assert len(str(error.value)) < 300
    with pytest.raises(ReflowlensError, match=r"a path or a name was expected, got|cannot look up '"):
        save_model(name, random_model("reflow"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("model.safetensors", "manifest.json", "config.json", "x.safetensors", "tokenizer.json"):
        os.mkfifo(folder / name)
    for use in (load_model, import_hf, import_nanogpt, lambda at: open_tensors(at, "x")):
        with pytest.raises(ReflowlensError):
            use(folder)
        with pytest.raises(ReflowlensError):
            use(folder / "model.safetensors")
    assert "cannot be read: it is no file" in "".join(inspect_path(folder).problems)
    with pytest.raises(ReflowlensError, match="is neither a file nor a folder"):
        inspect_path(folder / "x.safetensors")


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not forget a process's peak")
def test_no_model_is_held_twice_while_it_is_opened(tmp_path: Path) -> None:
    """The largest size of a process of its own for each kind, which has opened a tiny model of the kind before."""
    tiny = random_model("llama_untied")
    large = build_model(dataclasses.replace(tiny.cfg, n_layers=12, d_model=512, d_mlp=2048, d_vocab=4096))
    for name, model in (("tiny", tiny), ("large", large)):
        for dtype in (torch.float32, torch.bfloat16):
            save_model(tmp_path / f"ours {dtype} {name}", model, dtype=dtype)
            export_hf(model, tmp_path / f"theirs {dtype} {name}", dtype)
    kinds = sorted(str(path).removesuffix(" tiny") for path in tmp_path.glob("* tiny"))
    call = "import sys; from reflowlens.benchmarks.load import print_costs; print_costs(*sys.argv[1:])"
    for kind in kinds:
        costs = json.loads(run_python("-c", call, f"{kind} large", f"{kind} tiny").stdout)
        assert costs["weights_mb"] == pytest.approx(4 * large.n_parameters / 1e6, rel=1e-3)
        assert 0.9 < costs["relative"] < 1.35, kind  # 2 and more with the file beside the model


def test_a_file_that_is_replaced_while_it_is_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of two models are never put together."""
    other = save_model(tmp_path / "other", build_model(load_model(saved).cfg, seed=1)) / "model.safetensors"

    def read(path: Path, name: str) -> Tensor:
        tensor = read_tensor(path, name)
        if other.is_file():
            other.replace(path)
        return tensor

    monkeypatch.setattr(checkpoints, "read_tensor", read)
    with pytest.raises(ReflowlensError, match=r"model\.safetensors was written while it was read: open it again"):
        load_model(saved)
