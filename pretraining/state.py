"""What a run leaves on disk to continue from: the model as anyone may load it, and beside it the optimisers' state."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretraining.adam_rows import SHARED_SQUARE
from pretraining.annealing import topk_of_step
from pretraining.config import OptimizerConfig, TrainConfig
from pretraining.optimizers import schedule
from pretraining.shards import cut_like
from pretraining.starting import check_same_start, describe_start
from pretraining.token_files import Manifest
from reflowlens.checkpoints import WEIGHTS, is_as_written, save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.storage.atomic import replacing
from reflowlens.storage.folders import MANIFEST, leftovers, write_folder, write_tensors

STATE, AVERAGE = "training_state.safetensors", "average"


def newest_checkpoint(out: Path) -> Path:
    """The folder of the last complete checkpoint of a run.

    Raises:
        ReflowlensError: there is none.
    """
    complete = sorted(folder for folder in out.glob("step_*") if (folder / STATE).is_file())
    if not complete:
        raise ReflowlensError(f"{out} holds no checkpoint to resume from")
    return complete[-1]


def is_last(checkpoint: Path, cfg: TrainConfig) -> bool:
    """Whether a checkpoint is that of its run's last step: a run that was stopped has an earlier one."""
    return checkpoint.name == f"step_{cfg.run.steps:07d}"


def start_fresh(out: Path) -> int:
    """The first step of a new run: 0.

    Raises:
        ReflowlensError: the folder already holds a run.
    """
    if any(out.glob("step_*")):
        raise ReflowlensError(f"{out} already holds a run: continue it with --resume, or choose another run.out")
    return 0


def training_data(manifest: Manifest) -> dict[str, Any]:
    """What tells the tokens that a run reads from any others: how many, and the hash of each file of them."""
    split = manifest.splits["train"]
    return {"tokens": split.tokens, "sha256": [shard.sha256 for shard in split.shards]}


def origin(cfg: TrainConfig, manifest: Manifest, resume: bool) -> dict[str, Any]:
    """Where a run comes from, as the manifests of its checkpoints say: ``training_data`` and, of a run that began with
    the weights of another, ``started_from`` (:func:`pretraining.starting.describe_start`).

    Args:
        resume: it began before, and is said to come from where it came from then.

    Raises:
        ReflowlensError: there is nothing to begin with or to resume.
    """
    if resume:
        folder = newest_checkpoint(Path(cfg.run.out))
        with _readable(folder):
            started = json.loads((folder / MANIFEST).read_text(encoding="utf8")).get("started_from")
    else:
        started = describe_start(cfg) if cfg.run.start_from else None
    return {"training_data": training_data(manifest)} | ({"started_from": started} if started else {})


def save_state(
    cfg: TrainConfig,
    origin: Mapping[str, Any],
    model: HookedModel,
    optimizer_state: Mapping[str, Tensor],
    step: int,
    record: dict[str, float],
) -> Path:
    """A checkpoint folder: the model as anyone may load it, and beside it what resuming needs.

    Args:
        origin: :func:`origin`.
        optimizer_state: by ``"{index of the optimiser}/{parameter}/{entry}"``.
        record: the step's measurements, for the manifest.
    """
    out, name = Path(cfg.run.out), f"step_{step:07d}"
    tensors = {key: value.contiguous() for key, value in optimizer_state.items()}
    manifest = {
        "step": step,
        "tokens_seen": step * cfg.tokens_per_step,
        **record,
        "training": cfg.to_dict(),
        **origin,
        "overrides": dict(cfg.overrides),
    }

    def write(folder: Path) -> None:
        save_model(folder / "model", model, manifest)
        for file in (folder / "model").iterdir():
            file.rename(folder / file.name)
        (folder / "model").rmdir()
        write_tensors(folder / STATE, tensors, {"step": str(step)})

    with writing(out / name):
        folder = write_folder(out / name, write)
    for old in sorted(out.glob("step_*"))[: -cfg.run.keep_checkpoints]:
        shutil.rmtree(old)
    for unfinished in leftovers(out, r"step_\d+"):
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def save_average(cfg: TrainConfig, model: HookedModel, step: int) -> Path:
    """The averaged weights of a step as a model of their own, in the folder ``average`` of its checkpoint."""
    folder = Path(cfg.run.out) / f"step_{step:07d}" / AVERAGE
    with writing(folder):
        save_model(folder, model, {"step": step, "average": cfg.optimizer.average, "training": cfg.to_dict()})
    return folder


