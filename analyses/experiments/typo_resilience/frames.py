"""The frames of experiment 6."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.experiments.typo_resilience.measure import Likeness, Values, by_word, control_pvalues
from analyses.measures.lens import lens_points
from analyses.statistics.intervals import Interval, bootstrap_band, bootstrap_interval
from analyses.statistics.pvalues import holm
from analyses.words.lexicon import TYPO_KINDS, Typo
from reflowlens.models.base import HookedModel

QUANTITIES = ("cosine_readout", "cosine_resid", "kl")


def layers_frame(words: Sequence[str], compared: dict[str, Likeness], n_layers: int, seed: int) -> pd.DataFrame:
    """Means over words at every point, with pointwise bootstrap bands."""
    points = lens_points(n_layers)
    frames = []
    for name, likeness in compared.items():
        for quantity in QUANTITIES:
            pairs = pd.DataFrame(getattr(likeness, quantity).T)
            curves = pairs.groupby(np.array(words), sort=False).mean().to_numpy()
            low, high = bootstrap_band(curves, seed=seed)
            frames.append(
                pd.DataFrame(
                    {
                        "comparison": name,
                        "quantity": quantity,
                        "depth": [point.depth for point in points],
                        "point": [point.label for point in points],
                        "mean": curves.mean(axis=0),
                        "low": low,
                        "high": high,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def cells_frame(pairs: list[Typo], likeness: Likeness, n_layers: int) -> pd.DataFrame:
    """Every pair at every point."""
    points = lens_points(n_layers)
    return pd.DataFrame(
        {
            "kind": [pair.kind for pair in pairs for _ in points],
            "pair": [f"{pair.clean} → {pair.misspelt}" for pair in pairs for _ in points],
            "depth": [point.depth for _ in pairs for point in points],
            "point": [point.label for _ in pairs for point in points],
            **{quantity: getattr(likeness, quantity).T.ravel() for quantity in QUANTITIES},
        }
    )


def pairs_frame(
    model: HookedModel,
    pairs: list[Typo],
    others: dict[str, list[str]],
    compared: dict[str, Likeness],
    values: Values,
) -> pd.DataFrame:
    """The end of every pair and of its controls."""
    frames = []
    for name, likeness in compared.items():
        own = values[name]
        frames.append(
            pd.DataFrame(
                {
                    "comparison": name,
                    "kind": [pair.kind for pair in pairs],
                    "clean": [pair.clean for pair in pairs],
                    "other": others[name],
                    "other_tokens": [len(model.tokenizer.encode(f" {other}")) for other in others[name]],
                    "start_cosine_readout": likeness.cosine_readout[0],
                    **{metric: own[metric] for metric in ("final_cosine_readout", "final_cosine_resid", "final_kl")},
                    "recovered": own["recovered_share"] > 0,
                    "recovery_layer": own["recovery_layer"],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def kinds_frame(pairs: list[Typo], values: Values, seed: int) -> pd.DataFrame:
    """The cosine of the readouts at the end by kind of misspelling; a kind of one word has neither interval nor p."""
    metric = "final_cosine_readout"
    words, kinds = np.array([pair.clean for pair in pairs]), np.array([pair.kind for pair in pairs])
    by_kind = {
        kind: by_word(words[kinds == kind], {name: each[kinds == kind] for name, each in values.items()})
        for kind in TYPO_KINDS
        if kind in kinds
    }
    units = {kind: len(own["misspelt"]) for kind, own in by_kind.items()}
    raw = {kind: max(control_pvalues(own, metric, seed).values()) for kind, own in by_kind.items() if units[kind] > 1}
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    table = []
    for kind, own in by_kind.items():
        for name, each in own.items():
            sample, ours = each[metric], name == "misspelt"
            low, high = bootstrap_interval(sample, seed=seed) if kind in raw else Interval(np.nan, np.nan)
            table.append(
                {
                    "kind": kind,
                    "comparison": name,
                    "pairs": int((kinds == kind).sum()),
                    "words": units[kind],
                    metric: sample.mean(),
                    "low": low,
                    "high": high,
                    "p": raw.get(kind, np.nan) if ours else np.nan,
                    "p_holm": adjusted.get(kind, np.nan) if ours else np.nan,
                }
            )
    return pd.DataFrame(table)
