"""What each refiner adds to the logits before the cap, and how long a step the flow should take."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.experiments.refinement.gates import final_norm, losses, refiners_of
from analyses.experiments.refinement.texts import Losses, Texts
from reflowlens.models.base import HookedModel
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.ttt_flow import TTTFlow

STREAM, TTT, LINEAR, VELOCITY = "stream", "ttt", "flow_linear", "flow_velocity"
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
SUBSTEPS = (2, 4, 8)


def parts_of_stream(
    model: HookedModel, x: Float[Tensor, "batch pos d_model"]
) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """What the refined stream is the sum of, and so, each times the embedding, the logits before the cap.

    `stream`: behind the final norm. `ttt`: what the inner learner adds. The flow's step in two, σ(γ) z U, which is
    linear in what it reads, and σ(γ) v U. Parts that the model does not have are left out.
    """
    ttt, flow = refiners_of(model)
    parts = {STREAM: x}
    if ttt is not None:
        refined = ttt(x)[0]
        parts[TTT], x = refined - x, refined
    if flow is not None:
        z = x @ flow.W_down
        parts[LINEAR] = flow.gate.sigmoid() * (z @ flow.W_up)
        parts[VELOCITY] = flow.gate.sigmoid() * (flow.velocity(z) @ flow.W_up)
    return parts


@torch.no_grad()
def logit_frame(model: HookedModel, texts: Texts) -> pd.DataFrame:
    """A row a part of the stream, means over tokens.

    `norm`, and as a share of the stream's; `cosine` with the stream; `margin`: what it adds to the target's logit over
    the best other token's, before the cap; `share`: its share of the whole margin, of which the shares add up to 1 (and
    which says little where the whole is near 0).
    """
    sums: dict[str, dict[str, float]] = {}
    for rows, tokens, targets in texts.batches():
        is_read = torch.as_tensor(texts.is_read[rows, : tokens.shape[1]], device=tokens.device)
        parts = {name: part[is_read] for name, part in parts_of_stream(model, final_norm(model, tokens)).items()}
        x, whole = parts[STREAM], torch.stack([*parts.values()]).sum(dim=0)
        direction = _margin(cast(Tensor, cast(TTTFlow, model).W_E), whole, targets[is_read])
        for name, part in parts.items():
            measured = {
                "norm": part.norm(dim=-1),
                "cosine": torch.cosine_similarity(part, x, dim=-1),
                "margin": (part * direction).sum(-1),
            }
            own = sums.setdefault(name, dict.fromkeys(measured, 0.0))
            for key, values in measured.items():
                own[key] += float(values.double().sum())
    frame = pd.DataFrame([{"part": name, **own} for name, own in sums.items()])
    frame[["norm", "cosine", "margin"]] /= texts.lengths.sum()
    return frame.assign(relative_norm=frame["norm"] / frame["norm"][0], share=frame["margin"] / frame["margin"].sum())


def _margin(
    W_E: Float[Tensor, "d_vocab d_model"], stream: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """E[target] − E[best other], by the refined stream's logits."""
    others = []
    for part, own in zip(stream.split(1024), targets.split(1024), strict=True):
        others.append((part @ W_E.T).scatter(1, own[:, None], -torch.inf).argmax(-1))
    return W_E[targets] - W_E[torch.cat(others)]


@torch.no_grad()
def step_losses(model: HookedModel, texts: Texts) -> dict[str, Losses]:
    """Loss of every token where the flow takes other steps: by name "step 0.5" (z + τ v), and "4 substeps" of 1/4 each
    with v taken anew. The model's own is "step 1"."""
    flow = cast(FlowRefiner, cast(TTTFlow, model).flow)
    names = [*(f"step {tau:g}" for tau in STEPS), *(f"{n} substeps" for n in SUBSTEPS)]
    out = {name: np.zeros(texts.tokens.shape) for name in names}
    for rows, tokens, targets in texts.batches():
        parts = parts_of_stream(model, final_norm(model, tokens))
        x = parts[STREAM] + parts.get(TTT, 0)
        z = x @ flow.W_down
        ends = {f"step {tau:g}": z + tau * flow.velocity(z) for tau in STEPS}
        ends |= {f"{n} substeps": euler(flow, z, n) for n in SUBSTEPS}
        for name, end in ends.items():
            stream = x + flow.gate.sigmoid() * (end @ flow.W_up)
            out[name][rows, : tokens.shape[1]] = losses(model, stream, targets)
    return out


def euler(flow: FlowRefiner, z: Float[Tensor, "*batch flow"], n: int) -> Float[Tensor, "*batch flow"]:
    """z after n steps of 1/n along the velocity."""
    for _ in range(n):
        z = z + flow.velocity(z) / n
    return z
