"""The weights that a run begins with instead of fresh ones: which, what is kept of them, and how they are rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretraining.config import TrainConfig
from pretraining.shards import cut_like
from reflowlens.checkpoints import find_model, load_model, read_manifest
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.rotations import rotate_signals, rotate_stream
from reflowlens.signals import random_rotation
from reflowlens.storage.opening import file_hash


def named_start(cfg: TrainConfig) -> str:
    """What ``run.start_from`` names, with this run's seed in it."""
    return cfg.run.start_from.replace("{seed}", str(cfg.run.seed))


def describe_start(cfg: TrainConfig) -> dict[str, Any]:
    """Which weights ``run.start_from`` stands for now, as the manifests of checkpoints say it.

    Returns:
        ``model``, what was named; ``step`` of its training, None where nothing says; ``weights_sha256``, of its file.

    Raises:
        ReflowlensError: there is no such model, or the folder of a run is named that was not trained to its end: its
            newest checkpoint is then only where it happened to stop.
    """
    name = named_start(cfg)
    weights = find_model(name)
    manifest = read_manifest(weights)
    step = manifest.get("step")
    if weights.parent.parent == Path(name) and "training" in manifest:  # the newest checkpoint of a run
        steps = manifest["training"]["run"]["steps"]
        if step < steps:
            raise ReflowlensError(
                f"run.start_from: {name} is a run that stands at step {step} of {steps}: train it to its end, or name "
                f"the checkpoint to begin with, {weights.parent}"
            )
    return {"model": name, "step": step, "weights_sha256": file_hash(weights)}


def check_same_start(folder: Path, cfg: TrainConfig, recorded: dict[str, Any]) -> bool:
    """Whether ``run.start_from`` still names the weights that a run began with; False where it names none any more.

    Args:
        folder: the run's checkpoint.
        recorded: what its manifest says of them (:func:`describe_start`).

    Raises:
        ReflowlensError: it names others.
    """
    name = named_start(cfg)
    try:
        weights = find_model(name)
    except ReflowlensError:
        return False
    if file_hash(weights) != recorded["weights_sha256"]:
        began = recorded["model"] + ("" if recorded["step"] is None else f" at step {recorded['step']}")
        raise ReflowlensError(
            f"{folder} began with the weights of {began}, and run.start_from={name!r} holds others now: name the "
            "checkpoint that it began with, or train anew in another run.out"
        )
    return True


def start_from(cfg: TrainConfig, model: HookedModel) -> None:
    """Fill a model with the weights that ``run.start_from`` names, rotated as ``run.start_rotation`` says.

    Of a parameter that processes hold in parts, each takes its own.

    Raises:
        ReflowlensError: there is no such checkpoint, it is of another model, or its weights cannot be rotated so.
    """
    name = named_start(cfg)
    start = load_model(name)
    named = {"model_name": ""}
    if start.cfg.to_dict() | named != cfg.model.to_dict() | named:
        raise ReflowlensError(f"run.start_from: {name} holds another model than the configuration describes")
    if cfg.run.start_rotation == "signals":
        start = rotate_signals(start, random_rotation(start.cfg.n_signals or 0, cfg.run.seed))
    if cfg.run.start_rotation == "stream":
        start = rotate_stream(start, random_rotation(start.cfg.d_model, cfg.run.seed))
    weights = dict(start.named_parameters())
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            parameter.copy_(cut_like(weights[place].to(parameter.device), like=parameter))
