"""What a run leaves on disk to continue from: the model as anyone may load it, and beside it the optimisers' state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pretraining.config import TrainConfig
from reflowlens.checkpoints import MANIFEST, WEIGHTS, save_model, write_folder, write_tensors
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

STATE = "training_state.safetensors"


def newest_checkpoint(out: Path) -> Path:
    """The folder of the last complete checkpoint of a run.

    Raises:
        ReflowlensError: there is none.
    """
    complete = sorted(folder for folder in out.glob("step_*") if (folder / STATE).is_file())
    if not complete:
        raise ReflowlensError(f"{out} holds no checkpoint to resume from")
    return complete[-1]


def start_fresh(out: Path) -> int:
    """The first step of a new run: 0.

    Raises:
        ReflowlensError: the folder already holds a run.
    """
    if any(out.glob("step_*")):
        raise ReflowlensError(f"{out} already holds a run: continue it with --resume, or choose another run.out")
    return 0


def save_state(
    cfg: TrainConfig, model: HookedModel, optimizers: list[torch.optim.Optimizer], step: int, record: dict[str, float]
) -> Path:
    """A checkpoint folder: the model as anyone may load it, and beside it what resuming needs."""
    out = Path(cfg.run.out)
    tensors = {f"{i}/{name}/{key}": value.contiguous() for i, name, key, value in _state(model, optimizers)}
    manifest = {"step": step, "tokens_seen": step * cfg.tokens_per_step, **record, "training": cfg.to_dict()}

    def write(folder: Path) -> None:
        save_model(folder / "model", model, manifest)
        for name in (WEIGHTS, MANIFEST):
            (folder / "model" / name).rename(folder / name)
        (folder / "model").rmdir()
        write_tensors(folder / STATE, tensors, {"step": str(step)})

    folder = write_folder(out / f"step_{step:07d}", write)
    for old in sorted(out.glob("step_*"))[: -cfg.run.keep_checkpoints]:
        shutil.rmtree(old)
    return folder


def _state(model: HookedModel, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[int, str, str, Tensor]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield i, names[parameter], key, value


def resume_state(cfg: TrainConfig, model: HookedModel, optimizers: list[torch.optim.Optimizer]) -> int:
    """Fill model and optimisers from the newest checkpoint and return the step to go on from.

    Raises:
        ReflowlensError: there is none, or the configuration describes another model or another order of steps.
    """
    from safetensors.torch import load_file

    folder = newest_checkpoint(Path(cfg.run.out))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    if manifest["config"] != cfg.model.to_dict():
        raise ReflowlensError(f"{folder} holds another model than the configuration describes")
    ours, theirs = cfg.to_dict(), manifest["training"]
    for section, name in (("data", "context"), ("run", "batch_size"), ("run", "seed"), ("optimizer", "name")):
        if ours[section][name] != theirs[section][name]:
            raise ReflowlensError(
                f"{folder} was trained with {section}.{name}={theirs[section][name]!r}, but the configuration has "
                f"{ours[section][name]!r}: a resumed run must repeat the uninterrupted one"
            )
    weights = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / STATE).items():
        i, name, entry = key.split("/")
        parameter = parameters[name]
        # A moment lies in memory as its parameter does; a step count only has to be on the same device.
        kept = value.to(parameter.device) if entry == "step" else torch.empty_like(parameter).copy_(value)
        optimizers[int(i)].state[parameter][entry] = kept
    return int(manifest["step"])
