"""How rarely the units of a hook point fire and how selective they are, compared with an untrained model.

    text = Path("val.txt").read_text()
    result = unit_statistics(rl.load_model("out/nano"), text)
    print(unit_report(result))      # of analyses.units.terminal; or: reflowlens units out/nano --data val.txt

Of neurons behind two gates the claims (Kosowski et al., 2025) are that about 3% of them fire at a byte, that 40% of
them fire on less than 1% of bytes, and that single neurons mean something. Three facts bear on such numbers. Before
training one neuron in four fires, because each of two gates is open half the time. Selectivity, max / mean, equals
max / mean-when-active divided by the firing rate, so that it rises when units fire more rarely, whatever they fire for.
And a unit that fires once in P positions has selectivity P, the largest possible. Therefore every number is given for
untrained models too, only units with enough events are ranked, and max / mean-when-active is reported as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from analyses.claims import bound_of
from analyses.controls.nulls import untrained_model
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.units.counts import UnitCounts, count_units
from analyses.units.figures import unit_figures
from analyses.units.frames import NEAR_SILENT, levels_alike, levels_frame, rates_frame, top_units
from analyses.units.held_out import Sampling, Stream, as_stream, sampled_rows, shuffled
from analyses.units.intervals import mean_interval, near_silent_interval
from analyses.units.points import default_points, kind_of, points_named
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

MINIMUM_EVENTS = 20
MINIMUM_ROWS = 20
SHOWN = ("model", "untrained", "shuffled_text")  # in figures
PUBLISHED = {"xy_sparse_firing_rate": 0.03, "xy_sparse_near_silent": 0.40}


def definitions(kind: str) -> dict[str, str]:
    """The definitions of the metrics of a kind of units."""
    return {
        f"{kind}_firing_rate": "share of positions at which a unit is above 0, mean over units and levels",
        f"{kind}_near_silent": f"share of the units that fire at less than {NEAR_SILENT:.0%} of positions",
        f"{kind}_never": "share of the units that never fire",
        f"{kind}_selectivity": "max / mean over all positions, median over units with at least the floor of events",
        f"{kind}_max_over_active": "max / mean over the positions where the unit fires, median over the same units",
    }


@torch.no_grad()
def unit_statistics(
    model: HookedModel,
    text: Stream,
    points: str | Sequence[str] | None = None,
    *,
    sampling: Sampling = "windows",
    n_batches: int = 10,
    batch_size: int = 8,
    context: int = 256,
    minimum_events: int = MINIMUM_EVENTS,
    top: int = 20,
    controls: bool = True,
    untrained: int = 3,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Firing rates, selectivity and the strongest contexts of units, compared with untrained models.

    Args:
        text: held-out text, or its token ids [token].
        points: hook points [batch, pos, ...], or kinds as ``"xy_sparse"`` or ``"mlp_post"`` (`points_named`), one or
            several; default the neurons that blocks are made of (``units`` of the architecture), and the readout
            signals of a reFlow.
        sampling: ``"windows"`` draws ``n_batches * batch_size`` random rows, as published; ``"tiles"`` reads all of the
            text.
        n_batches: batches of random windows.
        batch_size: rows of a batch, and at most so many are read at once.
        context: tokens of a row.
        minimum_events: number of positions at which a unit must fire to be ranked.
        top: number of units of each kind whose strongest context is shown.
        controls: count two controls too: ``untrained``, the same architecture with fresh weights, and
            ``shuffled_text``, the model on the same tokens in a random order.
        untrained: number of untrained models; the frame ``levels`` has each, and the control is the hardest to beat.
        seed: of windows, fresh weights, shuffles and resamples.
        quick: two batches, one untrained model.
        progress: show how far the counting is.

    Returns:
        A Result with frames ``levels`` (a row per point and model), ``rates`` (the distribution over units), ``alike``
        (where blocks share their weights: is a unit the same at two levels, `levels_alike`) and ``top_units``, and
        figures ``firing``, ``rates_<kind>`` and ``selectivity_<kind>``. Metrics are of each kind of units, over levels.
        Claim ``<kind>_firing_rate``: training makes units fire less; supported if its interval lies below the untrained
        rate and the sign-flip test of their difference over rows has p < 0.05. Intervals are of moving blocks of rows
        (`analyses.units.intervals`).

    Raises:
        ReflowlensError: a point does not exist or has no positions, the text is shorter than a row, or ``untrained`` is
            below 1.

    Example: ``unit_statistics(model, text, sampling="tiles").frames["levels"]``
    """
    if controls and untrained < 1:
        raise ReflowlensError(f"untrained must be at least 1, got {untrained}: controls=False leaves them out")
    untrained = 1 if quick else untrained
    points = default_points(model) if points is None else points_named(model, points)
    stream = as_stream(model, text)
    n_rows = (2 if quick else n_batches) * batch_size
    tokens = sampled_rows(stream, sampling, n_rows, context, seed)
    tokens = tokens[:n_rows] if quick else tokens
    runs = {"model": (model, tokens)}
    if controls:
        for number, name in enumerate(untrained_names(untrained), start=1):
            runs[name] = untrained_model(model, seed, number), tokens
        mixed = shuffled(tokens.flatten(), derive_seed(seed, "unit_statistics"))
        runs["shuffled_text"] = model, mixed.reshape(tokens.shape)
    counts: dict[str, dict[str, UnitCounts]] = {}
    steps = bar(runs.items(), show=progress, named=True, unit="model")
    for name, (each, read) in steps:
        steps.set_description(name.replace("_", " "))
        counts[name] = count_units(each, read, points, batch_size=batch_size, progress=progress)
    frames = {
        "levels": pd.concat([levels_frame(part, name, minimum_events) for name, part in counts.items()]),
        "rates": pd.concat([rates_frame(part, name) for name, part in counts.items()]),
        "top_units": top_units(model, counts["model"], tokens, top, minimum_events, seed),
    }
    if not (alike := levels_alike(model, counts["model"], tokens, batch_size, progress)).empty:
        frames["alike"] = alike
    kinds = list(dict.fromkeys(map(kind_of, counts["model"])))
    findings = {
        name: finding for kind in kinds for name, finding in _findings(counts, kind, minimum_events, seed).items()
    }
    return Result(
        name="unit_statistics",
        title="Unit Statistics",
        params={
            "points": points,
            "sampling": sampling,
            "positions": tokens.numel(),
            "context": context,
            "minimum_events": minimum_events,
            "top": top,
            "controls": controls,
            "untrained": untrained,
            "seed": seed,
            "quick": quick,
            "model_hash": model_hash(model),
        },
        findings=findings,
        frames=frames,
        figures=unit_figures({name: counts[name] for name in counts if name in SHOWN}, kind_of, minimum_events, seed),
        definitions={metric: text for kind in kinds for metric, text in definitions(kind).items()},
        published={metric: value for metric, value in PUBLISHED.items() if metric in findings},
        notes=[
            f"{tokens.numel():,} positions in {len(tokens)} rows of {context}; position 0 of a row sees nothing before "
            "it: units that read earlier positions alone (y_sparse, and with it xy_sparse) are silent there",
            "intervals draw runs of consecutive rows; windows that overlap are not independent, tiles nearly so",
        ],
    )


