"""Confidence intervals of firing rates by the moving-block bootstrap, as consecutive rows of a text are dependent."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from analyses.statistics.intervals import Interval
from analyses.statistics.resampling import moving_block_weights, percentile_interval
from analyses.units.counts import UnitCounts

_AT_ONCE = 50  # resamples


def mean_interval(rows: ArrayLike, seed: int = 0) -> Interval:
    """The 95% interval of the mean of consecutive ``rows``, such as the units' mean firing rate in each row of a text.

    Raises:
        ReflowlensError: there are fewer than two rows.
    """
    values = np.asarray(rows, dtype=float)
    return percentile_interval(moving_block_weights(len(values), seed=seed) @ values / len(values))


def near_silent_interval(parts: list[UnitCounts], threshold: float, seed: int = 0) -> Interval:
    """The 95% interval of the share of units whose firing rate is below ``threshold``, over all parts.

    Args:
        parts: counts of the same text; each resample takes the same stretches of it for all of them.

    Raises:
        ReflowlensError: the text is a single stretch.
    """
    weights = torch.from_numpy(moving_block_weights(len(parts[0].stretch_positions), seed=seed))
    shares = []
    for some in weights.split(_AT_ONCE):
        silent = sum((resampled_rates(part.stretch_events, part, some) < threshold).sum(dim=1) for part in parts)
        shares.append(torch.as_tensor(silent) / sum(len(part.events) for part in parts))
    return percentile_interval(torch.cat(shares).numpy())


def unit_rate_intervals(part: UnitCounts, units: Int[Tensor, " chosen"], seed: int = 0) -> list[Interval]:
    """The 95% interval of the firing rate of each chosen unit; NaN if the text is a single stretch."""
    n = len(part.stretch_positions)
    if n < 2:
        return [Interval(float("nan"), float("nan"))] * len(units)
    rates = resampled_rates(part.stretch_events[:, units], part, torch.from_numpy(moving_block_weights(n, seed=seed)))
    return [percentile_interval(column) for column in rates.T.numpy()]


def resampled_rates(
    events: Int[Tensor, "stretch unit"], part: UnitCounts, weights: Float[Tensor, "resample stretch"]
) -> Float[Tensor, "resample unit"]:
    """Firing rates, events over positions, in each resample of the stretches."""
    return (weights @ events.float()) / (weights @ part.stretch_positions.float())[:, None]
