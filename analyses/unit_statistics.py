"""How sparsely single units fire, and how selective they are: of any hook point, beside the untrained model.

    text = Path("val.txt").read_text()
    result = unit_statistics(rl.load_model("out/bdh_nano"), text)
    print(unit_report(result))

Of BDH the claims are that about 3% of the gated neurons fire at a byte, that 40% of them fire on less than 1% of bytes,
and that single neurons mean something. Three numbers do not mean what they seem to. An untrained BDH already fires at
one gated neuron in four, each of two gates being open half the time. Selectivity, max / mean, is max / mean-when-active
divided by the firing rate, so that it rises when units get rarer, whatever they fire for; and a unit that fires once in
P positions has selectivity P, the largest there is. So everything stands beside the untrained model, units are ranked
among those with enough events, and max / mean-when-active is told too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from analyses.held_out import Stream, as_stream, shuffled, tiles, windows
from analyses.result import Result
from analyses.statistics import bootstrap_interval, paired_permutation_pvalue, verdict
from analyses.unit_counts import SHARES, UnitCounts, count_units
from analyses.unit_figures import unit_figures
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

Sampling = Literal["windows", "tiles"]
NEAR_SILENT = 0.01
MINIMUM_EVENTS = 20
MINIMUM_ROWS = 20
BEFORE, AFTER = 24, 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# The usual neurons of each architecture; of several with a level, the first that a model has.
_KINDS = (("hook_x_sparse", "hook_y_sparse", "hook_xy_sparse"), ("mlp.hook_post",))
PUBLISHED = {"xy_sparse_firing_rate": 0.03, "xy_sparse_near_silent": 0.40}


def definitions(kind: str) -> dict[str, str]:
    """What the metrics of a kind of units mean."""
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
    points: Sequence[str] | None = None,
    *,
    sampling: Sampling = "windows",
    n_batches: int = 10,
    batch_size: int = 8,
    context: int = 256,
    minimum_events: int = MINIMUM_EVENTS,
    top: int = 20,
    controls: bool = True,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Firing rates, selectivity and the strongest contexts of units, beside an untrained model.

    Args:
        text: held-out text, or its token ids.
        points: hook points [batch, pos, ...]; default x, y and their product of every level of a BDH, the MLP neurons
            of a transformer, the readout signals of a reFlow.
        sampling: ``"windows"``, ``n_batches * batch_size`` random ones, as published; ``"tiles"``, all of the text.
        context: tokens of a window or tile.
        minimum_events: positions at which a unit must fire to be ranked.
        top: units of each kind whose strongest context is shown.
        controls: count ``untrained``, the same architecture with fresh weights (``seed + 1``), and ``shuffled_text``,
            the model on the same tokens in a random order, too.
        quick: two batches.

    Returns:
        A Result with frames ``levels`` (a row a point and model), ``rates`` (the distribution over units), ``alike``
        (Spearman correlation of a unit's rate at two levels) and ``top_units``, and figures ``firing``,
        ``rates_<kind>`` and ``selectivity_<kind>``. Metrics are of each kind of units, over levels. Claim
        ``<kind>_firing_rate``: training makes units fire less; supported if the interval over rows lies below the
        untrained rate and the sign-flip test of their difference over rows has p < 0.05.

    Raises:
        ReflowlensError: a point does not exist, or the text is shorter than a row.

    Example: ``unit_statistics(model, text, sampling="tiles").frames["levels"]``
    """
    points = list(default_points(model) if points is None else points)
    stream = as_stream(model, text)
    if sampling not in ("windows", "tiles"):
        raise ReflowlensError(f"sampling must be 'windows' or 'tiles', got {sampling!r}")
    n_rows = (2 if quick else n_batches) * batch_size
    tokens = tiles(stream, context) if sampling == "tiles" else windows(stream, n_rows, context, seed)
    tokens = tokens[:n_rows] if quick else tokens
    runs = {"model": (model, tokens)}
    if controls:
        runs["untrained"] = build_model(model.cfg, seed=seed + 1, device=model.cfg.device), tokens
        runs["shuffled_text"] = model, shuffled(tokens.flatten(), seed).reshape(tokens.shape)
    counts = {
        name: count_units(each, read, points, batch_size=batch_size, progress=progress)
        for name, (each, read) in runs.items()
    }
    result = Result(
        name="unit_statistics",
        title="Unit Statistics",
        params={
            "points": points,
            "sampling": sampling,
            "positions": tokens.numel(),
            "context": context,
            "minimum_events": minimum_events,
            "seed": seed,
            "quick": quick,
            "model_hash": model_hash(model),
        },
        frames={
            "levels": pd.concat([levels_frame(part, name, minimum_events) for name, part in counts.items()]),
            "rates": pd.concat([rates_frame(part, name) for name, part in counts.items()]),
        },
    )
    result.frames["top_units"] = top_units(model, counts["model"], tokens, top, minimum_events)
    if not (alike := rates_alike(counts["model"])).empty:
        result.frames["alike"] = alike
    result.figures |= unit_figures(counts, kind_of, minimum_events)
    _add_metrics(result, counts, minimum_events, seed)
    result.notes += [
        f"{tokens.numel():,} positions in {len(tokens)} rows of {context}; position 0 of a row sees nothing before it: "
        "a BDH's y, and with it xy, is silent there",
        "intervals take rows as units of replication; windows that overlap are not independent, tiles nearly so",
    ]
    return result


