"""The frames of experiment 5, and what they say of each question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.experiments.semantic_algebra.measure import NULLS, RANKINGS, Ranks, paired_hits_pvalue
from analyses.statistics.intervals import rate_band
from analyses.words.lexicon import Analogy

MEASURES = {
    "accuracy_at_1": "share of questions whose expected word has rank 1",
    "accuracy_at_5": "share of questions whose expected word has rank 5 or better",
    "mean_reciprocal_rank": "mean over questions of 1 / rank of the expected word",
}
Answers: TypeAlias = "dict[str, dict[str, Ranks]]"  # by space and series


def published_frame(ranked: pd.DataFrame, published: Sequence[Analogy]) -> pd.DataFrame:
    """The ranks of the published analogies, with the rank that was published for each."""
    copies = len(ranked) // len(published)
    ranks = [float(item.published_rank or np.nan) for item in published]
    series = ranked["space"].where(ranked["weights"] == "trained", ranked["weights"])
    return ranked.assign(analogy=list(map(str, published)) * copies, series=series, published_rank=ranks * copies)


def answers_of(frame: pd.DataFrame) -> Answers:
    """Ranks by space and series: every ranking, then ``add`` with other than the trained weights."""
    answers: Answers = {}
    for space, weights in frame[["space", "weights"]].drop_duplicates().itertuples(index=False):
        rows = frame[(frame["space"] == space) & (frame["weights"] == weights)]
        series = {name: f"rank_{name}" for name in RANKINGS} if weights == "trained" else {weights: "rank_add"}
        answers.setdefault(space, {}).update({name: rows[column].to_numpy() for name, column in series.items()})
    return answers


def beside(answers: Answers, space: str) -> dict[str, Ranks]:
    """What stands beside a space's ``add``: its nulls, its rotation where it was rotated, and the other space."""
    own = {name: ranks for name, ranks in answers[space].items() if name in (*NULLS, "rotated_basis")}
    return own | {other: series["add"] for other, series in answers.items() if other != space}


def measures_of(ranks: Ranks) -> NDArray[np.float64]:
    """`MEASURES` of each question, [question, 3]."""
    return np.stack([ranks == 1, ranks <= 5, 1 / ranks], axis=1).astype(float)


def _summary(ranks: Ranks, seed: int) -> dict[str, float]:
    """Means over questions with 95% intervals; a single question has none."""
    values = measures_of(ranks)
    low, high = rate_band(values, seed=seed) if len(values) > 1 else (np.full(3, np.nan), np.full(3, np.nan))
    row: dict[str, float] = {"n": len(values)}
    for i, measure in enumerate(MEASURES):
        row |= {measure: values[:, i].mean(), f"{measure}_low": low[i], f"{measure}_high": high[i]}
    return row


def overall_frame(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a space and series; ``p``: that the space's ``add`` answers more questions than this series."""
    rows = [
        {"space": space, "series": name}
        | _summary(ranks, seed)
        | {"p": paired_hits_pvalue(series["add"] == 1, ranks == 1)}
        for space, series in answers_of(quadruples).items()
        for name, ranks in series.items()
    ]
    return pd.DataFrame(rows)


def sections_frame(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a relation and series: the spaces by ``add``, then the nulls of R."""
    rows = []
    for relation, part in quadruples.groupby("relation", sort=False):
        answers = answers_of(part)
        series = {space: answers[space]["add"] for space in answers} | {
            name: answers["R"][name] for name in NULLS if name in answers["R"]
        }
        rows += [{"relation": relation, "series": name} | _summary(ranks, seed) for name, ranks in series.items()]
    return pd.DataFrame(rows)
