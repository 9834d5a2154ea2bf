"""Activations of a model over a round of document windows, shuffled: what dictionaries are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from pretraining.dictionaries.documents import Windows, padded_batches
from pretraining.machine import autocast
from pretraining.token_files import TokenStream
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

_ROWS = 32  # windows of a forward pass


def n_vectors(windows: Windows) -> int:
    """How many positions of some windows are harvested: all but each one's first, which attends to itself alone."""
    return int((windows.length - 1).sum())


@torch.no_grad()
def harvest(
    model: HookedModel,
    tokens: TokenStream,
    windows: Windows,
    points: Sequence[str],
    *,
    seed: Sequence[int],
    dtype: str = "float32",
) -> dict[str, Float[Tensor, "n d"]]:
    """What hook points hold at every position of some windows but the first and the padding, in an order drawn.

    Args:
        points: names of hook points [batch, pos, d]; one pass serves them all.
        seed: of the order, which is the same for all points.
        dtype: ``"bfloat16"`` runs the pass under autocast and keeps the activations so.

    Raises:
        ReflowlensError: an activation is not finite.
    """
    order = torch.from_numpy(np.random.default_rng(list(seed)).permutation(n_vectors(windows)))
    kept: dict[str, Tensor] = {}
    done = 0
    device = next(model.parameters()).device
    stop = max((int(p.split(".")[1]) + 1 for p in points if p.startswith("blocks.")), default=0)
    stop_at_layer = stop if all(p.startswith("blocks.") for p in points) else None
    for batch, lengths, _ in padded_batches(tokens, windows, _ROWS):
        counted = (torch.arange(batch.shape[1]) < lengths[:, None]).index_fill(1, torch.tensor([0]), False)
        places = order[done : done + int(counted.sum())]
        hooks = [(point, partial(_keep, kept, places, counted, len(order), dtype)) for point in points]
        with autocast(device, dtype), model.hooks(hooks):
            model(batch.to(device), return_type=None, stop_at_layer=stop_at_layer)
        done += len(places)
    return kept


def batches(
    activations: dict[str, Float[Tensor, "n d"]], size: int, first: int = 0
) -> Iterator[dict[str, Float[Tensor, "size d"]]]:
    """A harvest in parts of ``size`` vectors, in float32; what is left over at its end is left out."""
    n = len(next(iter(activations.values())))
    for start in range(first * size, n - size + 1, size):
        yield {name: part[start : start + size].float() for name, part in activations.items()}


def _keep(
    kept: dict[str, Tensor],
    places: Tensor,
    counted: Tensor,
    n: int,
    dtype: str,
    activation: Tensor,
    hook: HookPoint,
) -> None:
    x = activation[counted.to(activation.device)]
    if not torch.isfinite(x).all():
        raise ReflowlensError(f"the model's activations at {hook.name!r} are not finite: no dictionary can be fitted")
    name = str(hook.name)
    if name not in kept:
        kept[name] = torch.empty(n, x.shape[-1], dtype=getattr(torch, dtype), device=x.device)
    kept[name][places.to(x.device)] = x.to(kept[name].dtype)
