"""The same sweep as nnsight batches it: each cell an invoke, the invokes of a layer one trace, which is one pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.base import HookedModel


def has_nnsight() -> bool:
    """Whether it is installed: ``pip install reflowlens[bench]``."""
    return importlib.util.find_spec("nnsight") is not None


def nnsight_resid_pre(
    model: HookedModel,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    read: Callable[[Float[Tensor, "prompt pos d_vocab"]], Float[Tensor, " prompt"]],
) -> Float[Tensor, "layer pos prompt"]:
    """Activation patching of what each block reads at each position.

    Args:
        read: the metric of a run's logits.
    """
    traced, layers, positions = _traced(model), range(model.cfg.n_layers), range(corrupted.shape[1])
    streams: list[Any] = []
    with traced.trace(clean):
        for layer in layers:
            streams.append(traced.blocks[layer].input.save())
    values = []
    for layer in layers:
        found: list[Any] = [None] * len(positions)
        with traced.trace() as tracer:
            for position in positions:
                with tracer.invoke(corrupted):
                    traced.blocks[layer].input[:, position] = streams[layer][:, position]
                    found[position] = cast(Any, read(traced.output)).save()  # nnsight gives tensors this
        values.append(torch.stack(found))
    return torch.stack(values)


def _traced(model: HookedModel) -> Any:
    """The model as nnsight has it; prompts of several invokes are put together as rows of one batch."""
    from nnsight import NNsight

    class Batched(NNsight):  # type: ignore[misc, unused-ignore]
        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            return len(inputs[0]) if inputs else 0

        def _batch(self, invokes: Sequence[Any], fn: Any) -> Any:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}

    return Batched(model)
