"""Functions in processes of their own, forked from one server that has imported torch and models already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["pretraining.train", "reflowlens.models", "tests.support.tiny"])


def exit_code(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Of a process in which ``function``, of a module, is called: 0, or minus the signal that ended it."""
    process = multiprocessing.get_context("forkserver").Process(target=_on_one_thread, args=(function, *arguments))
    process.start()
    process.join(300)
    return process.exitcode


def two_processes(function: Callable[..., Any], *arguments: Any) -> None:
    """``function(rank, *arguments)`` in each of two processes that find each other as torchrun's do.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one raised, whose trace this holds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_of_two, (port, function, *arguments), nprocs=2, start_method="forkserver")


def _of_two(rank: int, port: int, function: Callable[..., Any], *arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    _on_one_thread(function, rank, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()  # a process that ends with threads of gloo at work may abort


def _on_one_thread(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)
