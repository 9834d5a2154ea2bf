"""Screening: estimate every cell from gradients, then perform the interventions that look strongest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from reflowlens.arguments import whole_number
from reflowlens.circuits.gradients import estimate_cells, steps_of
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import Metric, check_metric
from reflowlens.models.text import TextInput, read_once
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions
from reflowlens.sweeps.grids import CellSpec
from reflowlens.sweeps.patching_result import mean_over_prompts, warn_of_misaligned
from reflowlens.sweeps.setup import prepare_sweep
from reflowlens.sweeps.sweep import sweep


@dataclass(frozen=True)
class Agreement:
    """How well estimated effects agree with exact ones.

    Args:
        n: number of effects that are compared.
        pearson, spearman: correlations of values and of ranks; NaN where one side does not vary.
        same_sign: share of the exact effects that are not zero whose estimate has the same sign.
        top: how many of the largest absolute effects ``top_found`` is about.
        top_found: share of the exact ones among them that are among the estimated ones too; NaN where unknown.
    """

    n: int
    pearson: float
    spearman: float
    same_sign: float
    top: int
    top_found: float


def agreement(estimated: ArrayLike, exact: ArrayLike, top: int = 20) -> Agreement:
    """Compare effects that are given in the same order.

    Raises:
        ReflowlensError: they are not of one number.

    >>> result = agreement([1.0, -2.0, 0.1, 3.0], [1.5, -1.0, -0.1, 3.5], top=2)
    >>> result.spearman, result.same_sign, result.top_found
    (1.0, 0.75, 0.5)
    """
    try:
        a, b = pd.Series(np.ravel(estimated), dtype=float), pd.Series(np.ravel(exact), dtype=float)
    except (TypeError, ValueError) as error:
        raise ReflowlensError("effects must be numbers") from error
    if len(a) != len(b):
        raise ReflowlensError(f"{len(a)} estimated effects cannot be compared with {len(b)} exact ones")
    top = min(whole_number(top, "top", 0), len(a))
    strongest = [set(x.abs().sort_values(ascending=False, kind="stable").index[:top]) for x in (a, b)]
    effective = b != 0
    return Agreement(
        n=len(a),
        pearson=float(a.corr(b)),
        spearman=float(a.rank().corr(b.rank())),
        same_sign=float((np.sign(a) == np.sign(b))[effective].mean()),
        top=top,
        top_found=len(strongest[0] & strongest[1]) / top if top else float("nan"),
    )


@dataclass(frozen=True)
class Screening:
    """Estimated effects of all cells, and exact ones of the strongest.

    Args:
        frame: one row a cell, the largest absolute estimate first: its coordinates, ``estimate`` and ``exact``, both
            the mean over prompts of the metric's change against the corrupted run, over those that have the cell's
            position (cells that none has are left out); ``exact`` is NaN where the intervention was not performed.
        agreement: of the cells that were performed; ``top_found`` is known only if they all were.
        baseline: the metric of the corrupted run.
    """

    frame: pd.DataFrame
    agreement: Agreement
    baseline: Float[Tensor, " prompt"]


@guarded(changing)
def screen(
    model: Any,
    clean: TextInput | Prompts | None,
    corrupted: TextInput | None = None,
    cells: CellSpec = (),
    metric: Metric | None = None,
    *,
    positions: Positions = None,
    mode: Literal["gradient", "integrated"] = "gradient",
    top: int = 20,
    exhaustive: bool = False,
    steps: int = 8,
    memory: float | None = None,
    progress: bool | None = None,
) -> Screening:
    """Estimate the effect of every cell from gradients and confirm the strongest by performing them.

    Args:
        clean, corrupted, cells, metric, positions, steps, memory, progress: as in :func:`reflowlens.sweep`.
        mode: how effects are estimated.
        top: number of cells, by absolute estimate, that are performed.
        exhaustive: perform all of them, to see which of the strongest the estimates miss.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> texts = "The king of France", "The king of China"
        >>> found = rl.screen(model, *texts, "mlp_neurons", rl.metrics.kl(), top=3, progress=False)
        >>> list(found.frame.columns), len(found.frame), len(found.frame.dropna())
        (['layer', 'neuron', 'estimate', 'exact'], 4224, 3)
    """
    if mode not in ("gradient", "integrated"):
        raise ReflowlensError(f"mode must be 'gradient' or 'integrated', got {mode!r}")
    top = whole_number(top, "top", 0)
    hooked = hooked_model(model)
    clean, corrupted = read_once(clean), read_once(corrupted)
    metric = check_metric(metric)
    setup = prepare_sweep(hooked, clean, corrupted, cells, positions)
    if setup.misaligned:
        warn_of_misaligned()
    values, baseline = estimate_cells(setup, metric, steps_of(mode, steps), memory)
    estimates = mean_over_prompts(values - baseline, setup.missing).cpu()
    somewhere = ~setup.missing.all(dim=1)
    order = estimates.abs().where(somewhere, -1.0).argsort(descending=True, stable=True)
    order = order[somewhere[order]]
    chosen = order if exhaustive else order[:top]
    exact = torch.full_like(estimates, torch.nan)
    if len(chosen):
        performed = [setup.asked[i] for i in chosen.tolist()]
        result = sweep(model, clean, corrupted, performed, metric, memory=memory, progress=progress)
        exact[chosen] = mean_over_prompts(result.effect(), result.missing).cpu()
    frame = setup.cells.index.assign(estimate=estimates.tolist(), exact=exact.tolist())
    measured = agreement(estimates[chosen].tolist(), exact[chosen].tolist(), top)
    if not exhaustive:
        measured = dataclasses.replace(measured, top_found=float("nan"))
    return Screening(frame.iloc[order.tolist()].reset_index(drop=True), measured, baseline)
