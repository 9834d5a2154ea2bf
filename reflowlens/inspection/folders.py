"""Folders that are recognised by what they hold: training runs, prepared data, transformers' models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reflowlens.storage.opening import holds_file, shown

METRICS, RUN, INDEX = "metrics.jsonl", "run.json", "model.safetensors.index.json"
_WINDOWS, _LAST = 12, 50
# What a transformers configuration calls the sizes of a decoder (GPT-2's names last).
_SIZES = (
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("num_key_value_heads",),
    ("head_dim",),
    ("intermediate_size", "n_inner"),
    ("vocab_size",),
    ("max_position_embeddings", "n_positions"),
    ("hidden_act", "activation_function"),
    ("rms_norm_eps", "layer_norm_epsilon"),
    ("rope_theta",),
    ("rope_parameters",),
    ("tie_word_embeddings",),
    ("torch_dtype", "dtype"),
    ("transformers_version",),
)


class Read(NamedTuple):
    """Facts and, where there is one, a frame, with what is wrong."""

    facts: dict[str, Any]
    frame: pd.DataFrame | None
    problems: list[str]


def read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, empty if the file is damaged or holds something else, and then the reason."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{path.name} is not readable JSON: {error}"]
    return (found, []) if isinstance(found, dict) else ({}, [f"{path.name} holds no JSON object"])


def transformers_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture and sizes in a transformers ``config.json``."""
    named = config.get("architectures") or config.get("model_type", "")
    names = named if isinstance(named, list) else [named]
    sizes = {}
    for candidates in _SIZES:
        name = next((name for name in candidates if config.get(name) is not None), None)
        if name is not None:
            sizes[name] = config[name]
    return {"architecture": ", ".join(map(str, names)), "model_type": config.get("model_type", ""), "config": sizes}


def missing_shards(folder: Path, read: Set[str]) -> tuple[set[str], list[str]]:
    """Shards that an index names, and what is missing of them, given the names of the tensors that were read."""
    index, problems = read_object(folder / INDEX)
    where = index.get("weight_map")
    if not isinstance(where, dict):
        return set(), problems or [f"{INDEX} has no weight_map"]
    named = {str(file) for file in where.values()}
    shards = {file for file in named if holds_file(folder, file)}  # an index must not have files elsewhere read
    for file in sorted(named - shards):
        if Path(file).name == file:
            problems.append(f"shard {file[:120]} is missing")
        else:
            problems.append(f"{INDEX} names {shown(file)}, which is no file of this folder")
    lost = sorted({name for name, file in where.items() if isinstance(file, str) and file in shards} - read)
    if lost:
        problems.append(f"{len(lost)} tensors that {INDEX} lists are in no shard, e.g. {lost[0]}")
    return shards, problems


def read_metrics(path: Path) -> Read:
    """The loss curve of a run: facts (``last_loss`` is a mean over 50 steps) and means over windows of steps.

    Objects with a step and a loss count, whoever wrote them; lines that are no JSON, or whose step is not finite, are
    damaged.
    """
    records, lines, damaged = [], 0, 0
    with path.open(encoding="utf8", errors="replace") as file:
        for line in file:
            lines += 1
            try:
                numbers = _numbers(json.loads(line))
            except (ValueError, OverflowError, RecursionError):
                damaged += 1
                continue
            if not math.isfinite(numbers.get("step", 0)):
                damaged += 1
            elif {"step", "loss"} <= numbers.keys():
                records.append(numbers)
    log = pd.DataFrame(records)
    problems = [f"{path.name}: {damaged} of {lines} lines are not readable"] if damaged else []
    if log.empty:
        return Read({}, None, [*problems, f"{path.name} holds no steps with a loss"])
    if not np.isfinite(log["loss"]).all():
        problems.append(f"the loss stopped being finite at step {int(log['step'][~np.isfinite(log['loss'])].iloc[0])}")
    facts: dict[str, Any] = {
        "steps": int(log["step"].iloc[-1]),
        "first_loss": float(log["loss"].iloc[0]),
        "last_loss": float(log["loss"].tail(_LAST).mean()),
    }
    if "val_loss" in log and log["val_loss"].notna().any():
        validated = log[log["val_loss"].notna()]
        last, best = validated.iloc[-1], validated.nsmallest(1, "val_loss").iloc[0]
        facts |= {"val_loss": float(last["val_loss"]), "val_loss_step": int(last["step"])}
        facts |= {"best_val_loss": float(best["val_loss"]), "best_val_loss_step": int(best["step"])}
    if "tokens_per_s" in log:
        facts["tokens_per_s"] = float(log["tokens_per_s"].median())
    return Read(facts, _windows(log), problems)


