"""The processes that torchrun started, where work is shared by them."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def processes() -> tuple[int, int]:
    """Rank and number of torchrun's processes, joined if they are not yet."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_all_processes(own: Value) -> list[Value]:
    """What every process has, pickled on its way, in the order of their ranks."""
    _, n = processes()
    if n == 1:
        return [own]
    found: list[Value] = [own] * n
    dist.all_gather_object(found, own)
    return found
