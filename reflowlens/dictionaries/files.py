"""Dictionaries on disk: a folder with ``dictionary.safetensors`` and ``manifest.json``, or the safetensors file alone.

The configuration travels in the safetensors header too, so that one file is a whole dictionary. A packed one, as those
that come with reflowlens, is ``dictionary.safetensors.gz`` (:mod:`reflowlens.storage.quantised`) in a folder, or the
one file that ``reflowlens pack`` writes, manifest included (:mod:`reflowlens.packing`). Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.packing import uses_of
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models import float32_by_default, moved
from reflowlens.storage.folders import MANIFEST, check_replaceable, write_folder, write_tensors
from reflowlens.storage.opening import (
    as_path,
    check_shapes,
    file_hash,
    read_json_object,
    read_safetensors,
    shown,
    stated_config,
)
from reflowlens.storage.packed_file import is_packed, read_header, read_packed_file, recorded_in
from reflowlens.storage.quantised import read_packed, write_packed

FORMAT = "reflowlens-dictionary-1"
WEIGHTS = "dictionary.safetensors"
PACKED = "dictionary.safetensors.gz"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ASSETS = Path(__file__).parents[1] / "assets" / "dictionaries"


def list_dictionaries() -> list[str]:
    """Names of the packaged dictionaries, for :func:`load_dictionary`."""
    return sorted(folder.name for folder in ASSETS.glob("*") if _weights_in(folder))


def save_dictionary(
    folder: str | Path,
    dictionary: Dictionary,
    manifest: Mapping[str, Any] | None = None,
    *,
    bits: float | None = None,
    reads: Sequence[Float[Tensor, "token d_in"]] | None = None,
) -> Path:
    """Write a dictionary's folder; an earlier one is replaced when the new one is complete.

    Args:
        folder: gets ``dictionary.safetensors``, or ``dictionary.safetensors.gz``, and ``manifest.json``.
        dictionary: what is in its configuration is written with it: hook points, name and hash of its model, its name.
        manifest: further entries of ``manifest.json``, such as ``tokens_seen`` and ``metrics``: its ``l0`` and ``fvu``
            are a number a layer.
        bits: that a weight takes, from 1 to 8 (:func:`reflowlens.storage.quantised.quantise`); biases and thresholds
            stay as they are. The error is 0.4% of a row's squared norm at 4.3, and a quarter of that for each bit more.
            None: weights as they are.
        reads: for ``bits``, activations that each layer reads, 10,000 positions or so: then errors are put where they
            change the reconstruction of these least, which makes its error several times smaller at equal size.

    Returns:
        The folder.

    Raises:
        ReflowlensError: a weight is not finite, ``bits`` is out of range, ``reads`` are of other layers, the folder
            holds something other than a dictionary, the disk is full or the folder cannot be written; then nothing has
            changed.

    Example: ``load_dictionary(save_dictionary("out/dictionary", dictionary))``
    """
    folder = as_path(folder)
    earlier = _weights_in(folder)
    check_replaceable(folder, (earlier.name if earlier else WEIGHTS, MANIFEST), "dictionary")
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in dictionary.state_dict().items()}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ReflowlensError(f"{name} holds NaN or infinite values: the dictionary is not saved")
    if reads is not None and bits is None:
        raise ReflowlensError("reads say how to pack: give bits= with them")
    uses = None if reads is None else uses_of(dictionary, reads)
    config = dictionary.cfg.to_dict()
    header = {"format": FORMAT, "config": json.dumps(config)}

    def write(folder: Path) -> None:
        path = folder / (WEIGHTS if bits is None else PACKED)
        if bits is None:
            write_tensors(path, weights, header)
        else:
            write_packed(path, weights, header, bits, uses)
        own = {"format": FORMAT, "config": config, "bits": bits, "weights_sha256": file_hash(path)}
        record = own | dict(manifest or {}) | own  # what is recorded may be another dictionary's manifest
        (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf8")

    return write_folder(folder, write)


def load_dictionary(
    name_or_folder: str | Path,
    *,
    model: Any = None,
    other_model: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Dictionary:
    """Load a dictionary, in evaluation mode.

    Args:
        name_or_folder: a packaged name (:func:`list_dictionaries`), a folder written by :func:`save_dictionary` or by
            training, the safetensors file alone, or a packed one (:func:`reflowlens.packing.pack_dictionary`).
        model: the model that it is for: checked to be the one that it was trained on. None: not checked here, but where
            the dictionary is used on a model.
        other_model: a model of other weights on purpose, which has the hook points and their widths.
        device: where to put it.
        dtype: floating-point type of its weights, however they are stored.
        verify: check the file against the SHA-256 that the ``manifest.json`` beside it records, if it does.

    Raises:
        ReflowlensError: there is no such dictionary, the file is corrupt or not the one its manifest was written with,
            was not written by reflowlens, does not fit its own configuration, or holds values that are not finite; or
            it is no dictionary of ``model``.

    Example: ``load_dictionary("reflow-nano-plt", model=model).layers[0].W_dec.shape  # [feature, 1, d_out]``
    """
    path = find_dictionary(name_or_folder)
    cfg, weights = _read(path)
    recorded = dictionary_manifest(path).get("weights_sha256") if verify else None
    if recorded is not None and recorded != file_hash(path):
        raise ReflowlensError(
            f"{path} is not the file that {MANIFEST} was written with (its SHA-256 differs): fetch it again, or take "
            "it as it is: load_dictionary(..., verify=False)"
        )
    dictionary = dictionary_of(path, cfg, weights, dtype)
    if model is not None:
        check_belongs(dictionary, model, other_model=other_model)
    return moved(dictionary, device)


def dictionary_of(
    path: Path, cfg: DictionaryConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Dictionary:
    """The dictionary that the tensors of a file make up, in evaluation mode.

    Raises:
        ReflowlensError: they are not the parameters of this configuration, or not finite; the message names the file.
    """
    _check_size(path, cfg, sum(tensor.numel() for tensor in weights.values()))
    dictionary = _unfilled(cfg)
    expected = {name: tensor.shape for name, tensor in dictionary.state_dict().items()}
    check_shapes(path, {name: tensor.shape for name, tensor in weights.items()}, expected)
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise ReflowlensError(f"{path}: {name} is of {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if not torch.isfinite(tensor).all():
            raise ReflowlensError(f"{path}: {name} holds NaN or infinite values")
    dictionary.load_state_dict({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, assign=True)
    return dictionary.eval()


def dictionary_manifest(name_or_folder: str | Path) -> dict[str, Any]:
    """What the JSON beside a dictionary's weights records, or a packed file in itself; empty for a single safetensors
    file.

    Raises:
        ReflowlensError: there is no such dictionary, or the JSON is damaged.
    """
    path = find_dictionary(name_or_folder)
    if is_packed(path):
        return recorded_in(path)
    manifest = path.with_name(MANIFEST)
    if path.name not in (WEIGHTS, PACKED) or not manifest.is_file():
        return {}
    return read_json_object(manifest)


def find_dictionary(name_or_folder: str | Path) -> Path:
    """The weights file that a dictionary's folder, a file or a packaged name stands for.

    What lies at a path comes first.
    """
    path = as_path(name_or_folder)
    if path.is_file():
        return path
    packaged = list_dictionaries()
    named = [ASSETS / str(name_or_folder)] if str(name_or_folder) in packaged else []
    for folder in (path, *named):
        if found := _weights_in(folder):
            return found
    if path.exists():
        inside = [folder.name for folder in sorted(path.glob("*")) if _weights_in(folder)]
        hint = f"; it holds the folders of {', '.join(inside)}" if inside else ""
        raise ReflowlensError(f"{path} holds no {WEIGHTS}: expected a dictionary's folder{hint}")
    raise ReflowlensError(
        f"no dictionary {shown(str(name_or_folder))}: neither one of the packaged ({', '.join(packaged) or 'none'}) "
        f"nor a dictionary's folder or safetensors file that exists{nearest(str(name_or_folder), packaged)}"
    )


def is_dictionary(folder: Path) -> bool:
    """Whether a folder holds a dictionary's weights, of whatever quality."""
    return _weights_in(folder) is not None


