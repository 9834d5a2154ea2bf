"""What a dictionary minimises: the squared error of every layer, and where no k holds features down, a penalty.

Inputs and targets come scaled so that E‖·‖² is their width; a squared error of 1 a component is then that of saying
nothing but zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretraining.dictionaries.config import DictionarySpec
from reflowlens.dictionaries.config import WITH_K
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.dictionaries.sparse import decode, encode, largest, largest_of_batch

AUX_WEIGHT = 1 / 32


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a batch gave.

    Args:
        objective: to be minimised.
        squared_error: Σ‖y - ŷ‖² of each layer.
        n_active: active features of each layer, over all positions.
        fired: which features of each layer were active at all.
        smallest: of each layer, the smallest activation that was kept (0 where nothing was).
        errors: y - ŷ of each layer, without gradients.
    """

    objective: Float[Tensor, ""]
    squared_error: list[float]
    n_active: list[int]
    fired: list[Bool[Tensor, " feature"]]
    smallest: list[float]
    errors: list[Float[Tensor, "position d_out"]]


@dataclass(frozen=True, eq=False)
class LayerOutcome:
    """What the features of one layer do on a batch."""

    written: Float[Tensor, "position reach d_out"]
    penalty: Float[Tensor, ""] | float
    n_active: int
    fired: Bool[Tensor, " feature"]
    smallest: float


def evaluate_objective(
    dictionary: Dictionary,
    spec: DictionarySpec,
    x: Sequence[Float[Tensor, "position d_in"]],
    y: Sequence[Float[Tensor, "position d_out"]],
    *,
    penalty_weight: float,
    dead: Sequence[Int[Tensor, " dead"]],
    dtype: torch.dtype = torch.float32,
) -> Outcome:
    """The objective of a batch and what is recorded of it.

    Args:
        x, y: what each layer reads and should write, scaled.
        penalty_weight: of the penalty; unused where there is a k.
        dead: features of each layer that have not fired for long. Where there is a k, the d_out / 2 largest of them
            reconstruct what is left of their layer's error, with weight 1/32 (AuxK: Gao et al., 2024).
        dtype: in which pre-activations are compared.
    """
    layers = dictionary.each_layer()
    of_layers = [
        (_sparse if spec.activation in WITH_K else _dense)(layer, spec, read, dtype)
        for layer, read in zip(layers, x, strict=True)
    ]
    objective: Any = 0.0
    errors = []
    for l, (layer, read, target) in enumerate(zip(layers, x, y, strict=True)):  # noqa: E741 (a layer)
        said = layer.constant(read)
        for source in range(0 if dictionary.cfg.cross_layer else l, l + 1):
            said = said + of_layers[source].written[:, l - source]
        error = target - said
        errors.append(error.detach())
        objective = objective + error.square().mean()
        if spec.activation in WITH_K and len(dead[l]):
            objective = objective + AUX_WEIGHT * _revival(layer, read, error.detach(), dead[l])
    if spec.activation not in WITH_K:
        objective = objective + penalty_weight * sum(outcome.penalty for outcome in of_layers)
    return Outcome(
        objective,
        [float(error.square().sum()) for error in errors],
        [outcome.n_active for outcome in of_layers],
        [outcome.fired for outcome in of_layers],
        [outcome.smallest for outcome in of_layers],
        errors,
    )


def _sparse(
    layer: DictionaryLayer, spec: DictionarySpec, x: Float[Tensor, "position d_in"], dtype: torch.dtype
) -> LayerOutcome:
    choose = largest if spec.activation == "topk" else largest_of_batch
    active = choose(x, layer.W_enc.detach(), layer.b_enc.detach(), spec.k, dtype)
    value = encode(x, layer.W_enc, layer.b_enc, active).relu()
    written = decode(value, layer.W_dec.flatten(1), active).unflatten(1, layer.W_dec.shape[1:])
    positive = value.detach() > 0
    fired = torch.bincount(active.feature[positive], minlength=active.n_features) > 0
    smallest = float(value.detach()[positive].min()) if bool(positive.any()) else 0.0
    return LayerOutcome(written, 0.0, int(positive.sum()), fired, smallest)


def _dense(
    layer: DictionaryLayer, spec: DictionarySpec, x: Float[Tensor, "position d_in"], dtype: torch.dtype
) -> LayerOutcome:
    before = layer.preactivations(x)
    value = before.relu() if layer.threshold is None else _Jump.apply(before, layer.threshold, spec.bandwidth)
    written = (value @ layer.W_dec.flatten(1)).unflatten(1, layer.W_dec.shape[1:])
    weighted = value * layer.W_dec.flatten(1).norm(dim=1)
    penalty = weighted if spec.penalty == "l1" else (spec.sharpness * weighted).tanh()
    is_active = value.detach() > 0
    return LayerOutcome(written, penalty.sum(1).mean(), int(is_active.sum()), is_active.any(0), 0.0)


def _revival(
    layer: DictionaryLayer, x: Float[Tensor, "position d_in"], error: Tensor, dead: Int[Tensor, " dead"]
) -> Float[Tensor, ""]:
    """Which share of an error dead features leave."""
    before = (x @ layer.W_enc[dead].T + layer.b_enc[dead]).relu()
    kept = before.topk(min(error.shape[1] // 2, len(dead)), dim=1)
    value = torch.zeros_like(before).scatter(1, kept.indices, kept.values)
    left = error - value @ layer.W_dec[dead, 0]
    return left.square().mean() / error.square().mean().clamp_min(1e-12)


class _Jump(torch.autograd.Function):
    """z·1[z > θ] with θ > 0, which learns through a rectangle of a bandwidth around it (Rajamanoharan et al., 2024)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = (z - threshold).abs() < ctx.bandwidth / 2
        for_threshold = -(threshold / ctx.bandwidth) * (gradient * near).sum(0)
        return gradient * (z > threshold), for_threshold, None
