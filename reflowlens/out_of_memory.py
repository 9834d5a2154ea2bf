"""Running out of memory, told as an error that says what to lower."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from reflowlens.errors import ReflowlensError

_ALLOCATORS_SAY = ("allocate memory", "bad_alloc")  # a CPU's have no error of their own


class OutOfMemory(ReflowlensError, MemoryError):
    """What was asked for does not fit the memory; the message says what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of Python, NumPy or torch refused."""
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS_SAY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def lower_if_it_does_not_fit(what: str) -> Iterator[None]:
    """A block, or a decorated function, whose allocator's error becomes one that says what to lower.

    Raises:
        OutOfMemory: it ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and with it what was computed
        cause = (
            error.__cause__ if isinstance(error, OutOfMemory) else error
        )  # the advice of a function within is left out
        raise OutOfMemory(f"out of memory: lower {what}") from cause
