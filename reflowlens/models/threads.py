"""Threads that share a model: hooks and edits are its state, so those of one thread reach the passes of another.

Any number of threads may run a model as it is. Whoever changes it, by hooks or by edits of weights, has it to itself
meanwhile: another thread's pass, hooks and edits raise instead of giving numbers of both.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from reflowlens.errors import ReflowlensError
from reflowlens.models.pass_context import running_pass

Forward = TypeVar("Forward", bound=Callable[..., Any])


@dataclass
class _Use:
    """Who changes a model, in how many blocks, and who is reading it, in how many passes."""

    changer: int | None = None
    blocks: int = 0
    readers: Counter[int] = field(default_factory=Counter)


_USES: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextlib.contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Have a model to oneself, for hooks, edits, or runs that have to see it unchanged.

    Raises:
        ReflowlensError: another thread is running it or changes it.
    """
    me = threading.get_ident()
    with _LOCK:
        use = _USES.setdefault(model, _Use())
        _check_free(use, me)
        if any(reader != me for reader in use.readers):
            _refuse()
        use.changer, use.blocks = me, use.blocks + 1
    try:
        yield
    finally:
        with _LOCK:
            use.blocks -= 1
            use.changer = use.changer if use.blocks else None


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Run a model as it is, beside other readers.

    Raises:
        ReflowlensError: another thread changes it.
    """
    me = threading.get_ident()
    with _LOCK:
        use = _USES.setdefault(model, _Use())
        _check_free(use, me)
        use.readers[me] += 1
    try:
        yield
    finally:
        with _LOCK:
            use.readers[me] -= 1
            use.readers = +use.readers  # without those at 0


def reading_forward(forward: Forward) -> Forward:
    """A model's forward pass, as a reader; a compiled graph neither sees hooks nor asks."""

    @functools.wraps(forward)
    def guarded(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        with reading(model), running_pass(model):
            return forward(model, *args, **kwargs)

    return guarded  # type: ignore[return-value] # called as the function is


def _check_free(use: _Use, me: int) -> None:
    if use.changer not in (None, me):
        _refuse()


def _refuse() -> None:
    raise ReflowlensError(
        "another thread is using this model, and hooks or edits of one thread reach the passes of both: "
        "let one thread at a time use it, or give each a copy (copy.deepcopy)"
    )
