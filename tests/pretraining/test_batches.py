"""Batches of a token stream in one file or in several, and their order."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretraining.batches import batch_at, blocks_per_epoch, sequential_batches, spread_batches
from pretraining.token_files import TokenShards
from reflowlens.errors import ReflowlensError


@given(n_tokens=st.integers(2, 400), context=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_visits_every_block_once(n_tokens: int, context: int, batch_size: int, seed: int) -> None:
    tokens = np.arange(n_tokens, dtype=np.uint16)
    if n_tokens <= context:
        with pytest.raises(ReflowlensError, match="too few for a context"):
            batch_at(tokens, 0, batch_size, context, seed)
        return
    n_blocks = blocks_per_epoch(n_tokens, context)
    steps = -(-2 * n_blocks // batch_size)
    batches = [batch_at(tokens, step, batch_size, context, seed) for step in range(steps)]
    x, y = (torch.cat(side) for side in zip(*batches, strict=True))
    assert torch.equal(y, x + 1)
    assert x.shape == (steps * batch_size, context)
    for epoch in range(2):
        seen = x[epoch * n_blocks : (epoch + 1) * n_blocks].flatten().sort().values
        assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + n_blocks * context))
        assert seen[0] < context
    # Only what an offset may cost is left out: fewer than two blocks.
    assert n_tokens - n_blocks * context <= 2 * context


@given(step=st.integers(0, 50), world_size=st.sampled_from([1, 2, 3, 6]))
def test_processes_share_the_rows_of_one_batch(step: int, world_size: int) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    x, y = batch_at(tokens, step, 6, 8, seed=0)
    for rank in range(world_size):
        x_rank, y_rank = batch_at(tokens, step, 6, 8, seed=0, rank=rank, world_size=world_size)
        assert torch.equal(x_rank, x[rank::world_size])
        assert torch.equal(y_rank, y[rank::world_size])


def test_the_order_is_a_function_of_seed_and_step() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    late = batch_at(tokens, 700, 4, 16, seed=0)[0]
    assert late.dtype == torch.int64
    assert torch.equal(late, batch_at(tokens.copy(), 700, 4, 16, seed=0)[0])
    assert not torch.equal(late, batch_at(tokens, 700, 4, 16, seed=1)[0])
    first, second = (batch_at(tokens, step, 311, 16, seed=0)[0] for step in (0, 1))  # an epoch each
    assert not torch.equal(first, second)


def test_batches_that_cannot_be_made_are_refused() -> None:
    tokens = np.arange(100)
    with pytest.raises(ReflowlensError, match="batch_size 4 does not divide among 3 processes"):
        batch_at(tokens, 0, 4, 8, seed=0, world_size=3)
    with pytest.raises(ReflowlensError, match="must not be negative"):
        batch_at(tokens, 0, 4, 8, seed=-1)
    with pytest.raises(ReflowlensError, match="1 tokens are too few"):
        next(sequential_batches(tokens[:1], 4, 8))


@given(n_tokens=st.integers(2, 300), context=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_sequential_batches_predict_every_token_once(n_tokens: int, context: int, batch_size: int) -> None:
    batches = list(sequential_batches(np.arange(n_tokens, dtype=np.uint16), batch_size, context))
    assert torch.equal(torch.cat([y.flatten() for _, y in batches]), torch.arange(1, n_tokens))
    assert all(torch.equal(y, x + 1) and len(x) <= batch_size for x, y in batches)
    assert all(x.shape[1] == context for x, _ in batches[:-1])


@given(n_tokens=st.integers(2, 300), context=st.integers(1, 40), max_tokens=st.integers(1, 320))
def test_spread_batches_take_whole_blocks_at_equal_distances(n_tokens: int, context: int, max_tokens: int) -> None:
    tokens = np.arange(n_tokens, dtype=np.uint16)
    batches = list(spread_batches(tokens, 3, context, max_tokens))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert all(torch.equal(y, x + 1) and len(x) <= 3 for x, y in batches)
    n_blocks = (n_tokens - 1) // context
    if max_tokens >= n_tokens - 1 or not n_blocks:
        assert torch.equal(targets, torch.arange(1, n_tokens))
        return
    assert len(targets) == max(1, max_tokens // context) * context
    starts = (targets[::context] - 1).numpy()
    assert (starts % context == 0).all()
    gaps = np.diff(np.append(starts, n_blocks * context)) // context  # to the end of the whole blocks too
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_the_whole_stream_when_no_limit_is_given() -> None:
    whole, limited = (
        list(b) for b in (sequential_batches(np.arange(50), 4, 8), spread_batches(np.arange(50), 4, 8, None))
    )
    assert all(
        torch.equal(a, b) for pair, other in zip(whole, limited, strict=True) for a, b in zip(pair, other, strict=True)
    )


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=6), data=st.data())
def test_slices_of_shards_are_slices_of_the_stream(cuts: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(cuts), dtype=np.uint16)
    shards = TokenShards(np.split(whole, np.cumsum(cuts)[:-1]))
    start, stop = (data.draw(st.none() | st.integers(-40, 200)) for _ in range(2))
    part = shards[start:stop]
    assert part.dtype == shards.dtype == np.uint16
    assert np.array_equal(part, whole[start:stop])
    assert shards.shape == whole.shape
    assert np.array_equal(np.asarray(shards), whole)


@given(cuts=st.lists(st.integers(1, 60), min_size=2, max_size=5), step=st.integers(0, 9))
def test_shards_make_the_batches_of_one_stream(cuts: list[int], step: int) -> None:
    whole = np.arange(sum(cuts) + 20, dtype=np.uint32)
    shards = TokenShards(np.split(whole, np.cumsum(cuts)))
    for one, other in zip(batch_at(whole, step, 3, 8, seed=1), batch_at(shards, step, 3, 8, seed=1), strict=True):
        assert torch.equal(one, other)
    for batches in (sequential_batches, lambda tokens, *sizes: spread_batches(tokens, *sizes, 30)):
        for one, other in zip(batches(whole, 3, 8), batches(shards, 3, 8), strict=True):
            assert torch.equal(one[0], other[0])


def test_the_order_never_changes() -> None:
    """A run begun with an earlier version is continued by this one: the first steps' order as it was then."""
    tokens = np.arange(5000, dtype=np.uint16)
    rows = b"".join(batch_at(tokens, step, 4, 16, seed=7)[0].numpy().tobytes() for step in range(100))
    assert hashlib.sha256(rows).hexdigest() == "cea6cf1ca8cc6d3e3bb652ba68e7b4c5fa185e9ddce32db875b4cbdb9fc041bd"
