"""What opening a model costs: memory beside that of its weights, and time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from reflowlens.benchmarks.peak_memory import forget_peak, peak_resident
from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.variants import NANO
from reflowlens.checkpoints import load_model, save_model
from reflowlens.config import ModelConfig
from reflowlens.conversion import export_hf, import_hf
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

_SECONDS = 0.3  # of opening a packaged model
LLAMA_135M = ModelConfig(
    architecture="llama", n_layers=30, d_model=576, n_heads=9, n_key_value_heads=3, d_head=64, d_mlp=1536,
    d_vocab=50304, n_ctx=1024,
)  # fmt: skip


def bench_load(cfg: ModelConfig = LLAMA_135M) -> Iterator[Row]:
    """Import a folder as transformers writes it, open one of ours and a packaged model, each in a process of its own.

    Yields:
        Rows of ``seconds``, ``peak_mb`` (how far the process's largest size rises above that after the imports, for a
        folder after a tiny model of the kind was opened: libraries and tokenizer loaded), ``weights_mb``, ``relative``
        (peak / weights), ``ratio`` (weights / peak; of the packaged model 0.3 s / its time) and ``of``.
    """
    cfg = dataclasses.replace(cfg, device="cpu")
    tiny = dataclasses.replace(cfg, n_layers=1, d_model=16, n_heads=1, n_key_value_heads=1, d_head=16, d_mlp=16)
    for write, kind in ((export_hf, "import"), (_save, "load_model")):
        with tempfile.TemporaryDirectory() as folder:
            write(build_model(cfg), Path(folder) / "model")
            write(build_model(tiny), Path(folder) / "tiny")
            row = _measured(Path(folder) / "model", Path(folder) / "tiny")
        yield row | {"ratio": round(row["weights_mb"] / row["peak_mb"], 3), "of": f"{kind}, {cfg.n_layers} layers"}
    row = _measured(str(NANO.model_name).replace("_", "-"))
    yield row | {"ratio": round(_SECONDS / row["seconds"], 3), "of": "load_model, reflow-nano"}


def _save(model: HookedModel, folder: Path) -> Path:
    return save_model(folder, model)


def _measured(model: str | Path, tiny: Path | None = None) -> Row:
    call = "import sys; from reflowlens.benchmarks.load import print_costs; print_costs(*sys.argv[1:])"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", call, *map(str, [model] if tiny is None else [model, tiny])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode != 0:
        raise ReflowlensError(f"measuring the memory of {model!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_costs(name: str, first: str | None = None) -> None:
    """Open a model, after another if there is one, and print what that took of time and memory, as JSON."""
    if first is not None:
        _opened(first)
    forget_peak()
    before, began = peak_resident(), time.perf_counter()
    model = _opened(name)
    seconds, peak = time.perf_counter() - began, peak_resident() - before
    weights = sum(parameter.nbytes for parameter in model.parameters())
    row = {"seconds": round(seconds, 3), "peak_mb": peak / 1e6, "weights_mb": weights / 1e6}
    print(json.dumps(row | {"relative": round(peak / weights, 3)}))


def _opened(name: str) -> HookedModel:
    return import_hf(name) if (Path(name) / "config.json").is_file() else load_model(name)
