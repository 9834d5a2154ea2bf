"""What a forward pass cannot see in its input: lengths that open blocks of interventions gave, and texts that grow.

And what one point of a pass leaves for later ones, which is forgotten when the pass ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Bool
from torch import Tensor, nn

from reflowlens.errors import ReflowlensError

_GIVEN: WeakKeyDictionary[nn.Module, list[Sequence[int]]] = WeakKeyDictionary()
_GROWING: ContextVar[Bool[Tensor, " batch"] | None] = ContextVar("growing", default=None)
_RUNNING: ContextVar[tuple[nn.Module, dict[Any, Any]] | None] = ContextVar("running", default=None)


@contextlib.contextmanager
def giving_lengths(model: nn.Module, lengths: Sequence[int] | None) -> Iterator[None]:
    """Passes over tokens and streams, whose rows have these lengths; None says nothing of them."""
    given = [] if lengths is None else [lengths]
    _GIVEN.setdefault(model, []).extend(given)
    try:
        yield
    finally:
        for own in given:
            _GIVEN[model].remove(own)


def lengths_given(model: nn.Module, input: Any) -> list[int] | None:
    """How many tokens are each row's own, where blocks of interventions know it: of tokens and streams they read.

    Raises:
        ReflowlensError: blocks that are open together disagree.
    """
    given = {tuple(lengths) for lengths in _GIVEN.get(model, ()) if isinstance(input, Tensor)}
    if len(given) > 1:
        raise ReflowlensError(f"rl.intervene blocks give different lengths: {' and '.join(map(str, sorted(given)))}")
    return list(given.pop()) if given else None


@contextlib.contextmanager
def growing_text(ready: Bool[Tensor, " batch"]) -> Iterator[None]:
    """Passes over the beginning of texts that are still being written, whether a cache holds what was read or not.

    Positions count from the start of the text then, and those that are not there yet belong to later passes.

    Args:
        ready: rows whose newest token is their last so far: the others are still inside their prompts, which an
            intervention at ``"last"`` leaves alone.
    """
    token = _GROWING.set(ready)
    try:
        yield
    finally:
        _GROWING.reset(token)


def growing_rows() -> Bool[Tensor, " batch"] | None:
    """The ``ready`` of :func:`growing_text` around this pass, None outside of it."""
    return _GROWING.get()


@contextlib.contextmanager
def running_pass(model: nn.Module) -> Iterator[None]:
    """A forward pass of a model, with a memory of its own (:func:`pass_memory`)."""
    token = _RUNNING.set((model, {}))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def pass_memory(model: nn.Module) -> dict[Any, Any] | None:
    """What points of the model's running pass left for later ones; None where its blocks run outside of a pass."""
    running = _RUNNING.get()
    return running[1] if running is not None and running[0] is model else None
