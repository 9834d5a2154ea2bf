"""Carrier prompts steered against their leaning, and what the same steering costs on neutral texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from analyses.measures.damage import Damage, NeutralTexts
from analyses.measures.lens import residual_stack
from analyses.measures.sentiment import Poles
from analyses.measures.steering import of_unit_rms
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView
from reflowlens.sweeps.injections import Injections, Where, stream_points

_ROWS = 2**13  # injections whose directions are spelled out at once


@dataclass(frozen=True)
class Steered:
    """What the held-out words' logits say of carriers, steered and not.

    Args:
        poles: the held-out words.
        before: unsteered.
        after: steered against the leaning, by direction.
    """

    poles: Poles
    before: Float[Tensor, "prompt word"]
    after: Float[Tensor, "direction prompt word"]

    @property
    def leaning(self) -> Int[Tensor, " prompt"]:
        """1 or -1, the pole of the most probable word before."""
        return self.poles.leaning(self.before)

    @property
    def flipped(self) -> NDArray[np.float64]:
        """[direction, prompt], 1 where the most probable word has come to be of the other pole."""
        return (self.poles.leaning(self.after) != self.leaning).double().cpu().numpy()

    @property
    def shift(self) -> NDArray[np.float64]:
        """[direction, prompt], how far the log odds have moved away from the leaning, in nats."""
        moved = self.poles.log_odds(self.after) - self.poles.log_odds(self.before)
        return (-self.leaning * moved).double().cpu().numpy()


@dataclass(frozen=True)
class Carriers:
    """Carrier prompts of one model; ``scale`` is the mean root mean square of their streams, by layer."""

    view: SignalView
    poles: Poles
    runs: Injections
    before: Float[Tensor, "prompt word"]
    scale: Float[Tensor, " layer"]

    @classmethod
    def of(cls, view: SignalView, prompts: Sequence[str], poles: Poles, where: Where = "last") -> Carriers:
        """Read the prompts; ``poles`` are the held-out words that they are judged by."""
        view, runs = view.final, Injections(view.model, list(prompts), where)
        before = poles.logits(view, runs.unsteered(runs.layers[-1]))
        return cls(view, poles, runs, before, runs.rms().mean(dim=1))

    def directions(self, poles: Sequence[Poles]) -> Float[Tensor, "direction d_model"]:
        """What the directions between some words' poles write, at unit root mean square."""
        return of_unit_rms(torch.stack([self.view.write(words.direction(self.view)) for words in poles]))

    def steer(self, layer: int, strength: float, directions: Float[Tensor, "direction d_model"]) -> Steered:
        """Add each direction to each carrier at a layer, toward the pole that the carrier does not lean to."""
        n = len(self.runs)
        leaning = self.poles.leaning(self.before)
        parts = []
        for some in directions.split(max(1, _ROWS // n)):
            prompt = torch.arange(n, device=some.device).repeat(len(some))
            change = -leaning[prompt, None] * some.repeat_interleave(n, dim=0) * strength * self.scale[layer]
            end = self.runs.final(layer, prompt, change)
            parts.append(self.poles.logits(self.view, end).unflatten(0, (-1, n)))
        return Steered(self.poles, self.before, torch.cat(parts))


class SteeredTexts:
    """Neutral texts steered at every position, every second one the other way."""

    def __init__(self, model: HookedModel, texts: Sequence[str]) -> None:
        self.neutral = NeutralTexts(model, texts)
        self.streams = residual_stack(model, self.neutral.tokens, last_only=False)[::2].clone()  # before each block
        self.sign = torch.where(torch.arange(len(texts), device=self.neutral.tokens.device) % 2 == 0, 1.0, -1.0)

    def damage(self, layer: int, change: Float[Tensor, " d_model"]) -> Damage:
        """What adding ``change`` or its opposite at a layer costs each text."""
        model = self.neutral.model
        if model.stages == "whole":
            added = self.sign[:, None, None] * change
            with model.hooks([(stream_points(model)[layer], lambda x, hook: x + added.to(x))]):
                return self.neutral.damage()
        steered = self.streams[layer] + self.sign[:, None, None] * change.to(self.streams)
        end = model(steered, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
        return self.neutral.damage(end)


def affordable_strength(strengths: ArrayLike, costs: ArrayLike, max_cost: float) -> float:
    """The largest strength before the cost first exceeds ``max_cost``, and the largest of all if it never does.

    Between two ascending strengths, and between 0 and the first, the cost is taken to grow with the strength's square,
    as the loss does near its unsteered value.

    >>> affordable_strength([0.1, 0.2, 0.4], [0.01, 0.04, 0.16], 0.09)
    0.3
    """
    s, c = np.asarray(strengths, dtype=float), np.asarray(costs, dtype=float)
    over = np.flatnonzero(c > max_cost)
    if not len(over):
        return float(s[-1])
    end = over[0]
    start_square, start_cost = (s[end - 1] ** 2, c[end - 1]) if end else (0.0, 0.0)
    share = (max_cost - start_cost) / (c[end] - start_cost)
    return round(float(np.sqrt(start_square + share * (s[end] ** 2 - start_square))), 12)
