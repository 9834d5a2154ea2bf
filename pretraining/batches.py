"""Batches of a token stream. Training order is a pure function of (seed, step): resuming needs no state but the step,
and the rows of a step are the same however many processes share them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from pretraining.token_files import TokenStream
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:  # preparing data imports this module's sibling and needs no torch
    import torch

    Batch = tuple[Int[torch.Tensor, "batch context"], Int[torch.Tensor, "batch context"]]


def batch_at(
    tokens: TokenStream, step: int, batch_size: int, context: int, seed: int, rank: int = 0, world_size: int = 1
) -> Batch:
    """The training batch of one step: inputs x and targets y (the token after each), both int64 [batch, context].

    The stream is cut into blocks of `context` + 1 tokens, `context` apart, from an offset in [0, context) that each
    epoch draws anew; an epoch visits every block once, in an order that it draws too. Both come from a generator seeded
    with [seed, epoch]. A step's batch is the next `batch_size` blocks (it may run into the next epoch), and a process
    takes its rows rank, rank + world_size, ...: batch is batch_size / world_size.

    Raises ReflowlensError if `batch_size` does not divide among the processes or the stream is shorter than one block.

    >>> x, y = batch_at(np.arange(100), step=0, batch_size=4, context=8, seed=0)
    >>> x.shape, bool((y == x + 1).all())
    (torch.Size([4, 8]), True)
    """
    if batch_size % world_size:
        raise ReflowlensError(f"batch_size {batch_size} does not divide among {world_size} processes")
    if min(step, seed) < 0:
        raise ReflowlensError(f"step and seed must not be negative, and are {step} and {seed}")
    n_blocks = blocks_per_epoch(len(tokens), context)
    rows = range(step * batch_size + rank, (step + 1) * batch_size, world_size)
    starts = [_block_starts(len(tokens), context, seed, row // n_blocks)[row % n_blocks] for row in rows]
    return _to_batch(np.stack([tokens[start : start + context + 1] for start in starts]))


def blocks_per_epoch(n_tokens: int, context: int) -> int:
    """How many blocks an epoch of `batch_at` has: as many as fit after the largest offset, and at least one.

    Raises ReflowlensError if the stream is shorter than one block of `context` + 1 tokens.
    """
    if n_tokens < context + 1:
        raise ReflowlensError(
            f"{n_tokens} tokens are too few for a context of {context}: at least {context + 1} are needed"
        )
    return max(1, n_tokens // context - 1)


def sequential_batches(tokens: TokenStream, batch_size: int, context: int) -> Iterator[Batch]:
    """Inputs and targets [batch, context] over the whole stream in order: every token but the first is a target once.

    The last batch of whole blocks may hold fewer rows; what remains of the stream then comes as one shorter row. Weight
    each batch by `y.numel()` when averaging.

    Raises ReflowlensError if there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ReflowlensError(f"{len(tokens)} tokens are too few to predict one from another")
    n_blocks = (len(tokens) - 1) // context
    yield from _blocks(tokens, np.arange(n_blocks) * context, batch_size, context)
    rest = tokens[n_blocks * context :]
    if len(rest) > 1:
        yield _to_batch(rest[np.newaxis])


def spread_batches(tokens: TokenStream, batch_size: int, context: int, max_tokens: int | None) -> Iterator[Batch]:
    """At most `max_tokens` predictions (at least a block's) that stand for the whole stream: blocks at equal distances.

    The blocks are those of `sequential_batches`, of which every k-th is taken; k need not be whole. None, or as many
    tokens as there are, is `sequential_batches` itself.

    >>> [x[:, 0].tolist() for x, y in spread_batches(np.arange(101), batch_size=2, context=10, max_tokens=35)]
    [[0, 30], [60]]
    """
    n_blocks = (len(tokens) - 1) // context
    if max_tokens is None or max_tokens >= len(tokens) - 1 or n_blocks == 0:
        yield from sequential_batches(tokens, batch_size, context)
        return
    n_taken = max(1, max_tokens // context)
    yield from _blocks(tokens, np.arange(n_taken) * n_blocks // n_taken * context, batch_size, context)


def count_batches(n_tokens: int, batch_size: int, context: int, max_tokens: int | None = None) -> int:
    """How many batches `spread_batches` makes of a stream of so many tokens.

    >>> count_batches(101, batch_size=2, context=10, max_tokens=35), count_batches(104, batch_size=2, context=10)
    (2, 6)
    """
    n_blocks, rest = divmod(n_tokens - 1, context)
    if max_tokens is None or max_tokens >= n_tokens - 1 or n_blocks == 0:
        return math.ceil(n_blocks / batch_size) + (rest > 0)
    return math.ceil(max(1, max_tokens // context) / batch_size)


def _blocks(tokens: TokenStream, starts: NDArray[np.int64], batch_size: int, context: int) -> Iterator[Batch]:
    for first in range(0, len(starts), batch_size):
        rows = [tokens[start : start + context + 1] for start in starts[first : first + batch_size]]
        yield _to_batch(np.stack(rows))


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _block_starts(n_tokens: int, context: int, seed: int, epoch: int) -> NDArray[np.int64]:
    n_blocks = blocks_per_epoch(n_tokens, context)
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(min(context, n_tokens - n_blocks * context))
    starts: NDArray[np.int64] = generator.permutation(n_blocks) * context + offset
    return starts


def _to_batch(blocks: NDArray[Any]) -> Batch:
    import torch

    both = torch.from_numpy(blocks.astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
