"""A batch of runs of a model under changes, whatever the architecture: settings, and what is read of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.directions import Directions
from reflowlens.circuits.attribution.traced import Traced
from reflowlens.models.loss import capped

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Level: TypeAlias = Literal["direct", "constrained", "free", "model"]
Hooks: TypeAlias = "list[tuple[Any, Callable[..., Any]]]"


class Place(NamedTuple):
    """Where an activation is: kind of node, block, position, and number of the feature, neuron or signal."""

    kind: str
    block: int
    position: int
    unit: int


@dataclass(frozen=True)
class Change:
    """What is done in one run.

    Args:
        by: by how much an activation is set above what it is on the prompt, of each place that is set.
        kept: by block, the features or neurons that are not removed [pos, unit]; those of other blocks all stay.
    """

    by: Mapping[Place, float]
    kept: Mapping[int, Bool[Tensor, "pos unit"]] | None = None


class Pass:
    """A batch of runs, the first of which changes nothing. An architecture adds its hooks and how logits are read.

    Args:
        level: what is held, see :mod:`.changed_runs`.
    """

    def __init__(self, graph: AttributionGraph, traced: Traced, changes: Sequence[Change], level: Level) -> None:
        self.graph, self.traced, self.level, self.changes = graph, traced, level, changes
        self.replacement, self.end = traced.engine.replacement, traced.engine.end
        self.is_frozen = level in ("direct", "constrained")
        size = len(changes), len(graph.nodes)
        dtype = traced.model.ln_final.w.dtype
        self.found = torch.full(size, torch.nan, dtype=dtype, device=traced.tokens.device)
        self.numbers = {name: number for number, name in enumerate(graph.nodes["node"])}
        places: dict[tuple[str, int], list[tuple[int, int, int, float]]] = {}
        for row, change in enumerate(changes):
            for place, by in change.by.items():
                places.setdefault(place[:2], []).append((row, place.position, place.unit, by))
        self.set = {key: _columns(entries, self.found) for key, entries in places.items()}

    @property
    def n_units(self) -> int:
        """How many blocks have nodes."""
        return len(self.replacement.units)

    def run(self) -> tuple[Float[Tensor, "row node"], Float[Tensor, "row d_vocab"]]:
        """Values and logits."""
        directions = self.end.directions
        n_blocks = max([self.n_units, *(each.layer + 1 for each in directions)])
        hooks = self.hooks(n_blocks) + [(each.asked[0].point, self._read_along(each)) for each in directions]
        batch = self.traced.tokens.expand(len(self.changes), -1)
        stream = self.streams(batch, hooks, n_blocks)
        if not self.end.targets.name:
            return self.found, stream.new_zeros(len(stream), 0)
        logits = self.logits(stream[:, -1:])
        for name in self.end.targets.name:
            token, *other = map(int, name.removeprefix("logit:").split("-"))
            self.found[:, self.numbers[name]] = logits[:, token] - (logits[:, other[0]] if other else logits.mean(1))
        return self.found, capped(logits, self.traced.model.unembed.cap)

    def streams(self, tokens: Int[Tensor, "row pos"], hooks: Hooks, n_blocks: int) -> Float[Tensor, "row pos d_model"]:
        """What :meth:`logits` reads, behind so many blocks."""
        return self.traced.model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=n_blocks)

    def hooks(self, n_blocks: int) -> Hooks:
        """Those that hold, change and read."""
        raise NotImplementedError

    def logits(self, stream: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
        """At the last position, in front of a cap."""
        raise NotImplementedError

    def note(self, kind: str, block: int, x: Float[Tensor, "row pos unit"]) -> None:
        """The values of a block's nodes."""
        nodes = self.graph.nodes
        numbers = np.flatnonzero((nodes["kind"] == kind) & (nodes["layer"] == block))
        position, unit = (nodes[name].to_numpy()[numbers].astype(int) for name in ("pos", "feature"))
        self.found[:, numbers] = x[:, position, unit]

    def neurons(self, block: int, x: Float[Tensor, "row pos unit"]) -> Float[Tensor, "row pos unit"]:
        """What neurons write with, from what they come out as: those that are no nodes belong to the error."""
        answer, units = x, self.replacement.units[block]
        if self.level != "model":
            answer = x[:1].repeat(len(x), 1, 1)
        if self.level in ("constrained", "free"):
            answer[:, units.position, units.index] = x[:, units.position, units.index]
        return self.with_settings("neuron", block, answer, x[0])

    def with_settings(
        self, kind: str, block: int, activations: Float[Tensor, "row pos unit"], first: Float[Tensor, "pos unit"]
    ) -> Float[Tensor, "row pos unit"]:
        """Activations with those that are removed at zero, and those that are set as they are set."""
        activations = activations.clone()
        for number, change in enumerate(self.changes):
            if change.kept is not None and block in change.kept:
                activations[number] *= change.kept[block]
        if (kind, block) in self.set:
            row, position, unit, by = self.set[kind, block]
            activations[row, position, unit] = first[position, unit] + by
        return activations

    def with_errors(self, block: int, y: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What is written, with the errors that are set."""
        if ("error", block) not in self.set:
            return y
        row, position, _, by = self.set["error", block]
        y, error = y.clone(), self.replacement.written[block].error
        assert error is not None
        y[row, position] += by[:, None] * error[position]
        return y

    def set_vectors(self, kind: str) -> Callable[..., Tensor]:
        """A hook where inputs are whole vectors."""

        def hook(x: Tensor, hook: Any) -> Tensor:
            row, position, _, by = self.set[kind, -1]
            x = x.clone()
            x[row, position] += by.view(-1, *[1] * (x.ndim - 2)) * x[0, position]
            return x

        return hook

    def _read_along(self, directions: Directions) -> Callable[..., None]:
        numbers = [self.numbers[each.node] for each in directions.asked]

        def hook(x: Tensor, hook: Any) -> None:
            self.found[:, numbers] = (x[:, directions.positions] * directions.rows).sum(-1)

        return hook


def held(x: Tensor, hook: Any) -> Tensor:
    """In all rows what it is in the first."""
    return x[:1].expand_as(x)


def _columns(entries: Iterable[tuple[int, int, int, float]], like: Tensor) -> tuple[Tensor, ...]:
    """Rows, positions and units, and by how much each is changed."""
    *places, by = zip(*entries, strict=True)
    return *(torch.tensor(each, device=like.device) for each in places), torch.tensor(by, dtype=torch.float64).to(like)
