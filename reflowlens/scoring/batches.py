"""Which windows are read together: those of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from reflowlens.out_of_memory import is_out_of_memory
from reflowlens.sweeps.batching import check_budget, items_within, measure_peak

Made = TypeVar("Made")
_LEAST = 1024  # positions, where nobody asks for less memory: fewer leave a processor waiting for the weights


def by_length(
    lengths: Sequence[int],
    run: Callable[[list[int]], Made],
    device: torch.device,
    *,
    batch: int | None = None,
    memory: float | None = None,
    alike: bool = False,
) -> Iterator[tuple[list[int], Made]]:
    """Run items in batches of like length, the longest first.

    How many positions go together is decided by what the longest item takes, run by itself. A batch that runs out of
    memory all the same is halved.

    Args:
        lengths: of the items.
        run: takes the numbers of a batch's items.
        batch: items that go together; default: as many as ``memory`` holds.
        memory: in bytes; default: see :func:`reflowlens.sweeps.batching.items_within`, and 1,024 positions at least.
        alike: a batch has items of one length alone.

    Yields:
        A batch's items and what ``run`` made of them.
    """
    check_budget(memory)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at, most = 0, batch
    positions: int | None = None
    while at < len(order):
        longest = lengths[order[at]]
        measuring = batch is None and positions is None
        size = most or (1 if positions is None else max(1, positions // longest))
        chosen = order[at : at + size]
        if alike:
            chosen = [i for i in chosen if lengths[i] == longest]
        try:
            if measuring:
                made, peak = measure_peak(partial(run, chosen), device)
                positions = items_within(memory, device, peak / longest)
                positions = max(positions, _LEAST) if memory is None else positions
            else:
                made = run(chosen)
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            most, positions = most and len(chosen) // 2, positions and len(chosen) * longest // 2
            continue
        yield chosen, made
        at += len(chosen)
