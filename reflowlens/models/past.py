"""Caches for incremental decoding: what a model keeps of the positions that it has read."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from reflowlens.arguments import number_of_runs
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError


def read_before(past: Any) -> int:
    """Number of positions that a pass with this ``past_kv_cache`` finds already read.

    Raises:
        ReflowlensError: it is not a cache from ``make_cache``.
    """
    if past is None:
        return 0
    if not isinstance(past, ReadPositions):
        raise ReflowlensError(f"past_kv_cache must be what model.make_cache(batch) gives, got {past!r}")
    return past.length


class ReadPositions:
    """Base class of caches, the ``past_kv_cache`` of a pass; a family of models says what it keeps of a position.

    Attributes:
        length: number of positions read so far.
        batch: number of rows.
        sizes: the sizes of what is kept per row, which the model must share.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype) -> None:
        rows = number_of_runs(batch, "batch", 1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ReflowlensError(f"dtype must be a floating-point type such as torch.float32, got {dtype!r}")
        self.batch, self.length = rows, 0
        self.architecture, self.sizes = cfg.architecture, self.sizes_for(cfg)
        self._reader: weakref.ref[Any] | None = None

    @classmethod
    def sizes_for(cls, cfg: ModelConfig) -> tuple[int, ...]:
        """The sizes of what is kept per row."""
        raise NotImplementedError

    def check(self, model: Any, batch: int) -> None:
        """Raise unless ``model`` can read ``batch`` rows on from here: what is kept is its own, or nothing yet.

        Raises:
            ReflowlensError: it is of other sizes, was read by another model (one of the same sizes too, and a copy,
                whose weights may differ), or holds another number of rows.
        """
        other = self.length and self._reader is not None and self._reader() is not model
        if other or (model.cfg.architecture != self.architecture) or self.sizes != self.sizes_for(model.cfg):
            raise ReflowlensError(
                "this key-value cache is another model's: each model reads on from its own, model.make_cache(batch)"
            )
        if batch != self.batch:
            raise ReflowlensError(
                f"this key-value cache holds a batch of {self.batch}, and the input is a batch of {batch}"
            )
        if self._reader is None or not self.length:
            self._reader = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}  # a reference of this process
