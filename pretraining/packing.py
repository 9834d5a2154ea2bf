"""Several examples in one row of a batch, each a segment that the others do not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pretraining.sft import Example
from reflowlens.models.loss import IGNORE

PADDING = -1  # a segment id


class Batch(NamedTuple):
    """Packed rows: what is read, what each position should predict (-100: nothing), which example it belongs to."""

    tokens: Int[Tensor, "batch context"]
    targets: Int[Tensor, "batch context"]
    segments: Int[Tensor, "batch context"]


def pack(examples: Sequence[Example], context: int) -> list[list[Example]]:
    """Rows of at most ``context`` positions: each example, in the order given, joins the first that has room for it."""
    rows: list[list[Example]] = []
    room = np.full(len(examples), context)
    for example in examples:
        row = int(np.argmax(room[: len(rows) + 1] >= example.positions))
        room[row] -= example.positions
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
    return rows


def shuffled_rows(examples: Sequence[Example], context: int, seed: Sequence[int]) -> list[list[Example]]:
    """All examples, packed in an order that the seed draws.

    First fit fills the early rows best, so the rows are shuffled once more: every step has its share of the others.
    """
    generator = np.random.default_rng(list(seed))
    rows = pack([examples[i] for i in generator.permutation(len(examples))], context)
    return [rows[i] for i in generator.permutation(len(rows))]


def to_batch(rows: Sequence[Sequence[Example]], context: int) -> Batch:
    """Rows of examples as tensors; what is left of a row is padding, a segment of its own that predicts nothing."""
    tokens = np.zeros((len(rows), context), dtype=np.int64)
    targets, segments = np.full_like(tokens, IGNORE), np.full_like(tokens, PADDING)
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples):
            place = row, slice(start, start + example.positions)
            tokens[place] = example.tokens[:-1]
            targets[place] = np.where(example.counted[1:], example.tokens[1:], IGNORE)
            segments[place] = segment
            start += example.positions
    return Batch(*map(torch.from_numpy, (tokens, targets, segments)))