def default_points(model: HookedModel) -> list[str]:
    """The units that an architecture is made of."""
    for kinds in _KINDS:
        if f"blocks.0.{kinds[0]}" in model.hook_dict:
            points = [f"blocks.{layer}.{kind}" for kind in kinds for layer in range(model.cfg.n_layers)]
            return points + [name for name in ("unembed.hook_signal",) if name in model.hook_dict]
    raise ReflowlensError(f"{model.cfg.architecture!r} has no usual units: give points, see model.hook_dict")


def kind_of(point: str) -> str:
    """The name of a kind of units: ``xy_sparse`` of ``blocks.3.hook_xy_sparse``, ``mlp_post`` of an MLP's neurons.

    >>> kind_of("blocks.3.hook_xy_sparse"), kind_of("blocks.0.mlp.hook_post"), kind_of("unembed.hook_signal")
    ('xy_sparse', 'mlp_post', 'unembed_signal')
    """
    return re.sub(r"^blocks\.\d+\.", "", point).replace("hook_", "").replace(".", "_")


def level_of(point: str) -> int:
    """The block that a point is in, -1 outside the blocks."""
    return int(point.split(".")[1]) if point.startswith("blocks.") else -1


def levels_frame(counts: dict[str, UnitCounts], name: str, minimum_events: int) -> pd.DataFrame:
    """One row a point. ``firing_rate_01`` and ``_10`` count above 1% and 10% of each unit's 99.9th percentile;
    ``open_given_x``, of BDH's product, is P(y > 0 | x > 0)."""
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
                "open_given_x": float(part.events.sum() / x.events.sum()) if is_product and x is not None else np.nan,
                **{f"rate_q{round(100 * q):02}": float(rate.quantile(q)) for q in QUANTILES},
            }
        )
    return pd.DataFrame(rows)


def rates_frame(counts: dict[str, UnitCounts], name: str) -> pd.DataFrame:
    """The distribution of firing rates over units in ten bins a decade; rates of 0 have a bin of their own, at 0."""
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


def rates_alike(counts: dict[str, UnitCounts]) -> pd.DataFrame:
    """Spearman correlation between a unit's rates at two levels: where levels share their weights, is it one unit?"""
    rows = []
    for first, part in counts.items():
        for second, other in counts.items():
            if kind_of(first) == kind_of(second) and level_of(first) < level_of(second):
                rho = float(stats.spearmanr(part.rate, other.rate).statistic)
                levels = {"level": level_of(first), "other_level": level_of(second)}
                rows.append({"kind": kind_of(first), **levels, "spearman": rho})
    return pd.DataFrame(rows)


