"""Arithmetic that 16 bits, infinities and autocast would spoil."""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix


def dense(matrix: Tensor | FactoredMatrix) -> Tensor:
    """A matrix as one: the product of its factors, where it has them."""
    return matrix if isinstance(matrix, Tensor) else cast(Tensor, matrix.AB)


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what sums over many entries is not left to 16 bits."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def all_finite(*tensors: Tensor) -> bool:
    """Whether there is neither an infinity nor NaN; taken for granted in a compiled graph, which asking would break."""
    if torch.compiler.is_compiling() or any(x.is_meta for x in tensors):
        return True
    # One pass over the numbers; a sum that overflows sends its caller the longer way, to the same result.
    return math.isfinite(sum(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors))


def only_finite(x: Tensor) -> bool:
    """Whether there is neither an infinity nor NaN, told from the extremes: without a copy, or a sum that overflows."""
    return x.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(x))


def weighted_sum(
    weights: Float[Tensor, "*batch query key"], values: Float[Tensor, "*#batch key feature"]
) -> Float[Tensor, "*batch query feature"]:
    """``weights @ values``, to which a key of weight 0 adds nothing even if its values are infinite or NaN.

    In a product they would: 0 · inf is NaN, and one position's overflow would reach the positions before it.
    """
    if all_finite(values):
        return weights @ values
    sign, infinity = wide(weights.sign()), wide(values.sign().where(values.isinf(), 0.0))
    either, balance = sign.abs() @ infinity.abs(), sign @ infinity
    unknown = sign.abs() @ values.isnan().to(sign)
    out = weights @ values.where(values.isfinite(), 0.0)
    for reached, value in ((either + balance, torch.inf), (either - balance, -torch.inf), (unknown, torch.nan)):
        out = out + torch.zeros_like(out).masked_fill(reached > 0, value)
    return out


def without_autocast(x: Tensor) -> torch.autocast:
    """Products in the types of their factors, on a tensor's device: autocast is for passes, not for what reads them."""
    return torch.autocast(x.device.type, enabled=False)
