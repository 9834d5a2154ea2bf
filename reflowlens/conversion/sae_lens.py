"""sae-lens's folders: ``cfg.json`` and ``sae_weights.safetensors``, one layer each.

W_enc is [d_in, feature], W_dec [feature, d_out], W_skip [d_out, d_in]; ``threshold`` [feature]. Autoencoders are of the
architecture standard, jumprelu or topk, transcoders transcoder or jumprelu_transcoder, with a skip skip_transcoder or
jumprelu_skip_transcoder. An autoencoder there may subtract the decoder's bias from what it reads; here that is part of
the encoder's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reflowlens.conversion.circuit_tracer import stored
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.dictionaries.files import dictionary_of
from reflowlens.dictionaries.thresholds import stored_thresholds
from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import check_replaceable, write_folder, write_tensors
from reflowlens.storage.opening import as_path, read_json_object, read_safetensors, shown

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
POINTS = ("reads", "writes")
LAYOUT = "6.0.0"  # the sae-lens version from which on cfg.json is like this
ARCHITECTURES = {  # kind, activation, skip
    "standard": ("sae", "relu", False),
    "jumprelu": ("sae", "jumprelu", False),
    "topk": ("sae", "topk", False),
    "transcoder": ("transcoder", "relu", False),
    "skip_transcoder": ("transcoder", "relu", True),
    "jumprelu_transcoder": ("transcoder", "jumprelu", False),
    "jumprelu_skip_transcoder": ("transcoder", "jumprelu", True),
}


def export_sae_lens(dictionary: Dictionary, folder: str | Path, manifest: Mapping[str, Any] | None = None) -> Path:
    """Write a dictionary as folders ``layer_0``, ``layer_1`` and so on, each for sae-lens's ``load_from_disk``.

    Args:
        dictionary: not cross-layer. An autoencoder of TopK stays one; of a transcoder of TopK first
            :func:`reflowlens.dictionaries.thresholds.with_thresholds`.
        folder: an earlier export there is replaced when the new one is complete.
        manifest: recorded as ``reflowlens`` in the metadata of each ``cfg.json``, such as what thresholds cost.

    Raises:
        ReflowlensError: sae-lens has nothing that computes what the dictionary does, the folder holds something else,
            or it cannot be written.

    Example: ``export_sae_lens(load_dictionary("reflow-nano-sae"), "out/sae")``
    """
    folder, cfg = as_path(folder), dictionary.cfg
    if cfg.cross_layer:
        raise ReflowlensError("sae-lens has no cross-layer transcoders: export to circuit-tracer")
    is_topk_sae = cfg.kind == "sae" and cfg.activation == "topk"
    thresholds = [None] * cfg.n_layers if is_topk_sae else stored_thresholds(dictionary)
    activation = "topk" if is_topk_sae else "relu" if cfg.activation == "relu" else "jumprelu"
    (architecture,) = (n for n, what in ARCHITECTURES.items() if what == (cfg.kind, activation, cfg.skip))
    check_replaceable(folder, (f"layer_0/{CONFIG}",), "export")

    def write(folder: Path) -> None:
        for i, (layer, threshold) in enumerate(zip(dictionary.each_layer(), thresholds, strict=True)):
            (folder / f"layer_{i}").mkdir()
            tensors: dict[str, Tensor | None] = {"W_enc": layer.W_enc.T, "b_enc": layer.b_enc}
            tensors |= {
                "W_dec": layer.W_dec[:, 0],
                "b_dec": layer.b_dec,
                "threshold": threshold,
                "W_skip": layer.W_skip,
            }
            write_tensors(folder / f"layer_{i}" / WEIGHTS, stored(tensors), {})
            fields = _config(cfg, architecture, i, dict(manifest or {}))
            (folder / f"layer_{i}" / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf8")

    return write_folder(folder, write)


def import_sae_lens(folder: str | Path) -> Dictionary:
    """Read one folder in sae-lens's layout, or all that lie in a folder as the layers of one dictionary, in float32.

    Raises:
        ReflowlensError: there is none, a file is damaged or has other tensors, the layers differ in kind or size, or
            what they read is rescaled or reshaped first.

    Example: ``import_sae_lens("out/sae").cfg.n_layers``
    """
    folder = as_path(folder)
    folders = [folder] if (folder / CONFIG).is_file() else [path.parent for path in folder.glob(f"*/{CONFIG}")]
    if not folders:
        raise ReflowlensError(f"{folder} has no {CONFIG}, and neither has a folder in it: expected one of sae-lens")
    layers = sorted(map(_read_layer, folders), key=_number)
    first = layers[0].fields
    for layer in layers:
        if differing := [name for name in first if name not in POINTS and layer.fields[name] != first[name]]:
            raise ReflowlensError(f"the layers in {folder} differ in {', '.join(differing)}: import each alone")
    points = {name: tuple(layer.fields[name] for layer in layers) for name in POINTS}
    cfg = DictionaryConfig(**{**first, **points}, name=folder.name)
    weights = {f"layers.{i}.{name}": t for i, layer in enumerate(layers) for name, t in layer.tensors.items()}
    dictionary = dictionary_of(folder, cfg, weights)
    for ours, theirs in zip(dictionary.each_layer(), layers, strict=True):
        _fold(ours, theirs)
    return dictionary


def _config(cfg: DictionaryConfig, architecture: str, layer: int, manifest: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architecture": architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT,
            "model_name": cfg.model_name,
            "hook_name": cfg.reads[layer],
            "hook_name_out": cfg.writes[layer],
            "prepend_bos": False,
            "reflowlens": {**manifest, "model_hash": cfg.model_hash},
        },
    }
    if cfg.kind == "transcoder":
        fields["d_out"] = cfg.d_out
    if architecture == "topk":
        fields |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return fields


class _Layer(NamedTuple):
    """A folder's content: fields of our configuration, tensors by our names, and what is to be folded into them."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    subtracts_b_dec: bool  # from what is read
    compares_by_norm: bool  # features' activations, times the norm of their decoder


