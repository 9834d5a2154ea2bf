"""A TTTFlow on a prompt as a linear map: patterns, divisors and the directions that heads lose are held, and what the
inner learner has become.

Blocks read more than the output of the one before: x₀, and outputs of earlier blocks. So what is carried between blocks
is the gradient at each of these (:class:`Branches`). The refiners, of which logits at the last position read that
position alone, are blocks of their own behind the last: the inner learner, then the flow step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.directions import MIDDLE
from reflowlens.circuits.attribution.linear.frozen import FrozenNorm
from reflowlens.circuits.attribution.linear.frozen_model import Carried, Entered, EnteredAt, PulledBack, at_positions
from reflowlens.circuits.attribution.linear.refiners import FrozenFlow, FrozenLearner
from reflowlens.circuits.attribution.linear.replacement import TOKEN_VALUES, Units, detached, head_writes
from reflowlens.circuits.attribution.linear.ways import Branches, Within
from reflowlens.models.refined_block import RefinedBlock
from reflowlens.models.ttt_flow import TTTFlow


@dataclass(frozen=True)
class FrozenBlock:
    """The attention of a block, and how what it reads is mixed.

    Args:
        W_O: with the scale of what attention writes.
        excluded: the unit directions that heads lose; None: they lose nothing.
        token_scale: of the token values; None: the block adds none.
        w_skip, skipped: the earlier block whose output is read times the former; None where none is.
    """

    norm: FrozenNorm
    mlp_norm: FrozenNorm
    pattern: Float[Tensor, "head query key"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    excluded: Float[Tensor, "pos head d_head"] | None
    token_scale: Float[Tensor, ""] | None
    w_stream: Float[Tensor, " d_model"]
    w_first: Float[Tensor, " d_model"]
    w_skip: Float[Tensor, " d_model"] | None
    skipped: int

    def attended(self, middle: Branches) -> Branches:
        """From ``resid_mid`` to ``resid_in``, the way around attention included."""
        n = len(middle.stream)
        z = einsum(middle.stream, self.W_O, "query target d_model, head d_head d_model -> query target head d_head")
        z = self._lose(z, None if self.excluded is None else self.excluded[:n, None])
        v = einsum(self.pattern[:, :n, :n], z, "head query key, query target head d_head -> key target head d_head")
        v = v.unflatten(2, (len(self.W_V), -1)).sum(3)  # query heads share heads of values
        return self._from_values(v, middle)

    def of_heads(
        self,
        rows: Float[Tensor, "target d_model"],
        heads: Int[Tensor, " target"],
        positions: Int[Tensor, " target"],
    ) -> Branches:
        """From what one head a target writes at one position to ``resid_in``."""
        n, group = int(positions.max()) + 1, len(self.W_O) // len(self.W_V)
        z = einsum(rows, self.W_O[heads], "target d_model, target d_head d_model -> target d_head")
        z = self._lose(z, None if self.excluded is None else self.excluded[positions, heads])
        weights = self.pattern[heads, positions, :n]
        v = rows.new_zeros(n, len(rows), *self.W_V.shape[::2])
        v[:, torch.arange(len(rows)), heads // group] = einsum(weights, z, "target key, target e -> key target e")
        return self._from_values(v, Branches.of(rows.new_zeros(n, *rows.shape)))

    def unmixed(self, read: Branches) -> Branches:
        """From ``resid_in`` to the output of the block before, to x₀, and to the earlier output that is read."""
        stream = self.w_stream * read.stream
        earlier = dict(read.earlier)
        if self.w_skip is not None:
            earlier[self.skipped] = self.w_skip * stream
        return replace(read, stream=stream, first=read.first + self.w_first * read.stream, earlier=earlier)

    def _from_values(self, v: Float[Tensor, "key target kv_head d_head"], around: Branches) -> Branches:
        normal = einsum(v, self.W_V, "key target kv_head e, kv_head d_model e -> key target d_model")
        stream = around.stream + self.norm.back(normal * self.norm.w)
        of_tokens = around.of_tokens if self.token_scale is None else around.of_tokens + self.token_scale * v.flatten(2)
        return replace(around, stream=stream, of_tokens=of_tokens)

    @staticmethod
    def _lose(z: Tensor, excluded: Tensor | None) -> Tensor:
        """A projection is its own transpose."""
        return z if excluded is None else z - (z * excluded).sum(-1, keepdim=True) * excluded


class FrozenRefined:
    """The linear map that a TTTFlow is on one prompt.

    Args:
        cache: the points of :meth:`points`.
        skips: of each block the matrix [d_out, d_in] by which its MLP's replacement passes on what it reads, or None.
        heads: they are nodes: of a block's two stages the first is its heads, and attention passes nothing on.
    """

    alone = False  # the smear reaches from one position to the next

    def __init__(
        self, model: TTTFlow, cache: Mapping[str, Tensor], skips: Sequence[Tensor | None], heads: bool = False
    ) -> None:
        self.skips, self.heads, self.n_blocks = skips, heads, model.cfg.n_layers
        self.blocks = [_frozen_block(model, layer, cache) for layer in range(self.n_blocks)]
        self.smear = model.smear.gate.detach().sigmoid()
        self.embedded = FrozenNorm.of(model.ln_embed, "ln_embed", cache)
        self.final = FrozenNorm.of(model.ln_final, "ln_final", cache)
        self.learner = None if model.ttt is None else FrozenLearner.of(model.ttt, cache)
        self.flow = None if model.flow is None else FrozenFlow.of(model.flow)
        self.refiners = [each for each in (self.learner, self.flow) if each is not None]
        d, heads_wide = model.cfg.d_model, model.cfg.n_heads * model.cfg.d_head
        self.value_width = model.cfg.kv_heads * model.cfg.d_head
        self.d_model, self.numbers_carried = d, (3 + self.n_blocks // 2) * d + 3 * heads_wide
        self.products = 0 if heads else heads_wide * (2 * d + len(self.final.scale))

    @staticmethod
    def points(model: TTTFlow, n_tokens: int) -> list[str]:
        """The hook points whose activations are held."""
        parts = ("ln1.hook_scale", "ln2.hook_scale", "attn.hook_pattern", "attn.hook_z", "attn.hook_excluded")
        names = [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in parts]
        names += ["ln_embed.hook_scale", "bigram.hook_bigram", "values.hook_token_values"]
        names += ["ln_final.hook_scale", "hook_refined", *FrozenFlow.POINTS]
        names += [] if model.ttt is None else FrozenLearner.points(model.ttt, n_tokens)
        return [name for name in names if name in model.hook_dict]

    def enter(self, stage: int, units: Units) -> Entered:
        """From ``ln2.hook_normalized``, or from what heads write; of the flow step from the stream that it reads."""
        (block, is_heads), rows = self._part(stage), units.rows
        none = rows.new_zeros(len(rows))
        if block >= self.n_blocks:
            if is_heads and self.learner is not None:
                gradient, constant = self.learner.back_from_heads(rows, units.index)
                return self._into(block, gradient), constant
            return (self._within(rows) if self.heads else self._into(block, rows)), none
        frozen = self.blocks[block]
        if is_heads:
            return frozen.unmixed(frozen.of_heads(rows, units.index, units.position)), none
        return self._from_middle(block, frozen.mlp_norm.back(rows, units.position), units.position), none

    def read_by(self, stage: int) -> int:
        return stage

    def enter_at(
        self, at: str, layer: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> EnteredAt:
        frozen, none = self.blocks[layer], rows.new_zeros(len(rows))
        if at == "ln2.hook_normalized":
            rows = frozen.mlp_norm.back(rows, positions)
        if at in MIDDLE:
            return EnteredAt(self._stage(layer) + self.heads, self._from_middle(layer, rows, positions), none)
        if at == "ln1.hook_normalized":
            read = Branches.of(at_positions(frozen.norm.back(rows, positions), positions))
            return EnteredAt(self._stage(layer), frozen.unmixed(read), none)
        return EnteredAt(self._stage(layer + (at == "resid_post")), Branches.of(at_positions(rows, positions)), none)

    def enter_end(self, rows: Float[Tensor, "target d_model"]) -> Carried:
        """From ``hook_refined`` of the last position."""
        return self._into(self.n_blocks + len(self.refiners), rows)

    def descend(self, stage: int, carried: Carried) -> PulledBack:
        block, is_heads = self._part(stage)
        if isinstance(carried, Within):
            gradient, refiner = carried.gradient, self.refiners[block - self.n_blocks]
            if not self.heads or (refiner is self.flow and not is_heads):
                gradient = refiner.back(gradient)
            below = self._within(gradient) if self.heads and not is_heads else self._into(block, gradient)
            return PulledBack(below, carried, gradient.new_zeros(len(gradient)))
        branches = cast(Branches, carried)
        none = branches.stream.new_zeros(branches.stream.shape[1])
        if is_heads:
            return PulledBack(self.blocks[block].unmixed(branches), branches.stream, none)
        branches = branches.at_output(block)
        middle = self._around_mlp(block, branches)
        return PulledBack(middle if self.heads else self._past_attention(block, middle), branches.stream, none)

    def at_inputs(self, carried: Carried, kind: str) -> Float[Tensor, "pos target width"]:
        """At what inputs write: token values to the values of the last blocks, others in front of the first norm."""
        branches = cast(Branches, carried)
        if kind == TOKEN_VALUES:
            return branches.of_tokens.expand(*branches.stream.shape[:2], self.value_width)
        first = branches.stream + branches.first
        behind = torch.cat([first[1:], torch.zeros_like(first[:1])])
        return self.embedded.back(torch.lerp(first, behind, self.smear))

    def ahead(self, vectors: Float[Tensor, "input width"], positions: Int[Tensor, " input"]) -> None:
        """Inputs are read by every block."""

    def descend_to_middle(
        self, stream: Float[Tensor, "pos target d_model"]
    ) -> tuple[Float[Tensor, "pos target d_model"], Float[Tensor, " target"]]:
        raise NotImplementedError

    def _from_middle(
        self, block: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> Branches:
        """From ``resid_mid`` at one position a target to the input of the stage that ends there."""
        middle = Branches.of(at_positions(rows, positions))
        return middle if self.heads else self._past_attention(block, middle)

    def _past_attention(self, block: int, middle: Branches) -> Branches:
        return self.blocks[block].unmixed(self.blocks[block].attended(middle))

    def _around_mlp(self, block: int, output: Branches) -> Branches:
        """And through the skip of what stands for it."""
        skip = self.skips[block]
        if skip is None:
            return output
        return replace(output, stream=output.stream + self.blocks[block].mlp_norm.back(output.stream @ skip))

    def _into(self, block: int, gradient: Float[Tensor, "target d_model"]) -> Carried:
        """From what a refiner reads at the last position to the output of the one before, or of the last block."""
        if block > self.n_blocks:
            return self._within(gradient)
        last = torch.full((len(gradient),), len(self.final.scale) - 1, device=gradient.device)
        return Branches.of(at_positions(self.final.back(gradient, last), last))

    def _within(self, gradient: Float[Tensor, "target d_model"]) -> Within:
        return Within(gradient, len(self.final.scale) - 1)

    def _stage(self, block: int) -> int:
        return (1 + self.heads) * block

    def _part(self, stage: int) -> tuple[int, bool]:
        """The block of a stage, and whether it is that of its heads."""
        return (stage // 2, stage % 2 == 0) if self.heads else (stage, False)


def _frozen_block(model: TTTFlow, layer: int, cache: Mapping[str, Tensor]) -> FrozenBlock:
    block, name, half = cast(RefinedBlock, model.blocks[layer]), f"blocks.{layer}", model.cfg.n_layers // 2
    attn, values = block.attn, model.values
    excluded = cache[f"{name}.attn.hook_excluded"][0] if attn.is_exclusive else None
    if excluded is not None:
        excluded = excluded.repeat_interleave(model.cfg.n_heads // model.cfg.kv_heads, dim=1)
    return FrozenBlock(
        norm=FrozenNorm.of(block.ln1, f"{name}.ln1", cache),
        mlp_norm=FrozenNorm.of(block.ln2, f"{name}.ln2", cache),
        pattern=cache[f"{name}.attn.hook_pattern"][0],
        W_V=attn.W_V.detach(),
        W_O=head_writes(block),
        excluded=excluded,
        token_scale=None if values is None else values.scale_of(layer),
        w_stream=block.w_stream.detach(),
        w_first=block.w_first.detach(),
        w_skip=detached(block.w_skip),
        skipped=2 * half - 1 - layer,
    )