def record_validation(out: Path, step: int, loss: float) -> None:
    """Enter the validation loss in the manifest of a step's checkpoint."""
    path = out / f"step_{step:07d}" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf8")) | {"val_loss": loss}
    with writing(path.parent), replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")


def awaits_validation(out: Path) -> bool:
    """Whether a run was stopped between its newest checkpoint and the evaluation that was due at the same step."""
    manifest = json.loads((newest_checkpoint(out) / MANIFEST).read_text(encoding="utf8"))
    run, step = manifest["training"]["run"], manifest["step"]
    return "val_loss" not in manifest and (step == run["steps"] or step % run["eval_interval"] == 0)


def begun_with(out: Path) -> dict[str, Any]:
    """The ``[run]`` table of the newest checkpoint of a run.

    Raises:
        ReflowlensError: there is no checkpoint, or it is damaged.
    """
    folder = newest_checkpoint(out)
    with _readable(folder):
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf8"))["training"]["run"])


def how_to_go_on(out: Path) -> str:
    """What an error of a run in this folder ends with; empty where no checkpoint was written."""
    try:
        return f"the last checkpoint is {newest_checkpoint(out)}: continue with --resume"
    except ReflowlensError:
        return ""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """One error for all that keeps a file or checkpoint of a run from being written.

    Raises:
        ReflowlensError: it names what was to be written, why it was not, and how to go on.
    """
    try:
        yield
    except (OSError, ReflowlensError) as error:
        cause = error.__cause__ if isinstance(error, ReflowlensError) else error
        if cause is None:  # not the disk's fault
            raise
        reason = cause.strerror if isinstance(cause, OSError) else None
        ending = f"; {said}" if (said := how_to_go_on(path.parent)) else ""
        raise ReflowlensError(f"cannot write {path}: {reason or cause}{ending}") from error


