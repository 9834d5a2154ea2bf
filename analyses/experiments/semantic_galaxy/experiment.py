"""Experiment 4, Semantic Galaxy: do the recipes of related words lie together?

The recipes of the lexicon's words are drawn in the plane of their first two principal components, and measured there,
in full recipe space and by their nearest neighbours. A silhouette of 0 is no chance level: with many categories of
different width it is below 0 by chance. What it is by chance is ``label_permutation``, the same points under permuted
categories; ``shuffled_recipe``, ``gaussian`` and ``untrained`` are the same categories over recipes with nothing in
them. ``E`` is the same in the embedding E = R B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pandas as pd
import torch
from tqdm import tqdm

from analyses.claims import bound_of
from analyses.controls.bases import INVARIANT
from analyses.controls.carried import recipe_error
from analyses.experiments.semantic_galaxy.figures import category_frame, galaxy_figures, word_frame
from analyses.experiments.semantic_galaxy.measure import (
    Galaxy,
    LabelNull,
    measure_galaxy,
    permuted_galaxy,
    word_spaces,
)
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import holm, permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import labelled_words
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import AnyView, view_of

MINIMUM_WORDS = 30
PERMUTATIONS = 999
QUICK_PERMUTATIONS = 199
PUBLISHED = {"silhouette_plane": 0.1052}
JUDGED = ("silhouette", "silhouette_plane", "knn_accuracy")


def definitions(k: int) -> dict[str, str]:
    """What each metric means, with the number of neighbours that vote."""
    variance = "share of the variance of the words' recipes along their first"
    return {
        "silhouette": "silhouette (Rousseeuw, 1987) of the categories by cosine distance in full recipe space, mean "
        "over words",
        "silhouette_plane": "the same by Euclidean distance in the plane of the words' first two principal components",
        "knn_accuracy": f"share of words whose category is that of most of their {k} nearest words by cosine",
        "explained_variance_2": f"{variance} two principal components",
        "explained_variance_3": f"{variance} three principal components",
    }


@torch.no_grad()
def semantic_galaxy(
    model: HookedModel,
    *,
    view: AnyView = None,
    lexicon: Lexicon | None = None,
    method: Literal["pca", "tsne"] = "pca",
    k: int = 5,
    permutations: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Draw the lexicon's words by their recipes, and measure whether its categories form clusters.

    Args:
        view: whose recipes; default the model's native ones, or its embedding where it has none.
        lexicon: its categories are the labels; words of several tokens are skipped.
        method: how the plane of the figure is found; ``tsne`` (by cosine) is for looking, and measured is PCA's.
        k: neighbours that vote for a word's category.
        permutations: of the labels; default 999, of a quick run 199.
        seed: of permutations, nulls, bootstrap and t-SNE.

    Returns:
        A Result with frames ``words`` (coordinates, silhouettes, nearest word and strongest signals of each),
        ``categories`` (means with intervals, p raw and Holm-adjusted) and ``permutations`` (the null), and figures
        ``galaxy``, ``galaxy_3d``, ``categories``, ``null``.

    Raises:
        ReflowlensError: the lexicon has fewer than 20 single-token words or 2 categories, the method is unknown, or k
            is out of range.

    Example: ``semantic_galaxy(model, method="tsne").figures["galaxy"]``
    """
    if method not in ("pca", "tsne"):
        raise ReflowlensError(f"method must be 'pca' or 'tsne', got {method!r}")
    chosen = view_of(model, view, seed=seed)
    lexicon = lexicon or load_lexicon()
    words, notes = labelled_words(lexicon, model.tokenizer, "semantic_galaxy")
    if not 1 <= k < len(words.ids):
        raise ReflowlensError(f"k must be between 1 and {len(words.ids) - 1}, the other words, got {k}")
    permutations = (QUICK_PERMUTATIONS if quick else PERMUTATIONS) if permutations is None else permutations
    spaces = word_spaces(chosen, words, seed, quick=quick)
    bar = tqdm(spaces.items(), desc="semantic galaxy", disable=not progress)
    galaxies = {name: measure_galaxy(rows, words.labels, k) for name, rows in bar}
    null = permuted_galaxy(galaxies["R"], words.labels, permutations, seed)
    frames = {
        "words": word_frame(chosen, words, galaxies["R"], method, seed),
        "categories": category_frame(words, galaxies["R"], null, seed),
        "permutations": pd.DataFrame(null.means),
    }
    findings, told = _findings(galaxies, null, seed)
    return Result(
        name="semantic_galaxy",
        title="Semantic Galaxy",
        params={
            "method": method,
            "k": k,
            "permutations": permutations,
            "words": len(words.ids),
            "categories": len(words.categories),
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings | recipe_error(chosen),
        frames=frames,
        figures=galaxy_figures(frames, galaxies["R"].headline(), method),
        definitions=definitions(k),
        published=PUBLISHED,
        notes=[*notes, f"{INVARIANT}.", *told],
    )


def clusters_verdict(
    metric: str, interval: tuple[float, float], controls: dict[str, float], p: float, words: int
) -> Verdict:
    """Claim: words of a category lie together in recipe space.

    Supported if p against permuted labels, Holm-adjusted over the three measures, is below 0.05 and the interval over
    words lies above what every null shows, permuted labels and recipes with nothing in them, by 0.05 of the share of
    neighbours and by 0.01 of a silhouette; underpowered below 30 words.
    """
    bound = bound_of("semantic_galaxy", metric, controls)
    return verdict(interval, bound, p, minimum_units=MINIMUM_WORDS, units=words)


def _findings(galaxies: Mapping[str, Galaxy], null: LabelNull, seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics of the recipes beside those of the other spaces, and notes."""
    found = galaxies["R"]
    headlines = {name: galaxy.headline() for name, galaxy in galaxies.items()}
    values = headlines.pop("R")
    beside = {metric: {name: headline[metric] for name, headline in headlines.items()} for metric in values}
    findings = {metric: Finding(value, controls=beside[metric]) for metric, value in values.items()}
    per_word = found.silhouettes | {"knn_accuracy": found.hits.astype(float)}
    raw = [permutation_pvalue(values[metric], null.means[metric]) for metric in JUDGED]
    notes = []
    for metric, p, adjusted in zip(JUDGED, raw, holm(raw).tolist(), strict=True):
        interval_of = rate_interval if metric == "knn_accuracy" else bootstrap_interval
        interval = interval_of(per_word[metric], seed=seed)
        controls = beside[metric] | {"label_permutation": float(null.means[metric].mean())}
        judged = clusters_verdict(metric, interval, controls, adjusted, len(found.hits))
        findings[metric] = Finding(values[metric], interval, controls, judged)
        notes.append(f"{metric}: permuted labels p = {p:.2g}, Holm-adjusted {adjusted:.2g}")
    if "E" not in galaxies:
        notes.append("no control E: the identity view's recipe is E itself")
    return findings, notes
