"""Positions of tokens within their texts: one text per row, or several packed into one."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Positions: TypeAlias = "slice | Int[Tensor, 'batch pos']"


class Places(NamedTuple):
    """Where the tokens of a pass stand in their texts, and which keys each may look at (None: all up to itself)."""

    positions: Positions
    mask: Bool[Tensor, "batch 1 query_pos key_pos"] | None = None


def packed_places(segments: Int[Tensor, "batch pos"]) -> Places:
    """Places of texts packed into rows: a run of equal ids is a text, which attends to itself alone, from position 0.

    >>> packed_places(torch.tensor([[5, 5, 5, 7, 7]])).positions
    tensor([[0, 1, 2, 0, 1]])
    """
    starts = segments != segments.roll(1, dims=1)
    starts[:, 0] = True
    text = starts.cumsum(dim=1)
    index = torch.arange(segments.shape[1], device=segments.device)
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    return Places(positions, (text[:, :, None] == text[:, None, :]).tril()[:, None])
