"""The same function in other coordinates: a model's weights with its signals, or its residual stream, rotated.

A view (:func:`reflowlens.signals.rotate`) rotates what is read off a model; here the weights themselves are rotated,
for training to go on from: does an optimiser single out axes again, once those that it had chosen are gone?
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import Norm

_READERS = ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in", "mlp.W_gate", "unembed.W_U")
_WRITERS = (
    *("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"),
    *("embed.W_E", "embed.W_basis", "pos_embed.W_pos"),
)


@torch.no_grad()
def rotate_signals(model: HookedModel, rotation: Float[Tensor, "S S"]) -> HookedModel:
    """A copy of a reFlow with the recipe R Q and the basis Qᵀ B: the same embedding, other signals.

    Args:
        rotation: Q, orthogonal; not checked beyond its shape.

    Raises:
        ReflowlensError: the model has no signals of its own, or computes its recipe from the stored one (ReLU and top-k
            do not commute with a rotation), or the rotation is not [S, S].

    Example: ``rotate_signals(model, random_rotation(model.cfg.n_signals, seed=0))``
    """
    if not isinstance(model.W_E, FactoredMatrix) or not model.recipe_is_stored:
        raise ReflowlensError(
            f"a {type(model).__name__} has no signals that can be rotated: take a reFlow with dense ones"
        )
    _check(rotation, "S", model.cfg.n_signals or 0)
    rotated = copy.deepcopy(model)
    weights = dict(rotated.named_parameters())
    recipe, basis = weights["embed.W_recipe"], weights["embed.W_basis"]
    Q = rotation.to(recipe)
    recipe.copy_(recipe @ Q)
    basis.copy_(Q.T @ basis)
    return rotated


@torch.no_grad()
def rotate_stream(model: HookedModel, rotation: Float[Tensor, "d_model d_model"]) -> HookedModel:
    """A copy of a decoder whose residual stream is x Q where the model's is x: whatever reads or writes it is rotated.

    Args:
        rotation: Q, orthogonal; not checked beyond its shape.

    Raises:
        ReflowlensError: the model is not a decoder with RMSNorm whose weights are one number a norm (as
            ``optimizer.freeze_norms`` leaves them): other norms do not commute with a rotation. Or the rotation is not
            [d_model, d_model].

    Example: ``rotate_stream(model, random_rotation(model.cfg.d_model, seed=0))``
    """
    if not isinstance(model, Decoder) or not all(map(_commutes, _norms_of_stream(model))):
        raise ReflowlensError(
            f"the stream of this {type(model).__name__} cannot be rotated: only a decoder with RMSNorm whose weights "
            "are one number a norm computes the same then; train it with optimizer.freeze_norms = true"
        )
    _check(rotation, "d_model", model.cfg.d_model)
    rotated = copy.deepcopy(model)
    for name, weight in rotated.named_parameters():
        Q = rotation.to(weight)
        if name.endswith(_READERS):
            weight.copy_(Q.T @ weight)
        elif name.endswith(_WRITERS):
            weight.copy_(weight @ Q)
    return rotated


def _norms_of_stream(model: HookedModel) -> list[Norm]:
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, Norm)]
    return [norm for name, norm in norms if not name.endswith(("attn.q_norm", "attn.k_norm"))]


def _commutes(norm: Norm) -> bool:
    return not norm.centered and norm.b is None and bool((norm.w == norm.w[0]).all())


def _check(rotation: Tensor, axis: str, size: int) -> None:
    if not isinstance(rotation, Tensor) or rotation.shape != (size, size):
        got = list(rotation.shape) if isinstance(rotation, Tensor) else repr(rotation)
        raise ReflowlensError(f"this rotation is a matrix [{axis}, {axis}], {axis}={size}, got {got}")
