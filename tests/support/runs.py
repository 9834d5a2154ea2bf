"""Training runs small enough for every test: their data, their configurations, and what they wrote down."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretraining.config import TrainConfig
from pretraining.data import prepare
from tests.support import ROOT

STEPS = 24
MODEL: dict[str, Any] = {
    "architecture": "reflow",
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "d_mlp": 32,
    "d_vocab": 256,
    "n_ctx": 16,
    "n_signals": 16,
    "tokenizer_name": "bytes",
}
OPTIMIZER: dict[str, Any] = {"name": "muon", "learning_rate": 0.01, "matrix_learning_rate": 0.05, "warmup_steps": 4}
RUN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "dtype": "float32",
    "compile": False,
    "eval_interval": 6,
    "eval_tokens": 100,
    "checkpoint_interval": 5,
}


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sentences = [f"The {animal} {verb} the {thing}. " for animal in ("cat", "dog") for verb in ("sees", "eats")
                 for thing in ("mouse", "bone", "grass")]  # fmt: skip
    (folder / "train.txt").write_text("".join(sentences * 20))
    (folder / "val.txt").write_text("".join(reversed(sentences)))
    prepare(folder / "train.txt", folder / "tokens", "bytes", val_sources=folder / "val.txt", progress=False)
    return folder / "tokens"


def run_tables(tokens_folder: Path, out: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": dict(MODEL),
        "data": {"folder": str(tokens_folder), "context": 16},
        "optimizer": dict(OPTIMIZER),
        "run": {"out": str(out), **RUN},
    }


def write_toml(path: Path, tables: dict[str, dict[str, Any]], **changes: dict[str, Any]) -> Path:
    """The tables with some fields changed: ``run={"steps": 3}``; None drops a field."""
    lines = []
    for table, fields in tables.items():
        lines.append(f"[{table}]")
        fields = fields | changes.get(table, {})
        lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def write(tokens_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A configuration with some fields changed: ``write(run={"steps": 3})``."""
    tables = run_tables(tokens_folder, tmp_path / "run")
    return lambda name="config.toml", **changes: write_toml(tmp_path / name, tables, **changes)


def with_out(cfg: TrainConfig, out: Path) -> TrainConfig:
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, out=str(out)))


def records(out: Path | str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def measured(out: Path | str) -> list[dict[str, float]]:
    """Records without the clock."""
    clock = ("tokens_per_s", "mfu")
    return [{name: value for name, value in record.items() if name not in clock} for record in records(out)]


def same_files(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "training_state.safetensors"):
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def run_python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process of its own, on one thread as here and without a GPU."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def run_two_processes(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """torchrun with a module or file and its arguments."""
    return run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments)
