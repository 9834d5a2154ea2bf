"""One process or many: which one this is, what they decide together, and what happens when one of them fails."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:  # some builds of torch have no processes that work together
    from torch.distributed.distributed_c10d import Store

_GRACE = 10.0  # seconds that a process waits for the launcher to end it, so that the launcher's report blames another
Made = TypeVar("Made")
_groups = itertools.count()  # all processes join their first, second, ... group together


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


class _AnotherFailed(Exception):
    """Another process knows why."""


@contextlib.contextmanager
def processes(advice: Callable[[], str] = str) -> Iterator[Processes]:
    """Join the group that torchrun describes in the environment, or be alone.

    When one of several processes fails, all end; the first to fail says so, once, with its rank. Of one that was killed
    the others only see that the connection broke, and the first to see it says so.

    Args:
        advice: called when that happens; the sentence with which the message ends.

    Raises:
        ReflowlensError: what the block raised, its rank in front.
        SystemExit: another process failed and has said why.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    store = PrefixStore(f"group {next(_groups)}", store)
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size)
    try:
        yield Processes(rank, world_size, device)
    except Exception as error:
        # The group is left as it is: taking it down would wait for processes that will not answer.
        if isinstance(error, _AnotherFailed) or not _first_to_fail(store, rank):
            _end_after(_GRACE)
        ending = f"; {said}" if (said := advice()) and said not in str(error) else ""
        if _lost_connection(error):
            print(
                f"error: rank {rank} of {world_size} lost the connection to another process, which was killed or whose "
                f"machine went down ({_first_sentence(error)}){ending}",
                file=sys.stderr,
            )
            _end_after(_GRACE)
        if isinstance(error, ReflowlensError):
            raise ReflowlensError(f"rank {rank} of {world_size}: {error}{ending}") from error
        reason = f"{type(error).__name__}: {_first_sentence(error)}"
        print(f"error: rank {rank} of {world_size} failed: {reason}{ending}", file=sys.stderr)
        raise
    # A wrapped model in a reference cycle keeps the group's threads past this point, and one that still lets go of
    # something while the interpreter ends aborts the process ("terminate called without an active exception").
    gc.collect()
    dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the process that speaks for all, known before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


def any_rank(flag: bool, group: Processes) -> bool:
    """Whether the flag is set in some process; all of them ask together."""
    if group.world_size == 1:
        return flag
    shared = torch.tensor(float(flag), device=group.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def on_first_process(group: Processes, action: Callable[[], object]) -> None:
    """Let the first process act while the others wait; if it fails, all of them stop, none waits for ever."""
    error: Exception | None = None
    if group.is_first:
        try:
            action()
        except Exception as caught:
            error = caught
    failed = any_rank(error is not None, group)
    if error is not None:
        raise error
    if failed:
        raise _AnotherFailed


def from_first_process(group: Processes, make: Callable[[], Made]) -> Made:
    """What the first process makes, for all of them; if it fails, all stop."""
    made: list[Any] = []
    on_first_process(group, lambda: made.append(make()))
    made = made or [None]
    if group.world_size > 1:
        dist.broadcast_object_list(made)
    return made[0]


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _first_to_fail(store: Store, rank: int) -> bool:
    try:
        return store.compare_set("first to fail", "", str(rank)) == str(rank).encode()
    except RuntimeError:  # the store went down with its process: better said twice than not at all
        return True


def _lost_connection(error: Exception) -> bool:
    signs = ("closed by peer", "reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _first_sentence(error: Exception) -> str:
    """What a message begins with, without the line of C++ that torch puts in front."""
    return re.sub(r"^\[[^\]]*\] ", "", f"{error}\n".splitlines()[0]).split(". ")[0]


def _end_after(seconds: float) -> None:
    sys.stderr.flush()
    time.sleep(seconds)
    raise SystemExit(1)
