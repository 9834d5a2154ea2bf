from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from reflowlens.dictionaries import files
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary, save_dictionary
from reflowlens.storage.model_hash import model_hash
from tests.reference import dictionary_formats
from tests.support.tiny import random_model

READS = tuple(f"blocks.{layer}.ln2.hook_normalized" for layer in range(2))
WRITES = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(2))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "tiny", random_model("gpt2_new"))


@pytest.fixture
def topk(tmp_path: Path) -> Path:
    cfg = DictionaryConfig(READS, WRITES, 32, 32, 64, "topk", k=5, model_name="tiny", name="plt")
    cfg = dataclasses.replace(cfg, model_hash=model_hash(random_model("gpt2_new")))
    measured = {"l0": [5.0, 4.0], "val_fvu": [0.25, 0.5]}
    return save_dictionary(tmp_path / "run" / "plt", Dictionary.fresh(cfg), {"measured_in_training": measured})


@pytest.fixture
def data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(100)))
    prepare = ["prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"]
    assert main([*prepare, "--val-fraction", "0.4"]) == 0
    capsys.readouterr()
    return tmp_path / "data"


@pytest.mark.parametrize("command", ["list", "train", "export", "import"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["dictionary", command, "--help"])
    assert stop.value.code == 0
    assert f"usage: reflowlens dictionary {command}" in capsys.readouterr().out


def test_list_shows_what_there_is(
    topk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packaged ones, those in a folder of several, and one that is named; what evaluation measured comes first."""
    monkeypatch.setattr(files, "ASSETS", tmp_path / "assets")
    metrics = {"metrics": {"l0": [3.0, 4.0], "fvu": [0.5, 0.7]}, "measured_in_training": {"l0": [9.0], "fvu": [9.0]}}
    cfg = DictionaryConfig(READS, WRITES, 8, 8, 2000, "relu", cross_layer=True)
    save_dictionary(tmp_path / "assets" / "nano-clt", Dictionary.fresh(cfg), metrics, bits=8)
    assert main(["dictionary", "list", str(topk.parent), str(topk / "dictionary.safetensors")]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["name", "kind", "model", "layers", "features", "activation", "L0", "FVU", "size"]
    assert rows[0] == ["nano-clt", "CLT", "-", "2", "2,000", "relu", "3.5", "0.600", "0.1", "MB"]
    assert rows[1] == [str(topk), "PLT", "tiny", "2", "64", "topk(5)", "4.5", "0.375", "0.0", "MB"]
    assert rows[2][1:] == rows[1][1:]
    assert main(["dictionary", "list", "nowhere"]) == 2
    assert "no dictionary 'nowhere'" in capsys.readouterr().err


def test_export_packs_and_keeps_what_is_recorded(topk: Path, model: Path, data: Path, tmp_path: Path) -> None:
    export = ["dictionary", "export", str(topk), str(tmp_path / "small"), "--bits", "6"]
    assert main(export) == 0
    plain = load_dictionary(tmp_path / "small").layers[0].W_enc
    assert main([*export, "--model", str(model), "--data", str(data), "--tokens", "300"]) == 0
    assert not torch.equal(load_dictionary(tmp_path / "small").layers[0].W_enc, plain)
    assert dictionary_manifest(tmp_path / "small")["measured_in_training"]["l0"] == [5.0, 4.0]
    assert dictionary_manifest(tmp_path / "small")["bits"] == 6
    assert load_dictionary(tmp_path / "small").cfg == load_dictionary(topk).cfg


def test_top_k_goes_out_as_thresholds_and_comes_in_again(
    topk: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["dictionary", "export", str(topk), str(tmp_path / "out"), "--format", "circuit-tracer"]
    assert main([*export, "--model", str(model), "--data", str(data), "--tokens", "600"]) == 0
    shown = capsys.readouterr().out
    cost = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["thresholds"]
    assert f"FVU: top-k {sum(cost['fvu_topk']) / 2:.4g}, thresholds {sum(cost['fvu_thresholds']) / 2:.4g}" in shown
    assert 250 < cost["positions"] < 300

    back = ["dictionary", "import", str(tmp_path / "out"), str(tmp_path / "back"), "--from", "circuit-tracer"]
    assert main([*back, "--model", str(model)]) == 0
    again = load_dictionary(tmp_path / "back", model=random_model("gpt2_new"))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(again(list(x)), dictionary_formats.circuit_tracer(tmp_path / "out", x)[1], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6
    assert dictionary_manifest(tmp_path / "back")["imported_from"]["format"] == "circuit-tracer"


def test_sae_lens_out_and_in(tmp_path: Path, model: Path) -> None:
    stream = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(2))
    sae = Dictionary.fresh(DictionaryConfig(stream, stream, 32, 32, 64, "topk", k=5))
    folder = save_dictionary(tmp_path / "sae", sae)
    assert main(["dictionary", "export", str(folder), str(tmp_path / "out"), "--format", "sae-lens"]) == 0
    assert json.loads((tmp_path / "out" / "layer_1" / "cfg.json").read_text())["k"] == 5
    back = ["dictionary", "import", str(tmp_path / "out"), str(tmp_path / "back"), "--from", "sae-lens"]
    assert main([*back, "--model", str(model)]) == 0
    found = load_dictionary(tmp_path / "back")
    assert torch.equal(found.layers[1].W_enc, sae.layers[1].W_enc)
    assert found.cfg.model_hash == model_hash(random_model("gpt2_new"))
    assert found.cfg.model_name == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "TOPK", "OUT", "--format", "circuit-tracer"], "which the format asks for: with_thresholds("),
        (["export", "TOPK", "OUT", "--model", "m"], "--model and --data go together"),
        (["export", "TOPK", "OUT", "--format", "sae-lens", "--bits", "4"], "--bits packs a dictionary of reflowlens"),
        (["export", "nowhere", "OUT"], "no dictionary 'nowhere'"),
        (["import", "TOPK", "OUT", "--from", "sae-lens"], "has no cfg.json"),
        (
            ["import", "TOPK", "OUT", "--from", "sae-lens", "--reads", "x"],
            "--reads and --writes are for circuit-tracer",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    arguments: list[str], message: str, topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TOPK": str(topk), "OUT": str(tmp_path / "out")}
    assert main(["dictionary", *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