def holds_dictionary(name_or_path: str | Path) -> bool:
    """Whether a name, folder or file is a dictionary's rather than a model's; False as well where there is nothing."""
    path = as_path(name_or_path)
    if not path.is_file():
        return is_dictionary(path) or (not path.exists() and str(name_or_path) in list_dictionaries())
    if is_packed(path):
        return read_header(path).get("kind") == "dictionary"
    return path.name in (WEIGHTS, PACKED)


def _weights_in(folder: Path) -> Path | None:
    """The weights file in a folder, if there is one."""
    return next((folder / name for name in (WEIGHTS, PACKED) if (folder / name).is_file()), None)


def _read(path: Path) -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """Configuration and tensors of a file, packed or not."""
    if is_packed(path):
        return read_packed_file(path, "dictionary", _configured)
    metadata, weights = read_packed(path) if path.suffix == ".gz" else read_safetensors(path)
    return DictionaryConfig.from_dict(stated_config(path, metadata, FORMAT)), weights


def _configured(header: Mapping[str, Any]) -> tuple[DictionaryConfig, dict[str, torch.Size]]:
    cfg = DictionaryConfig.from_dict(dict(header["config"]))
    return cfg, {name: tensor.shape for name, tensor in _unfilled(cfg).state_dict().items()}


def _unfilled(cfg: DictionaryConfig) -> Dictionary:
    with torch.device("meta"), float32_by_default():
        return Dictionary(cfg)


def _check_size(path: Path, cfg: DictionaryConfig, held: int) -> None:
    """Raise, before anything is built, if a file of so few numbers cannot hold a dictionary of these sizes."""
    needed = cfg.n_layers * cfg.n_features * (cfg.d_in + cfg.d_out)
    if needed > held:
        raise ReflowlensError(
            f"{path}: its configuration ({cfg.n_layers} layers of {cfg.n_features:,} features, {cfg.d_in:,} to "
            f"{cfg.d_out:,} wide) needs {needed:,} numbers or more, and the file holds {held:,}"
        )
