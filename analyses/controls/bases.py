"""The floor and the ceiling of every statement about single signals, and what such a statement has to beat.

(R A, Aᵀ B) is the same function for every orthogonal A. A random A says what signals look like that nobody trained
(``rotated_basis``); the varimax A, how sparse a basis with these predictions can be made without training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Generic, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from analyses.claims import bound_of, sign_of
from analyses.result.finding import Finding
from analyses.statistics.draws import derive_seed
from analyses.statistics.pvalues import Alternative, holm, predictive_pvalue
from analyses.statistics.verdicts import verdict
from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView, random_rotation, rotate, varimax_view

T = TypeVar("T")
U = TypeVar("U")

ROTATIONS = 10
QUICK_ROTATIONS = 4
INVARIANT = (
    "A rotation of the signals moves no cosine and no principal component, so that the floor (rotated_basis) and the "
    "ceiling (varimax) of these metrics are the metrics themselves"
)


@dataclass(frozen=True)
class Bases(Generic[T]):
    """The same measure in every basis that a statement about single signals is held against.

    Args:
        own: in the basis of the view itself.
        rotated: in random rotations of it, by name (``rotated_0`` and on); their mean is the floor.
        varimax: in the rotation with the sparsest recipes, the ceiling.
        nulls: of views with nothing in them to find, by name.

    >>> Bases(0.3, {"rotated_0": 0.1, "rotated_1": 0.2}, 0.9, {"untrained": 0.0}).map(lambda x: 10 * x).controls()
    {'untrained': 0.0, 'rotated_basis': 1.5, 'varimax': 9.0}
    """

    own: T
    rotated: dict[str, T]
    varimax: T
    nulls: dict[str, T] = field(default_factory=dict)

    def map(self, function: Callable[[T], U]) -> Bases[U]:
        """What a function makes of each."""
        rotated, nulls = ({name: function(x) for name, x in some.items()} for some in (self.rotated, self.nulls))
        return Bases(function(self.own), rotated, function(self.varimax), nulls)

    def named(self, own: str) -> dict[str, T]:
        """Each by its name; ``own``: that of the view's own basis."""
        return {own: self.own, **self.nulls, **self.rotated, "varimax": self.varimax}

    def series(self, own: str) -> dict[str, list[T]]:
        """As figures show them: all random rotations are one series, ``rotated_basis``."""
        single = {own: self.own, **self.nulls, "varimax": self.varimax}
        return {name: [x] for name, x in single.items()} | {"rotated_basis": [*self.rotated.values()]}

    def controls(self: Bases[float]) -> dict[str, float]:
        """What stands beside a metric: the nulls, the floor and the ceiling."""
        return {**self.nulls, "rotated_basis": float(np.mean([*self.rotated.values()])), "varimax": self.varimax}


def in_bases(
    measure: Callable[[SignalView], T],
    view: SignalView,
    nulls: Mapping[str, T],
    *,
    rotations: int,
    seed: int,
    experiment: str,
    progress: bool = False,
) -> Bases[T]:
    """Measure a view, random rotations of it that are drawn for one experiment, and its varimax rotation.

    A rotated recipe is in memory while it is measured. ``nulls``: what was measured of views with nothing in them.

    Raises:
        ReflowlensError: fewer than 2 rotations.
    """
    check_rotations(rotations)
    rotated = rotated_views(view, rotations, seed, experiment)
    bar = tqdm(rotated, total=rotations, desc=experiment.replace("_", " "), disable=not progress)
    return Bases(
        own=measure(view),
        nulls=dict(nulls),
        rotated={name: measure(other) for name, other in bar},
        varimax=measure(varimax_view(view, seed=seed)),
    )


def by_metric(headlines: Bases[dict[str, T]]) -> dict[str, Bases[T]]:
    """Numbers by basis and metric, by metric and basis."""
    return {metric: headlines.map(itemgetter(metric)) for metric in headlines.own}


def check_rotations(rotations: int) -> None:
    """Raises ReflowlensError for fewer than 2 random rotations."""
    if rotations < 2:
        raise ReflowlensError(f"rotations must be at least 2, for their spread is the null, got {rotations}")


def random_rotations(n: int, rotations: int, seed: int, experiment: str) -> Iterator[tuple[str, Float[Tensor, "n n"]]]:
    """The random rotations of an experiment, named ``rotated_0`` and on."""
    for i in range(rotations):
        yield f"rotated_{i}", random_rotation(n, derive_seed(seed, experiment, "rotated_basis", i))


def rotated_views(view: SignalView, rotations: int, seed: int, experiment: str) -> Iterator[tuple[str, SignalView]]:
    """A view in the `random_rotations` of an experiment."""
    for name, rotation in random_rotations(view.n_signals, rotations, seed, experiment):
        yield name, rotate(view, rotation)


def as_one_basis(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame whose column ``basis`` calls every random rotation ``rotated_basis``."""
    return frame.replace({"basis": r"rotated_\d+"}, "rotated_basis", regex=True)


def basis_verdicts(
    findings: Mapping[str, Finding],
    values: Mapping[str, Bases[float]],
    units: Mapping[str, int],
    *,
    minimum_units: int,
    experiment: str,
) -> tuple[dict[str, Finding], list[str]]:
    """Judge the claim, for each metric, that the trained basis is privileged: it says more than a random rotation.

    Supported if p of the metric as one more draw from the rotations, Holm-adjusted over these metrics, is below 0.05
    and the metric's interval is clear of the rotations' mean, and of the other controls that its claim names, by the
    smallest effect that matters, on the side where a privileged basis would be (`analyses.claims`); underpowered with
    fewer than ``minimum_units`` units of replication.

    Args:
        findings: with intervals.
        values: metric -> its value in every basis.
        units: the metrics that are judged -> how many units their intervals were taken over.
        experiment: whose claims these are.

    Returns:
        The findings, those that are judged with their verdicts, and notes that tell the p-values.
    """
    nulls = {metric: [*values[metric].rotated.values()] for metric in units}
    signs = {metric: sign_of(experiment, metric) for metric in units}
    sides: dict[int, Alternative] = {1: "greater", -1: "less"}
    raw = [predictive_pvalue(findings[metric].value, null, sides[signs[metric]]) for metric, null in nulls.items()]
    judged, notes = dict(findings), []
    for (metric, null), p, adjusted in zip(nulls.items(), raw, holm(raw).tolist(), strict=True):
        interval = findings[metric].interval
        assert interval is not None  # every metric that is judged is one over units
        low, high = sorted(signs[metric] * end for end in interval)
        bound = bound_of(experiment, metric, findings[metric].controls)
        judgement = verdict((low, high), bound, adjusted, minimum_units=minimum_units, units=units[metric])
        judged[metric] = replace(findings[metric], verdict=judgement)
        notes.append(
            f"{metric}: as one more rotation of the basis p = {p:.2g}, Holm-adjusted {adjusted:.2g}; "
            f"rotations {min(null):.4g} to {max(null):.4g}"
        )
    return judged, notes
