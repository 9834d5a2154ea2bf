"""Few active features of many: encoding and decoding whose gradients touch the active rows alone.

Of F features a position has about k ≪ F active ones. Which they are has to be found among all F, by one matrix product
without a gradient; everything after it, both gradients included, is a sum over the k. A dense product spends F/k times
the work on zeros: of the six products of a step (encoder and decoder, forward and for two gradients each) one is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.products import product

_POSITIONS_AT_ONCE = 512  # whose pre-activations of all features are held


@dataclass(frozen=True)
class Active:
    """Which features are active where: pairs (position, feature), position after position.

    Args:
        feature, position: of each pair.
        n_positions, n_features: how many there are in all.
    """

    feature: Int[Tensor, " pair"]
    position: Int[Tensor, " pair"]
    n_positions: int
    n_features: int

    @cached_property
    def offsets(self) -> Int[Tensor, " position"]:
        """Where the pairs of each position begin."""
        return _starts(self.position, self.n_positions)

    @cached_property
    def by_feature(self) -> Int[Tensor, " pair"]:
        """The order that brings the pairs of a feature together."""
        return self.feature.argsort(stable=True)

    @cached_property
    def feature_offsets(self) -> Int[Tensor, " feature"]:
        """Where the pairs of each feature begin in that order."""
        return _starts(self.feature, self.n_features)


@torch.no_grad()
def largest(
    x: Float[Tensor, "position d_in"],
    W_enc: Float[Tensor, "feature d_in"],
    b_enc: Float[Tensor, " feature"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Active:
    """The k features of each position with the largest pre-activations.

    Args:
        dtype: in which pre-activations are compared: in bfloat16, where that is fast, two that differ by less than
            1/256 may change places. The activations themselves are computed anew, by :func:`encode`.
    """
    feature = _candidates(x, W_enc, b_enc, k, dtype)[1].flatten()
    position = torch.arange(len(x), device=x.device).repeat_interleave(k)
    return Active(feature, position, len(x), len(W_enc))


@torch.no_grad()
def largest_of_batch(
    x: Float[Tensor, "position d_in"],
    W_enc: Float[Tensor, "feature d_in"],
    b_enc: Float[Tensor, " feature"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Active:
    """The k · n_positions largest pre-activations of a batch: k a position on average, and at most 4 k."""
    values, features = _candidates(x, W_enc, b_enc, min(4 * k, len(W_enc)), dtype)
    kept = values.flatten().topk(k * len(x), sorted=False).indices.sort().values
    position = kept.div(values.shape[1], rounding_mode="floor")
    return Active(features.flatten()[kept], position, len(x), len(W_enc))


def encode(
    x: Float[Tensor, "position d_in"],
    W_enc: Float[Tensor, "feature d_in"],
    b_enc: Float[Tensor, " feature"],
    active: Active,
) -> Float[Tensor, " pair"]:
    """Pre-activations ``x W_encᵀ + b_enc`` of the active features; gradients for both parameters, none for x."""
    return _Encode.apply(x, W_enc, active) + _Gather.apply(b_enc, active)


def decode(
    value: Float[Tensor, " pair"], W_dec: Float[Tensor, "feature d_out"], active: Active
) -> Float[Tensor, "position d_out"]:
    """What features of these activations write: ``a W_dec`` with a zero wherever nothing is active."""
    return _Decode.apply(value, W_dec, active)


def dense(value: Float[Tensor, " pair"], active: Active) -> Float[Tensor, "position feature"]:
    """The activations as a matrix."""
    zeros = value.new_zeros(active.n_positions, active.n_features)
    return zeros.index_put((active.position, active.feature), value)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, active: Active) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(x)
        return _products(x, W_enc, active)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, _rows(gradients[0], x, ctx.active), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, W_dec: Tensor, active: Active) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(value, W_dec)
        return F.embedding_bag(active.feature, W_dec, active.offsets, per_sample_weights=value, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        value, W_dec = ctx.saved_tensors
        (gradient,) = gradients
        for_value = _products(gradient.contiguous(), W_dec, ctx.active) if ctx.needs_input_grad[0] else None
        return for_value, _rows(value, gradient, ctx.active) if ctx.needs_input_grad[1] else None, None


class _Gather(torch.autograd.Function):
    """A bias of each pair's feature; a plain index would add up its gradient pair by pair."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, active: Active) -> Tensor:
        ctx.active = active
        return b[active.feature]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        active = ctx.active
        summed = torch.bincount(active.feature, weights=gradients[0], minlength=active.n_features)
        return summed.to(gradients[0].dtype), None


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and places of each position's k largest pre-activations, some positions at a time."""
    x, rows, b = x.to(dtype), W_enc.to(dtype).T, b_enc.to(dtype)
    chunks = [product(part, rows).add_(b).topk(k, dim=1, sorted=False) for part in x.split(_POSITIONS_AT_ONCE)]
    return torch.cat([chunk.values for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks])


def _products(vectors: Float[Tensor, "position d"], rows: Float[Tensor, "feature d"], active: Active) -> Tensor:
    """Of each pair, the product of its position's vector with its feature's row: how a weighted sum of rows, multiplied
    with the vectors, changes with the weights."""
    with torch.enable_grad():
        weights = torch.zeros(len(active.feature), dtype=rows.dtype, device=rows.device, requires_grad=True)
        summed = F.embedding_bag(active.feature, rows.detach(), active.offsets, per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(summed, weights, vectors.to(rows.dtype))[0]


def _rows(weight: Float[Tensor, " pair"], vectors: Float[Tensor, "position d"], active: Active) -> Tensor:
    """Of each feature, the sum of its positions' vectors, each times the pair's weight [feature, d]."""
    order = active.by_feature
    return F.embedding_bag(
        active.position[order], vectors, active.feature_offsets, per_sample_weights=weight[order], mode="sum"
    )


def _starts(sorted_or_not: Int[Tensor, " pair"], n: int) -> Int[Tensor, " n"]:
    counts = torch.bincount(sorted_or_not, minlength=n)
    return counts.cumsum(0) - counts
