"""What the matrices of a model's blocks read of a text: second moments, so that packing errs where it matters least."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.parts import Norm
from reflowlens.models.unwrapping import hooked_model

# By the point whose activation is read, times the norm's weight if the point is before it: who reads it.
_READERS = {
    "ln1.hook_normalized": ("attn.W_Q", "attn.W_K", "attn.W_V"),
    "attn.hook_z": ("attn.W_O",),
    "ln2.hook_normalized": ("mlp.W_gate", "mlp.W_in"),
    "mlp.hook_post": ("mlp.W_out",),
}


@torch.no_grad()
def input_grams(model: Any, batches: Iterable[Int[Tensor, "batch pos"]]) -> dict[str, Float[Tensor, "input input"]]:
    """E[xᵀx] of what each matrix of attention and MLPs reads, by its name, in float64.

    Args:
        model: a model whose blocks have attention heads and MLPs.
        batches: rows of tokens, without padding.

    Raises:
        ReflowlensError: the model has no such blocks, or there is no batch.

    Example: ``pack_model(model, 6, method="gptq", grams=input_grams(model, [tokens]))``
    """
    model = hooked_model(model)
    points = [f"blocks.{layer}.{point}" for layer in range(model.cfg.n_layers) for point in _READERS]
    if any(point not in model.hook_dict for point in points):
        raise ReflowlensError(f"a {type(model).__name__} has no blocks of attention heads and MLPs to calibrate")
    sums: dict[str, Tensor] = {}
    count = 0
    for tokens in batches:
        _, cache = model.run_with_cache(tokens, names_filter=points, return_type=None, return_cache_object=False)
        count += tokens.numel()
        for point in points:
            x = _inputs(model, point, cache[point])
            sums[point] = sums.get(point, 0.0) + x.T @ x
    if not count:
        raise ReflowlensError("no text to calibrate with")
    names = dict(model.named_parameters())
    return {
        name: total / count
        for point, total in sums.items()
        for reader in _READERS[point.split(".", 2)[2]]
        if (name := f"blocks.{point.split('.')[1]}.{reader}") in names
    }


def _inputs(model: HookedModel, point: str, activation: Tensor) -> Float[Tensor, "token input"]:
    x = activation.flatten(0, 1).flatten(1).double()
    if point.endswith("hook_normalized"):
        norm = cast(Norm, model.get_submodule(point.rpartition(".")[0]))
        x = x * norm.w.double()
        if norm.b is not None:
            x = x + norm.b.double()
    return x
