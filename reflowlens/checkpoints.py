"""Models on disk: a folder with ``model.safetensors`` and ``manifest.json``, or the safetensors file alone.

The configuration travels in the safetensors header too, so that one file is a whole model; only an imported model's
tokenizer lies beside it, as ``tokenizer.json``. A packed file (:mod:`reflowlens.packing`), ``model.packed`` in a
folder, carries its manifest too. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models import MODEL_CLASSES, check_memory, moved, parameter_shapes, unfilled_model
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import only_finite
from reflowlens.models.unwrapping import hooked_model
from reflowlens.storage.folders import MANIFEST, check_replaceable, check_same_model, write_folder, write_tensors
from reflowlens.storage.model_hash import model_hash as model_hash
from reflowlens.storage.opening import (
    as_path,
    check_shapes,
    file_hash,
    open_safetensors,
    read_json_object,
    read_tensor,
    shown,
    stated_config,
    unchanged,
)
from reflowlens.storage.packed_file import is_packed, read_packed_file, recorded_in
from reflowlens.tokenizers.file import OPENED, TOKENIZER, open_tokenizer

FORMAT = "reflowlens-1"
WEIGHTS = "model.safetensors"
PACKED = "model.packed"
FLOATS = ("F32", "F16", "BF16", "F64")  # types of weights, as safetensors names them
ASSETS = Path(__file__).parent / "assets" / "models"


def list_models() -> list[str]:
    """Names of the packaged models, for :func:`load_model`."""
    return sorted(folder.name for folder in ASSETS.glob("*") if weights_in(folder))


def weights_in(folder: Path) -> Path | None:
    """The weights file in a checkpoint's folder, if there is one."""
    return next((folder / name for name in (WEIGHTS, PACKED) if (folder / name).is_file()), None)


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> HookedModel:
    """Load a trained model, in evaluation mode.

    Args:
        name_or_path: a packaged name (:func:`list_models`), a checkpoint folder, the folder of a training run, or a
            safetensors file written by :func:`save_model`, or a packed one (:func:`reflowlens.packing.pack_model`).
        device: where to put it.
        dtype: floating-point type of its weights, however they are stored.
        verify: check the weights against the SHA-256, and their configuration against the one, that the
            ``manifest.json`` beside them records, if it does; False opens weights that were changed since, with the
            configuration that their own file states.

    Raises:
        ReflowlensError: there is no such model, the file is corrupt or not the one its manifest was written with, was
            not written by reflowlens, does not fit its own configuration, or holds values that are not finite; or the
            tokenizer beside it is another than its.

    Example: ``load_model("reflow-nano")("The king").shape  # [1, 2, d_vocab]``
    """
    path = find_model(name_or_path)
    if is_packed(path):
        cfg, weights = read_packed_model(path)
        _open_tokenizer(path, cfg)
        each = ((name, weights.pop(name)) for name in list(weights))  # none is kept beside the model's own
        return model_from_weights(cfg, each, device=device, dtype=dtype)
    with unchanged([path]):
        file = open_safetensors(path)
        config = stated_config(path, file.metadata() or {}, FORMAT)
        cfg = ModelConfig.from_dict(config)
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        _check_fit(path, cfg, stored)
        if verify:
            _check_as_recorded(path, config)
        _open_tokenizer(path, cfg)
        # The largest first: while it is there twice, the model is hardly there at all.
        names = sorted(stored, key=lambda name: math.prod(stored[name].get_shape()), reverse=True)
        each = ((name, _finite(path, name, read_tensor(path, name))) for name in names)
        return model_from_weights(cfg, each, device=device, dtype=dtype)


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not only_finite(tensor):
        raise ReflowlensError(f"{path}: {name} holds NaN or infinite values")
    return tensor