def _numbers(record: object) -> dict[str, float]:
    """The numbers of a JSON object by name; of anything else none."""
    fields = record if isinstance(record, dict) else {}
    return {name: float(value) for name, value in fields.items() if isinstance(value, int | float)}


def _windows(log: pd.DataFrame) -> pd.DataFrame:
    """Means over runs of steps; the step, tokens and validation loss are the last of each."""
    window = np.arange(len(log)) * _WINDOWS // len(log)
    last = {name: "last" for name in ("step", "tokens", "val_loss") if name in log}
    means = {name: "mean" for name in ("loss", "grad_norm", "tokens_per_s", "mfu") if name in log}
    columns = [
        name for name in ("step", "tokens", "loss", "val_loss", "grad_norm", "tokens_per_s", "mfu") if name in log
    ]
    curve = log.groupby(window).agg(last | means)[columns].reset_index(drop=True)
    whole = [name for name in ("step", "tokens") if name in curve and (curve[name].abs() < 2**53).all()]
    return curve.astype(dict.fromkeys(whole, "int64"))


def read_prepared(folder: Path, manifest: Mapping[str, Any]) -> Read:
    """What a folder of prepared tokens holds, its files' sizes checked against the manifest."""
    facts: dict[str, Any] = {
        name: manifest[name] for name in ("tokenizer", "n_vocab", "dtype", "seed", "val_fraction") if name in manifest
    }
    problems, rows = [], []
    splits = manifest.get("splits")
    width = _item_size(manifest.get("dtype"))
    for name, split in splits.items() if isinstance(splits, dict) else ():
        counts = split if isinstance(split, dict) else {}
        files = [file for file in folder.iterdir() if re.fullmatch(rf"{re.escape(name)}(-\d.*)?\.bin", file.name)]
        rows.append({"split": name, **{k: v for k, v in counts.items() if isinstance(v, int)}, "files": len(files)})
        tokens, found = counts.get("tokens"), sum(file.stat().st_size for file in files)
        if isinstance(tokens, int) and width and found != tokens * width:
            problems.append(f"{name}: {found:,} bytes of tokens, and the manifest says {tokens * width:,}")
    sources = manifest.get("sources")
    if isinstance(sources, list):
        names = [str(source.get("name", "?")) for source in sources if isinstance(source, dict)]
        facts["sources"] = [*names[:6], *([f"and {len(names) - 6} more"] if len(names) > 6 else [])]
    return Read(facts, pd.DataFrame(rows), problems)


def _item_size(dtype: object) -> int | None:
    try:
        return np.dtype(str(dtype)).itemsize
    except TypeError:
        return None


def manifest_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest records: tokens seen first, then the rest but for what is told elsewhere."""
    elsewhere = {"format", "config", "weights_sha256"}
    rest = {name: value for name, value in manifest.items() if name not in elsewhere and not _is_blank(value)}
    training = rest.pop("training", None)
    if isinstance(training, dict):
        rest |= {f"training.{name}": table for name, table in training.items() if name != "model"}
    return {"tokens_seen": rest.pop("tokens_seen"), **rest} if "tokens_seen" in rest else rest


def _is_blank(value: object) -> bool:
    return value is None or value == {} or (isinstance(value, float) and math.isnan(value))
