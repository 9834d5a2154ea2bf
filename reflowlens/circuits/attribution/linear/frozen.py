"""A decoder with its attention patterns and norm scales held at what they are on a prompt: a linear map, pulled back.

A stage is a block; where heads are nodes, a block's heads are one and its MLP another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.directions import MIDDLE
from reflowlens.circuits.attribution.linear.frozen_model import (
    Carried,
    Entered,
    EnteredAt,
    PulledBack,
    ReadAsStream,
    at_positions,
)
from reflowlens.circuits.attribution.linear.replacement import (
    Units,
    constant_behind,
    detached,
    divisor_behind,
    head_writes,
)
from reflowlens.circuits.attribution.linear.ways import Ways, Within, dense
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import Norm
from reflowlens.models.products import product

_MOST_AHEAD = 2**25  # numbers


@dataclass(frozen=True)
class FrozenNorm:
    """A norm that divides by what it divided by on the prompt."""

    scale: Float[Tensor, "pos 1"]
    is_centred: bool
    w: Float[Tensor, " d_model"]
    b: Float[Tensor, " d_model"] | None

    @classmethod
    def of(cls, norm: Norm, name: str, cache: Mapping[str, Tensor]) -> FrozenNorm:
        return cls(cache[f"{name}.hook_scale"][0], norm.centered, norm.w.detach(), detached(norm.b))

    def back(
        self, gradient: Float[Tensor, "*batch d_model"], positions: slice | Int[Tensor, " target"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """From ``hook_normalized`` to what the norm reads.

        Args:
            gradient: [pos, target, d_model] of positions from the first on, or [target, d_model] of one a target.
            positions: in the latter case, which.
        """
        scale = self.scale[: len(gradient), None] if positions is None else self.scale[positions]
        scaled = gradient / scale
        return scaled - scaled.mean(-1, keepdim=True) if self.is_centred else scaled


@dataclass(frozen=True)
class FrozenAttention:
    """Attention whose patterns are constants: from the values on a linear map.

    A norm behind it is part of it: its weight of ``W_O``, its divisor at each query of ``pattern`` and ``z``.

    Args:
        b_O: what is added whatever the heads find.
        z: what the heads found, before ``W_O``.
    """

    norm: FrozenNorm
    pattern: Float[Tensor, "head query key"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_V: Float[Tensor, "kv_head d_head"] | None
    b_O: Float[Tensor, " d_model"] | None
    z: Float[Tensor, "query head d_head"]

    def back(self, gradient: Float[Tensor, "pos target d_model"]) -> tuple[Tensor, Float[Tensor, " target"]]:
        """From ``resid_mid`` to ``resid_pre``, the way around attention included."""
        n = len(gradient)
        z = product(gradient, self.W_O.flatten(0, 1).T)
        z = rearrange(z, "query target (head d_head) -> head query (target d_head)", head=len(self.W_O))
        v = self._scaled_pattern[:, :n, :n].mT @ z
        v = rearrange(v, "head key (target d_head) -> (key target) (head d_head)", target=gradient.shape[1])
        stream = gradient + product(v, self._values_back.flatten(0, 1)).view_as(gradient)
        return stream, self.of_biases(gradient)

    def back_from(self, gradient: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]) -> Entered:
        """The same of targets that read one position each: there every head has one query."""
        return self.back_by_ways(Ways.at(gradient, positions)), (gradient * self._biases[positions]).sum(1)

    def back_by_ways(self, ways: Ways) -> Ways:
        """The same of sums over ways, but for what biases add."""
        return ways.through(self._scaled_pattern, self.W_O, self._values_back)

    def of_biases(self, gradient: Float[Tensor, "pos target d_model"]) -> Float[Tensor, " target"]:
        """What biases add on the way."""
        if self.b_V is None and self.b_O is None and self.norm.b is None:
            return gradient.new_zeros(gradient.shape[1])
        return torch.einsum("ptd,pd->t", gradient, self._biases[: len(gradient)])

    def ahead(
        self, vectors: Float[Tensor, "source d_model"], positions: Int[Tensor, " source"]
    ) -> Float[Tensor, "query d_model source"]:
        """From ``resid_pre`` to ``resid_mid``: what is written at one position a source, at every position."""
        written = torch.einsum("sd,hed,hef->hsf", vectors, self._values_back, self.W_O)
        middle = torch.einsum("hqs,hsd->qds", self._scaled_pattern[:, :, positions], written)
        middle[positions, :, torch.arange(len(vectors), device=vectors.device)] += vectors
        return middle

    def back_from_heads(
        self,
        gradient: Float[Tensor, "target d_model"],
        heads: Int[Tensor, " target"],
        positions: Int[Tensor, " target"],
    ) -> Entered:
        """From what one head a target writes at one position to ``resid_pre``, its biases ``b_V`` and ``ln1.b`` on the
        way."""
        n = int(positions.max()) + 1
        group = len(self.W_O) // len(self.W_V)
        z = torch.einsum("td,ted->te", gradient, self.W_O[heads])
        normal = torch.einsum("te,tde->td", z, self.W_V[heads // group])
        weights = rearrange(self.pattern[heads, positions, :n], "target key -> key target 1")
        constant = dot(normal, self.norm.b)
        if self.b_V is not None:
            constant = constant + (z * self.b_V[heads // group]).sum(1)
        return self.norm.back(weights * (normal * self.norm.w)), constant * weights.sum((0, 2))

    @cached_property
    def _scaled_pattern(self) -> Float[Tensor, "head query key"]:
        """With the divisor of the norm at each key."""
        return self.pattern / self.norm.scale[:, 0]

    @cached_property
    def _values_back(self) -> Float[Tensor, "head d_head d_model"]:
        """From values to what the norm reads, but for its divisor; query heads share heads of values."""
        read = self.W_V * self.norm.w[:, None]
        if self.norm.is_centred:
            read = read - read.mean(1, keepdim=True)
        return read.mT.repeat_interleave(len(self.W_O) // len(self.W_V), dim=0)

    @cached_property
    def _biases(self) -> Float[Tensor, "query d_model"]:
        """What the biases of the norm, the values and the output write at each position."""
        values = self.W_V.new_zeros(self.W_V.shape[0], self.W_V.shape[2]) if self.b_V is None else self.b_V
        if self.norm.b is not None:
            values = values + self.norm.b @ self.W_V
        values = values.repeat_interleave(len(self.W_O) // len(self.W_V), dim=0)
        written = torch.einsum("hq,he,hed->qd", self.pattern.sum(-1), values, self.W_O)
        return written if self.b_O is None else written + self.b_O


class FrozenDecoder(ReadAsStream):
    """The linear map that a decoder is on one prompt.

    Args:
        cache: norm scales and attention patterns of the prompt.
        skips: of each block the matrix [d_out, d_in] by which its MLP's replacement passes on what it reads, or None.
        heads: they are nodes: of a block's two stages the first is its heads, and attention passes nothing on.
    """

    def __init__(
        self, model: Decoder, cache: Mapping[str, Tensor], skips: Sequence[Tensor | None], heads: bool = False
    ) -> None:
        self.skips, self.heads, self.parallel = skips, heads, model.cfg.parallel_attn_mlp
        self.attention: list[FrozenAttention] = []
        self.norms: list[FrozenNorm] = []  # of the MLPs
        for layer, block in enumerate(cast("list[Block]", list(model.blocks))):
            attn, name = block.attn, f"blocks.{layer}"
            norm = FrozenNorm.of(block.ln1, f"{name}.ln1", cache)
            pattern, z = cache[f"{name}.attn.hook_pattern"][0], cache[f"{name}.attn.hook_z"][0]
            if (scale := divisor_behind(cache, f"{name}.ln1_post")) is not None:
                pattern, z = pattern / scale, z / scale[:, None]
            b_O = constant_behind(block.ln1_post, attn.b_O)
            weights = attn.W_V.detach(), head_writes(block), detached(attn.b_V), b_O
            self.attention.append(FrozenAttention(norm, pattern, *weights, z))
            self.norms.append(FrozenNorm.of(block.ln2, f"{name}.ln2", cache))
        self.final = FrozenNorm.of(model.ln_final, "ln_final", cache)
        self.d_model, width = model.cfg.d_model, model.cfg.n_heads * model.cfg.d_head
        self.numbers_carried = 2 * (self.d_model + width)
        self.products = 0 if heads else width * (2 * self.d_model + len(self.final.scale))

    @staticmethod
    def points(n_layers: int) -> list[str]:
        """The hook points whose activations are held."""
        parts = ("ln1.hook_scale", "ln2.hook_scale", "attn.hook_pattern", "attn.hook_z")
        return [f"blocks.{layer}.{part}" for layer in range(n_layers) for part in parts] + ["ln_final.hook_scale"]

    def enter(self, stage: int, units: Units) -> Entered:
        """From ``ln2.hook_normalized``, or from what heads write."""
        layer, is_heads = self._part(stage)
        if is_heads:
            return self.attention[layer].back_from_heads(units.rows, units.index, units.position)
        gradient = self.norms[layer].back(units.rows, units.position)
        if self.heads:
            return self._at(gradient, units.position), gradient.new_zeros(len(gradient))
        if self.parallel:
            return Ways.at(gradient, units.position), gradient.new_zeros(len(gradient))
        return self.attention[layer].back_from(gradient, units.position)

    def read_by(self, stage: int) -> int:
        is_heads = self._part(stage)[1]
        return stage - 1 if self.parallel and self.heads and not is_heads else stage

    def enter_at(
        self, at: str, layer: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> EnteredAt:
        if at == "ln1.hook_normalized":
            rows = self.attention[layer].norm.back(rows, positions)
        if at == "ln2.hook_normalized":
            rows = self.norms[layer].back(rows, positions)
        inside = at in MIDDLE and not self.parallel
        if inside and not self.heads:
            return EnteredAt(layer, *self.attention[layer].back_from(rows, positions))
        stage = (1 + self.heads) * (layer + (at == "resid_post")) + inside
        return EnteredAt(stage, self._at(rows, positions), rows.new_zeros(len(rows)))

    def enter_end(self, rows: Float[Tensor, "target d_model"]) -> Carried:
        """From ``ln_final.hook_normalized`` of the last position to the output of the last block."""
        last = torch.full((len(rows),), len(self.final.scale) - 1, device=rows.device)
        return self._at(self.final.back(rows, last), last)

    def descend(self, stage: int, carried: Carried) -> PulledBack:
        layer, is_heads = self._part(stage)
        if isinstance(carried, Within):
            gradient, here = carried.gradient, slice(carried.position, carried.position + 1)
            within = carried if is_heads else Within(self.middle(layer, gradient, here), carried.position)
            return PulledBack(within, carried, gradient.new_zeros(len(gradient)))
        stream = dense(carried)
        if self.heads:
            below = stream if is_heads else self.middle(layer, stream)
            return PulledBack(below, stream, stream.new_zeros(stream.shape[1]))
        attention = self.attention[layer]
        if isinstance(carried, Ways) and self.skips[layer] is None and carried.stay_few(len(attention.W_O)):
            return PulledBack(attention.back_by_ways(carried), stream, attention.of_biases(stream))
        below, constant = self.through(layer, stream)
        return PulledBack(below, stream, constant)

    def through(
        self, layer: int, stream: Float[Tensor, "pos target d_model"]
    ) -> tuple[Float[Tensor, "pos target d_model"], Float[Tensor, " target"]]:
        """From a block's output to its input, and what biases of attention add on the way."""
        below, constant = self.attention[layer].back(self.middle(layer, stream))
        skip = self.skips[layer]
        if self.parallel and skip is not None:
            below = below + self.norms[layer].back(stream @ skip)
        return below, constant

    def ahead(
        self, vectors: Float[Tensor, "input d_model"], positions: Int[Tensor, " input"]
    ) -> Float[Tensor, "pos d_model input"] | None:
        n = len(self.final.scale)
        around = self.parallel and self.skips[0] is not None  # another way from the input than by attention
        if self.heads or around or len(vectors) > vectors.shape[1] or n * vectors.numel() > _MOST_AHEAD:
            return None
        return self.attention[0].ahead(vectors, positions)

    def descend_to_middle(
        self, stream: Float[Tensor, "pos target d_model"]
    ) -> tuple[Float[Tensor, "pos target d_model"], Float[Tensor, " target"]]:
        middle = self.middle(0, stream)
        return middle, self.attention[0].of_biases(middle)

    def middle(
        self, layer: int, stream: Float[Tensor, "*pos target d_model"], positions: slice | None = None
    ) -> Float[Tensor, "*pos target d_model"]:
        """From a block's output to ``resid_mid``, by the way around the MLP and the skip of its replacement.

        Where attention and MLP are parallel the skip does not begin there, but in front of the block.

        Args:
            positions: the one that all targets are at, where the stream is of that alone.
        """
        skip = self.skips[layer]
        if skip is None or self.parallel:
            return stream
        return stream + self.norms[layer].back(stream @ skip, positions)

    def _at(self, gradient: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]) -> Carried:
        """Where heads are nodes, what reads one position is connected with nothing else."""
        if self.heads and bool((positions == positions[0]).all()):
            return Within(gradient, int(positions[0]))
        return at_positions(gradient, positions)

    def _part(self, stage: int) -> tuple[int, bool]:
        """The block of a stage, and whether it is that of its heads."""
        return (stage // 2, stage % 2 == 0) if self.heads else (stage, False)


def dot(gradient: Float[Tensor, "target d_model"], bias: Float[Tensor, " d_model"] | None) -> Float[Tensor, " target"]:
    """What a bias adds, if there is one."""
    return gradient.new_zeros(len(gradient)) if bias is None else gradient @ bias