def top_units(
    model: HookedModel, counts: dict[str, UnitCounts], tokens: Int[Tensor, "row pos"], top: int, minimum_events: int
) -> pd.DataFrame:
    """The most selective units of each kind among those with enough events, with the text around their maximum."""
    rows = []
    for point, part in counts.items():
        score = part.selectivity.masked_fill(part.events < minimum_events, -np.inf).nan_to_num(nan=-np.inf)
        best = score.topk(min(top, len(score)))
        for unit in best.indices[best.values > 0].tolist():
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
                    "max": float(part.largest[unit]),
                    "context": context_of(model, tokens, int(part.where[unit])),
                }
            )
    columns = ["kind", "level", "head", "unit", "selectivity", "max_over_active", "events", "firing_rate", "max"]
    frame = pd.DataFrame(rows, columns=[*columns, "context"])
    frame = frame.sort_values(["kind", "selectivity"], ascending=[True, False])
    return frame.groupby("kind").head(top).reset_index(drop=True)


def context_of(model: HookedModel, tokens: Int[Tensor, "row pos"], where: int) -> str:
    """The tokens around a position of the text, line breaks as ``\\n``, the token itself in ⟦ ⟧."""
    row, position = divmod(where, tokens.shape[1])
    start = max(0, position - BEFORE)
    pieces = model.tokenizer.to_str_tokens(tokens[row, start : position + 1 + AFTER].tolist())
    peak = position - start
    text = "".join(f"⟦{piece}⟧" if i == peak else piece for i, piece in enumerate(pieces))
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def _add_metrics(result: Result, counts: dict[str, dict[str, UnitCounts]], minimum_events: int, seed: int) -> None:
    """Metrics of each kind of units over its levels, with the untrained model's and the verdict of the firing rate."""
    for kind in dict.fromkeys(map(kind_of, counts["model"])):
        parts = {name: [p for point, p in each.items() if kind_of(point) == kind] for name, each in counts.items()}
        values = {name: _headline(each, kind, minimum_events) for name, each in parts.items()}
        metric = f"{kind}_firing_rate"
        result.metrics |= values["model"]
        result.definitions |= definitions(kind)
        result.published |= {name: value for name, value in PUBLISHED.items() if name in values["model"]}
        per_row = {name: torch.stack([p.row_rates for p in each]).mean(dim=0).numpy() for name, each in parts.items()}
        rows = per_row["model"]
        if len(rows) > 1:
            result.intervals[metric] = bootstrap_interval(rows, seed=seed)
        for name in values["model"]:
            beside = {other: each[name] for other, each in values.items() if other != "model" and name in each}
            if beside:
                result.controls[name] = beside
        if len(rows) > 1 and "untrained" in values:
            p = paired_permutation_pvalue(per_row["untrained"] - rows, seed=seed)
            low, high = result.intervals[metric]
            control = values["untrained"][metric]
            result.verdicts[metric] = verdict((-high, -low), -control, p, minimum_units=MINIMUM_ROWS, units=len(rows))


def _headline(parts: list[UnitCounts], kind: str, minimum_events: int) -> dict[str, float]:
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


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else float("nan")


def unit_report(result: Result, top: int = 10) -> str:
    """The result as text: a table of levels, the metrics beside their controls, and the strongest contexts."""
    columns = ["model", "kind", "level", "firing_rate", "near_silent", "never", "selectivity", "max_over_active"]
    lines = [f"{result.params['positions']:,} positions", ""]
    lines += [result.frames["levels"][columns].to_string(index=False, float_format=lambda x: f"{x:.4g}"), ""]
    for metric, value in result.metrics.items():
        beside = ", ".join(f"{name} {control:.4g}" for name, control in result.controls.get(metric, {}).items())
        said = f", published {result.published[metric]:.4g}" if metric in result.published else ""
        lines.append(f"{metric:<32}{value:>12.4g}  {beside}{said}".rstrip(", "))
    for kind, units in result.frames["top_units"].groupby("kind", sort=False):
        lines += ["", f"{kind}: the most selective units with at least {result.params['minimum_events']} events"]
        for unit in units.head(top).to_dict("records"):
            where = f"level {unit['level']} head {unit['head']} unit {unit['unit']}"
            lines.append(
                f"  {where:<32} s {unit['selectivity']:>8.1f}  max/active {unit['max_over_active']:>6.1f}  "
                f"events {unit['events']:>6}  {unit['context']}"
            )
    return "\n".join(lines)
