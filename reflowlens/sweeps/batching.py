"""Running many items in batches under a memory budget that is measured, not guessed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reflowlens.arguments import real_number
from reflowlens.errors import ReflowlensError
from reflowlens.out_of_memory import is_out_of_memory

Item = TypeVar("Item")
Made = TypeVar("Made")
_FIRST_BATCH = 16
_CPU_BUDGET = 2**25  # what is larger leaves the processor's cache, and goes back to the system after each batch


def in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], Made],
    device: torch.device,
    budget: float | None = None,
    size: int | None = None,
    finished: Container[Item] = (),
) -> Iterator[tuple[list[Item], Made]]:
    """Run items in batches, in order.

    How many go together is given, or decided by a first, small batch, on which what an item takes is measured. A batch
    that runs out of memory all the same is halved.

    Args:
        budget: in bytes, see :func:`items_within`.
        size: items of a batch, where what one takes has been measured.
        finished: items that are known; a batch of these alone is left out. Another is run whole: in another batch its
            results would be rounded differently.

    Yields:
        A batch, and what ``run`` made of it.
    """
    check_budget(budget)
    measured, at = size is not None, 0
    size = size or _FIRST_BATCH
    while at < len(items):
        batch = list(items[at : at + size])
        if all(item in finished for item in batch):
            at += len(batch)
            continue
        try:
            if measured or len(items) <= _FIRST_BATCH:
                values = run(batch)
            else:
                values, peak = measure_peak(partial(run, batch), device)
                size, measured = items_within(budget, device, peak / len(batch)), True
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            size, measured = len(batch) // 2, True
            continue
        yield batch, values
        at += len(batch)


def items_within(budget: float | None, device: torch.device, item_bytes: float) -> int:
    """How many items fit a budget in bytes, one at least.

    Args:
        budget: default: half a GPU's free memory, or a quarter of the free memory of the machine, at most 32 MiB.
    """
    check_budget(budget)
    return max(1, int((budget or _default_budget(device)) / max(item_bytes, 1)))


def check_budget(budget: float | None) -> None:
    """Raise unless it is a number of bytes, or None."""
    if budget is not None and not 0 < real_number(budget, "memory") < float("inf"):
        raise ReflowlensError(f"memory must be a number of bytes above 0, got {budget!r}")


def measure_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What a function returns, and the most bytes its tensors held at once, beyond those that existed before.

    >>> out, peak = measure_peak(lambda: (torch.ones(1000) + 1).sum(), torch.device("cpu"))
    >>> peak in range(8000, 9000)
    True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        return run(), live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata in self._seen or storage._cdata in given:
                continue
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _default_budget(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system tells
        return _CPU_BUDGET
    return min(free / 4, _CPU_BUDGET)
