"""Passes of a model in which some of its activations are others: reconstructions, zeros or means.

Only positions that count (`analyses.features.documents`) are replaced; position 0 keeps what the model says. A pass
ends before the readout, whose logits are formed for a few positions at a time (`analyses.features.predictions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from analyses.features.documents import DocumentBatch
from analyses.features.reconstructors import Reconstructor
from reflowlens.activations.stream import first_unneeded_block
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel


@dataclass(frozen=True, eq=False)
class CleanPass:
    """A pass without replacements: its ``final_stream``, and activations [row, pos, ...] by hook point."""

    stream: Float[Tensor, "row pos d_model"]
    activations: Mapping[str, Tensor]


def activations(model: HookedModel, batch: DocumentBatch, points: Sequence[str]) -> dict[str, Tensor]:
    """Activations [row, pos, ...] of hook points; the pass goes no further than they need.

    Raises:
        ReflowlensError: a point does not exist, or holds NaN or infinite values.
    """
    stop = first_unneeded_block(points)
    return _run(model, batch, points, partial(model, return_type=None, stop_at_layer=stop))[1]


def clean_pass(model: HookedModel, batch: DocumentBatch, points: Sequence[str], writes: Sequence[str]) -> CleanPass:
    """The last stream, what is at some points, and where the blocks begin that hold ``writes``."""
    return CleanPass(*_run(model, batch, [*points, *writes, *map(_begin, writes)], model.final_stream))


def with_one_replaced(
    model: HookedModel, batch: DocumentBatch, clean: CleanPass, point: str, y: Float[Tensor, "n d"]
) -> Float[Tensor, "row pos d_model"]:
    """The last stream when one point holds y: the model runs from the block of this point on, if it can."""
    value = batch.filled(clean.activations[point], y)
    begin = clean.activations[_begin(point)]
    with model.hooks([(point, lambda activation, hook: value)]):
        if model.stages == "whole":
            return model.final_stream(batch.tokens)
        return model(begin, start_at_layer=int(point.split(".")[1]), stop_at_layer=model.cfg.n_layers)


def with_all_constant(
    model: HookedModel, batch: DocumentBatch, values: Mapping[str, Float[Tensor, " d"]]
) -> Float[Tensor, "row pos d_model"]:
    """The last stream when every one of these points holds the same vector at all positions."""
    with model.hooks([(point, partial(_constant, batch, value)) for point, value in values.items()]):
        return model.final_stream(batch.tokens)


def with_all_replaced(
    model: HookedModel, batch: DocumentBatch, reconstructor: Reconstructor
) -> Float[Tensor, "row pos d_model"]:
    """The last stream when every layer writes what its reconstruction says, made of what it reads in this pass."""
    read: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}

    def catch(layer: int, activation: Tensor, hook: HookPoint) -> None:
        read[layer] = batch.within(activation)
        features[layer] = reconstructor.encode(layer, read[layer])

    def write(layer: int, activation: Tensor, hook: HookPoint) -> Tensor:
        return batch.filled(activation, reconstructor.reconstruct(layer, features, read[layer]))

    hooks = []
    for layer, points in enumerate(zip(reconstructor.reads, reconstructor.writes, strict=True)):
        hooks += list(zip(points, (partial(catch, layer), partial(write, layer)), strict=True))
    with model.hooks(hooks):
        return model.final_stream(batch.tokens)


def _constant(batch: DocumentBatch, value: Float[Tensor, " d"], activation: Tensor, hook: HookPoint) -> Tensor:
    return torch.where(batch.counted[..., None], value.to(activation.dtype), activation)


def _begin(point: str) -> str:
    """What the block reads that holds a point."""
    return f"blocks.{point.split('.')[1]}.hook_resid_pre"


def _run(
    model: HookedModel, batch: DocumentBatch, points: Sequence[str], run: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a pass gives, and what is at some points."""
    found, hooks, _ = model.get_caching_hooks(list(dict.fromkeys(points)))
    with model.hooks(hooks):
        stream = run(batch.tokens)
    for point, activation in found.items():
        if not activation.isfinite().all():
            raise ReflowlensError(f"{point!r} holds NaN or infinite values")
    return stream, found
