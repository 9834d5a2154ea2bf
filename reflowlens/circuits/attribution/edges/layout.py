"""The nodes of a graph by number: what it begins with, what it ends with, and how many edges there can be between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.directions import Directions
from reflowlens.circuits.attribution.edges.rows import REST
from reflowlens.circuits.attribution.linear.replacement import Replacement
from reflowlens.circuits.attribution.targets import LogitTargets


@dataclass(frozen=True)
class Inputs:
    """What the stream begins with.

    Args:
        kind: ``"embedding"``, ``"position"``, of reFlow ``"signal"``, of a TTTFlow ``"bigram"`` and ``"token_value"``.
        index: the token, or the signal, of each; the others have none of their own.
        position: in ascending order.
        activation: of a signal the recipe's entry, otherwise 1.
        vectors: what each adds.
    """

    kind: str
    index: Int[Tensor, " input"]
    position: Int[Tensor, " input"]
    activation: Float[Tensor, " input"]
    vectors: Float[Tensor, "input width"]


@dataclass(frozen=True)
class End:
    """What is read off the last position.

    Args:
        targets: logits; empty where the targets are features.
        rows: by which each target, or each signal of the readout, reads ``ln_final.hook_normalized``.
        constant: what the biases add to it.
        signals: of a readout by way of signals, their values; the targets are sums over these.
        directions: targets that are read off the stream elsewhere, where there are no logits.
    """

    targets: LogitTargets
    rows: Float[Tensor, "row d_model"]
    constant: Float[Tensor, " row"]
    signals: Float[Tensor, " row"] | None
    directions: Sequence[Directions] = ()

    @property
    def n_targets(self) -> int:
        return len(self.targets.name) + sum(len(each.asked) for each in self.directions)


@dataclass(frozen=True)
class Layout:
    """The numbers of the nodes: the rest, a bias a block and one of the readout, inputs, errors, units, the end.

    Args:
        inputs: how many of each kind.
        units: how many of each stage; stages are blocks, or where heads are nodes two a block.
    """

    n_blocks: int
    n_positions: int
    inputs: Sequence[int]
    units: Sequence[int]
    n_signals: int
    n_targets: int
    first_input: list[int] = field(init=False)
    first_error: list[int] = field(init=False)
    first_unit: list[int] = field(init=False)

    def __post_init__(self) -> None:
        first_input = running(1 + self.n_blocks + 1, self.inputs)
        first_error = running(first_input[-1], [self.n_positions] * self.n_blocks)
        first_unit = running(first_error[-1], self.units)
        for name, value in (("first_input", first_input), ("first_error", first_error), ("first_unit", first_unit)):
            object.__setattr__(self, name, value)

    def bias(self, block: int) -> int:
        return REST + 1 + block

    @property
    def first_signal(self) -> int:
        return self.first_unit[-1]

    @property
    def first_target(self) -> int:
        return self.first_signal + self.n_signals

    @property
    def n_nodes(self) -> int:
        return self.first_target + self.n_targets


def running(start: int, counts: Sequence[int]) -> list[int]:
    """Where each of neighbouring parts begins, and the last ends."""
    firsts = [start]
    for count in counts:
        firsts.append(firsts[-1] + count)
    return firsts


def layout_of(replacement: Replacement, inputs: Sequence[Inputs], end: End, n_positions: int) -> Layout:
    n_signals = 0 if end.signals is None else len(end.signals)
    sizes = [len(each.index) for each in inputs], [len(stage.units) for stage in replacement.stages]
    return Layout(len(replacement.units), n_positions, *sizes, n_signals, end.n_targets)


def possible_edges(layout: Layout, replacement: Replacement, inputs: Sequence[Inputs], alone: bool) -> tuple[int, int]:
    """How many edges there can be, and how many targets they go into.

    Args:
        alone: where heads are nodes, all other targets read what is at their own position.
    """
    alone = alone and bool(replacement.heads)
    n = layout.n_positions

    def at(position: Tensor) -> Tensor:
        return torch.bincount(position.cpu(), minlength=n)

    def reached(here: bool) -> Tensor:
        return (sources if here else sources.cumsum(0)) + layout.n_blocks + 2

    sources = sum((at(each.position) for each in inputs), torch.zeros(n, dtype=torch.long))
    edges = targets = 0
    for stage in replacement.stages:
        position = stage.units.position
        edges += int(reached(alone and stage.kind != "head")[position.cpu()].sum())
        targets += len(position)
        sources = sources + at(position) + (stage.written.error is not None)
    at_end = layout.n_signals or layout.n_targets
    edges += int(reached(alone).max()) * at_end + layout.n_signals * layout.n_targets
    return edges, targets + layout.n_signals + layout.n_targets
