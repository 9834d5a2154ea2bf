"""Scale: does the loss of factoring the embedding shrink as models grow, and where would the published ones lie?

A study of several sizes, each as reFlow and as GPT-2-New with the same blocks, on the same batches, with as many tokens
a parameter and one shape of schedule (`pretraining/studies/scale.toml`). N counts parameters outside the embedding,
which both have alike.

What is fitted. The gap L(reFlow) - L(GPT-2-New), paired by seed, is a line in log10 N: a gap may be 0 or change its
sign, which no power law can. Each family's loss is L = a·N^-b + c; from three sizes c cannot be told apart from b, and
is 0 (`analyses.statistics.power_law`). Intervals are Student's t with runs - parameters degrees of freedom, and
hold as far as the law does. A bootstrap over runs within each size stands beside: of two runs a size it is too narrow.

The rule, decided beforehand. *The gap shrinks* if the 95% interval of its slope lies below -0.02 nats a tenfold of N,
the smallest effect that matters; it does not if the interval lies above that; otherwise, and with fewer than 2 seeds a
size or 3 sizes, this is underpowered. *There is a gap* at a size if its paired 95% interval lies above 0.02 nats (three
seeds at least: `analyses.findings.contrasts`). A prediction whose interval is wider than 0.1 nats, the published gap
(3%, said to narrow to 1%), is *too wide to tell*.

What the published comparison is not. From reFlow-1 to Big both depth (32 to 36 layers) and schedule (constant to
decayed rate) change, and from Small also d and S: that depth closes the gap was never measured alone. What lies on the
curves here are models trained on this data with this many tokens a parameter; levels are not comparable with the
published losses (another corpus, vocabulary and 9B tokens), which stand beside as such. Learning rates are the same at
all sizes, so that a rate too large for the largest would pass for an effect of size in both families alike.

A rate that is too large for one family alone would pass for a gap: where the mean loss of a family rises from one size
to the next nothing is said of the gap's slope. This condition was added after runs at a quarter of the batch, in which
that of GPT-2-New did.

What would change the answer: sizes that span more than a tenfold, a fourth of them (which identifies c), more seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.findings.contrasts import contrast
from analyses.findings.runs import TrainedRun, measured_by, runs_table, trained_runs
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.intervals import Interval
from analyses.statistics.power_law import FEWEST_FOR_FLOOR, Line, PowerLaw, fit_line, fit_power_law
from analyses.statistics.verdicts import Verdict
from reflowlens.config import PRESETS
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import line_with_band
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import ENDS

SLOPE, GAP, WIDE = 0.02, 0.02, 0.1
FAMILIES = {"reflow": "reFlow", "other": "GPT-2-New"}
PUBLISHED = {"reflow_1_small": 3.55, "reflow_1": 3.01, "reflow_1_big": 2.92}
"""Held-out losses of the published models."""


def scale(study: str | Path, *, quick: bool = True, progress: bool | None = None) -> Result:
    """Whether the loss of factoring the embedding shrinks with size, and where the published models would lie.

    Args:
        study: what `reflowlens study scale` wrote.
        quick: 1,000 resamples of the bootstrap, otherwise 10,000.

    Returns a Result with metrics `gap_slope`, `gap_N` at each size, `exponent_reflow`, `exponent_other` and
    `gap_at_PRESET`; frames `runs`, `gaps` (a row a size and seed), `fits`, `predictions` (a row a published model: its
    size, the gap and each family's loss with 95% prediction intervals, and whether they are too wide to tell); and
    figures `loss` and `gap`.

    Raises ReflowlensError if no seed has both families at two sizes, if two arms are of one size and family, or as
    `trained_runs` does.

    Example: `scale("out/scale").frames["predictions"]`
    """
    runs = sized_runs(study, progress=progress)
    complete = runs_table(study)["complete"]
    notes = [] if complete.all() else [f"{(~complete).sum()} of {len(complete)} runs are not complete and left out"]
    return answer(runs, {"quick": quick, "seed": 0}, notes, 1000 if quick else 10_000)


def sized_runs(study: str | Path, *, progress: bool | None = None) -> pd.DataFrame:
    """A row a run: `arm`, `seed`, `size` (N), `parameters` (all of them), `factored` and `loss`."""
    runs = measured_by(study, "sizes", _sizes, progress=progress)
    losses = {(run.arm, run.seed): run.val_loss for run in trained_runs(study)}
    runs["loss"] = [losses[arm, seed] for arm, seed in zip(runs["arm"], runs["seed"], strict=True)]
    return runs.assign(factored=runs["factored"] == 1)


def size_of(model: HookedModel) -> int:
    """N: parameters outside the embedding and the readout."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(ENDS))


def _sizes(model: HookedModel, run: TrainedRun) -> dict[str, float]:
    factored = float(model.cfg.is_factored)
    return {"size": float(size_of(model)), "parameters": float(model.n_parameters), "factored": factored}


def answer(runs: pd.DataFrame, params: dict[str, object], notes: list[str], resamples: int) -> Result:
    """The `Result` of a table of `sized_runs`."""
    if (twice := runs[runs.duplicated(["size", "seed", "factored"], keep=False)]["arm"].unique()).size:
        raise ReflowlensError(
            f"scale compares one reFlow with one other model of each size, and {', '.join(twice)} are as large as "
            "another of their family"
        )
    pairs = runs.pivot(index=["size", "seed"], columns="factored", values="loss").dropna()
    if len(pairs.columns) < 2 or pairs.index.get_level_values("size").nunique() < 2 or len(pairs) < 3:
        raise ReflowlensError("scale needs reFlow and GPT-2-New of the same seeds at two sizes at least, three pairs")
    gaps = (pairs[True] - pairs[False]).rename("gap").reset_index()
    line = fit_line(np.log10(gaps["size"]), gaps["gap"])
    risen = _families_that_rise(runs)
    shrinks: Verdict = "underpowered" if risen else _slope_verdict(line, gaps)
    if risen:
        told = " and ".join(FAMILIES[name] for name in risen)
        notes = [
            *notes,
            f"the loss of {told} rises with size: the runs tell a training that failed, not what size does",
        ]
    findings = {"gap_slope": Finding(line.slope, line.interval, {"smallest_effect": -SLOPE}, shrinks)}
    for size, own in gaps.groupby("size"):
        each = contrast(own["gap"], GAP)
        findings[f"gap_{size:.0f}"] = Finding(each.mean, each.interval, {"smallest_effect": GAP}, each.verdict())
    curves: dict[str, Line | PowerLaw] = {"gap": line}
    fits = []
    for name in FAMILIES:
        own = runs[runs["factored"] == (name == "reflow")]
        curves[name] = law = fit_power_law(own["size"], own["loss"], resamples=resamples)
        findings[f"exponent_{name}"] = Finding(law.exponent, law.interval)
        fits.append({"family": name, "runs": len(own), "factor": law.factor, "exponent": law.exponent,
                     "floor": law.floor, "low": law.interval.low, "high": law.interval.high, "df": law.df,
                     "bootstrap_low": law.bootstrap.low, "bootstrap_high": law.bootstrap.high})  # fmt: skip
    predictions = _predictions(curves)
    for row in predictions.to_dict("records"):
        findings[f"gap_at_{row['model']}"] = Finding(row["gap"], (row["gap_low"], row["gap_high"]))
    if wide := predictions.loc[predictions["too_wide"], "model"].tolist():
        notes = [*notes, f"too wide to tell, by more than {WIDE} nats: the gap of {', '.join(wide)}"]
    if gaps["size"].nunique() < FEWEST_FOR_FLOOR:
        notes = [*notes, "c is 0: so few sizes do not tell it from the exponent"]
    return Result(
        name="scale",
        title="Scale",
        params=params,
        findings=findings,
        frames={"runs": runs, "gaps": gaps, "fits": pd.DataFrame(fits), "predictions": predictions},
        figures=_figures(runs, gaps, curves),
        definitions=_definitions(findings, line.df),
        notes=notes,
    )


def _slope_verdict(line: Line, gaps: pd.DataFrame) -> Verdict:
    seeds = gaps.groupby("size")["seed"].nunique()
    if len(seeds) < 3 or seeds.min() < 2:
        return "underpowered"
    if line.interval.high < -SLOPE:
        return "supported"
    return "not supported" if line.interval.low > -SLOPE else "underpowered"


def _families_that_rise(runs: pd.DataFrame) -> list[str]:
    """Families with a size whose mean loss is above that of the next smaller one."""
    losses = runs.groupby(["factored", "size"])["loss"].mean()
    return [name for name in FAMILIES if losses[name == "reflow"].sort_index().diff().max() > 0]


@functools.cache
def published_sizes() -> dict[str, int]:
    """N of each published model."""
    return {name: size_of(build_model(PRESETS[name], device="meta")) for name in PUBLISHED}


def _at(curve: Line | PowerLaw, size: float) -> tuple[float, Interval]:
    return curve.at(math.log10(size)) if isinstance(curve, Line) else curve.at(size)


def _predictions(curves: Mapping[str, Line | PowerLaw]) -> pd.DataFrame:
    """A row a published model: `gap`, and the `reflow` and `other` loss, with prediction intervals, at its size."""
    rows = []
    for model, size in published_sizes().items():
        row: dict[str, Any] = {"model": model, "size": size, "published_loss": PUBLISHED[model]}
        for name, curve in curves.items():
            value, (low, high) = _at(curve, size)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row | {"too_wide": row["gap_high"] - row["gap_low"] > WIDE})
    return pd.DataFrame(rows)