def resume_state(
    cfg: TrainConfig, data: Mapping[str, Any], model: HookedModel, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Fill model and optimisers from the newest checkpoint and return the step to go on from.

    Of a parameter that processes hold in parts, each takes its own; optimisers take the state of their parameters.

    Raises:
        ReflowlensError: there is none or it is damaged, the configuration describes another model or other steps than
            were taken, or the tokens (`training_data`) or the weights it names to begin with are others.
    """
    from safetensors import safe_open

    folder = newest_checkpoint(Path(cfg.run.out))
    parameters = dict(model.named_parameters())
    own = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    with torch.no_grad(), _readable(folder):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        if not is_as_written(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} is not the file that {MANIFEST} was written with")
        _check_same_run(folder, cfg, manifest)
        _check_same_data(folder, cfg, data, manifest)
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            for name, parameter in parameters.items():
                parameter.copy_(cut_like(weights.get_tensor(name).to(parameter.device), like=parameter))
        with safe_open(folder / STATE, framework="pt") as states:
            for key in states.keys():  # noqa: SIM118 (it is not a dictionary)
                i, name, entry = key.split("/")
                parameter = parameters[name]
                if parameter not in own[int(i)]:
                    continue
                value = states.get_tensor(key).to(parameter.device)
                # A moment lies in memory as its parameter does; a step count or a scale that is
                # shared only has to be on the same device.
                apart = entry in ("step", SHARED_SQUARE)
                kept = value if apart else torch.empty_like(parameter).copy_(cut_like(value, like=parameter))
                optimizers[int(i)].state[parameter][entry] = kept
        return int(manifest["step"])


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """One error for all that reading a damaged checkpoint raises, or one that may not be read."""
    from safetensors import SafetensorError

    try:
        yield
    except ReflowlensError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ReflowlensError(
            f"cannot resume from {folder}: {type(error).__name__}: {error}; if it is damaged, remove it to go on from "
            "the checkpoint before"
        ) from error


# Where a run lies and how it is computed, up to rounding: free to change when it is resumed.
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
    "distillation.teacher",  # where it lies: what it is, its hash tells
}
# But not with dropout: what is dropped is drawn for each pass, and by compiled code otherwise.
_DECIDE_WHAT_IS_DROPPED = {"run.accumulation", "run.compile"}
# Free as long as the steps already taken had the same rates, so that a run can be made longer.
_SCHEDULE = {
    "run.steps",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_fraction",
    "optimizer.final_fraction",
}


def _check_same_run(folder: Path, cfg: TrainConfig, manifest: dict[str, Any]) -> None:
    if manifest["config"] != cfg.model.to_dict():
        raise ReflowlensError(f"{folder} holds another model than the configuration describes")
    ours, theirs, given = cfg.to_dict(), manifest["training"], manifest.get("overrides", {})
    free = _INDIFFERENT - _DECIDE_WHAT_IS_DROPPED if cfg.model.dropout else set(_INDIFFERENT)
    if _same_rates(cfg, theirs, int(manifest["step"])):
        free |= _SCHEDULE - (given.keys() - cfg.overrides.keys())  # what --set gave is not to be forgotten
    if "training_data" in manifest or "data.folder" not in {*given, *cfg.overrides}:
        free.add("data.folder")  # a folder may move: the tokens in it are compared apart
    started = manifest.get("started_from")  # older checkpoints do not say
    if started and cfg.run.start_from and check_same_start(folder, cfg, started):
        free.add("run.start_from")
    before, now = ("with" if "distillation" in tables else "without" for tables in (theirs, ours))
    if before != now:
        raise ReflowlensError(
            f"{folder} was trained {before} a table [distillation], and the configuration is {now} one"
        )
    for place in (f"{table}.{name}" for table in ours if table != "model" for name in ours[table]):
        table, name = place.split(".")
        # A field's default is what checkpoints written before it existed were trained with.
        before, now = theirs[table].get(name, _default(cfg, place)), ours[table][name]
        if before != now and place not in free:
            again = f" (give --set {place}={before} again)" if place in given and place not in cfg.overrides else ""
            raise ReflowlensError(
                f"{folder} was trained with {place}={before!r}, but the configuration has {now!r}: "
                f"a resumed run must repeat the uninterrupted one{again}"
            )


def _same_rates(cfg: TrainConfig, theirs: Mapping[str, Any], steps: int) -> bool:
    """Whether the configuration gives the steps already taken the rates that they had, and as many signals a token."""
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    before = OptimizerConfig(**{name: value for name, value in theirs["optimizer"].items() if name in known})
    total = theirs["run"]["steps"]
    then = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, steps=total))
    return all(
        schedule(i, cfg.optimizer, cfg.run.steps) == schedule(i, before, total)
        and topk_of_step(i, cfg) == topk_of_step(i, then)
        for i in range(steps)
    )


def _check_same_data(folder: Path, cfg: TrainConfig, data: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    before = manifest.get("training_data", data)  # older checkpoints do not say
    if before != data:
        raise ReflowlensError(
            f"{folder} was trained on other tokens than {cfg.data.folder} holds now: a resumed run must repeat the "
            "uninterrupted one"
        )


def _default(cfg: TrainConfig, place: str) -> Any:
    section, name = place.split(".")
    return next(f.default for f in dataclasses.fields(getattr(cfg, section)) if f.name == name)
