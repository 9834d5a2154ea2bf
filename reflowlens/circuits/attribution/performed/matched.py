"""Random nodes beside those of a graph: other features or neurons of a block, that write as much at the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.linear.refiners import flow_writes
from reflowlens.circuits.attribution.linear.replacement import blocks_of, neuron_writes
from reflowlens.circuits.attribution.performed.changed_pass import Change, Place
from reflowlens.models.bdh import BDH
from reflowlens.models.components import Block
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.ttt_flow import TTTFlow

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.traced import Traced

_OWN = 2**40  # added to a seed, that what is resampled by the same seed is no draw of these
_NEAREST = 0.1, 8  # the share, and the least number, of candidates that one is drawn from


class Matched:
    """Draws random nodes for those of a graph.

    Of a block and a position, a candidate is a feature that is not active there and is elsewhere on the prompt (any
    that is not active there if these are fewer than 8), or a neuron that is no node there; where there is none, any
    other, and of a block of one unit this one. One is drawn from the tenth, and 8 at least, whose decoder norms are
    nearest.
    """

    def __init__(self, traced: Traced, seed: int) -> None:
        self.traced, self.rng = traced, np.random.default_rng(_OWN + seed)
        self.blocks = [] if traced.dictionary is None else blocks_of(traced.dictionary)

    def norms(self, block: int) -> Float[Tensor, " unit"]:
        """Of what each feature or neuron of a block writes with an activation of 1, over all that it writes to."""
        if self.traced.dictionary is not None:
            return self.traced.dictionary.decoder_norms(self.blocks.index(block)).detach()
        model = self.traced.model
        if isinstance(model, BDH):
            return model.neurons.W_out.detach().flatten(0, 1).norm(dim=1)
        if isinstance(model, TTTFlow) and block >= model.cfg.n_layers:
            return flow_writes(cast(FlowRefiner, model.flow)).norm(dim=1)
        return neuron_writes(cast(Block, model.blocks[block])).norm(dim=1)

    def candidates(self, block: int, position: int) -> Bool[Tensor, " unit"]:
        units = self.traced.engine.replacement.units[block]
        free = torch.ones(len(self.norms(block)), dtype=torch.bool, device=units.index.device)
        free[units.index[units.position == position]] = False
        if self.traced.dictionary is None:
            return free
        elsewhere = torch.zeros_like(free)
        elsewhere[units.index[units.activation > 0]] = True
        both = free & elsewhere
        return both if int(both.sum()) >= _NEAREST[1] else free

    def draw(self, place: Place) -> tuple[Place, float]:
        """Another unit for a node's, and what its activation is multiplied with to write as much."""
        norms = self.norms(place.block)
        candidates = self.candidates(place.block, place.position).nonzero()[:, 0]
        if not len(candidates):
            others = torch.arange(len(norms), device=norms.device) != place.unit
            candidates = (others if bool(others.any()) else ~others).nonzero()[:, 0]
        nearest = nearest_norms(norms, place.unit, candidates)
        unit = int(nearest[int(self.rng.integers(len(nearest)))])
        return place._replace(unit=unit), ratio_of(norms, place.unit, unit)


def nearest_norms(
    norms: Float[Tensor, " unit"], unit: int, candidates: Int[Tensor, " candidate"], least: int = _NEAREST[1]
) -> Int[Tensor, " nearest"]:
    """The tenth of the candidates, and ``least`` at least, whose norms are nearest to a unit's, the nearest first."""
    distance = (norms[candidates].clamp_min(1e-30).log() - norms[unit].clamp_min(1e-30).log()).abs()
    return candidates[distance.sort(stable=True).indices[: max(least, round(_NEAREST[0] * len(candidates)))]]


def ratio_of(norms: Float[Tensor, " unit"], unit: int, other: int) -> float:
    """What another unit's activation is multiplied with to write as much as a unit."""
    return float(norms[unit] / norms[other].clamp_min(1e-30))


def instead(change: Change, other: tuple[Place, float]) -> Change:
    """A change of one node, as large and at the same place, of another."""
    (by,) = change.by.values()
    place, ratio = other
    return Change({place: by * ratio})
