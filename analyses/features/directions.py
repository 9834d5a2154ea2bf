"""What features write: the tokens that they promote on the direct path, and the features that point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.layers import FeatureLayer

_AT_ONCE = 2**24  # entries of a matrix


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """The tokens whose logits rise and fall most with each feature, strongest first, and by how much."""

    promoted: Int[Tensor, "feature k"]
    rise: Float[Tensor, "feature k"]
    suppressed: Int[Tensor, "feature k"]
    fall: Float[Tensor, "feature k"]


@torch.no_grad()
def token_effects(layer: FeatureLayer, k: int, n_tokens: int) -> TokenEffects | None:
    """The k tokens at either end of what a feature adds to the logits by itself; None of units that write nothing."""
    if layer.promote is None:
        return None
    parts = []
    for features in torch.arange(layer.n_features).split(max(1, _AT_ONCE // n_tokens)):
        logits = layer.promote(features)
        rise, promoted = logits.topk(min(k, n_tokens))
        fall, suppressed = logits.topk(min(k, n_tokens), largest=False)
        parts.append((promoted.cpu(), rise.cpu(), suppressed.cpu(), fall.cpu()))
    return TokenEffects(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Near:
    """The features with the largest cosine of directions: the layer's own first, then those of other layers."""

    layer: Int[Tensor, "feature k"]
    index: Int[Tensor, "feature k"]
    cosine: Float[Tensor, "feature k"]


@torch.no_grad()
def nearest_features(layers: Sequence[FeatureLayer], within: int, across: int) -> list[Near | None]:
    """For each layer the nearest features of each of its features; None where units write nothing.

    Args:
        within, across: how many of the same layer and of all others; fewer where there are no more.
    """
    units = [None if layer.directions is None else F.normalize(layer.directions.float(), dim=-1) for layer in layers]
    return [None if own is None else _nearest(number, own, units, within, across) for number, own in enumerate(units)]


def _nearest(
    number: int,
    own: Float[Tensor, "feature d"],
    units: Sequence[Float[Tensor, "feature d"] | None],
    within: int,
    across: int,
) -> Near:
    others = [(i, directions) for i, directions in enumerate(units) if directions is not None and i != number]
    owner = torch.cat([torch.full((len(d),), i) for i, d in others]) if others else torch.zeros(0, dtype=torch.long)
    place = torch.cat([torch.arange(len(d)) for _, d in others]) if others else owner
    rest = torch.cat([d for _, d in others]) if others else own[:0]
    parts = []
    for features in torch.arange(len(own)).split(max(1, _AT_ONCE // max(len(rest), len(own)))):
        cosine = own[features] @ own.T
        cosine[torch.arange(len(features)), features] = -torch.inf  # itself
        near, index = cosine.topk(min(within, len(own) - 1))
        far, behind = (own[features] @ rest.T).topk(min(across, len(rest)))
        near, index, far, behind = (part.cpu() for part in (near, index, far, behind))
        layer = torch.cat([torch.full_like(index, number), owner[behind]], dim=1)
        parts.append((layer, torch.cat([index, place[behind]], dim=1), torch.cat([near, far], dim=1)))
    return Near(*(torch.cat(part) for part in zip(*parts, strict=True)))
