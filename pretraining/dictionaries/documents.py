"""The documents of a prepared folder as windows that a model reads: what is harvested, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from pretraining.token_files import TokenData, TokenStream
from reflowlens.errors import ReflowlensError

SHORTEST = 8  # tokens of a window; what is left of a document's end says little


@dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of documents, none of which reaches into another document; the end token is left out.

    Args:
        start, length: in the stream, of each window.
        document: which document each is from.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    document: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: NDArray[np.int64] | slice) -> Windows:
        return Windows(self.start[chosen], self.length[chosen], self.document[chosen])


def document_windows(data: TokenData, context: int, *, first_only: bool = False) -> Windows:
    """Every document cut into windows of ``context`` tokens, its last one shorter, but none below 8 tokens.

    Args:
        first_only: take the beginning of each document alone.

    Raises:
        ReflowlensError: the stream has no document that long.
    """
    tokens = np.asarray(data.tokens)
    ends = np.flatnonzero(tokens == data.manifest.end_id)
    if not len(ends) or ends[-1] != len(tokens) - 1:
        ends = np.append(ends, len(tokens))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    per_document = np.minimum(1, lengths) if first_only else -(-lengths // context)
    document = np.repeat(np.arange(len(starts)), per_document)
    within = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    start = starts[document] + within * context
    length = np.minimum(context, ends[document] - start)
    windows = Windows(start, length, document)[np.flatnonzero(length >= SHORTEST)]
    if not len(windows):
        raise ReflowlensError(f"the data hold no document of at least {SHORTEST} tokens")
    return windows


def padded_batches(
    tokens: TokenStream, windows: Windows, rows: int
) -> Iterator[tuple[Int[Tensor, "row pos"], Int[Tensor, " row"], NDArray[np.int64]]]:
    """Windows as batches of similar length, padded on the right.

    Yields:
        Tokens [row, pos], the length of each row, and which windows they are.
    """
    order = np.argsort(windows.length, kind="stable")
    for chosen in (order[i : i + rows] for i in range(0, len(order), rows)):
        lengths = windows.length[chosen]
        batch = np.zeros((len(chosen), int(lengths.max())), dtype=np.int64)
        for row, start, length in zip(batch, windows.start[chosen], lengths, strict=True):
            row[:length] = tokens[int(start) : int(start + length)]
        yield torch.from_numpy(batch), torch.from_numpy(lengths), chosen


def drawn_rounds(windows: Windows, per_round: int, seed: int, first: int = 0) -> Iterator[Windows]:
    """Windows in an order that each epoch draws anew, so many at a time, without end: a function of seed and number.

    Args:
        first: number of the round to begin with.
    """
    per_epoch = max(1, len(windows) // per_round)
    number = first
    while True:
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(windows))
        yield windows[order[place * per_round : (place + 1) * per_round]]
        number += 1
