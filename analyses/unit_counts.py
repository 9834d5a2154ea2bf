"""What single units do over a long text, counted as it streams by: memory is a few numbers a unit, however long it is.

A unit is a coordinate of a hook point: a neuron of BDH, of an MLP, a signal of reFlow. An *event* is a position where
it is above 0; of units that can be negative the positive part is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from reflowlens.collection import first_unneeded_block
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

SHARES = (0.01, 0.1)  # thresholds, as shares of a unit's 99.9th percentile
PERCENTILE = 99.9
_TAIL = 1 - PERCENTILE / 100


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """Counts of one hook point over ``n`` positions, by unit; its axes behind the position are flattened to units.

    Args:
        unit_shape: those axes: ``events.reshape(unit_shape)`` has them again.
        events: positions above 0.
        total, square: sums over positions of the positive part and of its square.
        largest, where: its largest value and the position in the text read row after row, of equal ones the first.
        percentile: the 99.9th over all positions, zeros included, interpolated as ``numpy.percentile`` does.
        above: positions above each of ``SHARES`` times the percentile.
        row_rates: of each row of the text, the mean firing rate of the units.
        active: how many units fire at a position, summed over positions and squared.
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

    @property
    def rate(self) -> Float[Tensor, " unit"]:
        """f, the share of positions at which a unit fires."""
        return self.events.double() / self.n

    @property
    def selectivity(self) -> Float[Tensor, " unit"]:
        """s = max / mean over all positions, zeros included: at most n, which one single event reaches; NaN of none."""
        return self.largest.double() / (self.total / self.n)

    @property
    def max_over_active(self) -> Float[Tensor, " unit"]:
        """max / mean over the events: selectivity times the firing rate; NaN of none."""
        return self.selectivity * self.rate

    @property
    def active_mean(self) -> float:
        """Units that fire at a position, mean over positions."""
        return self.active[0] / self.n

    @property
    def active_cv(self) -> float:
        """Their standard deviation over positions, in means; NaN where no unit fires."""
        mean = self.active_mean
        return math.sqrt(max(self.active[1] / self.n - mean**2, 0.0)) / mean if mean else math.nan


class _Running:
    """The sums of :class:`UnitCounts` so far."""

    def __init__(self, n_positions: int) -> None:
        self.kept = math.floor(_TAIL * (n_positions - 1)) + 2  # enough of the largest to interpolate the percentile
        self.n, self.active = 0, (0.0, 0.0)
        self.row_rates: list[Tensor] = []
        self.shape: tuple[int, ...] = ()

    def add(self, activation: Float[Tensor, "batch pos *unit"], name: str) -> None:
        values = activation.detach().flatten(2).flatten(0, 1).float().clamp(min=0)
        if not values.isfinite().all():
            raise ReflowlensError(f"{name!r} holds NaN or infinite values")
        fires = values > 0
        largest, where = values.max(dim=0)
        top = values.topk(min(self.kept, len(values)), dim=0).values
        if not self.n:
            self.shape = tuple(activation.shape[2:])
            zero = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
            self.events, self.total, self.square = zero.long(), zero, zero
            self.largest, self.where, self.top = largest, where, top
        else:
            later = largest > self.largest
            self.where = torch.where(later, where + self.n, self.where)
            self.largest = torch.where(later, largest, self.largest)
            joined = torch.cat([self.top, top])
            self.top = joined.topk(min(self.kept, len(joined)), dim=0).values
        self.events = self.events + fires.sum(dim=0)
        self.total = self.total + values.sum(dim=0, dtype=torch.float64)
        self.square = self.square + values.square().sum(dim=0, dtype=torch.float64)
        per_position = fires.sum(dim=1).double()
        self.active = self.active[0] + float(per_position.sum()), self.active[1] + float(per_position.square().sum())
        self.row_rates.append(per_position.unflatten(0, activation.shape[:2]).mean(dim=1) / values.shape[1])
        self.n += len(values)

    def percentile(self) -> Float[Tensor, " unit"]:
        """Between the two values around it, counted from the largest."""
        place = _TAIL * (self.n - 1)
        below, share = math.ceil(place), math.ceil(place) - place
        lower, upper = self.top[below], self.top[max(below - 1, 0)]
        return lower + (upper - lower) * share


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
        tokens: the text, row after row; a unit sees nothing of other rows.

    Raises:
        ReflowlensError: a point does not exist or has no positions, or an activation is not finite.

    Example: ``count_units(model, tokens, ["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"].rate``
    """
    for name in points:
        if model.hook_axes(name)[:2] != ("batch", "pos"):
            raise ReflowlensError(f"{name!r} has axes {model.hook_axes(name)}: units are of [batch, pos, ...]")
    running = {name: _Running(tokens.numel()) for name in points}
    with _watching(model, points, lambda name, activation: running[name].add(activation, name)):
        _read(model, tokens, points, batch_size, "counting units", progress)
    percentiles = {name: part.percentile() for name, part in running.items()}
    above = {name: torch.zeros(len(SHARES), len(q), dtype=torch.long) for name, q in percentiles.items()}

    def count(name: str, activation: Tensor) -> None:
        values = activation.flatten(2).flatten(0, 1)
        for i, share in enumerate(SHARES):
            above[name][i] += (values > (share * percentiles[name]).clamp(min=0)).sum(dim=0).cpu()

    with _watching(model, points, count):
        _read(model, tokens, points, batch_size, "above thresholds", progress)
    return {
        name: UnitCounts(
            part.n,
            part.shape,
            part.events.cpu(),
            part.total.cpu(),
            part.square.cpu(),
            part.largest.cpu(),
            part.where.cpu(),
            percentiles[name].cpu(),
            above[name],
            torch.cat(part.row_rates).cpu(),
            part.active,
        )
        for name, part in running.items()
    }


@contextmanager
def _watching(model: HookedModel, points: Sequence[str], see: Any) -> Iterator[None]:
    """Show every activation of the points to ``see(name, activation)`` when it exists: none is kept."""

    def watch(name: str, activation: Tensor, hook: HookPoint) -> None:
        see(name, activation)

    with model.hooks(fwd_hooks=[(name, partial(watch, name)) for name in points]):
        yield


def _read(
    model: HookedModel, tokens: Int[Tensor, "row pos"], points: Sequence[str], batch_size: int, what: str, show: bool
) -> None:
    stop = first_unneeded_block(points)
    for rows in tqdm(tokens.split(batch_size), desc=what, unit="batch", disable=not show):
        model(rows, return_type=None, stop_at_layer=stop)
