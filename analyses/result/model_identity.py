"""The hash of the model that a run is about: taken once a run, not once an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from reflowlens import checkpoints
from reflowlens.models.base import HookedModel

_known: ContextVar[tuple[HookedModel, str] | None] = ContextVar("_known", default=None)


@contextmanager
def known_hash(model: HookedModel, identity: str) -> Iterator[None]:
    """Within the block `hash_of` takes a model's hash for granted: its weights stay what they are there."""
    token = _known.set((model, identity))
    try:
        yield
    finally:
        _known.reset(token)


def hash_of(model: HookedModel) -> str:
    """`reflowlens.model_hash` of a model, which within a run is known already."""
    known = _known.get()
    return known[1] if known and known[0] is model else checkpoints.model_hash(model)
