"""What a run of dictionaries leaves on disk: each dictionary as anyone may load it, and the state to go on from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretraining.dictionaries.config import DictionaryRun
from pretraining.dictionaries.learner import Learner
from pretraining.state import writing
from reflowlens.dictionaries.files import save_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.storage.tensor_folder import open_tensors, save_tensors

KIND = "dictionary_state"
STATE = "state"
_INDIFFERENT = ("out", "log_interval", "eval_interval", "checkpoint_interval")  # of [run], free when a run goes on


def check_fresh(out: Path, cfg: DictionaryRun) -> None:
    """Raise if the folder already holds a run, or a dictionary would be written over something."""
    if (out / STATE).exists():
        raise ReflowlensError(f"{out} already holds a run: continue it with --resume, or choose another run.out")
    for spec in cfg.dictionaries:
        if (out / spec.name).exists() and any((out / spec.name).iterdir()):
            raise ReflowlensError(f"{out / spec.name} already exists: choose another run.out or name")


def save_run(
    cfg: DictionaryRun,
    learners: Sequence[Learner],
    step: int,
    data: Mapping[str, Any],
    records: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> None:
    """Write every dictionary, and then the state: a run killed in between goes on from the state before.

    Args:
        data: what tells the tokens from others (:func:`pretraining.state.training_data`).
        records: of each dictionary, its last measurements.
        machine: what else the steps depend on: ``dtype`` and the number of ``processes``, which a run keeps, and the
            ``processor`` with its threads, on which rounding depends.
    """
    out = Path(cfg.run.out)
    for learner in learners:
        manifest = {
            "step": step,
            "tokens_seen": step * cfg.run.batch_tokens,
            "measured_in_training": records.get(learner.spec.name, {}),
            "dictionary": dataclasses.asdict(learner.spec),
            "training": {name: table for name, table in cfg.to_dict().items() if name != "dictionary"},
            "training_data": dict(data),
        }
        with writing(out / learner.spec.name):
            save_dictionary(out / learner.spec.name, learner.result(), manifest)
    tensors = {
        f"{learner.spec.name}/{name}": tensor for learner in learners for name, tensor in learner.state().items()
    }
    with writing(out / STATE):
        save_tensors(out / STATE, KIND, tensors, {"step": step, "run": cfg.to_dict(), "data": dict(data), **machine})


def resume_run(
    cfg: DictionaryRun, learners: Sequence[Learner], data: Mapping[str, Any], machine: Mapping[str, Any]
) -> int:
    """Fill the learners from the state of a run, and return the step to go on from.

    On another processor, or with another number of threads, which is said, the steps are those of the uninterrupted run
    up to rounding.

    Raises:
        ReflowlensError: there is none or it is damaged, or the configuration or the tokens are others.
    """
    out = Path(cfg.run.out)
    if not (out / STATE).is_dir():
        raise ReflowlensError(f"{out} holds no state to resume from")
    manifest, tensors = open_tensors(out / STATE, KIND)
    try:
        before, step = dict(manifest["run"]), int(manifest["step"])
        _check_same(out, before, json.loads(json.dumps(cfg.to_dict())))
        if manifest["data"] != json.loads(json.dumps(dict(data))):
            raise ReflowlensError(f"{out} was trained on other tokens than {cfg.data.folder} holds now")
        for name in ("dtype", "processes"):
            if manifest[name] != machine[name]:
                raise ReflowlensError(
                    f"{out} was trained with {name} {manifest[name]}, and now it is {machine[name]}: a resumed run "
                    "must repeat the uninterrupted one"
                )
        if manifest["processor"] != machine["processor"]:
            print(f"begun on {manifest['processor']}, going on with {machine['processor']}", file=sys.stderr)
        for learner in learners:
            prefix = f"{learner.spec.name}/"
            learner.restore({name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)})
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ReflowlensError(f"cannot resume from {out / STATE}: {type(error).__name__}: {error}") from error
    return step


def begun_with(out: Path, name: str) -> Any:
    """What a run's state says of the machine that it was begun on.

    Raises:
        ReflowlensError: there is no state, or it does not say.
    """
    if not (out / STATE).is_dir():
        raise ReflowlensError(f"{out} holds no state to resume from")
    manifest, _ = open_tensors(out / STATE, KIND)
    if name not in manifest:
        raise ReflowlensError(f"cannot resume from {out / STATE}: it does not say with what {name} the run was begun")
    return manifest[name]


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for table in ("model", "data", "optimizer", "run", "dictionary"):
        ours, theirs = now[table], before[table]
        if table == "dictionary":
            ours, theirs = {"tables": ours}, {"tables": theirs}
        for name, value in ours.items():
            free = (table == "run" and name in _INDIFFERENT) or (table, name) == ("data", "folder")
            if not free and theirs.get(name) != value:
                raise ReflowlensError(
                    f"{out} was trained with {table}.{name}={theirs.get(name)!r}, but the configuration has {value!r}: "
                    "a resumed run must repeat the uninterrupted one"
                )
