"""The next batch is read while the step before it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pretraining.batches import Batch


@contextlib.contextmanager
def prefetched(load: Callable[[int], Batch], steps: range, device: torch.device) -> Iterator[Iterator[Batch]]:
    """The batches of the steps in order, each loaded in a thread one step ahead.

    For a GPU they lie in pinned memory, from which a copy does not hold up the computation. An error of ``load`` is
    raised when its batch is due.
    """

    def prepare(step: int) -> Batch:
        x, y = load(step)
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    def batches(pool: ThreadPoolExecutor) -> Iterator[Batch]:
        loading = (pool.submit(prepare, step) for step in steps)
        due = next(loading, None)
        while due is not None:
            current, due = due, next(loading, None)
            yield current.result()

    with ThreadPoolExecutor(1) as pool:
        yield batches(pool)
