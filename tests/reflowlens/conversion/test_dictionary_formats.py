"""circuit-tracer's and sae-lens's layouts, both ways, against code that follows their readers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflowlens.conversion.circuit_tracer import export_circuit_tracer, import_circuit_tracer
from reflowlens.conversion.flat_yaml import read_yaml
from reflowlens.conversion.sae_lens import export_sae_lens, import_sae_lens
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.thresholds import Activations, activations_of, with_thresholds
from reflowlens.errors import ReflowlensError
from tests.reference import dictionary_formats as theirs
from tests.support.tiny import random_model, random_tokens

N = 3
READS = tuple(f"blocks.{layer}.ln2.hook_normalized" for layer in range(N))
WRITES = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(N))
PLT = DictionaryConfig(READS, WRITES, 10, 10, 24, "jumprelu", model_name="ours", model_hash="ab", name="plt")
SAE = dataclasses.replace(PLT, writes=READS)
AS = dataclasses.replace


def dictionary_of(cfg: DictionaryConfig) -> Dictionary:
    dictionary, generator = Dictionary(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_(generator=generator)
    return dictionary.eval()


def inputs(d: int = 10, n_layers: int = N) -> Tensor:
    return torch.randn(n_layers, 50, d, generator=torch.Generator().manual_seed(1))


def assert_same(dictionary: Dictionary, x: Tensor, features: Tensor, outputs: Tensor) -> None:
    """To 1e-6 of the largest number; a dictionary whose features are all silent would show nothing."""
    ours = torch.stack(dictionary.encode(list(x))), torch.stack(dictionary(list(x)))
    assert (ours[0] > 0).float().mean() > 0.1
    for one, other in zip(ours, (features, outputs), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


# ------------------------------------------------------------------------------------------------------- circuit-tracer


@pytest.mark.parametrize(
    "cfg",
    [
        PLT,
        AS(PLT, activation="relu"),
        AS(PLT, skip=True),
        AS(PLT, activation="batchtopk", k=4),
        AS(PLT, cross_layer=True),
        AS(PLT, cross_layer=True, activation="relu"),
    ],
    ids=str,
)
def test_circuit_tracer_computes_from_an_export_what_the_dictionary_does(cfg: DictionaryConfig, tmp_path: Path) -> None:
    """Also with thresholds below zero, which let nothing negative through here, and would there."""
    dictionary = dictionary_of(cfg)
    folder = export_circuit_tracer(dictionary, tmp_path / "out", {"note": "x: y"})
    assert_same(dictionary, inputs(), *theirs.circuit_tracer(folder, inputs()))
    again = import_circuit_tracer(folder)
    activation = "relu" if cfg.activation == "relu" else "jumprelu"
    assert again.cfg == AS(cfg, activation=activation, k=None)
    assert_same(again, inputs(), *theirs.circuit_tracer(folder, inputs()))
    assert read_yaml(folder / "config.yaml")["note"] == "x: y"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind",
    [
        {"cross_layer": False, "jump": False},
        {"cross_layer": False, "jump": True, "skip": True},
        {"cross_layer": True, "jump": False},
        {"cross_layer": True, "jump": True},
    ],
    ids=str,
)
def test_what_circuit_tracer_wrote_is_read(kind: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    theirs.write_circuit_tracer(tmp_path / "in", **kind, dtype=dtype)
    dictionary = import_circuit_tracer(tmp_path / "in", input_hook="ln2.hook_normalized")
    assert_same(dictionary, inputs(), *theirs.circuit_tracer(tmp_path / "in", inputs()))
    cfg = dictionary.cfg
    assert (cfg.reads, cfg.writes) == (READS, WRITES)
    assert (cfg.cross_layer, cfg.skip, cfg.activation == "jumprelu") == (
        kind["cross_layer"],
        kind.get("skip", False),
        kind["jump"],
    )
    assert import_circuit_tracer(tmp_path / "in").cfg.reads[2] == "blocks.2.mlp.hook_in"
    assert {p.dtype for p in dictionary.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (SAE, "circuit-tracer reads transcoders: an autoencoder is exported to sae-lens"),
        (AS(PLT, d_out=6), "have one width, and this one reads 10 and writes 6"),
        (AS(PLT, cross_layer=True, skip=True), "reads no skip from a cross-layer folder"),
        (AS(PLT, reads=READS[::-1]), "needs every layer from 0 on and one hook in all, and reads is"),
        (AS(PLT, activation="topk", k=3), r"have no thresholds.*with_thresholds\(dictionary, activations\).*--data"),
    ],
)
def test_what_circuit_tracer_has_nothing_for(cfg: DictionaryConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=message):
        export_circuit_tracer(dictionary_of(cfg), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_circuit_tracer_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=r"has no config\.yaml"):
        import_circuit_tracer(tmp_path)
    folder = tmp_path / "in"

    def refused(message: str, **changes: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        theirs.write_circuit_tracer(folder, cross_layer=False, jump=True)
        (folder / "config.yaml").write_text(changes.pop("yaml", (folder / "config.yaml").read_text()))
        layer = load_file(folder / "layer_1.safetensors") | changes
        save_file({k: v for k, v in layer.items() if v is not None}, folder / "layer_1.safetensors")
        with pytest.raises(ReflowlensError, match=message):
            import_circuit_tracer(folder)

    refused(r"model_kind is 'sae', expected transcoder_set or cross_layer_transcoder", yaml="model_kind: sae\n")
    refused("feature_input_hook is None, expected a hook's name", yaml="model_kind: transcoder_set\n")
    refused(r"lacks 'layers\.1\.b_enc'", b_enc=None)
    refused("holds NaN or infinite values", b_enc=torch.full((24,), torch.nan))
    refused(r"layers\.1\.W_dec has shape \[24, 1, 9\], expected \[24, 1, 10\]", W_dec=torch.zeros(24, 9))
    refused(r"holds 'layers\.1\.W_gate'", W_gate=torch.zeros(2))
    refused(
        "layer 1 has thresholds below zero, so that features could be negative",
        **{"activation_function.threshold": torch.full((24,), -1.0)},
    )
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(ReflowlensError, match=r"of the layers \[0, 2\], expected 0, 1, 2"):
        import_circuit_tracer(folder)
    (folder / "layer_1.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ReflowlensError, match="is not a readable safetensors file"):
        import_circuit_tracer(folder)


# ------------------------------------------------------------------------------------------------------------- sae-lens


@pytest.mark.parametrize(
    "cfg",
    [
        SAE,
        AS(SAE, activation="relu"),
        AS(SAE, activation="topk", k=4),
        AS(SAE, activation="batchtopk", k=4),
        AS(PLT, d_out=6),
        AS(PLT, activation="relu"),
        AS(PLT, skip=True),
        AS(PLT, activation="relu", skip=True, d_out=6),
    ],
    ids=str,
)
def test_sae_lens_computes_from_an_export_what_the_dictionary_does(cfg: DictionaryConfig, tmp_path: Path) -> None:
    dictionary = dictionary_of(cfg)
    folder = export_sae_lens(dictionary, tmp_path / "plt", {"fvu": [0.5]})
    found = [theirs.sae_lens(folder / f"layer_{i}", x) for i, x in enumerate(inputs())]
    features, outputs = (torch.stack(each) for each in zip(*found, strict=True))
    assert_same(dictionary, inputs(), features, outputs)
    again = import_sae_lens(folder)
    activation = {"batchtopk": "jumprelu"}.get(cfg.activation, cfg.activation)
    assert again.cfg == AS(cfg, activation=activation, k=cfg.k if activation == "topk" else None)
    assert_same(again, inputs(), features, outputs)
    metadata = json.loads((folder / "layer_2" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == READS[2]
    assert metadata["reflowlens"]["fvu"] == [0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("transcoder", {}),
        ("skip_transcoder", {}),
        ("jumprelu_transcoder", {}),
        ("jumprelu_skip_transcoder", {}),
    ],
    ids=str,
)
def test_what_sae_lens_wrote_is_read(
    architecture: str, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """One folder as one layer, and folders side by side as layers in the order of the blocks."""
    for layer in (10, 9, 2):
        theirs.write_sae_lens(tmp_path / "in" / f"b{layer}", architecture, layer=layer, dtype=dtype, **fields)
    x = inputs()
    found = [theirs.sae_lens(tmp_path / "in" / f"b{layer}", x[i]) for i, layer in enumerate((2, 9, 10))]
    features, outputs = (torch.stack(each) for each in zip(*found, strict=True))
    dictionary = import_sae_lens(tmp_path / "in")
    assert_same(dictionary, x, features, outputs)
    assert dictionary.cfg.reads == tuple(f"blocks.{layer}.hook_resid_mid" for layer in (2, 9, 10))
    assert dictionary.cfg.model_name == "theirs"
    assert_same(import_sae_lens(tmp_path / "in" / "b9"), x[1:2], features[1:2], outputs[1:2])


def test_a_configuration_from_before_version_6_is_read(tmp_path: Path) -> None:
    theirs.write_sae_lens(tmp_path / "new", "topk")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "hook_point": "blocks.0.hook_resid_mid"}
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(old | {"d_in": 10, "d_sae": 24}))
    new, old_one = import_sae_lens(tmp_path / "new"), import_sae_lens(tmp_path / "old")
    assert old_one.cfg == AS(new.cfg, name="old", model_name="")
    assert torch.equal(old_one(inputs(n_layers=1))[0], new(inputs(n_layers=1))[0])


def test_what_sae_lens_has_nothing_for(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match="sae-lens has no cross-layer transcoders"):
        export_sae_lens(dictionary_of(AS(PLT, cross_layer=True)), tmp_path / "out")
    with pytest.raises(ReflowlensError, match="have no thresholds"):
        export_sae_lens(dictionary_of(AS(PLT, activation="topk", k=3)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gated"}, "architecture is 'gated', expected one of standard, jumprelu, topk, transcoder"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm', and only none is read"),
        ({"metadata": {"model_name": "x"}}, "names no hook point that the layer reads: None"),
        ({"architecture": "topk"}, "k must be a positive integer, got None"),
        ({"architecture": "jumprelu"}, r"lacks 'layers\.0\.threshold'"),
    ],
)
def test_folders_of_sae_lens_that_cannot_be_read(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=r"has no cfg\.json, and neither has a folder in it"):
        import_sae_lens(tmp_path)
    theirs.write_sae_lens(tmp_path / "in", "standard")
    config = json.loads((tmp_path / "in" / "cfg.json").read_text())
    (tmp_path / "in" / "cfg.json").write_text(json.dumps(config | fields))
    with pytest.raises(ReflowlensError, match=message):
        import_sae_lens(tmp_path / "in")


def test_layers_that_differ_are_no_dictionary(tmp_path: Path) -> None:
    theirs.write_sae_lens(tmp_path / "0", "standard")
    theirs.write_sae_lens(tmp_path / "1", "topk", layer=1)
    with pytest.raises(ReflowlensError, match="differ in activation, k: import each alone"):
        import_sae_lens(tmp_path)


# ------------------------------------------------------------------------------------------------ top-k, and replacing


def test_thresholds_for_topk_and_what_they_cost(tmp_path: Path) -> None:
    """Each threshold is the best of all there are, and the cost is that of what was exported."""
    cfg = AS(PLT, activation="topk", k=4, cross_layer=True)
    topk = dictionary_of(cfg)
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(400, 10, generator=generator) for _ in range(N)]
    y = [torch.randn(400, 10, generator=generator) + out for out in topk(x)]
    found, cost = with_thresholds(topk, Activations(x, y))
    assert found.cfg == AS(cfg, activation="jumprelu", k=None)
    before, kept = topk.layers[1].preactivations(x[1][:200]), topk.layers[1].encode(x[1][:200])

    def error(threshold: Tensor) -> Tensor:
        return (before.relu() * (before > threshold) - kept).square().sum(0)

    for other in torch.linspace(0, before.max().item(), 97):
        assert (error(found.layers[1].threshold) <= error(other) * (1 + 1e-5) + 1e-5).all()

    folder = export_circuit_tracer(found, tmp_path / "out", {"thresholds": cost})
    features, outputs = theirs.circuit_tracer(folder, torch.stack(x)[:, 200:])
    assert cost["positions"] == 200
    for layer in range(N):
        held_out = y[layer][200:]
        fvu = (held_out - outputs[layer]).square().sum() / (held_out - held_out.mean(0)).square().sum()
        assert cost["fvu_thresholds"][layer] == pytest.approx(fvu.item(), rel=1e-5)
        assert cost["l0_thresholds"][layer] == pytest.approx((features[layer] > 0).sum(-1).float().mean().item())
        assert cost["l0_topk"][layer] <= 4
        assert cost["fvu_topk"][layer] < cost["fvu_thresholds"][layer]
    with pytest.raises(ReflowlensError, match="stand in for topk, and this dictionary is of jumprelu"):
        with_thresholds(found, Activations(x, y))
    with pytest.raises(ReflowlensError, match="one half of the positions and measured on the other, got 1"):
        with_thresholds(topk, Activations([each[:1] for each in x], [each[:1] for each in y]))


def test_activations_are_those_of_the_model_without_first_positions() -> None:
    model = random_model("gpt2_new")
    cfg = DictionaryConfig(READS[:2], WRITES[:2], 32, 32, 40, "topk", k=3)
    tokens = [random_tokens(model.cfg, seed=seed) for seed in range(2)]
    found = activations_of(Dictionary.fresh(cfg), model, tokens)
    assert len(found.reads) == len(found.writes) == 2
    for point, stored in zip((*cfg.reads, *cfg.writes), (*found.reads, *found.writes), strict=True):
        expected = [model.run_with_cache(batch)[1][point][:, 1:].reshape(-1, 32) for batch in tokens]
        assert torch.equal(stored, torch.cat(expected))
    with pytest.raises(ReflowlensError, match="there are no tokens to take activations from"):
        activations_of(Dictionary.fresh(cfg), model, [])


@pytest.mark.parametrize("export", [export_circuit_tracer, export_sae_lens])
def test_an_export_replaces_only_its_own_kind(export: Any, tmp_path: Path) -> None:
    folder = export(dictionary_of(PLT), tmp_path / "out")
    before = sorted(path.name for path in folder.rglob("*"))
    assert export(dictionary_of(PLT), tmp_path / "out") == folder
    assert sorted(path.name for path in folder.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ReflowlensError, match="holds other files and no export to replace"):
        export(dictionary_of(PLT), tmp_path / "mine")


def test_flat_yaml_reads_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# of somebody\n---\na: b c # d\n'e': \"f: #\"\ng: 'it''s'\nh: 7\ni: true\nj:\n- k: 1\n- l\nm: null\nn:\n"
        "  o: p\n"
    )
    assert read_yaml(path) == {
        "a": "b c", "e": "f: #", "g": "it's", "h": 7, "i": True, "j": None, "m": None, "n": None,
    }  # fmt: skip
    path.write_text("a: 1\n{b: 2}\n")
    with pytest.raises(ReflowlensError, match=r"is no flat YAML: '\{b: 2\}'"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReflowlensError, match="is damaged"):
        read_yaml(path)
