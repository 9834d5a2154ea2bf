"""Whether all that the flow does is give the model an output matrix of its own.

The flow's linear part, x + σ(γ) x D U, is read off by E as x is by E + σ(γ) E Uᵀ Dᵀ: it unties the output matrix from
the embedding, by a difference of at most the flow's rank. If the velocity were an affine function of z, so would the
whole flow. How much of the flow's gain stays when the velocity is left out, or is made affine, says how much of it a
model with an output matrix of its own would have.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.experiments.refinement.gates import final_norm, gated, losses, refiners_of
from analyses.experiments.refinement.texts import Losses, Texts, as_frame, mean_by_document
from analyses.experiments.refinement.velocity import ROTATED, AffineMap, Points, halves
from analyses.statistics.draws import derive_seed
from reflowlens.models.base import HookedModel
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.signals import random_rotation

NO_FLOW, WHOLE, LINEAR, VELOCITY_ALONE, AFFINE, ROTATED_LINEAR = (
    "none",
    "flow",
    "linear",
    "velocity",
    "affine",
    f"{ROTATED}_linear",
)


def untied(model: HookedModel, inner: Tensor | None = None) -> Float[Tensor, "d_vocab d_model"]:
    """The output matrix into which the flow's linear part is folded, E + σ(γ) E Uᵀ Mᵀ Dᵀ.

    `inner`: M [flow, flow], what is done between D and U; None: nothing, as the model's own linear part.

    Example: `model.read_final(stream, (untied(model),)).logits()`, of the stream that the flow would read
    """
    own = cast(TTTFlow, model)
    flow, W_E = cast(FlowRefiner, own.flow), cast(Tensor, own.W_E)
    down = flow.W_down if inner is None else flow.W_down @ inner
    return W_E + flow.gate.sigmoid() * (W_E @ flow.W_up.T) @ down.T


@torch.no_grad()
def untying_losses(model: HookedModel, texts: Texts, points: Points, seed: int) -> dict[str, Losses]:
    """Loss of every token without the flow, with it, and with parts of it.

    "linear": read off by the `untied` matrix, without the flow. "velocity": v alone, without z. "affine": z and the
    best affine map of z for v in the sense of least squares, fitted on the other half of the texts. "rotated_linear":
    the linear part with a random rotation in the middle, which changes no singular value of D or of U.

    `points`: `velocity.visited` of the same texts.
    """
    flow = cast(FlowRefiner, refiners_of(model)[1])
    v, (even, odd) = flow.velocity(points.z), halves(points.text)
    of_even, of_odd = (AffineMap.fitted(points.z[other], v[other]) for other in (odd, even))
    rotation = random_rotation(flow.W_up.shape[0], derive_seed(seed, ROTATED)).to(flow.W_up)
    matrices = {LINEAR: untied(model), ROTATED_LINEAR: untied(model, rotation)}
    parts = (NO_FLOW, WHOLE, LINEAR, VELOCITY_ALONE, AFFINE, ROTATED_LINEAR)
    out = {part: np.zeros(texts.tokens.shape) for part in parts}
    for rows, tokens, targets in texts.batches():
        x = gated(model, final_norm(model, tokens), flow=False)
        z = x @ flow.W_down
        is_even = torch.as_tensor(rows % 2 == 0, device=z.device)[:, None, None]
        ends = {VELOCITY_ALONE: flow.velocity(z), WHOLE: z + flow.velocity(z)}
        ends[AFFINE] = z + of_even(z).where(is_even, of_odd(z))
        found = {
            part: losses(model, x + flow.gate.sigmoid() * (end @ flow.W_up), targets) for part, end in ends.items()
        }
        found[NO_FLOW] = losses(model, x, targets)
        for part, matrix in matrices.items():
            found[part] = cast(TTTFlow, model).read_final(x, (matrix,)).losses(targets).double().cpu().numpy()
        for part, own in found.items():
            out[part][rows, : tokens.shape[1]] = own
    return out


def untying_frame(loss: dict[str, Losses], texts: Texts, seed: int) -> pd.DataFrame:
    """A row a part of the flow: what it takes off the loss without the flow, nats a token, and over which intervals.

    `share`, `share_low`, `share_high`: of what the whole flow takes off; NaN where that is nothing.
    """
    gains = {part: (loss[NO_FLOW] - own).sum(axis=1) for part, own in loss.items() if part != NO_FLOW}
    frame = as_frame(mean_by_document(gains, texts.lengths, seed), "part")
    whole = gains[WHOLE]
    if whole.sum() <= 0:
        return frame.assign(share=np.nan, share_low=np.nan, share_high=np.nan)
    shares = as_frame(mean_by_document(gains, whole, seed), "part")
    return frame.assign(share=shares["value"], share_low=shares["low"], share_high=shares["high"])
