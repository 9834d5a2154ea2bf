"""What a sweep over prompts says of each cell: the mean effect, how sure it is, and whether it is more than chance.

    result = rl.sweep(model, prompts, cells="resid_pre", metric=rl.metrics.logit_diff(prompts), positions=["subject"])
    frame = summarise(result, prompts, model=model)
    effect_grid(frame, "role", "layer")

The unit of replication is the prompt. A cell's mean has a percentile bootstrap interval over its prompts, and the p
value of a sign-flip permutation test: under no effect, each prompt's effect could as well have the other sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.pvalues import benjamini_hochberg, holm, sign_flip_pvalues
from analyses.statistics.resampling import mean_band
from reflowlens.arguments import is_one_of, number_of_runs
from reflowlens.circuits.task import performance_on, warn_unless_done
from reflowlens.errors import ReflowlensError
from reflowlens.prompts import Prompts
from reflowlens.sweeps.patching_result import PatchingResult, groups_of_present, warn_of_misaligned

EVERYTHING = "all"
Adjust = Literal["holm", "bh"]
_ADJUST = {"holm": holm, "bh": benjamini_hochberg}


def summarise(
    result: PatchingResult,
    prompts: Prompts | None = None,
    *,
    model: Any = None,
    adjust: Adjust = "holm",
    confidence: float = 0.95,
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """The effect of every cell over prompts.

    Args:
        result: of `rl.sweep`, with a value a prompt.
        prompts: those of the sweep: with a column ``group``, there are rows of each group too.
        model: of the sweep: then it begins with whether the model does the task, for prompts with answers, and warns
            where it does not; `frame.attrs["performance"]` says it in words.
        adjust: p values for the number of cells: ``"holm"``, for the chance of any false one among a group's cells, or
            ``"bh"`` (Benjamini and Hochberg), for the share of false ones among those found.
        confidence: of the intervals.
        resamples, permutations: of the prompts, and of signs where there are more than so many: fewer than 14 prompts
            have exact p values.

    Returns:
        A row a group (``"all"`` first) and cell: the cell's coordinates, ``group``, ``prompts``, those that have the
        cell's position, ``mean`` of the metric's change against the corrupted run, ``low`` and ``high``, ``p`` and
        ``p_adjusted``. What cannot be known of so few prompts is NaN: of none the mean, of one its interval and p.

    Raises:
        ReflowlensError: the result has no value a prompt, or of another number of prompts, or one is not finite.

    Example: ``summarise(rl.sweep(model, prompts, cells="mlp_out", metric=metric, positions="right"), prompts)``
    """
    resamples, permutations = number_of_runs(resamples, "resamples", 1), number_of_runs(permutations, "permutations", 1)
    if not is_one_of(adjust, list(_ADJUST)):
        raise ReflowlensError(f"adjust must be 'holm' or 'bh', got {adjust!r}")
    if result.reduced or result.has_metric_axis:
        raise ReflowlensError("a summary over prompts needs one metric's value of each prompt: rl.sweep gives it")
    if result.misaligned:
        warn_of_misaligned()
    effects = (result.values if result.baseline is None else result.effect()).flatten(0, -2).double().cpu()
    if prompts is not None and len(prompts) != effects.shape[1]:
        raise ReflowlensError(f"the result is of {effects.shape[1]} prompts, but {len(prompts)} are given")
    missing = torch.zeros_like(effects, dtype=torch.bool)
    if result.missing is not None:
        missing = result.missing.flatten(0, -2).cpu()
    _check_finite(effects, missing)
    frames = []
    for group, rows in _groups(prompts, effects.shape[1]):
        columns = _of_cells(effects[:, rows], missing[:, rows], confidence, resamples, permutations, seed)
        frame = result.index_df.reset_index(drop=True).assign(group=group, **columns)
        known = frame.p.notna()
        frame.loc[known, "p_adjusted"] = _ADJUST[adjust](frame.p[known])
        frames.append(frame)
    summary = pd.concat(frames, ignore_index=True)
    if model is not None and prompts is not None and {"answer", "wrong_answer"} <= set(prompts.frame):
        performance = performance_on(model, prompts)
        warn_unless_done(performance, "what its cells do", stacklevel=3)
        summary.attrs["performance"] = f"{performance}: {performance.verdict}"
    return summary


def _of_cells(
    effects: Tensor, missing: Tensor, confidence: float, resamples: int, permutations: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Each column of the summary, [cell]; cells that have the same prompts go together."""
    n_cells = len(effects)
    columns: dict[str, NDArray[Any]] = {"prompts": (~missing).sum(dim=1).numpy()}
    columns |= {name: np.full(n_cells, np.nan) for name in ("mean", "low", "high", "p", "p_adjusted")}
    for cells, present in groups_of_present(missing):
        table, at = effects[cells][:, present].T.numpy(), cells.numpy()
        columns["mean"][at] = table.mean(axis=0)
        if len(present) > 1:
            band = mean_band(table, confidence=confidence, resamples=resamples, seed=seed)
            columns["low"][at], columns["high"][at] = band
            columns["p"][at] = sign_flip_pvalues(table, permutations=permutations, seed=seed)
    return columns


def _groups(prompts: Prompts | None, n: int) -> Iterator[tuple[str, list[int]]]:
    yield EVERYTHING, list(range(n))
    if prompts is not None and "group" in prompts.frame:
        groups = prompts.groups
        for name in dict.fromkeys(groups):
            yield str(name), [row for row, group in enumerate(groups) if group == name]


def _check_finite(effects: Tensor, missing: Tensor) -> None:
    for cell, prompt in (~effects.isfinite() & ~missing).nonzero().tolist():
        raise ReflowlensError(
            f"prompt {prompt}: the effect of cell {cell} is {effects[cell, prompt]:g} (a recovery of two runs that "
            "agree, or activations that overflow): leave the prompt out, or take another metric"
        )
