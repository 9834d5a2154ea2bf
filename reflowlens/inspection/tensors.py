"""What the tensors of a path are: statistics, the model that they make up, and how far from another's they are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from reflowlens.checkpoints import FORMAT, WEIGHTS, impossible_size, weights_in
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.inspection import kinds
from reflowlens.inspection.report import Inspection
from reflowlens.inspection.signals import signals_frame
from reflowlens.inspection.weights import Weights, difference, parts_frame, tensor_statistics
from reflowlens.models import parameter_shapes

_BAR_FROM = 1 << 28  # parameters from which a terminal gets a progress bar


@contextmanager
def _progress(weights: Weights) -> Iterator[Callable[[], object]]:
    shown = sys.stderr.isatty() and sum(stored.size for stored in weights.tensors.values()) >= _BAR_FROM
    with tqdm(total=len(weights.tensors), unit="tensor", disable=not shown, leave=False) as bar:
        yield bar.update


def of_weights(path: Path, kind: str, files: list[Path]) -> Inspection:
    """Statistics of all tensors of safetensors files, and the model that they are where reflowlens wrote them."""
    rows, problems = [], []
    with Weights(files) as weights, _progress(weights) as step:
        for name in sorted(weights.tensors, key=_layer_order):
            try:
                rows.append(tensor_statistics(weights, name))
            except Exception as error:  # a type that this torch does not have, say
                problems.append(f"{name} cannot be read: {error}")
            step()
        problems = [*weights.problems, *problems]
        facts, frames, misfits = _model_facts(weights)
        kind = f"{kind} written by reflowlens" if weights.metadata.get("format") == FORMAT else kind
        metadata = {name: text for name, text in weights.metadata.items() if name not in ("config", "format")}
    facts |= {"bytes": sum(file.stat().st_size for file in files)}
    if not rows:
        return Inspection(
            str(path), kind, facts, notes=("there is no tensor to read",), problems=tuple(problems + misfits)
        )
    tensors = pd.DataFrame(rows)
    unsound = tensors[(tensors["nan"] > 0) | (tensors["infinite"] > 0)]
    problems += [
        f"{row['name']} holds {row['nan']:,} NaN and {row['infinite']:,} infinite values"
        for row in unsound.to_dict("records")
    ]
    facts |= {
        "parameters": int(tensors["parameters"].sum()),
        "dtype": {str(name): int(size) for name, size in tensors.groupby("dtype")["parameters"].sum().items()},
        "not_finite": int((tensors["nan"] + tensors["infinite"]).sum()),
        **({"metadata": metadata} if metadata else {}),
    }
    frames = {"parts": parts_frame(tensors), **frames, "tensors": tensors}
    return Inspection(str(path), kind, facts, frames, problems=tuple(problems + misfits))


def _layer_order(name: str) -> list[str]:
    """Sorts layer 10 after layer 9."""
    words = re.split(r"(\d+)", name)  # every second is a number, of any length
    words[1::2] = [word.zfill(9) for word in words[1::2]]
    return words


def _model_facts(weights: Weights) -> tuple[dict[str, Any], dict[str, pd.DataFrame], list[str]]:
    """Of a file written by reflowlens: its configuration, its signals if it fits that, and what does not fit it."""
    if weights.metadata.get("format") != FORMAT:
        return {}, {}, []
    try:
        cfg = ModelConfig.from_dict(json.loads(weights.metadata["config"]))
    except (ReflowlensError, KeyError, TypeError, ValueError, RecursionError) as error:
        return {}, {}, [f"its configuration is not readable: {error}"]
    config = {name: value for name, value in cfg.to_dict().items() if value not in (None, "")}
    facts = {"architecture": config.pop("architecture"), "config": config}
    misfits = _misfits(cfg, weights)
    frames = {"signals": signals_frame(weights, cfg)} if cfg.is_factored and not misfits else {}
    return facts, frames, misfits


def _misfits(cfg: ModelConfig, weights: Weights) -> list[str]:
    found = {name: stored.shape for name, stored in weights.tensors.items()}
    if reason := impossible_size(cfg, found):
        return [reason]
    shapes = parameter_shapes(cfg)
    return [
        *(f"{name} is missing" for name in shapes if name not in found),
        *(f"{name} is not a parameter of its configuration" for name in found if name not in shapes),
        *(
            f"{name} has shape {list(found[name])}, and its configuration asks for {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ),
    ]


def differences_frame(path: Path, other: Path) -> pd.DataFrame:
    """The tensors of two models compared by name, those of one side alone included.

    Raises:
        ReflowlensError: a side holds no tensors.
    """
    with Weights(_tensor_files(path)) as ours, Weights(_tensor_files(other)) as theirs, _progress(ours) as step:
        for side, weights in ((path, ours), (other, theirs)):
            if not weights.tensors:
                reason = f": {weights.problems[0]}" if weights.problems else ""
                raise ReflowlensError(f"{side} holds no tensors to compare{reason}")
        rows = []
        for name in dict.fromkeys([*ours.tensors, *theirs.tensors]):
            rows.append(difference(ours, theirs, name))
            step()
    return pd.DataFrame(rows)


def _tensor_files(path: Path) -> list[Path]:
    """The model's own files: of a run, those of its newest checkpoint."""
    if path.is_file():
        return [path] if kinds.recognise(path) in (kinds.SAFETENSORS, kinds.PACKED) else []
    newest = sorted(step for step in path.glob("step_*") if (step / WEIGHTS).is_file())
    folder = newest[-1] if newest else path
    weights = weights_in(folder)
    return [weights] if weights else sorted(folder.glob("*.safetensors"))


def comparison(other: str, frame: pd.DataFrame) -> str:
    """:func:`differences_frame` in one line."""
    counts = frame["state"].value_counts()
    return f"{other}: " + ", ".join(f"{count} tensors {state}" for state, count in counts.items())
