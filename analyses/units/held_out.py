"""Held-out text as rows of tokens: windows drawn at random, or all of it in tiles; and text in a random order."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from analyses.statistics.draws import derive_generator
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

Stream: TypeAlias = "str | np.ndarray | Int[Tensor, ' token']"
Sampling = Literal["windows", "tiles"]


def as_stream(model: HookedModel, text: Stream) -> Int[Tensor, " token"]:
    """A text as token ids on the model's device.

    Args:
        text: one text, or its token ids [token].

    Raises:
        ReflowlensError: it is neither one text nor a one-dimensional array of integers.
    """
    if isinstance(text, str):
        text = np.array(model.tokenizer.encode(text), dtype=np.int64)
    if not isinstance(text, Tensor):
        try:
            text = torch.from_numpy(np.asarray(text).astype(np.int64, casting="same_kind"))
        except (TypeError, ValueError) as error:  # texts, bytes, a path, real numbers, rows of different lengths
            raise _no_stream(text) from error
    if text.ndim != 1 or text.is_floating_point():
        raise _no_stream(text)
    return text.to(model.cfg.device)


def _no_stream(given: object) -> ReflowlensError:
    what = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor | np.ndarray) else type(given).__name__
    return ReflowlensError(f"one text or its token ids [token] were expected, got {what}")


def tiles(stream: Int[Tensor, " token"], context: int) -> Int[Tensor, "row context"]:
    """The whole stream in consecutive rows that do not overlap; a remainder shorter than a row is left out.

    Raises:
        ReflowlensError: the stream is shorter than one row.

    >>> tiles(torch.arange(7), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    n_rows = len(stream) // context
    if not n_rows:
        raise ReflowlensError(f"{len(stream)} tokens are too few for one row of {context}")
    return stream[: n_rows * context].unflatten(0, (n_rows, context))


def windows(stream: Int[Tensor, " token"], n_rows: int, context: int, seed: int) -> Int[Tensor, "row context"]:
    """Rows that start at random positions of the stream; they may overlap.

    Raises:
        ReflowlensError: the stream is shorter than one row.
    """
    if len(stream) < context:
        raise ReflowlensError(f"{len(stream)} tokens are too few for one row of {context}")
    generator = derive_generator(seed, "windows")
    starts = torch.randint(0, len(stream) - context + 1, (n_rows,), generator=generator)
    return torch.stack([stream[start : start + context] for start in starts.tolist()])


def sampled_rows(
    stream: Int[Tensor, " token"], sampling: Sampling, n_rows: int, context: int, seed: int
) -> Int[Tensor, "row context"]:
    """``n_rows`` random `windows`, or the whole text in `tiles`.

    Raises:
        ReflowlensError: the sampling is neither ``"windows"`` nor ``"tiles"``, or the stream is shorter than one row.
    """
    if sampling not in ("windows", "tiles"):
        raise ReflowlensError(f"sampling must be 'windows' or 'tiles', got {sampling!r}")
    return tiles(stream, context) if sampling == "tiles" else windows(stream, n_rows, context, seed)


def shuffled(stream: Int[Tensor, " token"], seed: int) -> Int[Tensor, " token"]:
    """The same tokens in a random order: frequencies are kept, order is not."""
    order = torch.randperm(len(stream), generator=derive_generator(seed, "shuffled_text"))
    return stream[order.to(stream.device)]
