"""The floor and the ceiling of every statement about single signals, and what such a statement has to beat.

(R A, Aᵀ B) is the same function for every orthogonal A. A random A says what signals look like that nobody trained
(``rotated_basis``); the varimax A, how sparse a basis with these predictions can be made without training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analyses.result.result import Finding, Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.pvalues import Alternative, holm, predictive_pvalue
from analyses.statistics.verdicts import verdict
from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView, random_rotation, rotate, varimax_view

ROTATIONS = 10
QUICK_ROTATIONS = 4
INVARIANT = (
    "A rotation of the signals moves no cosine and no principal component, so that the floor (rotated_basis) and the "
    "ceiling (varimax) of these metrics are the metrics themselves"
)


def check_rotations(rotations: int) -> None:
    """Raises ReflowlensError for fewer than 2 random rotations."""
    if rotations < 2:
        raise ReflowlensError(f"rotations must be at least 2, for their spread is the null, got {rotations}")


def random_rotations(n: int, rotations: int, seed: int, experiment: str) -> Iterator[tuple[str, Float[Tensor, "n n"]]]:
    """The random rotations of an experiment, named ``rotated_0`` and on."""
    for i in range(rotations):
        yield f"rotated_{i}", random_rotation(n, derive_seed(seed, experiment, "rotated_basis", i))


def other_bases(view: SignalView, rotations: int, seed: int, experiment: str) -> Iterator[tuple[str, SignalView]]:
    """``rotations`` random rotations of a view, drawn for one experiment, and the ``varimax`` one.

    Raises ReflowlensError for fewer than 2 rotations.
    """
    check_rotations(rotations)
    for name, rotation in random_rotations(view.n_signals, rotations, seed, experiment):
        yield name, rotate(view, rotation)
    yield "varimax", varimax_view(view, seed=seed)


def rotated_values(values: Mapping[str, float]) -> list[float]:
    """The numbers of the random rotations, of numbers by basis."""
    return [value for basis, value in values.items() if basis.startswith("rotated_")]


def basis_controls(values: Mapping[str, float]) -> dict[str, float]:
    """The floor, a mean over rotations, and the ceiling of a metric; ``values`` by basis (`other_bases`)."""
    return {"rotated_basis": float(np.mean(rotated_values(values))), "varimax": values["varimax"]}


def basis_verdicts(
    findings: Mapping[str, Finding],
    nulls: Mapping[str, Sequence[float]],
    alternatives: Mapping[str, Alternative],
    units: Mapping[str, int],
    *,
    minimum_units: int,
) -> tuple[dict[str, Finding], list[str]]:
    """Judge the claim, for each metric, that the trained basis is privileged: it says more than a random rotation.

    Supported if p of the metric as one more draw from the rotations, Holm-adjusted over these metrics, is below 0.05
    and the metric's interval is clear of the rotations' mean, on the side that ``alternatives`` names; underpowered
    with fewer than ``minimum_units`` units of replication.

    Args:
        findings: with intervals.
        nulls: metric -> its values in random rotations.
        alternatives: metric -> "greater" or "less", whichever a privileged basis would be.
        units: metric -> how many units its interval was taken over.

    Returns:
        The findings, those of ``nulls`` with their verdicts, and notes that tell the p-values.
    """
    raw = [predictive_pvalue(findings[metric].value, null, alternatives[metric]) for metric, null in nulls.items()]
    judged, notes = dict(findings), []
    for (metric, null), p, adjusted in zip(nulls.items(), raw, holm(raw).tolist(), strict=True):
        sign = 1 if alternatives[metric] == "greater" else -1
        low, high = sorted(sign * end for end in findings[metric].interval or ())
        judgement = verdict(
            (low, high), sign * float(np.mean(null)), adjusted, minimum_units=minimum_units, units=units[metric]
        )
        judged[metric] = replace(findings[metric], verdict=judgement)
        notes.append(
            f"{metric}: as one more rotation of the basis p = {p:.2g}, Holm-adjusted {adjusted:.2g}; "
            f"rotations {min(null):.4g} to {max(null):.4g}"
        )
    return judged, notes


def add_basis_controls(result: Result, metric: str, values: Mapping[str, float]) -> None:
    """Put the floor and the ceiling beside a metric; ``values`` by basis (`other_bases`)."""
    result.controls[metric] = result.controls.get(metric, {}) | basis_controls(values)


def add_basis_verdicts(
    result: Result,
    nulls: Mapping[str, Sequence[float]],
    alternatives: Mapping[str, Alternative],
    units: Mapping[str, int],
    *,
    minimum_units: int,
) -> None:
    """`basis_verdicts` of a result's findings."""
    judged, notes = basis_verdicts(result.findings, nulls, alternatives, units, minimum_units=minimum_units)
    result.verdicts |= {metric: finding.verdict for metric, finding in judged.items() if finding.verdict}
    result.notes += notes