def read_packed_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of a packed model.

    Raises:
        ReflowlensError: the file is damaged, cut short, of another version, or does not fit its own configuration.
    """

    def configured(header: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, torch.Size]]:
        cfg = ModelConfig.from_dict(dict(header["config"]))
        if reason := impossible_size(cfg, dict.fromkeys(header["tensors"], (1 << 30,))):
            raise ValueError(reason)
        return cfg, parameter_shapes(cfg)

    cfg, weights = read_packed_file(path, "model", configured)
    return cfg, {name: _finite(path, name, tensor) for name, tensor in weights.items()}


def _check_as_recorded(path: Path, config: Mapping[str, Any]) -> None:
    """Raise unless a weights file and the configuration in it are those of the manifest beside it, if there is one."""
    if not is_as_written(path):
        raise ReflowlensError(
            f"{path} is not the file that {MANIFEST} was written with (its SHA-256 differs): fetch it again, or "
            "take it as it is: load_model(..., verify=False), or reflowlens export OLD NEW --no-verify"
        )
    recorded = read_manifest(path).get("config", config)
    fields = recorded if isinstance(recorded, dict) else {}
    for name in (*config, *fields):
        ours, theirs = config.get(name), fields.get(name)
        if ours != theirs:
            raise ReflowlensError(
                f"{path} states {name}={ours!r}, and {MANIFEST} beside it {name}={theirs!r}: one was edited; put it "
                "back, or go by the weights file: load_model(..., verify=False), or reflowlens export OLD NEW "
                "--no-verify"
            )


def is_as_written(path: Path) -> bool:
    """Whether a weights file has the hash that the manifest beside it records, if one does."""
    recorded = read_manifest(path).get("weights_sha256")
    return recorded is None or recorded == file_hash(path)


def model_from_weights(
    cfg: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """A model in evaluation mode with these weights, whose names and shapes are known to fit.

    Args:
        weights: every parameter by name, taken one after the other, so that no more than one need be held twice.

    Raises:
        ReflowlensError: there is no such device, or the model is larger than the machine's memory.
    """
    check_memory(cfg, dtype)
    model = unfilled_model(cfg)
    if dtype.is_floating_point:
        for parameter in model.parameters():  # before they are filled: no weight is rounded twice
            parameter.data = torch.empty_like(parameter.data, dtype=dtype)  # nothing to convert: memory is not touched
    model = moved(model, "cpu", dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights:
            parameters.pop(name).copy_(tensor)
    assert not parameters
    return moved(model, device).eval()


def save_model(
    folder: str | Path,
    model: HookedModel,
    manifest: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a checkpoint folder; an earlier one is replaced when the new one is complete.

    Args:
        folder: gets ``model.safetensors``, ``manifest.json`` and, if the tokenizer is a file, ``tokenizer.json``.
        model: a hooked model, compiled or not.
        manifest: further entries of ``manifest.json``, such as tokens seen, losses, or the command that made it.
        dtype: type in which weights are stored, e.g. ``torch.float16``; None: as they are.
        overwrite: False replaces a checkpoint of the same weights alone.

    Returns:
        The folder.

    Raises:
        ReflowlensError: a weight is not finite (in ``dtype``) or is pruned, the folder holds something other than a
            checkpoint, or than one that may be replaced, the disk is full or the folder cannot be written; then nothing
            has changed.

    Example: ``load_model(save_model("out/model", model))``
    """
    folder = as_path(folder)
    model = hooked_model(model)
    check_replaceable(folder, (WEIGHTS, MANIFEST))
    parameters = all_parameters(model)
    if not overwrite:
        check_same_model(folder, WEIGHTS, parameters)
    weights = {name: p.to("cpu", dtype or p.dtype).contiguous() for name, p in parameters.items()}
    for name, tensor in weights.items():
        if not only_finite(tensor):
            raise ReflowlensError(f"{name} holds values that are not finite in {tensor.dtype}: the model is not saved")
    config = model.cfg.to_dict()

    def write(folder: Path) -> None:
        write_tensors(folder / WEIGHTS, weights, {"format": FORMAT, "config": json.dumps(config)})
        own = {"format": FORMAT, "config": config, "weights_sha256": file_hash(folder / WEIGHTS)}
        record = own | dict(manifest or {}) | own  # what is recorded may be another checkpoint's manifest
        (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf8")
        if model.cfg.tokenizer_name in OPENED:
            OPENED[model.cfg.tokenizer_name].write(folder)

    return write_folder(folder, write)


def all_parameters(model: HookedModel) -> dict[str, Tensor]:
    """A model's parameters by name, detached: those that its configuration has, and no others.

    Raises:
        ReflowlensError: one is missing, as after pruning, or has another shape, or there is one more.
    """
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = parameter_shapes(model.cfg)
    if missing := [name for name in expected if name not in found]:
        raise ReflowlensError(
            f"the model has no parameter {missing[0]!r} ({len(missing)} missing): what torch.nn.utils.prune or "
            "parametrize put in its place is made a parameter by prune.remove or remove_parametrizations"
        )
    if extra := [name for name in found if name not in expected]:
        raise ReflowlensError(f"the model has a parameter {extra[0]!r}, which its configuration does not have")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ReflowlensError(f"{name} has shape {list(found[name].shape)}, and model.cfg says {list(shape)}")
    return found


def read_manifest(name_or_path: str | Path) -> dict[str, Any]:
    """The JSON written beside the weights, of a packed file the one in it; empty for a single safetensors file.

    Raises:
        ReflowlensError: there is no such model, or the JSON is damaged.
    """
    path = find_model(name_or_path)
    if is_packed(path):
        return recorded_in(path)
    manifest = path.with_name(MANIFEST)
    if path.name != WEIGHTS or not manifest.is_file():
        return {}
    return read_json_object(manifest)


def find_model(name_or_path: str | Path) -> Path:
    """The weights file that a checkpoint folder, a training run, a file or a packaged name stands for.

    What lies at a path comes first: a run called as a packaged model is the run.
    """
    path = as_path(name_or_path)
    if path.is_file():
        return path
    packaged = list_models()
    named = [ASSETS / str(name_or_path)] if str(name_or_path) in packaged else []
    for folder in (path, *sorted(path.glob("step_*"), reverse=True), *named):
        if found := weights_in(folder):
            return found
    if path.exists():
        raise ReflowlensError(f"{path} holds no {WEIGHTS}: expected a checkpoint folder")
    raise ReflowlensError(
        f"no model {shown(str(name_or_path))}: neither one of the packaged ({', '.join(packaged) or 'none'}) nor a "
        f"checkpoint folder or safetensors file that exists{nearest(str(name_or_path), packaged)}"
    )


def _open_tokenizer(path: Path, cfg: ModelConfig) -> None:
    """Make the tokenizer beside the weights known by its name; without one the model reads token ids alone."""
    if not cfg.has_file_tokenizer or not path.with_name(TOKENIZER).is_file():
        return
    found = open_tokenizer(path.parent).name
    if found != cfg.tokenizer_name:
        raise ReflowlensError(f"{path.parent} holds {found!r}, but its model reads {cfg.tokenizer_name!r}")


def impossible_size(cfg: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> str:
    """What of a configuration tensors of these shapes cannot make up, told before it is built; "" if nothing.

    Every size of a sound model is the length of a stored axis or a count of them.
    """
    if not MODEL_CLASSES[cfg.architecture].blocks_share_weights and cfg.n_layers > len(shapes):
        return f"its configuration has n_layers {cfg.n_layers:,}, and the file {len(shapes):,} tensors"
    held = sum(map(math.prod, shapes.values()))
    for name in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_signals"):
        if (getattr(cfg, name) or 0) > held:
            return f"its configuration has {name} {getattr(cfg, name):,}, and the file {held:,} numbers in all"
    return ""


def _check_fit(path: Path, cfg: ModelConfig, stored: Mapping[str, Any]) -> None:
    """Raise unless slices of a safetensors file, of which no number was read, are a model's parameters."""
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
    if reason := impossible_size(cfg, shapes):
        raise ReflowlensError(f"{path}: {reason}")
    check_shapes(path, shapes, parameter_shapes(cfg))
    for name, tensor in stored.items():
        if tensor.get_dtype() not in FLOATS:
            raise ReflowlensError(f"{path}: {name} is of type {tensor.get_dtype()}, expected {', '.join(FLOATS)}")
