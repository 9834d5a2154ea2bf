"""What a run leaves on disk to continue from: the model as anyone may load it, and beside it the optimisers' state."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretraining.config import TrainConfig
from pretraining.shards import cut_like
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
    cfg: TrainConfig, model: HookedModel, optimizer_state: Mapping[str, Tensor], step: int, record: dict[str, float]
) -> Path:
    """A checkpoint folder: the model as anyone may load it, and beside it what resuming needs.

    Args:
        optimizer_state: by ``"{index of the optimiser}/{parameter}/{entry}"``.
        record: the step's measurements, for the manifest.
    """
    out = Path(cfg.run.out)
    tensors = {key: value.contiguous() for key, value in optimizer_state.items()}
    manifest = {
        "step": step,
        "tokens_seen": step * cfg.tokens_per_step,
        **record,
        "training": cfg.to_dict(),
        "overrides": dict(cfg.overrides),
    }

    def write(folder: Path) -> None:
        save_model(folder / "model", model, manifest)
        for file in (folder / "model").iterdir():
            file.rename(folder / file.name)
        (folder / "model").rmdir()
        write_tensors(folder / STATE, tensors, {"step": str(step)})

    folder = write_folder(out / f"step_{step:07d}", write)
    for old in sorted(out.glob("step_*"))[: -cfg.run.keep_checkpoints]:
        shutil.rmtree(old)
    return folder


def resume_state(cfg: TrainConfig, model: HookedModel, optimizers: list[torch.optim.Optimizer]) -> int:
    """Fill model and optimisers from the newest checkpoint and return the step to go on from.

    Of a parameter that processes hold in parts, each takes its own; optimisers take the state of their parameters.

    Raises:
        ReflowlensError: there is none, or the configuration describes another model or another order of steps.
    """
    from safetensors import safe_open

    folder = newest_checkpoint(Path(cfg.run.out))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    _check_same_run(folder, cfg, manifest)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name, parameter in parameters.items():
            parameter.copy_(cut_like(weights.get_tensor(name).to(parameter.device), like=parameter))
    own = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    with torch.no_grad(), safe_open(folder / STATE, framework="pt") as states:
        for key in states.keys():  # noqa: SIM118 (it is not a dictionary)
            i, name, entry = key.split("/")
            parameter = parameters[name]
            if parameter not in own[int(i)]:
                continue
            value = states.get_tensor(key).to(parameter.device)
            # A moment lies in memory as its parameter does; a step count only has to be on the same device.
            kept = value if entry == "step" else torch.empty_like(parameter).copy_(cut_like(value, like=parameter))
            optimizers[int(i)].state[parameter][entry] = kept
    return int(manifest["step"])


# What a resumed run must have in common with the run it continues, whatever the configuration says elsewhere.
_DECISIVE = ("data.context", "run.batch_size", "run.seed", "optimizer.name", "optimizer.matrix_scale")
# What may be overridden otherwise than at the start: where the run lies and how it is computed, up to rounding.
_INDIFFERENT = {
    "run.out",
    "run.accumulation",
    "run.compile",
    "run.sharding",
    "run.eval_interval",
    "run.eval_tokens",
    "run.checkpoint_interval",
    "run.keep_checkpoints",
    "run.wandb_project",
}


def _check_same_run(folder: Path, cfg: TrainConfig, manifest: dict[str, Any]) -> None:
    if manifest["config"] != cfg.model.to_dict():
        raise ReflowlensError(f"{folder} holds another model than the configuration describes")
    ours, theirs, given = cfg.to_dict(), manifest["training"], manifest.get("overrides", {})
    overridden = {place for place in (*given, *cfg.overrides) if not place.startswith("model.")} - _INDIFFERENT
    for place in (*_DECISIVE, *sorted(overridden)):
        section, name = place.split(".")
        # A field's default is what checkpoints written before it existed were trained with.
        before, now = theirs[section].get(name, _default(cfg, place)), ours[section][name]
        if before != now:
            again = f" (give --set {place}={before} again)" if place in given and place not in cfg.overrides else ""
            raise ReflowlensError(
                f"{folder} was trained with {place}={before!r}, but the configuration has {now!r}: "
                f"a resumed run must repeat the uninterrupted one{again}"
            )


def _default(cfg: TrainConfig, place: str) -> Any:
    section, name = place.split(".")
    return next(f.default for f in dataclasses.fields(getattr(cfg, section)) if f.name == name)
