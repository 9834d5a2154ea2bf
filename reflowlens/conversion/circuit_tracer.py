"""circuit-tracer's folders of transcoders: ``config.yaml`` and safetensors, a layer a file.

    layer_{i}.safetensors                      W_enc, W_dec [feature, d], b_enc, b_dec, W_skip [d_out, d_in]
    W_enc_{i}.safetensors, W_dec_{i}.safetensors      of a cross-layer one: W_dec_{i} [feature, n_layers - i, d]

``activation_function.threshold`` (``threshold_{i}``) makes a JumpReLU of it, x where x > θ; without, it is a ReLU. It
names one hook for what all layers read and one for what they write, without ``blocks.{i}.``. Of ours,
``ln2.hook_normalized`` is what the MLP reads before the norm's weight; where the weight is applied before that hook, or
behind it (``mlp.hook_in``), a reader sees other vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reflowlens.conversion.flat_yaml import read_yaml, write_yaml
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_of
from reflowlens.dictionaries.thresholds import stored_thresholds
from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import check_replaceable, write_folder, write_tensors
from reflowlens.storage.opening import as_path, read_safetensors, shown

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
PER_LAYER, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"


def export_circuit_tracer(
    dictionary: Dictionary, folder: str | Path, manifest: Mapping[str, Any] | None = None
) -> Path:
    """Write a transcoder as a folder that circuit-tracer opens, given its absolute path.

    Args:
        dictionary: a transcoder of every layer from 0 on, with one hook to read and one to write. Of TopK first
            :func:`reflowlens.dictionaries.thresholds.with_thresholds`.
        folder: an earlier export there is replaced when the new one is complete.
        manifest: further fields of ``config.yaml``, such as what thresholds cost.

    Raises:
        ReflowlensError: circuit-tracer has nothing that computes what the dictionary does, the folder holds something
            else, or it cannot be written.

    Example: ``export_circuit_tracer(load_dictionary("reflow-nano-plt"), "out/plt")``
    """
    folder, cfg = as_path(folder), dictionary.cfg
    if cfg.kind == "sae":
        raise ReflowlensError("circuit-tracer reads transcoders: an autoencoder is exported to sae-lens")
    if cfg.d_in != cfg.d_out:
        raise ReflowlensError(
            f"circuit-tracer's transcoders have one width, and this one reads {cfg.d_in} and writes {cfg.d_out}"
        )
    if cfg.cross_layer and cfg.skip:
        raise ReflowlensError("circuit-tracer reads no skip from a cross-layer folder")
    thresholds = stored_thresholds(dictionary)
    config = {
        "model_kind": CROSS_LAYER if cfg.cross_layer else PER_LAYER,
        "feature_input_hook": _shared_hook("reads", cfg.reads),
        "feature_output_hook": _shared_hook("writes", cfg.writes),
        "scan": cfg.name or folder.name,
        "model_name": cfg.model_name,
        "model_hash": cfg.model_hash,
    }
    check_replaceable(folder, (CONFIG,), "export")

    def write(folder: Path) -> None:
        write_yaml(folder / CONFIG, {**(manifest or {}), **config})
        for i, (layer, threshold) in enumerate(zip(dictionary.each_layer(), thresholds, strict=True)):
            end = f"_{i}" if cfg.cross_layer else ""
            encoder: dict[str, Tensor | None] = {"W_enc": layer.W_enc, "b_enc": layer.b_enc, "b_dec": layer.b_dec}
            if cfg.cross_layer:
                encoder["threshold"] = threshold
                write_tensors(folder / f"W_dec_{i}.safetensors", stored({f"W_dec_{i}": layer.W_dec}), {})
            else:
                encoder |= {"W_dec": layer.W_dec[:, 0], THRESHOLD: threshold, "W_skip": layer.W_skip}
            file = f"W_enc_{i}.safetensors" if cfg.cross_layer else f"layer_{i}.safetensors"
            write_tensors(folder / file, stored({f"{name}{end}": tensor for name, tensor in encoder.items()}), {})

    return write_folder(folder, write)


def import_circuit_tracer(
    folder: str | Path, *, input_hook: str | None = None, output_hook: str | None = None
) -> Dictionary:
    """Read a folder in circuit-tracer's layout, in float32; nothing of it is executed.

    Args:
        input_hook, output_hook: what the layers read and write, without ``blocks.{i}.``, where the model's names are
            others than the folder's.

    Raises:
        ReflowlensError: a file is missing, damaged or has other tensors, or its features may be negative.

    Example: ``import_circuit_tracer("out/plt").cfg.reads[0]  # 'blocks.0.ln2.hook_normalized'``
    """
    folder = as_path(folder)
    if not (folder / CONFIG).is_file():
        raise ReflowlensError(f"{folder} has no {CONFIG}: expected a folder of circuit-tracer's transcoders")
    config = read_yaml(folder / CONFIG)
    kind = config.get("model_kind")
    if kind not in (PER_LAYER, CROSS_LAYER):
        raise ReflowlensError(f"{folder / CONFIG}: model_kind is {shown(kind)}, expected {PER_LAYER} or {CROSS_LAYER}")
    hooks = [
        _hook(folder, name, chosen or config.get(name))
        for name, chosen in (("feature_input_hook", input_hook), ("feature_output_hook", output_hook))
    ]
    layers = [_read_layer(folder, i, kind) for i in range(_count(folder, kind))]
    W_enc = layers[0].get("W_enc")
    if W_enc is None or W_enc.ndim != 2:
        raise ReflowlensError(f"{folder} holds no encoder W_enc [feature, d] of layer 0")
    is_topk = config.get("activation") == "topk"
    cfg = DictionaryConfig(
        reads=tuple(f"blocks.{i}.{hooks[0]}" for i in range(len(layers))),
        writes=tuple(f"blocks.{i}.{hooks[1]}" for i in range(len(layers))),
        d_in=W_enc.shape[1],
        d_out=W_enc.shape[1],
        n_features=W_enc.shape[0],
        activation="topk" if is_topk else "jumprelu" if "threshold" in layers[0] else "relu",
        k=config.get("k") if is_topk else None,
        cross_layer=kind == CROSS_LAYER,
        skip="W_skip" in layers[0],
        **{name: config[name] for name in ("model_name", "model_hash") if isinstance(config.get(name), str)},
        name=str(config.get("scan") or folder.name),
    )
    weights = {f"layers.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}
    dictionary = dictionary_of(folder, cfg, weights)
    for i, layer in enumerate(dictionary.each_layer()):
        if layer.threshold is not None and (layer.threshold < 0).any():
            raise ReflowlensError(f"{folder}: layer {i} has thresholds below zero, so that features could be negative")
    return dictionary


def stored(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that there are, as they are written."""
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}


