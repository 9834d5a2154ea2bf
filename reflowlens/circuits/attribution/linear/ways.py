"""Gradients of targets that read one position each, written as sums over the few ways that lead on from there.

A target at position p reaches position k by the stream (k = p) or by one of the heads, with the weight of its pattern
that all targets at p share: that is a sum of one vector a way, whatever the number of positions. One block further down
each way forks again. While they are fewer than the positions it is the vectors that are carried through the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Ways:
    """Σ_way weights[p(target), pos, way] · vectors[way, target], p(target) the position that a target reads.

    Args:
        weights: ``group`` are the positions that are read.
        counts: how many targets, in their order, read each.
    """

    vectors: Float[Tensor, "way target d_model"]
    weights: Float[Tensor, "group pos way"]
    counts: Sequence[int]

    @classmethod
    def at(cls, gradient: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]) -> Ways:
        """Of gradients at one position each, those at the same one beside each other."""
        read, counts = positions.unique_consecutive(return_counts=True)
        weights = gradient.new_zeros(len(read), int(read.max()) + 1, 1)
        weights[torch.arange(len(read), device=read.device), read] = 1.0
        return cls(gradient[None], weights, counts.tolist())

    def stay_few(self, n_heads: int) -> bool:
        """Whether behind another block of heads they are not more than the positions."""
        return len(self.vectors) * (1 + n_heads) <= self.weights.shape[1]

    def through(
        self,
        pattern: Float[Tensor, "head query key"],
        W_O: Float[Tensor, "head d_head d_model"],
        values_back: Float[Tensor, "head d_head d_model"],
    ) -> Ways:
        """Past a block of heads and through each of them."""
        n = self.weights.shape[1]
        z = self.vectors @ W_O.flatten(0, 1).T
        z = rearrange(z, "way target (head d_head) -> head (way target) d_head", head=len(W_O))
        vectors = (z @ values_back).unflatten(1, self.vectors.shape[:2]).flatten(0, 1)
        weights = torch.einsum("hqk,gqw->gkhw", pattern[:, :n, :n], self.weights).flatten(2)
        return Ways(torch.cat([self.vectors, vectors]), torch.cat([self.weights, weights], dim=2), self.counts)

    def dense(self) -> Float[Tensor, "pos target d_model"]:
        """The gradients at every position."""
        n_ways, n_targets, d_model = self.vectors.shape
        out = self.vectors.new_empty(self.weights.shape[1], n_targets * d_model)
        for part, weights in zip(self._columns(), self.weights, strict=True):
            torch.mm(weights, self.vectors.view(n_ways, -1)[:, part], out=out[:, part])
        return out.unflatten(1, (n_targets, d_model))

    def _columns(self) -> Iterator[slice]:
        ends = [self.vectors.shape[2] * end for end in accumulate(self.counts, initial=0)]
        return (slice(*each) for each in pairwise(ends))


@dataclass(frozen=True)
class Within:
    """Gradients of targets that nothing reaches but from one position."""

    gradient: Float[Tensor, "target d_model"]
    position: int


@dataclass(frozen=True)
class Branches:
    """Gradients where blocks read more than the output of the one before.

    Args:
        stream: at that output.
        first: at the first stream, by way of blocks that were passed.
        of_tokens: at the values of tokens, by way of the same.
        earlier: by block, at its output, by way of blocks behind the next one.
    """

    stream: Float[Tensor, "pos target d_model"]
    first: Float[Tensor, "#pos #target #d_model"]
    of_tokens: Float[Tensor, "#pos #target #value"]
    earlier: Mapping[int, Float[Tensor, "pos target d_model"]] = field(default_factory=dict)

    @classmethod
    def of(cls, stream: Float[Tensor, "pos target d_model"]) -> Branches:
        """Of the stream alone."""
        return cls(stream, stream.new_zeros(1, 1, 1), stream.new_zeros(1, 1, 1))

    def at_output(self, block: int) -> Branches:
        """All that leads to the output of a block taken together."""
        earlier = dict(self.earlier)
        more = earlier.pop(block, None)
        return self if more is None else replace(self, stream=self.stream + more, earlier=earlier)


def dense(
    carried: Float[Tensor, "pos target d_model"] | Ways | Within | Branches,
) -> Float[Tensor, "pos target d_model"]:
    """The gradients at every position up to the last, of the stream alone."""
    assert not isinstance(carried, Branches)
    if isinstance(carried, Within):
        zeros = carried.gradient.new_zeros(carried.position, *carried.gradient.shape)
        return torch.cat([zeros, carried.gradient[None]])
    return carried.dense() if isinstance(carried, Ways) else carried
