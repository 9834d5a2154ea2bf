"""What the critical strengths of single problems say of concepts: medians, points of no return, long clauses."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.measures.lens import first_settled
from analyses.statistics.intervals import bootstrap_interval, rate_interval


def _medians(frame: pd.DataFrame, column: str, seed: int) -> tuple[float, float, float]:
    """Median over concepts of the mean over their prompts, and its interval; unreachable is larger than all.

    NaN for what lies among the unreachable.
    """
    values = frame.assign(value=frame[column].fillna(np.inf)).groupby("concept", sort=False)["value"].mean().to_numpy()
    finite = values[np.isfinite(values)]
    beyond = 2 * finite.max() + 1 if len(finite) else 1.0
    coded = np.where(np.isfinite(values), values, beyond)
    ends = (float(np.median(coded)), *bootstrap_interval(coded, np.median, seed=seed))
    median, low, high = (value if len(finite) and value <= finite.max() else np.nan for value in ends)
    return median, low, high


def layers_frame(problems: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a series and layer: medians over concepts with intervals, and the share that can be reached."""
    rows = []
    for (series, layer), part in problems.groupby(["series", "layer"], sort=False):
        row: dict[str, object] = {"series": series, "layer": layer}
        for column in ("strength", "alpha"):
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), _medians(part, column, seed), strict=True))
        shares = by_concept(part, "reachable")
        low, high = rate_interval(shares, seed=seed)
        rows.append(row | {"reachable": shares.mean(), "reachable_low": low, "reachable_high": high})
    return pd.DataFrame(rows)


def by_concept(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """Means over what belongs to a concept, the unit of replication."""
    return frame.groupby("concept", sort=False)[column].mean().to_numpy(dtype=float)


def no_return(problems: pd.DataFrame) -> pd.DataFrame:
    """Of one series a row a ``pair`` of concept and prompt: ``layer``, the first from which on nothing suffices, one
    behind the end if there is none; and whether it is ``closed``."""
    reachable = problems.pivot(index="layer", columns="pair", values="reachable")
    concept = problems.drop_duplicates("pair").set_index("pair")["concept"]
    settled = first_settled(~reachable.to_numpy(dtype=bool))
    layers = [*reachable.index, reachable.index[-1] + 1]
    columns = {
        "concept": concept[reachable.columns],
        "layer": np.array(layers)[settled],
        "closed": settled < len(reachable),
    }
    return pd.DataFrame(columns, index=reachable.columns)


def long_clause(short: pd.DataFrame, long: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a clause before the prompts of ``long`` does, two series of the same model: by concept, how many layers
    later the point of no return comes; and the log ratio of the critical strengths, of the concepts that have any."""
    short = short[short["pair"].isin(long["pair"])]
    later = by_concept(no_return(long), "layer") - by_concept(no_return(short), "layer")
    both = short.merge(long, on=["concept", "pair", "layer"], suffixes=("", "_long"))
    both = both[(both["strength"] > 0) & (both["strength_long"] > 0)]  # reached in both, and not without an injection
    return later, by_concept(both.assign(ratio=np.log(both["strength_long"] / both["strength"])), "ratio")