def _figures(runs: pd.DataFrame, gaps: pd.DataFrame, curves: Mapping[str, Line | PowerLaw]) -> dict[str, go.Figure]:
    """Fitted curves with prediction bands out to the largest published model, and the runs as points."""
    sizes = np.geomspace(runs["size"].min(), max(published_sizes().values()), 60)

    def drawn(names: Mapping[str, str], points: Mapping[str, pd.DataFrame], title: str, y: str) -> go.Figure:
        rows = []
        for name, label in names.items():
            for size in sizes:
                value, ends = _at(curves[name], size)
                rows.append((size, value, *ends, label))
        frame = pd.DataFrame(rows, columns=["size", "value", "low", "high", "of"])
        x = "parameters outside the embedding"
        figure = line_with_band(frame, "size", "value", "low", "high", "of", title=title, x_title=x, y_title=y)
        for label, own in points.items():
            figure.add_scatter(x=own["size"], y=own.iloc[:, -1], mode="markers", name=label)
        return figure.update_xaxes(type="log")

    own = {f"{label}, runs": runs.loc[runs["factored"] == (name == "reflow"), ["size", "loss"]] for name, label in
           FAMILIES.items()}  # fmt: skip
    published = pd.DataFrame({"size": published_sizes(), "loss": PUBLISHED})
    own["reFlow as published (other data, 9B tokens)"] = published
    return {
        "loss": drawn(FAMILIES, own, "Loss against size", "nats a token"),
        "gap": drawn(
            {"gap": "gap"}, {"pairs of runs": gaps}, "What factoring costs", "reFlow - GPT-2-New, nats a token"
        ),
    }


def _definitions(findings: dict[str, Finding], df: int) -> dict[str, str]:
    said = {
        "gap_slope": f"change of L(reFlow) - L(GPT-2-New) with log10 N, nats a tenfold; {df} degrees of freedom",
        "exponent": "b of L = a·N^-b (+ c), Student's t over runs",
        "at": "gap at the size of a published model on the line in log10 N, with its 95% prediction interval",
        "gap": "held-out loss of reFlow less that of GPT-2-New of the same seed, nats a token",
    }
    return {
        name: said.get(name) or said["at" if name.startswith("gap_at") else name.split("_")[0]] for name in findings
    }
