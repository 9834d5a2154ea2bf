"""Units of several models on one text, such as training steps, seeds or architectures, and their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.units.counts import count_units
from analyses.units.firing import MINIMUM_EVENTS, headline
from analyses.units.held_out import Sampling, Stream, as_stream, sampled_rows
from analyses.units.intervals import mean_interval
from analyses.units.points import default_points, kind_of, points_named
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar


@torch.no_grad()
def compare_units(
    models: Mapping[str, HookedModel],
    text: Stream,
    points: str | Sequence[str] | None = None,
    *,
    sampling: Sampling = "windows",
    n_batches: int = 10,
    batch_size: int = 8,
    context: int = 256,
    minimum_events: int = MINIMUM_EVENTS,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Firing rates of several models on the same rows of a text, and how each differs from the first.

    Args:
        models: by name; all must have the tokenizer of the first.
        points: hook points or kinds (`analyses.units.points.points_named`); by default each model's own.
        text, sampling, n_batches, batch_size, context, minimum_events, seed, progress: as for
            `analyses.units.firing.unit_statistics`.

    Returns:
        A row per model and kind: ``firing_rate`` with its 95% interval ``low`` to ``high``, ``near_silent``, ``never``,
        ``selectivity`` and ``max_over_active``; if the first model has units of the kind, the ``difference`` of the
        firing rate from its own, with the interval ``difference_low`` to ``difference_high`` (moving blocks of rows)
        and the two-sided sign-flip ``p`` over rows.

    Raises:
        ReflowlensError: no model is given, one has another tokenizer, or as of `unit_statistics`.

    Example: ``compare_units({"step 0": fresh, "step 3000": trained}, text)``
    """
    if not models:
        raise ReflowlensError("no model is given: a firing rate needs one, a difference two")
    first = next(iter(models.values()))
    for name, model in models.items():
        if model.cfg.tokenizer_name != first.cfg.tokenizer_name:
            raise ReflowlensError(
                f"{name} reads {model.cfg.tokenizer_name!r} tokens and the first model {first.cfg.tokenizer_name!r}"
            )
    stream = as_stream(first, text)
    tokens = sampled_rows(stream, sampling, n_batches * batch_size, context, seed)
    rows: list[dict[str, str | float]] = []
    reference: dict[str, NDArray[np.float64]] = {}
    steps = bar(models.items(), show=progress, named=True, unit="model")
    for name, model in steps:
        steps.set_description(name)
        named = default_points(model) if points is None else points_named(model, points)
        counts = count_units(model, tokens.to(model.cfg.device), named, batch_size=batch_size, progress=progress)
        for kind in dict.fromkeys(map(kind_of, named)):
            parts = [part for point, part in counts.items() if kind_of(point) == kind]
            values = {key.removeprefix(f"{kind}_"): v for key, v in headline(parts, kind, minimum_events).items()}
            per_row = torch.stack([part.row_rates for part in parts]).mean(dim=0).numpy()
            rows.append({"model": name, "kind": kind, **values, **_beside(per_row, reference.get(kind), seed)})
            if model is first:
                reference[kind] = per_row
    order = ["model", "kind", "firing_rate", "low", "high", "near_silent", "never", "selectivity", "max_over_active"]
    return pd.DataFrame(rows, columns=[*order, "difference", "difference_low", "difference_high", "p"])


def _beside(per_row: NDArray[np.float64], reference: NDArray[np.float64] | None, seed: int) -> dict[str, float]:
    """The interval of the firing rate, and its difference from the first model's if that has such units."""
    if len(per_row) < 2:
        return {}
    low, high = mean_interval(per_row, seed)
    found = {"low": low, "high": high}
    if reference is None:
        return found
    difference = per_row - reference
    found["difference"] = float(difference.mean())
    found["difference_low"], found["difference_high"] = mean_interval(difference, seed)
    found["p"] = paired_permutation_pvalue(difference, "two-sided", seed=seed)
    return found
