"""The tables of `analyses.genetic_hijack`: its edits, what carriers become under them, and single signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analyses.controls.bases import rotated_views
from analyses.experiments.genetic_hijack.edits import RecipeEdits, replacements, strongest_signal
from analyses.experiments.genetic_hijack.measure import Outcome, Probe, Written
from analyses.measures.sentiment import Poles
from analyses.statistics.intervals import bootstrap_band
from reflowlens.signals import SignalView


@dataclass(frozen=True)
class Run:
    """An edit or its control (``series``), and what the model did under it."""

    edit: str
    series: str
    beta: float
    outcome: Outcome

    @property
    def written(self) -> Written:
        assert self.outcome.written is not None
        return self.outcome.written


def signals_frame(probe: Probe, view: SignalView, poles: Poles, rotations: int, seed: int) -> pd.DataFrame:
    """Silence and graft in the trained basis and in random rotations of it, a row a carrier."""
    bases = {view.name: view}
    if view.model.recipe_is_stored:
        bases |= rotated_views(view, rotations, seed, "genetic_hijack")
    before = probe.log_odds()
    frames = []
    for basis, some in bases.items():
        direction = poles.direction(some)
        signal = strongest_signal(direction)
        for name, column in replacements(some, direction).items():
            after = probe.log_odds([RecipeEdits.of(some).graft(signal, column)])
            columns = {
                "basis": basis,
                "edit": name,
                "signal": signal,
                "share_of_direction": float((direction[signal] / direction.norm()) ** 2),
                "prompt": probe.carriers,
                "effect": np.abs(after - before),
            }
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def edits_frame(runs: Sequence[Run], seed: int) -> pd.DataFrame:
    """A row a run, with intervals over carriers."""
    rows = []
    for run in runs:
        low, high = bootstrap_band(np.stack([run.written.valence, run.outcome.log_odds], axis=1), seed=seed)
        rows.append(
            {
                "edit": run.edit,
                "series": run.series,
                "beta": run.beta,
                "valence": run.written.valence.mean(),
                "valence_low": low[0],
                "valence_high": high[0],
                "log_odds": run.outcome.log_odds.mean(),
                "log_odds_low": low[1],
                "log_odds_high": high[1],
                "perplexity": run.written.perplexity,
                "perplexity_ratio": run.written.perplexity / runs[0].written.perplexity,
                "distinct_2": run.written.distinct,
                "locality_kl": run.outcome.kl.mean(),
            }
        )
    return pd.DataFrame(rows)


def carriers_frame(runs: Sequence[Run], carriers: list[str]) -> pd.DataFrame:
    frames = []
    for run in runs:
        columns = {
            "edit": run.edit,
            "series": run.series,
            "beta": run.beta,
            "prompt": carriers,
            "text": run.written.texts,
            "valence": run.written.valence,
            "log_odds": run.outcome.log_odds,
            "loss": run.written.loss,
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
