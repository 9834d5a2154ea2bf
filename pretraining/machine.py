"""What a configuration leaves open with ``auto``: decided by what the processor has and by how long the run is."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pretraining.config import AUTO, TrainConfig
from reflowlens.flops import training_flops_per_token

_BFLOAT16 = ("amx_bf16", "avx512_bf16")
# Operations of a process's whole run from which compiling pays: some ten minutes' work of a thread of a CPU, or one
# minute's of a large GPU. Compiling takes a CPU one to several minutes.
_WORTH_COMPILING = {"cpu": 5e13, "cuda": 1e16}


def decided(
    cfg: TrainConfig, device: torch.device, world_size: int = 1, before: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration with a value in the place of every ``auto``.

    ``run.dtype`` becomes bfloat16 where the processor has instructions for it (a GPU, or a CPU with AMX or AVX-512),
    otherwise float32, which is faster there. ``run.compile`` becomes true where the run's operations
    (:func:`reflowlens.flops.training_flops_per_token`) take long enough to make up for compiling, and a compiler is
    there.

    Args:
        device: on which a process computes.
        world_size: processes that share the work.
        before: the ``[run]`` table that the run was begun with, whose values it keeps.
    """
    before = before or {}
    found: dict[str, Any] = {}
    if cfg.run.dtype == AUTO:
        found["dtype"] = before.get("dtype") or ("bfloat16" if has_bfloat16(device) else "float32")
    if cfg.run.compile == AUTO:
        found["compile"] = before["compile"] if "compile" in before else _compiling_pays(cfg, device, world_size)
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, **found))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16 itself; others imitate it, and take longer than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch may be held to fewer instructions than there are (ATEN_CPU_CAPABILITY)
    held_to_fewer = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return not held_to_fewer and any(name in _cpu("flags").split() for name in _BFLOAT16)


def autocast(device: torch.device | str, dtype: str) -> torch.autocast:
    """For a pass: with ``bfloat16`` matrix products run in it, with ``float32`` nothing changes."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def processor(device: torch.device) -> str:
    """The name of the processor, and of a CPU how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _compiling_pays(cfg: TrainConfig, device: torch.device, world_size: int) -> bool:
    rows = max(1, cfg.run.batch_size // cfg.run.accumulation // world_size)
    per_token = training_flops_per_token(cfg.model, cfg.data.context, batch=rows)
    mine = cfg.run.steps * cfg.tokens_per_step * per_token / world_size
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return has_compiler and mine >= threads * _WORTH_COMPILING[device.type]


def _cpu(field: str) -> str:
    """What Linux says of the CPU; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
