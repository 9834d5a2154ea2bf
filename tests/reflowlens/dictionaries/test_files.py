from __future__ import annotations

import dataclasses
import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reflowlens.dictionaries import belonging, files
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_manifest, list_dictionaries, load_dictionary, save_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.storage.model_hash import model_hash
from reflowlens.storage.opening import file_hash
from tests.support.processes import in_a_process
from tests.support.tiny import random_model, tiny_config

READS = tuple(f"blocks.{layer}.ln2.hook_normalized" for layer in range(2))
WRITES = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(2))
STREAM = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(2))
PLT = DictionaryConfig(READS, WRITES, 32, 32, 48, "topk", k=4, name="plt")
KINDS = {
    "plt": PLT,
    "clt": dataclasses.replace(PLT, activation="jumprelu", k=None, cross_layer=True),
    "skip": dataclasses.replace(PLT, activation="relu", k=None, skip=True),
    "sae": DictionaryConfig(STREAM, STREAM, 32, 32, 48, "batchtopk", k=4),
}


def random_dictionary(cfg: DictionaryConfig = PLT, seed: int = 0) -> Dictionary:
    """Every number of it is drawn, biases, thresholds and skips too."""
    dictionary, generator = Dictionary(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.normal_(generator=generator).mul_(0.3)
            if name.endswith("threshold"):
                parameter.abs_()
    return dictionary


def inputs(dictionary: Dictionary) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, dictionary.cfg.d_in, generator=generator) for _ in dictionary.cfg.reads]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_dictionary(tmp_path / "saved", random_dictionary(), {"tokens_seen": 7})


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_for_bit(kind: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(KINDS[kind])
    folder = save_dictionary(tmp_path / "saved", dictionary)
    for path in (folder, str(folder), folder / "dictionary.safetensors"):
        loaded = load_dictionary(path)
        assert loaded.cfg == dictionary.cfg
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        for ours, theirs in zip(loaded(inputs(loaded)), dictionary(inputs(dictionary)), strict=True):
            assert torch.equal(ours, theirs)
    again = save_dictionary(tmp_path / "again", load_dictionary(folder))
    assert file_hash(again / "dictionary.safetensors") == file_hash(folder / "dictionary.safetensors")
    assert {p.dtype for p in load_dictionary(folder, dtype=torch.float64).parameters()} == {torch.float64}


def test_what_the_manifest_records(saved: Path, tmp_path: Path) -> None:
    manifest = dictionary_manifest(saved)
    assert manifest["tokens_seen"] == 7
    assert manifest["config"] == PLT.to_dict()
    assert manifest["weights_sha256"] == file_hash(saved / "dictionary.safetensors")
    other = save_dictionary(tmp_path / "other", random_dictionary(KINDS["clt"]), manifest)
    assert dictionary_manifest(other)["config"] == KINDS["clt"].to_dict()
    assert dictionary_manifest(other)["weights_sha256"] == file_hash(other / "dictionary.safetensors")


def test_packaged_dictionaries_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    save_dictionary(tmp_path / "nano-plt", random_dictionary())
    (tmp_path / "draft").mkdir()
    assert list_dictionaries() == ["nano-plt"]
    assert load_dictionary("nano-plt").cfg == PLT
    with pytest.raises(ReflowlensError, match=r"no dictionary 'nano-pl': .*\(nano-plt\).*; did you mean 'nano-plt'\?"):
        load_dictionary("nano-pl")


def test_a_folder_of_dictionaries_names_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_dictionary(tmp_path / name, random_dictionary(PLT))
    with pytest.raises(ReflowlensError, match="it holds the folders of one, two"):
        load_dictionary(tmp_path)


# ------------------------------------------------------------------------------------------- whose dictionary it is


def test_a_dictionary_belongs_to_its_model_alone(tmp_path: Path) -> None:
    model = random_model("gpt2_new")
    own = dataclasses.replace(PLT, model_name="tiny", model_hash=model_hash(model))
    folder = save_dictionary(tmp_path / "saved", random_dictionary(own))
    assert load_dictionary(folder, model=model).cfg == own
    other = random_model("gpt2_new", seed=1)
    with pytest.raises(ReflowlensError, match=r"plt of tiny was trained on a model of other weights .*other_model=T"):
        load_dictionary(folder, model=other)
    assert load_dictionary(folder, model=other, other_model=True).cfg == own
    assert check_belongs(random_dictionary(PLT), torch.compile(other)) is other  # it says of no model that it is its


def test_weights_are_hashed_again_once_they_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed = random_model("gpt2_new"), list[int]()
    own = random_dictionary(dataclasses.replace(PLT, model_hash=model_hash(model)))
    monkeypatch.setattr(belonging, "model_hash", lambda model: hashed.append(1) or model_hash(model))
    for _ in range(3):
        check_belongs(own, model)
    assert len(hashed) == 1
    weight = next(model.parameters())
    for write in (lambda: weight[0, 0].add_(1.0), lambda: weight.data[0, 0].add_(1.0)):
        before = weight.detach().clone()
        with torch.no_grad():
            write()
        with pytest.raises(ReflowlensError, match="of other weights"):
            check_belongs(own, model)
        with torch.no_grad():
            weight.copy_(before)
        check_belongs(own, model)


def test_hook_points_and_widths_must_be_there_in_any_case() -> None:
    model = random_model("gpt2_new")
    narrow = build_model(tiny_config("gpt2_new", d_model=16, n_heads=2))
    with pytest.raises(ReflowlensError, match=r"activations \[batch, pos, 32\] at blocks\.0\.ln2.*\[1, 1, 16\]"):
        check_belongs(random_dictionary(), narrow, other_model=True)
    deep = dataclasses.replace(PLT, reads=(READS[0], READS[1].replace("1", "7")))
    with pytest.raises(ReflowlensError, match=r"'blocks\.7\.ln2\.hook_normalized', and this model has no such hook"):
        check_belongs(random_dictionary(deep), model, other_model=True)
    heads = dataclasses.replace(PLT, reads=tuple(f"blocks.{layer}.attn.hook_z" for layer in range(2)))
    with pytest.raises(ReflowlensError, match=r"\[batch, pos, 32\] at blocks\.0\.attn\.hook_z; .* has \[1, 1, 4, 8\]"):
        check_belongs(random_dictionary(heads), model)


# --------------------------------------------------------------------------------------------------- files that are not


def test_truncated_and_corrupt_files(saved: Path) -> None:
    path = saved / "dictionary.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for damaged in (b"", whole[:100], whole[: 8 + header], whole[:-1], b"PK\x03\x04" + whole, b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ReflowlensError, match="is not a readable safetensors file"):
            load_dictionary(saved)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ReflowlensError, match=r"SHA-256 differs.*load_dictionary\(\.\.\., verify=False\)"):
        load_dictionary(saved)
    assert load_dictionary(saved, verify=False).cfg == PLT
    (saved / "manifest.json").write_text("7")
    with pytest.raises(ReflowlensError, match=r"manifest\.json is damaged"):
        load_dictionary(saved)


