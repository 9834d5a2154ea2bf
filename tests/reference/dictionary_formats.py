"""What circuit-tracer and sae-lens write, and what they compute from a folder, from the description of their layouts.

In float64 and a position at a time; nothing here knows reflowlens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor


def circuit_tracer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [layer, pos, feature] and reconstructions [layer, pos, d] of x [layer, pos, d]."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {"feature_input_hook", "feature_output_hook", "scan"} <= set(config)
    if config["model_kind"] == "transcoder_set":
        return _per_layer(folder, x.double())
    assert config["model_kind"] == "cross_layer_transcoder"
    return _cross_layer(folder, x.double())


def _per_layer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    n_layers = len(list(folder.glob("layer_*.safetensors")))
    features, outputs = [], []
    for i in range(n_layers):
        p = {name: t.double() for name, t in load_file(folder / f"layer_{i}.safetensors").items()}
        a = _jump(x[i] @ p["W_enc"].T + p["b_enc"], p.get("activation_function.threshold"))
        y = a @ p["W_dec"] + p["b_dec"]
        features.append(a)
        outputs.append(y + x[i] @ p["W_skip"].T if "W_skip" in p else y)
    return torch.stack(features), torch.stack(outputs)


def _cross_layer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    features, outputs = [], torch.zeros_like(x)
    for i in range(n_layers):
        p = {name: t.double() for name, t in load_file(folder / f"W_enc_{i}.safetensors").items()}
        a = _jump(x[i] @ p[f"W_enc_{i}"].T + p[f"b_enc_{i}"], p.get(f"threshold_{i}"))
        outputs[i] += p[f"b_dec_{i}"]
        decoders = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].double()
        assert decoders.shape[1] == n_layers - i
        for ahead in range(n_layers - i):
            outputs[i + ahead] += a @ decoders[:, ahead]
        features.append(a)
    return torch.stack(features), outputs


def _jump(before: Tensor, threshold: Tensor | None) -> Tensor:
    return before.clamp(min=0) if threshold is None else torch.where(before > threshold, before, 0.0)


def write_circuit_tracer(
    folder: Path, *, cross_layer: bool, jump: bool, skip: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Three layers of 24 features, 10 wide."""
    folder.mkdir()
    kind = "cross_layer_transcoder" if cross_layer else "transcoder_set"
    fields = {"model_kind": kind, "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    fields |= {"scan": "somebody/transcoders", "repo_id": None, "transcoders": ["hf://a/b.safetensors"]}
    (folder / "config.yaml").write_text(yaml.dump(fields))
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    for i in range(3):
        encoder = {"W_enc": normal(24, 10), "b_enc": normal(24), "b_dec": normal(10)}
        threshold = normal(24).abs()
        if cross_layer:
            encoder |= {"threshold": threshold} if jump else {}
            save_file({f"{name}_{i}": t for name, t in encoder.items()}, folder / f"W_enc_{i}.safetensors")
            save_file({f"W_dec_{i}": normal(24, 3 - i, 10)}, folder / f"W_dec_{i}.safetensors")
            continue
        tensors = encoder | {"W_dec": normal(24, 10)}
        tensors |= {"activation_function.threshold": threshold} if jump else {}
        tensors |= {"W_skip": normal(10, 10)} if skip else {}
        save_file(tensors, folder / f"layer_{i}.safetensors")


def sae_lens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [pos, feature] and reconstructions [pos, d_out] of x [pos, d_in], of one layer's folder."""
    config = json.loads((folder / "cfg.json").read_text())
    p = {name: t.double() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    x, architecture = x.double(), config["architecture"]
    assert p["W_enc"].shape == (config["d_in"], config["d_sae"])
    assert config["normalize_activations"] == "none"
    if "transcoder" in architecture:
        assert not config["apply_b_dec_to_input"]
        assert p["W_dec"].shape == (config["d_sae"], config["d_out"])
        assert config["metadata"]["hook_name_out"]
    read = x - p["b_dec"] if config["apply_b_dec_to_input"] else x
    before = read @ p["W_enc"] + p["b_enc"]
    norms = p["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(len(p["W_dec"]))
    before = before * norms
    if architecture == "topk":
        kept = torch.zeros_like(before, dtype=torch.bool)
        for row, values in zip(kept, before, strict=True):
            row[values.argsort(descending=True)[: config["k"]]] = True
        a = before.clamp(min=0) * kept
    else:
        assert ("threshold" in p) == ("jumprelu" in architecture)
        a = before.clamp(min=0) * (before > p.get("threshold", torch.zeros(1)))
    y = a / norms @ p["W_dec"] + p["b_dec"]
    assert ("W_skip" in p) == ("skip" in architecture)
    return a, y + x @ p["W_skip"].T if "W_skip" in p else y


def write_sae_lens(
    folder: Path, architecture: str, *, layer: int = 0, dtype: torch.dtype = torch.float32, **fields: object
) -> None:
    """One layer of 24 features, 10 wide, or, of a transcoder, 10 to 6."""
    folder.mkdir(parents=True)
    is_transcoder = "transcoder" in architecture
    d_out = 6 if is_transcoder else 10
    metadata = {"sae_lens_version": "6.54.12", "model_name": "theirs", "hook_name": f"blocks.{layer}.hook_resid_mid"}
    config = {"architecture": architecture, "d_in": 10, "d_sae": 24, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": not is_transcoder, "normalize_activations": "none"}
    config |= {"reshape_activations": "none"} | ({"k": 4} if architecture == "topk" else {})
    if is_transcoder:
        metadata["hook_name_out"], config["d_out"] = f"blocks.{layer}.hook_mlp_out", d_out
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata, **fields}))
    draw = torch.Generator().manual_seed(layer)
    shapes = {"W_enc": (10, 24), "W_dec": (24, d_out), "b_enc": (24,), "b_dec": (d_out,)}
    shapes |= {"threshold": (24,)} if "jumprelu" in architecture else {}
    shapes |= {"W_skip": (d_out, 10)} if "skip" in architecture else {}
    tensors = {name: torch.randn(*shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
