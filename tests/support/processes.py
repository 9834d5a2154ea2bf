"""Functions in processes of their own, forked from one server that has imported torch and models already."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["tests.support.imported"])


def exit_code(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Of a process in which ``function``, of a module, is called: 0, or minus the signal that ended it."""
    process = multiprocessing.get_context("forkserver").Process(target=_on_one_thread, args=(function, *arguments))
    process.start()
    process.join(300)
    return process.exitcode


def in_a_process(function: Callable[..., Any], *arguments: Any) -> None:
    """``function(*arguments)`` in a process in which nothing of the tests has happened; of code: ``exec`` and the code.

    Raises:
        torch.multiprocessing.ProcessRaisedException: it raised, whose trace this holds.
    """
    mp.start_processes(_alone, (function, *arguments), nprocs=1, start_method="forkserver")


def two_processes(function: Callable[..., Any], *arguments: Any) -> None:
    """``function(rank, *arguments)`` in each of two processes that find each other as torchrun's do.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one raised, whose trace this holds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives groups, as torchrun's does
    mp.start_processes(_of_two, (store.port, function, *arguments), nprocs=2, start_method="forkserver")


def _alone(_: int, function: Callable[..., Any], *arguments: Any) -> None:
    _on_one_thread(function, *arguments)


def _of_two(rank: int, port: int, function: Callable[..., Any], *arguments: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    _on_one_thread(function, rank, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()  # a process that ends with threads of gloo at work may abort


def _on_one_thread(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    function(*arguments)