def test_what_is_no_dictionary(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match="no dictionary 'nowhere'"):
        load_dictionary("nowhere")
    with pytest.raises(ReflowlensError, match=r"holds no dictionary\.safetensors: expected a dictionary's folder"):
        load_dictionary(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ReflowlensError, match="was not written by reflowlens"):
        load_dictionary(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"k": 99}, {}, r"k must not be larger than n_features \(48\), got 99"),
        ({"width": 3}, {}, "a dictionary has no field 'width'"),
        ({"n_features": 10**12}, {}, "needs 128,000,000,000,000 numbers or more, and the file holds"),
        ({"cross_layer": True}, {}, r"layers\.0\.W_dec has shape \[48, 1, 32\], expected \[48, 2, 32\]"),
        ({"skip": True}, {}, r"lacks 'layers\.0\.W_skip' \(2 parameters missing\)"),
        ({}, {"layers.0.b_enc": None}, r"lacks 'layers\.0\.b_enc'"),
        ({}, {"more": torch.zeros(2)}, "holds 'more', which its configuration does not have"),
        (
            {},
            {"layers.0.b_enc": torch.zeros(48, dtype=torch.int8)},
            r"b_enc is of torch\.int8, expected one of torch\.float32",
        ),
        ({}, {"layers.1.b_dec": torch.full((32,), torch.nan)}, r"layers\.1\.b_dec holds NaN or infinite values"),
    ],
)
def test_files_that_do_not_fit_their_configuration(
    saved: Path, config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    (saved / "manifest.json").unlink()
    tensors = load_file(saved / "dictionary.safetensors") | change
    header = {"format": files.FORMAT, "config": json.dumps(PLT.to_dict() | config)}
    save_file({k: v for k, v in tensors.items() if v is not None}, saved / "dictionary.safetensors", metadata=header)
    with pytest.raises(ReflowlensError, match=message):
        load_dictionary(saved)


# ------------------------------------------------------------------------------------------------------------ replacing


def test_a_failure_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    broken = random_dictionary()
    with torch.no_grad():
        broken.layers[1].W_dec[3, 0, 2] = torch.inf
    with pytest.raises(ReflowlensError, match=r"layers\.1\.W_dec holds NaN or infinite values: .* is not saved"):
        save_dictionary(saved, broken)

    def fail(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", fail)
    with pytest.raises(ReflowlensError, match=r"cannot write .*saved: the disk is full; nothing was changed"):
        save_dictionary(saved, random_dictionary())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_only_a_dictionary_is_replaced(saved: Path, tmp_path: Path) -> None:
    save_dictionary(saved, random_dictionary(KINDS["sae"]))
    assert load_dictionary(saved).cfg == KINDS["sae"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ReflowlensError, match="holds other files and no dictionary to replace"):
        save_dictionary(tmp_path / "notes", random_dictionary())


# -------------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_dictionary_is_nearly_the_same(kind: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(KINDS[kind])
    folder = save_dictionary(tmp_path / "packed", dictionary, bits=6)
    assert sorted(path.name for path in folder.iterdir()) == ["dictionary.safetensors.gz", "manifest.json"]
    assert dictionary_manifest(folder)["bits"] == 6
    loaded = load_dictionary(folder)
    assert loaded.cfg == dictionary.cfg
    for (name, ours), theirs in zip(loaded.named_parameters(), dictionary.parameters(), strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error == 0 if theirs.ndim == 1 else 0 < error < 0.025, name
    alone = (folder / "dictionary.safetensors.gz").rename(tmp_path / "alone.gz")
    assert torch.equal(load_dictionary(alone).layers[1].W_dec, loaded.layers[1].W_dec)
    again = save_dictionary(tmp_path / "again", dictionary, bits=6)
    assert file_hash(again / "dictionary.safetensors.gz") == file_hash(alone)


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_packing_by_activations_keeps_more_of_the_reconstruction(kind: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(KINDS[kind])
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(8, 32, generator=generator)
    reads = [
        torch.randn(600, 8, generator=generator) @ mix + 0.2 * torch.randn(600, 32, generator=generator) for _ in READS
    ]
    seen, held_out = [x[:400] for x in reads], [x[400:] for x in reads]

    def error(**how: Any) -> float:
        loaded = load_dictionary(save_dictionary(tmp_path / "packed", dictionary, **how))
        both = zip(loaded(held_out), dictionary(held_out), strict=True)
        return sum((ours - theirs).square().sum().item() for ours, theirs in both)

    plain, used = error(bits=6), error(bits=6, reads=seen)
    assert used < plain / 1.5
    with pytest.raises(ReflowlensError, match=r"reads say how to pack: give bits="):
        error(reads=seen)
    for wrong in (seen[:1], [x[:0] for x in seen], [x * torch.nan for x in seen]):
        with pytest.raises(ReflowlensError, match="packing goes by what each of the 2 layers reads"):
            error(bits=6, reads=wrong)


def test_packed_and_plain_replace_each_other(saved: Path) -> None:
    save_dictionary(saved, random_dictionary(), bits=4.3)
    assert sorted(path.name for path in saved.iterdir()) == ["dictionary.safetensors.gz", "manifest.json"]
    whole = (saved / "dictionary.safetensors.gz").read_bytes()
    (saved / "dictionary.safetensors.gz").write_bytes(whole[:-9])
    with pytest.raises(ReflowlensError, match="is not a readable packed file"):
        load_dictionary(saved)
    save_dictionary(saved, random_dictionary())
    assert sorted(path.name for path in saved.iterdir()) == ["dictionary.safetensors", "manifest.json"]
    with pytest.raises(ReflowlensError, match="bits must be a number from 1 to 8, got 9"):
        save_dictionary(saved, random_dictionary(), bits=9)
    assert sorted(path.name for path in saved.iterdir()) == ["dictionary.safetensors", "manifest.json"]


def sums(folder: Path) -> list[float]:
    return [parameter.double().sum().item() for parameter in load_dictionary(folder).parameters()]


def write_sums(folder: Path, written: Path) -> None:
    written.write_text(json.dumps(sums(folder)))


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    folder = save_dictionary(tmp_path / "packed", random_dictionary(), bits=4.3)
    in_a_process(write_sums, folder, tmp_path / "sums")
    assert json.loads((tmp_path / "sums").read_text()) == sums(folder)
