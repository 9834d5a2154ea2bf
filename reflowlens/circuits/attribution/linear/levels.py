"""BDH on a prompt: its gated neurons, and the linear map that it is while their first reading is held.

A neuron of a level writes x_sparse ⊙ y_sparse. Its first reading, x_sparse, is held: as the gate of the second, and in
the attention scores, of which it is query and key. Then y_sparse reads, by scores and divisors that are constants, the
streams of earlier positions, and the levels are one linear map but for the neurons. To hold y_sparse instead would
leave no way from one position to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.linear.frozen import FrozenNorm
from reflowlens.circuits.attribution.linear.frozen_model import (
    Carried,
    Entered,
    EnteredAt,
    PulledBack,
    ReadAsStream,
    at_positions,
)
from reflowlens.circuits.attribution.linear.replacement import FeatureAt, Replacement, Units, Written, chosen_units
from reflowlens.circuits.attribution.linear.ways import dense
from reflowlens.models.bdh import BDH, Level, normalized
from reflowlens.models.numerics import wide


class FrozenLevels(ReadAsStream):
    """The linear map that a BDH is on one prompt; a level is a stage.

    Args:
        cache: the points of :meth:`points`.
    """

    def __init__(self, model: BDH, cache: Mapping[str, Tensor]) -> None:
        self.cfg, eps = model.cfg, model.cfg.eps
        self.scores: list[Float[Tensor, "head query key"]] = []
        self.found: list[FrozenNorm] = []  # of what attention found: a divisor a position and head
        self.out: list[FrozenNorm] = []
        self.post: list[FrozenNorm] = []
        for level in range(model.cfg.n_layers):
            x, found, out = (cache[f"blocks.{level}.hook_{part}"][0] for part in ("resid_pre", "attn_out", "mlp_out"))
            self.scores.append(cache[f"blocks.{level}.hook_attn_scores"][0])
            self.found.append(_frozen_norm(found.flatten(0, 1), eps))
            self.out.append(_frozen_norm(out, eps))
            self.post.append(_frozen_norm(x + normalized(out, eps), eps))
        self.d_model, self.numbers_carried, self.products = model.cfg.d_model, 3 * model.cfg.d_model, model.cfg.d_model

    @staticmethod
    def points(n_layers: int) -> list[str]:
        """The hook points that the constants are computed from."""
        parts = ("resid_pre", "attn_scores", "attn_out", "mlp_out")
        return [f"blocks.{level}.hook_{part}" for level in range(n_layers) for part in parts]

    def enter(self, stage: int, units: Units) -> Entered:
        """From what a head found at a position, ``hook_attn_norm``, to the level's input at the positions before it."""
        head, positions = units.index // self.cfg.d_head, units.position
        gradient = self.found[stage].back(units.rows, positions * self.cfg.n_heads + head)
        weights = self.scores[stage][head, positions, : int(positions.max()) + 1]
        return rearrange(weights, "target key -> key target 1") * gradient, gradient.new_zeros(len(gradient))

    def enter_at(
        self, at: str, layer: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> EnteredAt:
        return EnteredAt(layer + (at == "resid_post"), at_positions(rows, positions), rows.new_zeros(len(rows)))

    def enter_end(self, rows: Float[Tensor, "target d_model"]) -> Carried:
        """The last level's output is read as it is."""
        return at_positions(rows, torch.full((len(rows),), len(self.post[0].scale) - 1, device=rows.device))

    def descend(self, stage: int, carried: Carried) -> PulledBack:
        stream = dense(carried)
        below = self.post[stage].back(stream)
        return PulledBack(below, self.out[stage].back(below), stream.new_zeros(stream.shape[1]))

    def ahead(self, vectors: Float[Tensor, "input d_model"], positions: Int[Tensor, " input"]) -> None:
        """There is no way between positions but the neurons."""

    def descend_to_middle(
        self, stream: Float[Tensor, "pos target d_model"]
    ) -> tuple[Float[Tensor, "pos target d_model"], Float[Tensor, " target"]]:
        raise NotImplementedError


def _frozen_norm(x: Float[Tensor, "row d_model"], eps: float) -> FrozenNorm:
    """LayerNorm without weight and bias, at the divisors of ``x``."""
    scale = (wide(x).var(-1, keepdim=True, correction=0) + eps).sqrt()
    return FrozenNorm(scale, True, torch.ones_like(x[0]), None)


def gated_points(n_layers: int) -> list[str]:
    """The hook points whose activations a replacement by gated neurons is made of."""
    parts = ("x_sparse", "y_pre", "xy_sparse")
    return [f"blocks.{level}.hook_{part}" for level in range(n_layers) for part in parts]


def of_gated_neurons(model: BDH, cache: Mapping[str, Tensor], n: int, asked: Sequence[FeatureAt]) -> Replacement:
    """The ``n`` gated neurons of each level and position that write the most, and those that are asked for; all others
    are the error. The number of a neuron is head · d_head + its place in its head."""
    shared = cast("list[Level]", list(model.blocks))[0].neurons()
    reads = rearrange(shared.W_y.detach(), "head d_model neuron -> (head neuron) d_model")
    writes = shared.W_out.detach().flatten(0, 1)
    units, written = [], []
    for level in range(model.cfg.n_layers):
        gate, before, after = (cache[name][0].flatten(1) for name in gated_points(model.cfg.n_layers)[3 * level :][:3])
        chosen = chosen_units(after.abs() * writes.norm(dim=1), n, level, asked)
        position, index = chosen.nonzero().unbind(1)
        held, activation = gate[position, index], after[position, index]
        value, rows = held * before[position, index], held[:, None] * reads[index]
        units.append(Units(index, position, activation, value, rows, torch.zeros_like(held)))
        rest = after.masked_fill(chosen, 0.0) @ writes
        written.append(Written({level: activation[:, None] * writes[index]}, rest, None))
    return Replacement("neuron", units, written)
