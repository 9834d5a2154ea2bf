"""The tables of unit statistics, from counts: by level, over units, between levels, and the strongest units."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from analyses.units.counts import SHARES, UnitCounts, firing_overlap
from analyses.units.intervals import unit_rate_intervals
from analyses.units.points import kind_of, level_of
from reflowlens.models.base import HookedModel

NEAR_SILENT = 0.01
BEFORE, AFTER = 24, 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def levels_frame(counts: dict[str, UnitCounts], name: str, minimum_events: int) -> pd.DataFrame:
    """A row per point. ``firing_rate_01`` and ``_10`` count above 1% and 10% of each unit's 99.9th percentile;
    ``open_given_x``, of a product x y of units, is P(y > 0 | x > 0); ``gini``, ``hoyer`` and ``participation`` are of
    the values at a position (`analyses.units.counts.UnitCounts`)."""
    rows = []
    for point, part in counts.items():
        rate, ranked = part.rate, part.events >= minimum_events
        x = counts.get(point.replace("hook_xy_sparse", "hook_x_sparse"))
        is_product = point.endswith("hook_xy_sparse") and x is not None
        rows.append(
            {
                "model": name,
                "kind": kind_of(point),
                "level": level_of(point),
                "units": len(rate),
                "firing_rate": float(rate.mean()),
                **{
                    f"firing_rate_{round(100 * share):02}": float(above.double().mean() / part.n)
                    for share, above in zip(SHARES, part.above, strict=True)
                },
                "near_silent": float((rate < NEAR_SILENT).double().mean()),
                "never": int((part.events == 0).sum()),
                "ranked": int(ranked.sum()),
                "selectivity": _median(part.selectivity[ranked]),
                "max_over_active": _median(part.max_over_active[ranked]),
                "active_mean": part.active_mean,
                "active_cv": part.active_cv,
                **part.sparsity,
                "open_given_x": float(part.events.sum() / x.events.sum()) if is_product and x is not None else np.nan,
                **{f"rate_q{round(100 * q):02}": float(rate.quantile(q)) for q in QUANTILES},
            }
        )
    return pd.DataFrame(rows)


def rates_frame(counts: dict[str, UnitCounts], name: str) -> pd.DataFrame:
    """The distribution of firing rates over units in ten bins per decade; rates of 0 have a bin of their own, at 0."""
    edges = np.logspace(-6, 0, 61)
    rows = []
    for point, part in counts.items():
        rate = part.rate.numpy()
        shares = np.histogram(rate[rate > 0], bins=edges)[0] / len(rate)
        places = {"model": name, "kind": kind_of(point), "level": level_of(point)}
        rows.append({**places, "rate": 0.0, "share": float((rate == 0).mean())})
        rows += [
            {**places, "rate": float(np.sqrt(low * high)), "share": float(share)}
            for low, high, share in zip(edges, edges[1:], shares, strict=False)
            if share
        ]
    return pd.DataFrame(rows)


def levels_alike(
    model: HookedModel, counts: dict[str, UnitCounts], tokens: Int[Tensor, "row pos"], batch_size: int, progress: bool
) -> pd.DataFrame:
    """Where blocks share their weights: is a unit one unit? Of each two levels ``spearman``, the correlation
    of the units' rates, and ``jaccard``, mean over units of |positions of both| / |positions of either|, beside the
    ``jaccard_chance`` of units with these rates that know nothing of each other. Empty for other models, where nothing
    but the number joins a unit of one block to a unit of the next."""
    if not model.blocks_share_weights:
        return pd.DataFrame()
    pairs = [
        (first, second)
        for first, second in itertools.product(counts, counts)
        if kind_of(first) == kind_of(second) and level_of(first) < level_of(second)
    ]
    overlap = firing_overlap(model, tokens, pairs, batch_size=batch_size, progress=progress) if pairs else {}
    rows = []
    for (first, second), jaccard in overlap.items():
        a, b = counts[first].rate, counts[second].rate
        rows.append(
            {
                "kind": kind_of(first),
                "level": level_of(first),
                "other_level": level_of(second),
                "spearman": float(stats.spearmanr(a, b).statistic),
                "jaccard": float(jaccard.nanmean()),
                "jaccard_chance": float((a * b / (a + b - a * b)).nanmean()),
            }
        )
    return pd.DataFrame(rows)


def top_units(
    model: HookedModel,
    counts: dict[str, UnitCounts],
    tokens: Int[Tensor, "row pos"],
    top: int,
    minimum_events: int,
    seed: int = 0,
) -> pd.DataFrame:
    """The most selective units of each kind, among those with enough events, with the intervals of their firing rates
    and the text around their maximum."""
    rows = []
    for point, part in counts.items():
        score = part.selectivity.masked_fill(part.events < minimum_events, -np.inf).nan_to_num(nan=-np.inf)
        best = score.topk(min(top, len(score)))
        chosen = best.indices[best.values > 0]
        intervals = unit_rate_intervals(part, chosen, seed)
        for unit, interval in zip(chosen.tolist(), intervals, strict=True):
            place = np.unravel_index(unit, part.unit_shape)
            rows.append(
                {
                    "kind": kind_of(point),
                    "level": level_of(point),
                    "head": int(place[0]) if len(place) > 1 else -1,
                    "unit": int(place[-1]),
                    "selectivity": float(part.selectivity[unit]),
                    "max_over_active": float(part.max_over_active[unit]),
                    "events": int(part.events[unit]),
                    "firing_rate": float(part.rate[unit]),
                    "low": interval.low,
                    "high": interval.high,
                    "max": float(part.largest[unit]),
                    "context": context_of(model, tokens, int(part.where[unit])),
                }
            )
    columns = [
        "kind",
        "level",
        "head",
        "unit",
        "selectivity",
        "max_over_active",
        "events",
        "firing_rate",
        "low",
        "high",
    ]
    frame = pd.DataFrame(rows, columns=[*columns, "max", "context"])
    frame = frame.sort_values(["kind", "selectivity"], ascending=[True, False])
    return frame.groupby("kind").head(top).reset_index(drop=True)


def context_of(model: HookedModel, tokens: Int[Tensor, "row pos"], where: int) -> str:
    """The text around a position, line breaks as ``\\n``, the token itself in ⟦ ⟧."""
    row, position = divmod(where, tokens.shape[1])
    start = max(0, position - BEFORE)
    pieces = model.tokenizer.to_str_tokens(tokens[row, start : position + 1 + AFTER].tolist())
    peak = position - start
    text = "".join(f"⟦{piece}⟧" if i == peak else piece for i, piece in enumerate(pieces))
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else float("nan")
