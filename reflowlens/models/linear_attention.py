"""Linear attention: a position finds Σ_{s<t} <q_t, q_s> x_s, so that of earlier positions their sum is enough.

The sum has three forms that agree:

==========  ==========================================  ==============================================================
square      scores [pos, pos] times x                   short texts, packed texts, and when the scores are hooked
chunked     squares of a few positions, and between     long texts
            them the state ρ = Σ_s q_sᵀ x_s
recurrent   a chunk a pass, ρ kept in between           generation: a byte costs the same wherever it stands
==========  ==========================================  ==============================================================
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.models.numerics import weighted_sum
from reflowlens.models.products import products


class Alikeness(torch.autograd.Function):
    """``q qᵀ``, whose gradient takes one product, (G + Gᵀ) q, where that of two different factors takes two."""

    @staticmethod
    def forward(ctx: Any, q: Float[Tensor, "*batch pos neuron"]) -> Float[Tensor, "*batch pos pos"]:
        ctx.save_for_backward(q)
        return products(q, q.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*batch pos pos"]) -> Float[Tensor, "*batch pos neuron"]:
        (q,) = ctx.saved_tensors
        return products((gradient + gradient.mT).to(q.dtype), q)


def attend_in_chunks(
    q: Float[Tensor, "batch head pos neuron"],
    x: Float[Tensor, "batch pos d_model"],
    chunk: int,
    state: Float[Tensor, "batch head neuron d_model"] | None = None,
) -> tuple[Float[Tensor, "batch head pos d_model"], Float[Tensor, "batch head neuron d_model"]]:
    """Σ_{s<t} <q_t, q_s> x_s a chunk at a time, what lies before it in the state.

    Args:
        state: Σ q_sᵀ x_s of earlier positions; without gradients it is updated in place.

    Returns:
        The sums, and the state after the last position.
    """
    parts = []
    for here, values in zip(q.split(chunk, dim=2), x[:, None].split(chunk, dim=2), strict=True):
        if state is None:
            out = weighted_sum(products(here, here.mT).tril(-1), values)
            state = x.new_zeros(*q.shape[:2], q.shape[3], x.shape[2])
        else:
            out = products(here, state.to(here.dtype))
            if here.shape[2] > 1:  # one position, as where text is generated, has none of its own chunk before it
                out = out + weighted_sum(products(here, here.mT).tril(-1), values)
        parts.append(out)
        state = remembered(state, here, values.expand(-1, q.shape[1], -1, -1))
    assert state is not None  # a text has one position at least
    return torch.cat(parts, dim=2), state


def remembered(
    state: Float[Tensor, "batch head neuron d_model"],
    q: Float[Tensor, "batch head pos neuron"],
    x: Float[Tensor, "batch head pos d_model"],
) -> Float[Tensor, "batch head neuron d_model"]:
    """``state + qᵀ x``, in the state's precision; the sum goes into its memory where no gradient needs the old one."""
    with torch.autocast(q.device.type, enabled=False):
        keys, values = q.to(state.dtype).mT.flatten(0, 1), x.to(state.dtype).flatten(0, 1)
        flat = state.flatten(0, 1)
        total = flat.baddbmm(keys, values) if torch.is_grad_enabled() else flat.baddbmm_(keys, values)
        return total.unflatten(0, state.shape[:2])


def chunks_are_cheaper(n_positions: int, n_neurons: int, d_model: int) -> bool:
    """Whether chunks of d_model positions take fewer multiplications than the square of all of them."""
    square = n_positions * (n_neurons + d_model)
    return n_positions > d_model and d_model * (n_neurons + d_model) + 2 * n_neurons * d_model < square