def _shared_hook(what: str, points: tuple[str, ...]) -> str:
    hook = points[0].removeprefix("blocks.0.")
    if points != tuple(f"blocks.{i}.{hook}" for i in range(len(points))):
        raise ReflowlensError(f"circuit-tracer needs every layer from 0 on and one hook in all, and {what} is {points}")
    return hook


def _hook(folder: Path, name: str, hook: Any) -> str:
    if not isinstance(hook, str) or not hook:
        raise ReflowlensError(f"{folder / CONFIG}: {name} is {shown(hook)}, expected a hook's name")
    return hook


def _count(folder: Path, kind: str) -> int:
    """How many layers there are; their files are numbered from 0 on without a gap."""
    start = "W_enc" if kind == CROSS_LAYER else "layer"
    found = [re.fullmatch(rf"{start}_(\d{{1,6}})\.safetensors", path.name) for path in folder.iterdir()]
    numbers = sorted(int(name[1]) for name in found if name)
    if not numbers or numbers != list(range(len(numbers))):
        raise ReflowlensError(f"{folder} holds {start}_….safetensors of the layers {numbers}, expected 0, 1, 2, …")
    return len(numbers)


def _read_layer(folder: Path, i: int, kind: str) -> dict[str, Tensor]:
    """A layer's tensors by our names."""
    if kind == CROSS_LAYER:
        parts = [read_safetensors(folder / f"W_{part}_{i}.safetensors")[1] for part in ("enc", "dec")]
        return {name.removesuffix(f"_{i}"): tensor for part in parts for name, tensor in part.items()}
    tensors = read_safetensors(folder / f"layer_{i}.safetensors")[1]
    if THRESHOLD in tensors:
        tensors["threshold"] = tensors.pop(THRESHOLD)
    if "W_dec" in tensors and tensors["W_dec"].ndim == 2:
        tensors["W_dec"] = tensors["W_dec"][:, None]
    return tensors