def _read_layer(folder: Path) -> _Layer:
    config = read_json_object(folder / CONFIG)
    architecture, k = config.get("architecture", "standard"), config.get("k")
    activation_fn = config.get("activation_fn", config.get("activation_fn_str", "relu"))  # before version 6
    if activation_fn not in ("relu", "topk"):
        raise ReflowlensError(f"{folder / CONFIG}: activation_fn is {shown(activation_fn)}, expected relu or topk")
    if activation_fn == "topk":
        architecture, k = "topk", _mapping(config, "activation_fn_kwargs").get("k")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ReflowlensError(
            f"{folder / CONFIG}: architecture is {shown(architecture)}, expected one of {', '.join(ARCHITECTURES)}"
        )
    kind, activation, skip = ARCHITECTURES[architecture]
    for name in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
        if config.get(name) not in (None, False, "none"):
            raise ReflowlensError(f"{folder / CONFIG}: {name} is {shown(config[name])}, and only none is read")
    tensors = read_safetensors(folder / WEIGHTS)[1]
    W_enc, W_dec = tensors.get("W_enc"), tensors.get("W_dec")
    if W_enc is None or W_dec is None or W_enc.ndim != 2 or W_dec.ndim != 2:
        raise ReflowlensError(f"{folder / WEIGHTS} holds no matrices W_enc [d_in, feature] and W_dec [feature, d_out]")
    metadata = _mapping(config, "metadata") or config  # before version 6 there was none
    hook = metadata.get("hook_name", metadata.get("hook_point"))
    fields = {
        "reads": hook,
        "writes": hook if kind == "sae" else metadata.get("hook_name_out"),
        "d_in": W_enc.shape[0],
        "d_out": W_dec.shape[1],
        "n_features": W_enc.shape[1],
        "activation": activation,
        "k": k if activation == "topk" else None,
        "skip": skip,
        "model_name": str(metadata.get("model_name") or ""),
        "model_hash": str(_mapping(metadata, "reflowlens").get("model_hash") or ""),
    }
    for name in POINTS:
        if not isinstance(fields[name], str):
            raise ReflowlensError(f"{folder / CONFIG} names no hook point that the layer {name}: {shown(fields[name])}")
    return _Layer(
        fields,
        tensors | {"W_enc": W_enc.T, "W_dec": W_dec[:, None]},
        subtracts_b_dec=kind == "sae" and bool(config.get("apply_b_dec_to_input", True)),
        compares_by_norm=bool(config.get("rescale_acts_by_decoder_norm")),
    )


@torch.no_grad()
def _fold(ours: DictionaryLayer, theirs: _Layer) -> None:
    if theirs.subtracts_b_dec:
        ours.b_enc.sub_(ours.W_enc @ ours.b_dec)
    if theirs.compares_by_norm:
        norm = ours.W_dec.flatten(1).norm(dim=1)
        ours.W_enc.mul_(norm[:, None])
        ours.b_enc.mul_(norm)
        ours.W_dec.div_(torch.where(norm > 0, norm, 1.0)[:, None, None])


def _mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return fields[name] if isinstance(fields.get(name), dict) else {}


def _number(layer: _Layer) -> int:
    """Of the block that it reads, in forward order."""
    found = re.search(r"\d+", layer.fields["reads"])
    return int(found[0][:9]) if found else -1
