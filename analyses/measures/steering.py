"""Steering: what a direction added to the residual stream does from its layer on, for many strengths at once.

Many are run at once by :class:`reflowlens.sweeps.injections.Injections`. Layer ``n_layers`` is the end: the stream that
is unembedded.

A direction is written in write coordinates, r B, which is the same through every exact view of a model. Its *strength*
is the root mean square of what is added over that of the stream that it is added to: at 1 it is as large as the stream.
``alpha`` is the factor of r B itself, the unit of the published figures as far as these say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_generator
from reflowlens.errors import ReflowlensError

Reached: TypeAlias = "Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.bool_]]"


def of_unit_rms(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The same directions with entries of root mean square 1."""
    return F.normalize(vectors.float(), dim=-1) * vectors.shape[-1] ** 0.5


def random_directions(n: int, size: int, seed: int) -> Float[Tensor, "n size"]:
    """The control `random_direction`: isotropic, of unit root mean square."""
    return of_unit_rms(torch.randn(n, size, generator=derive_generator(seed, "random_direction")))


class Critical(NamedTuple):
    """What :func:`critical_strength` found.

    Args:
        strength: the smallest that suffices, by problem; NaN where none up to the largest does.
        trace: a row a trial in the order made: ``problem``, ``step``, ``strength``, ``reached``.
    """

    strength: NDArray[np.float64]
    trace: pd.DataFrame


def critical_strength(
    reached: Reached, n_problems: int, *, smallest: float, largest: float, tolerance: float = 0.02
) -> Critical:
    """The smallest strength at which each problem's goal is reached: bracketed by doubling, then bisected, all at once.

    0 is tried first, then ``smallest``, twice that, and so on up to ``largest``; the first bracket whose upper end
    suffices is halved until it is no wider than ``tolerance`` times its upper end, which is returned. If a goal is lost
    again at a larger strength this is still its first bracket: see :func:`lost_again`.

    Args:
        reached: called with the indices of some problems and a strength for each.

    Raises:
        ReflowlensError: not 0 < smallest ≤ largest, or not 0 < tolerance < 1.

    >>> needed = np.array([0.0, 0.7, 50.0])
    >>> critical_strength(lambda problem, strength: strength >= needed[problem], 3, smallest=0.1, largest=8).strength
    array([0. , 0.7, nan])
    """
    if not 0 < smallest <= largest or not 0 < tolerance < 1:
        raise ReflowlensError(
            f"0 < smallest ≤ largest and 0 < tolerance < 1 were expected, got {smallest}, {largest} and {tolerance}"
        )
    low, high = np.zeros(n_problems), np.full(n_problems, smallest)
    critical = np.full(n_problems, np.nan)
    trials: list[pd.DataFrame] = []

    def succeed(problems: NDArray[np.int64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
        hits = reached(problems, strengths)
        trials.append(pd.DataFrame({"problem": problems, "step": len(trials), "strength": strengths, "reached": hits}))
        return hits

    searching = np.arange(n_problems)
    hits = succeed(searching, low)
    critical[searching[hits]] = 0.0
    searching = searching[~hits]
    found = []
    while len(searching):
        hits = succeed(searching, high[searching])
        found.append(searching[hits])
        searching = searching[~hits & (high[searching] < largest)]
        low[searching] = high[searching]
        high[searching] = np.minimum(2 * low[searching], largest)
    bracketed = np.concatenate(found) if found else searching
    while len(wide := bracketed[high[bracketed] - low[bracketed] > tolerance * high[bracketed]]):
        middle = (low[wide] + high[wide]) / 2
        hits = succeed(wide, middle)
        high[wide[hits]], low[wide[~hits]] = middle[hits], middle[~hits]
    critical[bracketed] = high[bracketed]
    return Critical(critical, pd.concat(trials, ignore_index=True))


def lost_again(reached: Reached, critical: NDArray[np.float64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """By problem, whether a goal that is reached at its critical strength fails at one of some larger ones.

    >>> def reached(problem, strength):
    ...     return (strength > 1) & (strength < 3 + 9 * problem)
    >>> lost_again(reached, np.array([1.1, 1.1, np.nan]), np.array([1, 2, 4, 8]))
    array([ True, False, False])
    """
    lost = np.zeros(len(critical), dtype=bool)
    for strength in strengths:
        problems = np.flatnonzero((critical < strength) & ~lost)
        lost[problems] = ~reached(problems, np.full(len(problems), float(strength)))
    return lost