def _findings(
    counts: dict[str, dict[str, UnitCounts]], kind: str, minimum_events: int, seed: int
) -> dict[str, Finding]:
    """A kind's metrics over its levels, with those of the controls, and the verdict of its firing rate."""
    parts = {name: [p for point, p in each.items() if kind_of(point) == kind] for name, each in counts.items()}
    values = {name: headline(each, kind, minimum_events) for name, each in parts.items()}
    per_row = {name: torch.stack([p.row_rates for p in each]).mean(dim=0).numpy() for name, each in parts.items()}
    rows, fresh = per_row["model"], [name for name in values if name.startswith("untrained")]
    rate, controls = f"{kind}_firing_rate", {name: _controls(values, fresh, name) for name in values["model"]}
    intervals, verdicts = {}, {}
    if len(rows) > 1:
        intervals[rate] = mean_interval(rows, seed)
        intervals[f"{kind}_near_silent"] = near_silent_interval(parts["model"], NEAR_SILENT, seed)
    if len(rows) > 1 and fresh:
        p = max(paired_permutation_pvalue(per_row[each] - rows, seed=seed) for each in fresh)
        (low, high), bound = intervals[rate], bound_of("unit_statistics", rate, controls[rate])
        verdicts[rate] = verdict((-high, -low), bound, p, minimum_units=MINIMUM_ROWS, units=len(rows))
    return {
        name: Finding(value, intervals.get(name), controls[name], verdicts.get(name))
        for name, value in values["model"].items()
    }


def _controls(values: dict[str, dict[str, float]], fresh: list[str], metric: str) -> dict[str, float]:
    """A metric's value in each untrained model, and on shuffled text, where they have it."""
    found = {each: values[each][metric] for each in fresh if metric in values[each]}
    if metric in values.get("shuffled_text", {}):
        found["shuffled_text"] = values["shuffled_text"][metric]
    return found


def headline(parts: list[UnitCounts], kind: str, minimum_events: int) -> dict[str, float]:
    """The metrics of a kind of units over its levels; selectivity only where a unit has enough events."""
    rate = torch.cat([part.rate for part in parts])
    ranked = torch.cat([part.events for part in parts]) >= minimum_events
    found: dict[str, Any] = {
        f"{kind}_firing_rate": rate.mean(),
        f"{kind}_near_silent": (rate < NEAR_SILENT).double().mean(),
        f"{kind}_never": (rate == 0).double().mean(),
    }
    if ranked.any():
        found[f"{kind}_selectivity"] = torch.cat([part.selectivity for part in parts])[ranked].median()
        found[f"{kind}_max_over_active"] = torch.cat([part.max_over_active for part in parts])[ranked].median()
    return {name: float(value) for name, value in found.items()}


def untrained_names(n: int) -> list[str]:
    """What the untrained models are called: the first without a number.

    >>> untrained_names(3)
    ['untrained', 'untrained_2', 'untrained_3']
    """
    return ["untrained", *(f"untrained_{i}" for i in range(2, n + 1))]
