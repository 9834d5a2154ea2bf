"""A configuration by its name or file, with settings in place of what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretraining.config.tables import DataConfig, OptimizerConfig, RunConfig
from pretraining.config.toml import read_toml, section, toml_value
from pretraining.config.train_config import TrainConfig
from pretraining.distillation.config import DistillationConfig
from reflowlens.config import ModelConfig, preset
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.ttt_flow_config import TTTFlowConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def load_config(name: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """Read and check a configuration; ``[model]`` takes ``preset = "name"`` and/or fields of ``ModelConfig``.

    Args:
        name: a TOML file, or the bare name of a shipped configuration.
        settings: ``"table.field=value"``, each in place of what the file says; text needs no quotes.

    Raises:
        ReflowlensError: the file is missing, unreadable or not TOML, a table or field is unknown or missing, or a value
            is not allowed.

    >>> load_config("reflow_1_small", ["run.steps=100"]).run.steps
    100
    """
    path = find_config(name)
    tables = read_toml(path)
    for table, fields in tables.items():
        if table not in _TABLES:
            raise ReflowlensError(f"{path}: unknown table [{table}]{nearest(table, list(_TABLES))}")
        if not isinstance(fields, dict):
            raise ReflowlensError(f"{path}: [{table}] must be a table, got {fields!r}")
    for table in ("model", "data", "run"):
        if table not in tables:
            raise ReflowlensError(f"{path}: the table [{table}] is missing")
    overrides = dict(map(_setting, settings))
    for place, value in overrides.items():
        *outer, key = place.split(".")
        fields = tables
        for name in outer:
            fields = fields.setdefault(name, {})
        fields[key] = value
    return TrainConfig(
        model=_model(tables["model"]),
        data=section("data", DataConfig, tables["data"]),
        optimizer=section("optimizer", OptimizerConfig, tables.get("optimizer", {})),
        run=section("run", RunConfig, tables["run"]),
        distillation=(
            section("distillation", DistillationConfig, tables["distillation"]) if "distillation" in tables else None
        ),
        overrides=overrides,
    )


def list_configs() -> list[str]:
    """Names of the shipped configurations, for :func:`load_config`."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def find_config(name: str | Path) -> Path:
    """The file that a path, or the bare name of a shipped configuration, stands for.

    Raises:
        ReflowlensError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or path.name != str(name):
        raise ReflowlensError(f"no configuration file {str(path)!r}")
    shipped = list_configs()
    if path.name not in shipped:
        hint = nearest(path.name, shipped)
        raise ReflowlensError(
            f"no configuration {path.name!r}{f'{hint} Shipped' if hint else '; shipped'} are {', '.join(shipped)}; "
            "otherwise give a TOML file"
        )
    return CONFIGS / f"{path.name}.toml"


_TABLES: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "distillation": DistillationConfig,
}


def _setting(text: str) -> tuple[str, Any]:
    """``"run.steps=100"`` as a place and a value of the type that TOML would give it."""
    place, equals, written = (part.strip() for part in text.partition("="))
    types = {f"{table}.{f.name}": str(f.type) for table, kind in _TABLES.items() for f in dataclasses.fields(kind)}
    types |= {f"model.ttt_flow.{f.name}": str(f.type) for f in dataclasses.fields(TTTFlowConfig)}
    types["model.preset"] = "str"
    if not equals or place not in types:
        what = f"unknown field {place!r}" if equals else "expected table.field=value"
        raise ReflowlensError(f"--set {text}: {what}{nearest(place, list(types))}")
    if types[place] == "str" and written[:1] not in ('"', "'"):
        return place, written
    return place, toml_value(written)  # what wants to be a number and is none fails the field's own check


def _model(fields: dict[str, Any]) -> ModelConfig:
    base = preset(fields["preset"]).to_dict() if "preset" in fields else {}
    own = {name: value for name, value in fields.items() if name != "preset"}
    if isinstance(base.get("ttt_flow"), dict) and isinstance(own.get("ttt_flow"), dict):
        own["ttt_flow"] = base["ttt_flow"] | own["ttt_flow"]
    return ModelConfig.from_dict(base | own)
