"""Every edge of a graph, from targets pulled back stage by stage through a frozen model.

Targets are taken in the order of their stages and positions, several at once: each enters at its own stage, is carried
over the positions up to its own, and is multiplied, wherever something is written into the stream, with that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.directions import Directions
from reflowlens.circuits.attribution.edges.layout import End, Inputs, Layout, running
from reflowlens.circuits.attribution.linear.frozen_model import Carried, FrozenModel
from reflowlens.circuits.attribution.linear.replacement import Replacement, Units
from reflowlens.circuits.attribution.linear.ways import Branches, Within, dense

BYTES_AT_ONCE = 2**24  # of gradients that are carried: what a processor keeps near


@dataclass(frozen=True)
class Batch:
    """Targets that are carried together.

    Args:
        stage: from whose input on they are carried down.
        first: the number of the first; they follow each other.
        work: how many multiply-adds their rows take, or so.
        values: makes the rows.
    """

    stage: int
    first: int
    n_targets: int
    work: float
    values: Callable[[], Float[Tensor, "target node"]]


class Engine:
    """The edges of a frozen model with its MLPs replaced."""

    def __init__(
        self, frozen: FrozenModel, replacement: Replacement, inputs: Sequence[Inputs], end: End, layout: Layout
    ) -> None:
        self.frozen, self.replacement, self.inputs, self.end, self.layout = frozen, replacement, inputs, end, layout
        self.stages = replacement.stages
        self._alone = bool(replacement.heads) and frozen.alone  # but for heads
        self.first_stage = [block * (1 + bool(replacement.heads)) for block in range(layout.n_blocks + 1)]
        n = layout.n_positions
        self.unit_starts = [_starts(stage.units.position, n) for stage in self.stages]
        self.input_starts = [_starts(each.position, n) for each in inputs]

    def batches(self) -> list[Batch]:
        """All targets, in the order of their rows."""
        layout, found = self.layout, []
        for number, (stage, first) in enumerate(zip(self.stages, layout.first_unit, strict=False)):
            alone = self._alone and stage.kind != "head"
            for part in self._parts(first, stage.units.position, alone):
                values = partial(self._of_units, number, stage.units[part], stage.block)
                found.append(self._batch(first, part, number, stage.units.position, alone, values))
        end, last = self.end, len(self.stages)
        first = layout.first_target if end.signals is None else layout.first_signal
        positions = torch.full((len(end.rows),), layout.n_positions - 1)
        for part in self._parts(layout.first_signal, positions, self._alone):
            found.append(self._batch(first, part, last, positions, self._alone, partial(self._of_end, part)))
        if end.signals is not None and len(end.rows):
            values = partial(self._of_signals, end.signals)
            found.append(Batch(last, layout.first_target, layout.n_targets, 0.0, values))
        first = layout.first_target
        for each in end.directions:
            for part in self._parts(layout.first_signal, each.positions, self._alone):
                values = partial(self._of_directions, each, part)
                found.append(self._batch(first, part, last, each.positions, self._alone, values))
            first += len(each.positions)
        return found

    def _batch(
        self,
        first: int,
        part: slice,
        stage: int,
        positions: Int[Tensor, " target"],
        alone: bool,
        values: Callable[[], Float[Tensor, "target node"]],
    ) -> Batch:
        """Every target and position costs what it takes to pass the stages below, and a product a source there."""
        sources = self.layout.first_unit[stage] / self.layout.n_positions
        products = stage * self.frozen.products + sources * self.frozen.d_model
        n = part.stop - part.start
        carried = n if alone else int(positions[part].sum()) + n
        return Batch(stage, first + part.start, n, carried * products, values)

    def _of_units(self, number: int, units: Units, block: int) -> Float[Tensor, "target node"]:
        carried, constant = self.frozen.enter(number, units)
        return self._row_values(self.frozen.read_by(number), carried, constant + units.constant, block)

    def _of_end(self, part: slice) -> Float[Tensor, "target node"]:
        stream, n_blocks = self.frozen.enter_end(self.end.rows[part]), self.layout.n_blocks
        return self.edges_into(n_blocks, stream, self.end.constant[part], n_blocks)

    def _of_directions(self, directions: Directions, part: slice) -> Float[Tensor, "target node"]:
        return self.edges_at(directions.at, directions.layer, directions.rows[part], directions.positions[part])

    def _of_signals(self, signals: Float[Tensor, " signal"]) -> Float[Tensor, "target node"]:
        """Logits, of the signals of the readout."""
        layout, targets = self.layout, self.end.targets
        values = targets.vectors.new_zeros(layout.n_targets, layout.first_target)
        values[:, layout.bias(layout.n_blocks)] = targets.bias
        values[:, layout.first_signal :] = targets.vectors * signals
        return values

    def edges_at(
        self, at: str, layer: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> Float[Tensor, "target node"]:
        """The edges into rows that read the stream, or what a norm made of it, at one position each."""
        return self._row_values(*self.frozen.enter_at(at, layer, rows, positions), layer)

    def edges_into(
        self, block: int, carried: Carried, constant: Float[Tensor, " target"], constant_of: int
    ) -> Float[Tensor, "target node"]:
        """The edges into targets, from the gradients at the input of their block and what biases added above."""
        return self._row_values(self.first_stage[block], carried, constant, constant_of)

    def _row_values(
        self, stage: int, carried: Carried, constant: Float[Tensor, " target"], constant_of: int
    ) -> Float[Tensor, "target node"]:
        """The same, from the gradients at the input of their stage."""
        layout = self.layout
        values = constant.new_zeros(len(constant), layout.first_unit[stage])
        values[:, layout.bias(constant_of)] = constant
        for number in reversed(range(bool(self._ahead), stage)):
            carried, written, constant = self.frozen.descend(number, carried)
            self._add_written(values, number, written, constant)
        stream = carried if isinstance(carried, Within | Branches) else dense(carried)
        if stage and self._ahead and isinstance(stream, Tensor):
            middle, constant = self.frozen.descend_to_middle(stream)
            self._add_written(values, 0, stream, constant)
            middle = middle.transpose(0, 1).flatten(1)
            for first, ahead, starts in zip(layout.first_input[:-1], self._ahead, self.input_starts, strict=True):
                n = starts[len(stream)]
                torch.mm(middle, ahead[: middle.shape[1], :n], out=values[:, first : first + n])
            return values
        for first, each, starts in zip(layout.first_input[:-1], self.inputs, self.input_starts, strict=True):
            _add_products(values, first, starts, each.vectors, self.frozen.at_inputs(stream, each.kind))
        return values

    def _add_written(
        self,
        values: Float[Tensor, "target node"],
        number: int,
        written: Float[Tensor, "pos target d_model"] | Within,
        constant: Float[Tensor, " target"],
    ) -> None:
        """Add the edges from what is written in a stage."""
        layout, block, here = self.layout, self.stages[number].block, self.stages[number].written
        if here.bias is not None:
            constant = constant + (written.gradient if isinstance(written, Within) else written.sum(0)) @ here.bias
        for source, vectors in here.by_units.items():
            _add_products(values, layout.first_unit[source], self.unit_starts[source], vectors, written)
        if here.error is not None:
            _add_products(values, layout.first_error[block], range(layout.n_positions + 1), here.error, written)
        values[:, layout.bias(block)] += constant

    @cached_property
    def _ahead(self) -> list[Float[Tensor, "pos_and_d_model input"]]:
        """What the inputs of each kind are behind the first attention, where it is cheaper to carry them there than all
        targets to them; otherwise empty."""
        found = [self.frozen.ahead(each.vectors, each.position) for each in self.inputs]
        return [each.flatten(0, 1) for each in found if each is not None] if None not in found else []

    def _parts(self, n_columns: int, positions: Int[Tensor, " target"], alone: bool) -> Iterator[slice]:
        """Targets of a stage that are carried together: neighbours, so that few are carried over positions behind their
        own; those of a position alone, where nothing reaches them from others."""
        ends, start = positions.tolist(), 0
        while start < len(ends):
            n = start + 1
            while n < len(ends) and n - start < self._targets_at_once(n_columns, ends[n] + 1):
                if alone and ends[n] > ends[start]:
                    break
                n += 1
            yield slice(start, n)
            start = n

    def _targets_at_once(self, n_columns: int, n_positions: int) -> int:
        numbers = n_columns + n_positions * self.frozen.numbers_carried
        return max(1, BYTES_AT_ONCE // (4 * numbers))


def _add_products(
    values: Float[Tensor, "target node"],
    first: int,
    starts: Sequence[int],
    vectors: Float[Tensor, "source d_model"],
    gradient: Float[Tensor, "pos target d_model"] | Within,
) -> None:
    """What sources write times the gradient at their positions; source i has column ``first + i``."""
    if isinstance(gradient, Within):
        start, end = starts[gradient.position : gradient.position + 2]
        values[:, first + start : first + end] += gradient.gradient @ vectors[start:end].T
        return
    n = len(gradient)
    if _are_even(starts):
        products = gradient @ vectors[: starts[n]].unflatten(0, (n, starts[1])).mT
        values[:, first : first + starts[n]].unflatten(1, (n, starts[1])).add_(products.transpose(0, 1))
        return
    for here, (start, end) in zip(gradient, pairwise(starts), strict=False):
        if end > start:
            values[:, first + start : first + end] += here @ vectors[start:end].T


def _are_even(starts: Sequence[int]) -> bool:
    """Whether there are as many sources at every position, and some."""
    return starts[1] > 0 and all(end - start == starts[1] for start, end in pairwise(starts))


def _starts(position: Int[Tensor, " source"], n_positions: int) -> list[int]:
    """Where the sources of each position begin, and the last end."""
    return running(0, torch.bincount(position, minlength=n_positions).tolist())
