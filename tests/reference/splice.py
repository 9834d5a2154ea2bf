"""A dictionary in a model by two plain hooks a layer, everything recomputed: what splicing one in has to equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel

Edit = Callable[[int, Tensor], Tensor]


def unedited(layer: int, features: Tensor) -> Tensor:
    return features


def by_hand(
    model: HookedModel, dictionary: Dictionary, tokens: Any, edit: Edit = unedited, error: bool = True, **kwargs: Any
) -> tuple[Tensor, list[Tensor]]:
    """What the model returns when ``edit(layer, features)`` stands in for the features, and these of every layer.

    What was attached to the model before acts first, so that reads see it and writes do not.
    """
    cfg, state = dictionary.cfg, dictionary.state_dict()
    read: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []

    def on_read(x: Tensor, hook: Any) -> None:
        layer = cfg.reads.index(hook.name)
        read.append(x)
        before.append(
            encoded(
                cfg.activation,
                cfg.k,
                {key: state[f"layers.{layer}.{key}"] for key in KEYS if f"layers.{layer}.{key}" in state},
                x,
            )
        )
        after.append(edit(layer, before[-1]))

    def on_write(y: Tensor, hook: Any) -> Tensor:
        layer = cfg.writes.index(hook.name)
        new, old = (reconstructed(layer, features) for features in (after, before))
        return new + (y - old) if error else new

    def reconstructed(layer: int, features: list[Tensor]) -> Tensor:
        total = state[f"layers.{layer}.b_dec"].expand(*features[0].shape[:2], -1)
        if cfg.skip:
            total = total + torch.einsum("bpi,oi->bpo", read[layer], state[f"layers.{layer}.W_skip"])
        for source in range(layer + 1) if cfg.cross_layer else [layer]:
            decoder = state[f"layers.{source}.W_dec"][:, layer - source]
            total = total + torch.einsum("bpf,fo->bpo", features[source], decoder)
        return total

    hooks = []
    for point, other in zip(cfg.reads, cfg.writes, strict=True):
        hooks += [(point, on_read), (other, on_write)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs), before


KEYS = ("W_enc", "b_enc", "threshold")


def encoded(activation: str, k: int | None, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = torch.einsum("bpi,fi->bpf", x, weights["W_enc"]) + weights["b_enc"]
    if activation in ("jumprelu", "batchtopk"):
        return torch.where((pre > weights["threshold"]) & (pre > 0), pre, 0.0)
    if activation == "relu":
        return pre.clamp(min=0)
    kth = pre.sort(dim=-1, descending=True).values[..., k - 1 : k]
    return torch.where((pre >= kth) & (pre > 0), pre, 0.0)
