"""Frames and figures of the Sparsity Profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from analyses.claims import UNTRAINED
from analyses.controls.bases import Bases
from analyses.experiments.sparsity_profile.measure import FACTORS, Profile
from analyses.measures.knockout import codebook_texts
from analyses.measures.sparsity import gaussian_density, lorenz_curve
from analyses.words.lexicon import Lexicon
from analyses.words.tokens import labelled_words
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.signals import SignalView

CONTROLS = ("gaussian", *UNTRAINED, "rotated_basis")
WORDS_A_CATEGORY = 2
HEATMAP_SIGNALS = 40


def sparsity_frames(
    view: SignalView, profiles: Bases[Profile], texts: Sequence[Sequence[int]], lexicon: Lexicon
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """``tokens``, ``signals``, ``counts``, ``usage``, ``density`` and, of a lexicon with enough words, ``recipes``.

    Args:
        profiles: of ``view`` and what stands beside it; the random rotations are drawn as one.
    """
    series = profiles.series("trained")
    frames = {
        "tokens": _token_frame(view, profiles.own, texts),
        "signals": _signal_frame(view, profiles.own),
        "counts": _stack(series, _count_columns),
        "usage": _stack(series, _usage_columns),
        "density": pd.concat(
            [
                _stack(series, _density_columns),
                pd.DataFrame({"basis": "Gaussian curve", "c": FACTORS, "share": gaussian_density(FACTORS)}),
            ],
            ignore_index=True,
        ),
    }
    try:
        frames["recipes"] = _recipe_frame(view, lexicon)
    except ReflowlensError as error:
        return frames, [f"no heatmap of recipes: {error}"]
    return frames, []


def sparsity_figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """``active``, ``usage``, ``lorenz``, ``density`` and, where there is its frame, ``recipes``."""
    usage, counts = frames["usage"], frames["counts"]
    occupied = counts.loc[counts["share"] > 0, "active"]
    diagonal = pd.DataFrame({"basis": "all alike", "signals": [0.0, 1.0], "held": [0.0, 1.0]})
    figures = {
        "active": line_with_band(
            counts[counts["active"].between(occupied.min() - 1, occupied.max() + 1)],
            "active",
            "share",
            color="basis",
            controls=CONTROLS,
            title="How many signals are active for a token",
            x_title="active signals",
            y_title="share of tokens",
        ),
        "usage": line_with_band(
            usage[usage["rank"] > 0],
            "rank",
            "usage",
            color="basis",
            controls=CONTROLS,
            title="For how many tokens each signal is active",
            x_title="signals, most used first",
            y_title="share of tokens",
        ),
        "lorenz": line_with_band(
            pd.concat([usage, diagonal]),
            "signals",
            "held",
            color="basis",
            controls=(*CONTROLS, "all alike"),
            title="Lorenz curve of usage: twice its area to the diagonal is the Gini coefficient",
            x_title="share of signals, least used first",
            y_title="share of all activity",
        ),
        "density": line_with_band(
            frames["density"],
            "c",
            "share",
            color="basis",
            controls=(*CONTROLS, "Gaussian curve"),
            title="Entries larger than c times the root mean square of their recipe",
            y_title="share of entries",
        ).update_xaxes(type="log", tickvals=[0.25, 0.5, 1, 2, 4]),
    }
    if "recipes" in frames:
        recipes = frames["recipes"]
        limit = float(recipes["recipe"].abs().quantile(0.99))
        figures["recipes"] = heatmap(
            recipes,
            "signal",
            "word",
            "recipe",
            hover=["category"],
            z_range=(-limit, limit),
            title="Recipes of the lexicon's words, by category",
        ).update_layout(height=160 + 11 * recipes["word"].nunique())
    return figures


def _stack(
    series: Mapping[str, list[Profile]], columns: Callable[[Profile], dict[str, NDArray[np.floating]]]
) -> pd.DataFrame:
    """The columns of each series under its name, means over the profiles of one."""
    frames = []
    for name, profiles in series.items():
        found = [columns(profile) for profile in profiles]
        means = {column: np.mean([each[column] for each in found], axis=0) for column in found[0]}
        frames.append(pd.DataFrame({"basis": name, **means}))
    return pd.concat(frames, ignore_index=True)


def _count_columns(profile: Profile) -> dict[str, NDArray[np.floating]]:
    S = len(profile.usage)
    return {"active": np.arange(S + 1.0), "share": np.bincount(profile.active, minlength=S + 1) / len(profile.active)}


def _usage_columns(profile: Profile) -> dict[str, NDArray[np.floating]]:
    """Row i: the i-th most used signal, and what the i least used ones hold; row 0 begins the Lorenz curve."""
    S = len(profile.usage)
    usage = np.concatenate([[np.nan], np.sort(profile.usage)[::-1] / len(profile.active)])
    return {
        "rank": np.arange(S + 1.0),
        "usage": usage,
        "signals": np.arange(S + 1) / S,
        "held": lorenz_curve(profile.usage),
    }


def _density_columns(profile: Profile) -> dict[str, NDArray[np.floating]]:
    return {"c": np.array(FACTORS), "share": profile.density}


def _token_frame(view: SignalView, profile: Profile, texts: Sequence[Sequence[int]]) -> pd.DataFrame:
    """A row a token of the vocabulary."""
    n_tokens = len(profile.active)
    return pd.DataFrame(
        {
            "token": range(n_tokens),
            "text": view.model.tokenizer.to_str_tokens(range(n_tokens)),
            "active": profile.active,
            "hoyer": profile.hoyer,
            "participation": profile.participation,
            "occurrences": np.bincount([token for ids in texts for token in ids], minlength=n_tokens),
        }
    )


def _signal_frame(view: SignalView, profile: Profile) -> pd.DataFrame:
    """A row a signal, most used first."""
    frame = pd.DataFrame(
        {
            "signal": range(len(profile.usage)),
            "usage": profile.usage,
            "usage_text": profile.usage_text,
            "kurtosis": profile.kurtosis,
            "codebook": codebook_texts(view),
        }
    )
    return frame.sort_values("usage", ascending=False, kind="stable", ignore_index=True)


def _recipe_frame(view: SignalView, lexicon: Lexicon) -> pd.DataFrame:
    """The first words of each category and the signals in which these words differ most, a row a cell."""
    words, _ = labelled_words(lexicon, view.model.tokenizer, "the heatmap of recipes")
    first = [i for i in range(len(words.ids)) if (words.labels[:i] == words.labels[i]).sum() < WORDS_A_CATEGORY]
    recipes = view.recipe[words.ids[first]].float().cpu().numpy()
    signals = np.sort(recipes.var(axis=0).argsort()[::-1][:HEATMAP_SIGNALS])
    return pd.DataFrame(
        {
            "category": np.repeat([words.category_of[i] for i in first], len(signals)),
            "word": np.repeat([words.words[i] for i in first], len(signals)),
            "signal": np.tile(signals, len(first)),
            "recipe": recipes[:, signals].ravel(),
        }
    )
