"""One model with its refiners' gates open and shut: four losses of every token, and what they say of both together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.experiments.refinement.texts import Losses, Texts
from reflowlens.models.base import HookedModel
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import InnerState, TTTLinear

CELLS = ("none", "ttt", "flow", "both")

T = TypeVar("T", float, np.ndarray)


def effects(loss: Mapping[str, T]) -> dict[str, T]:
    """What four losses say of each refiner and of both together; below 0 is good.

    "ttt" and "flow" are main effects, the mean of that without and that with the other refiner; "interaction" is
    both − ttt − flow + none, below 0 where each helps more beside the other.

    >>> effects({"none": 4.0, "ttt": 3.0, "flow": 3.5, "both": 2.0})["interaction"]
    -0.5
    """
    none, ttt, flow, both = (loss[cell] for cell in CELLS)
    return {
        "ttt_alone": ttt - none,
        "ttt_with_flow": both - flow,
        "ttt": (ttt - none + both - flow) / 2,
        "flow_alone": flow - none,
        "flow_with_ttt": both - ttt,
        "flow": (flow - none + both - ttt) / 2,
        "interaction": both - ttt - flow + none,
    }


def final_norm(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The stream that the refiners read."""
    return cast(TTTFlow, model).ln_final(model(tokens, stop_at_layer=model.cfg.n_layers))


def gated(
    model: HookedModel,
    x: Float[Tensor, "batch pos d_model"],
    *,
    ttt: bool = True,
    flow: bool = True,
    rate: float = 1.0,
    state: InnerState | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The refined stream, of which a refiner that is switched off adds nothing.

    `rate`: what the inner learning rate is multiplied by; 0: nothing is learned from the text. `state`: of the inner
    learner at the start of the text; None: the one that was trained.
    """
    own = cast(TTTFlow, model)
    if ttt and own.ttt is not None:
        x = with_rate(own.ttt, rate)(x, state)[0]
    return own.flow(x) if flow and own.flow is not None else x


def with_rate(ttt: TTTLinear, factor: float) -> TTTLinear:
    """The same inner learner at another rate, on the same weights."""
    if factor == 1.0:
        return ttt
    other = copy.copy(ttt)
    other.rate = factor * ttt.rate
    return other


def losses(
    model: HookedModel, stream: Float[Tensor, "batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> Float[np.ndarray, "batch pos"]:
    """In nats, 0 where nothing is predicted."""
    return model.read_final(stream).losses(targets).double().cpu().numpy()


@torch.no_grad()
def gate_losses(model: HookedModel, texts: Texts) -> dict[str, Losses]:
    """Loss of every token by which gates are open: "none", "ttt", "flow", "both", those that the model can have."""
    out = {cell: np.zeros(texts.tokens.shape) for cell in cells_of(model)}
    for rows, tokens, targets in texts.batches():
        x = final_norm(model, tokens)
        for cell, own in out.items():
            stream = gated(model, x, ttt=cell in ("ttt", "both"), flow=cell in ("flow", "both"))
            own[rows, : tokens.shape[1]] = losses(model, stream, targets)
    return out


def cells_of(model: HookedModel) -> tuple[str, ...]:
    """The cells of the design that a model can be in, itself last."""
    ttt, flow = refiners_of(model)
    present = {"none": True, "ttt": ttt is not None, "flow": flow is not None, "both": bool(ttt and flow)}
    return tuple(cell for cell in CELLS if present[cell])


def refiners_of(model: HookedModel) -> tuple[TTTLinear | None, FlowRefiner | None]:
    """A model's refiners; neither of a model of another architecture."""
    return (model.ttt, model.flow) if isinstance(model, TTTFlow) else (None, None)
