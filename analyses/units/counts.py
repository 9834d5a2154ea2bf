"""Firing counts of single units over a stream of text: memory is a few numbers per unit, however long the text.

A unit is a coordinate of a hook point, such as a neuron or a signal of reFlow. An *event* is a position where it is
above 0; of units that can be negative, only the positive part is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.measures.sparsity import gini, hoyer, participation_share
from analyses.units.points import written_by
from reflowlens.activations.stream import Measure, Part, measured
from reflowlens.dictionaries.splice import spliced_layers
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

SHARES = (0.01, 0.1)  # thresholds, as shares of a unit's 99.9th percentile
PERCENTILE = 99.9
SPARSITY = ("gini", "hoyer", "participation")
_TAIL = 1 - PERCENTILE / 100
STRETCHES = 128  # into which the text is divided for intervals: memory is so many counts a unit, however long it is
_AT_ONCE = 2**22  # entries of a point, 16 MB: memory of larger ones is handed back and asked for anew each time
_EVERY = 17  # positions of which one is taken for sparsity, which has to sort: no divisor of a usual row


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """Counts of one hook point over ``n`` positions, per unit; all axes after the position are flattened to units.

    Args:
        n: number of positions.
        unit_shape: the flattened axes; ``events.reshape(unit_shape)`` restores them.
        events: number of positions where the unit is above 0.
        total, square: sums over positions of the positive part, and of its square.
        largest: the largest positive part.
        where: the position of ``largest`` in the text, rows read one after the other; the first among equal values.
        percentile: the 99.9th of the positive part over all positions, zeros included, interpolated linearly as
            ``numpy.percentile`` does.
        above: number of positions above each of ``SHARES`` times the percentile.
        row_rates: firing rate in each row of the text, mean over units.
        active: sum over positions of the number of units that fire, and of its square.
        stretch_events: events in each of at most ``STRETCHES`` runs of consecutive rows.
        stretch_positions: number of positions of each run.
        sparsity: ``gini``, ``hoyer`` and ``participation`` (`analyses.measures.sparsity`) of the values of all units at
            a position, mean over every 17th position where a unit fires. ``participation`` is of the norms of what the
            units write: value times norm of the write direction; NaN for units that write nothing by themselves.
    """

    n: int
    unit_shape: tuple[int, ...]
    events: Int[Tensor, " unit"]
    total: Float[Tensor, " unit"]
    square: Float[Tensor, " unit"]
    largest: Float[Tensor, " unit"]
    where: Int[Tensor, " unit"]
    percentile: Float[Tensor, " unit"]
    above: Int[Tensor, "share unit"]
    row_rates: Float[Tensor, " row"]
    active: tuple[float, float]
    stretch_events: Int[Tensor, "stretch unit"]
    stretch_positions: Int[Tensor, " stretch"]
    sparsity: dict[str, float]

    @property
    def rate(self) -> Float[Tensor, " unit"]:
        """Firing rate: the share of positions at which a unit fires."""
        return self.events.double() / self.n

    @property
    def selectivity(self) -> Float[Tensor, " unit"]:
        """Max / mean over all positions, zeros included: at most n, reached by a single event; NaN without events."""
        return self.largest.double() / (self.total / self.n)

    @property
    def max_over_active(self) -> Float[Tensor, " unit"]:
        """Max / mean over the events, which is selectivity times firing rate; NaN without events."""
        return self.selectivity * self.rate

    @property
    def active_mean(self) -> float:
        """Number of units that fire at a position, mean over positions."""
        return self.active[0] / self.n

    @property
    def active_cv(self) -> float:
        """Coefficient of variation over positions of the number of units that fire; NaN if none ever does."""
        mean = self.active_mean
        return math.sqrt(max(self.active[1] / self.n - mean**2, 0.0)) / mean if mean else math.nan


class _Running:
    """The sums of :class:`UnitCounts` so far."""

    def __init__(self, tokens: Int[Tensor, "row pos"], write_norms: Float[Tensor, " unit"] | None) -> None:
        # enough of the largest to interpolate the percentile
        self.kept = math.floor(_TAIL * (tokens.numel() - 1)) + 2
        self.write_norms = write_norms
        self.stretch = torch.arange(len(tokens), device=tokens.device) // -(-len(tokens) // STRETCHES)  # of each row
        self.stretch_positions = self.stretch.bincount() * tokens.shape[1]
        self.context, self.rows = tokens.shape[1], 0
        self.measured: list[Tensor] = []
        self.n, self.active = 0, (0.0, 0.0)
        self.row_rates: list[Tensor] = []
        self.shape: tuple[int, ...] = ()
        self.above = torch.zeros(len(SHARES), 1, dtype=torch.long, device=tokens.device)

    def add(self, name: str, x: Float[Tensor, "n *unit"]) -> None:
        values = x.flatten(1).float().clamp(min=0)
        rows = values.unflatten(0, (-1, self.context))
        fires = (rows > 0).float()  # sums of floats are several times as fast as of bools
        total, events = rows.sum(dim=1).double(), fires.sum(dim=1).long()
        if not total.isfinite().all():
            raise ReflowlensError(f"{name!r} holds NaN or infinite values")
        largest, where = values.max(dim=0)
        top = values.topk(min(self.kept, len(values)), dim=0).values
        if not self.n:
            self.shape = tuple(x.shape[1:])
            zero = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
            self.events, self.total, self.square = zero.long(), zero, zero
            self.largest, self.where, self.top = largest, where, top
            self.stretch_events = zero.int().repeat(len(self.stretch_positions), 1)
        else:
            later = largest > self.largest
            self.where = torch.where(later, where + self.n, self.where)
            self.largest = torch.where(later, largest, self.largest)
            joined = torch.cat([self.top, top])
            self.top = joined.topk(min(self.kept, len(joined)), dim=0).values
        self.events = self.events + events.sum(dim=0)
        self.total = self.total + total.sum(dim=0)
        self.square = self.square + rows.square().sum(dim=1).double().sum(dim=0)
        per_position = fires.sum(dim=2).double()
        self.active = self.active[0] + float(per_position.sum()), self.active[1] + float(per_position.square().sum())
        self.row_rates.append(per_position.mean(dim=1) / values.shape[1])
        stretch = self.stretch[self.rows : self.rows + len(rows)]
        self.stretch_events.index_add_(0, stretch, events.int())
        self.measured.append(self._sparsity(values[-self.n % _EVERY :: _EVERY]))
        self.rows += len(rows)
        self.n += len(values)

    def _sparsity(self, values: Float[Tensor, "pos unit"]) -> Float[Tensor, "firing_pos measure"]:
        """Gini, Hoyer and the participation ratio of the writes at each position where a unit fires."""
        values = values[(values > 0).any(dim=1)].double()
        norms = torch.nan if self.write_norms is None else self.write_norms
        ginis = torch.from_numpy(gini(values.cpu().numpy())).to(values.device)
        return torch.stack([ginis, hoyer(values), participation_share(values * norms)], dim=1)

    def percentile(self) -> Float[Tensor, " unit"]:
        """Interpolated between the two values around it, counted from the largest."""
        place = _TAIL * (self.n - 1)
        below, share = math.ceil(place), math.ceil(place) - place
        lower, upper = self.top[below], self.top[max(below - 1, 0)]
        return lower + (upper - lower) * share

    def add_above(self, x: Float[Tensor, "n *unit"]) -> None:
        """In a second pass: only after the first are the percentiles known."""
        thresholds = [(share * self.percentile()).clamp(min=0) for share in SHARES]
        self.above = self.above + torch.stack([(x.flatten(1) > t).float().sum(dim=0).long() for t in thresholds])

    def finish(self) -> UnitCounts:
        sparsity = torch.cat(self.measured).mean(dim=0).tolist()  # NaN where no unit fires
        return UnitCounts(
            self.n,
            self.shape,
            self.events.cpu(),
            self.total.cpu(),
            self.square.cpu(),
            self.largest.cpu(),
            self.where.cpu(),
            self.percentile().cpu(),
            self.above.cpu(),
            torch.cat(self.row_rates).cpu(),
            self.active,
            self.stretch_events.cpu(),
            self.stretch_positions.cpu(),
            dict(zip(SPARSITY, sparsity, strict=True)),
        )


@torch.no_grad()
def count_units(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    points: Sequence[str],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, UnitCounts]:
    """Count the units of some hook points over a text, in two passes: the second counts above shares of percentiles.

    Args:
        tokens: the text in rows, each read by itself.
        points: hook points whose activations are [batch, pos, ...], as `analyses.units.points.points_named` gives them.
        batch_size: at most so many rows are read at once; fewer where an activation would be large.

    Returns:
        The counts of each hook point, in main memory.

    Raises:
        ReflowlensError: a point does not exist, or an activation is not finite.

    Example: ``count_units(model, tokens, ["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"].rate``
    """
    read = partial(_read, model, tokens, points, batch_size, progress)
    running = {name: _Running(tokens, write_norms(model, name)) for name in points}
    for _ in read("counting units", lambda name, x, occurrences: running[name].add(name, x)):
        pass  # counts are small, and grow in place
    for _ in read("above thresholds", lambda name, x, occurrences: running[name].add_above(x)):
        pass
    return {name: part.finish() for name, part in running.items()}


def write_norms(model: HookedModel, point: str) -> Float[Tensor, " unit"] | None:
    """The norm of what each unit adds to the residual stream at activation 1; None of units that write nothing.

    Of a dictionary's features, while it is spliced in, over all layers that they write to.
    """
    for layer in spliced_layers(model):
        if layer.points.get(point) is layer.features:
            return layer.weights.W_dec.detach().flatten(1).norm(dim=1)
    weight = written_by(model, point)
    return None if weight is None else model.get_parameter(weight).detach().norm(dim=-1).flatten()


@torch.no_grad()
def firing_overlap(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[tuple[str, str], Float[Tensor, " _unit"]]:
    """Jaccard's index of the positions at which a unit fires at two points: |both| / |either|; NaN if at neither.

    Args:
        tokens, batch_size: as for `count_units`.
        pairs: pairs of hook points with the same number of units; unit i of one is compared with unit i of the other.

    Returns:
        The index of each unit, for each pair.

    Raises:
        ReflowlensError: a point does not exist.

    Example: ``firing_overlap(model, tokens, [("blocks.0.hook_x_sparse", "blocks.1.hook_x_sparse")])``
    """
    points = list(dict.fromkeys(name for pair in pairs for name in pair))
    both: dict[tuple[str, str], Tensor | int] = dict.fromkeys(pairs, 0)
    events: dict[str, Tensor | int] = dict.fromkeys(points, 0)
    read = partial(_read, model, tokens, points, batch_size, progress)
    for fires, *_ in read("comparing levels", lambda name, x, occurrences: (x.flatten(1) > 0).float()):
        for name in points:
            events[name] = events[name] + fires[name].sum(dim=0).long()
        for first, second in pairs:
            both[first, second] = both[first, second] + (fires[first] * fires[second]).sum(dim=0).long()
        fires.clear()  # the next batch is read into the same memory
    shared = {pair: torch.as_tensor(both[pair]).double() for pair in pairs}
    return {pair: (n / (events[pair[0]] + events[pair[1]] - n)).cpu() for pair, n in shared.items()}


def _read(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    points: Sequence[str],
    batch_size: int,
    progress: bool,
    what: str,
    measure: Measure[Part],
) -> Iterator[tuple[dict[str, Part], int, int]]:
    """Measure the points in so few rows at once that every activation is small."""
    _, one = model.run_with_cache(tokens[:1, :1], names_filter=list(points), return_type=None)
    largest = max(one[name].numel() for name in points) * tokens.shape[1]
    rows = tokens.split(max(1, min(batch_size, _AT_ONCE // largest)))
    return measured(model, bar(rows, show=progress, desc=what, unit="batch", leave=False), points, measure)
