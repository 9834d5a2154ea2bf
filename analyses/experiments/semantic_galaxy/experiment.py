"""Experiment 4, Semantic Galaxy: do the recipes of related words lie together?

The recipes of the lexicon's words are drawn in the plane of their first two principal components, and measured there,
in full recipe space and by their nearest neighbours. A silhouette of 0 is no chance level: with many categories of
different width it is below 0 by chance. What it is by chance is ``label_permutation``, the same points under permuted
categories; ``shuffled_recipe``, ``gaussian`` and ``untrained`` are the same categories over recipes with nothing in
them. ``E`` is the same in the embedding E = R B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from tqdm import tqdm

from analyses.controls.bases import INVARIANT
from analyses.controls.nulls import permuted_labels, recipe_nulls
from analyses.experiments.semantic_galaxy.clusters import (
    cosine_distances,
    euclidean_distances,
    nearest_labelled,
    permuted_accuracies,
    permuted_silhouettes,
    silhouettes,
    voted_labels,
)
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval, rate_interval
from analyses.statistics.pvalues import holm, permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import LabelledWords, labelled_words
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars, histogram_with_control
from reflowlens.figures.scatter import scatter
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_WORDS = 30
PERMUTATIONS = 999
QUICK_PERMUTATIONS = 199
COMPONENTS = 3
TOP_SIGNALS = 5
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
    view: SignalView | ViewName | None = None,
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
    spaces = tqdm(_spaces(chosen, words, seed), total=5, desc="semantic galaxy", disable=not progress)
    galaxies = {name: measure_galaxy(rows, words.labels, k) for name, rows in spaces}
    null = _permute(galaxies["R"], words.labels, permutations, seed)
    frames = {
        "words": _word_frame(chosen, words, galaxies["R"], method, seed),
        "categories": _category_frame(words, galaxies["R"], null, seed),
        "permutations": pd.DataFrame(null.means),
    }
    result = Result(
        name="semantic_galaxy",
        title="Semantic Galaxy",
        params={
            "view": chosen.name,
            "method": method,
            "k": k,
            "permutations": permutations,
            "words": len(words.ids),
            "categories": len(words.categories),
            "seed": seed,
            "quick": quick,
            "lexicon": lexicon.version,
            "model_hash": hash_of(model),
        },
        frames=frames,
        figures=_figures(frames, galaxies["R"].headline(), method),
        definitions=definitions(k),
        published=PUBLISHED,
        notes=[*notes, f"{INVARIANT}."],
    )
    return _with_metrics(result, galaxies, null, seed)


@dataclass(frozen=True)
class Galaxy:
    """Labelled points of one space. Arrays are [word, ...]."""

    components: NDArray[np.float64]  # coordinates along the first three principal components
    explained: NDArray[np.float64]  # share of the variance along each
    distances: dict[str, NDArray[np.float32]]  # by silhouette
    silhouettes: dict[str, NDArray[np.float64]]  # in full space, and in the plane
    neighbors: NDArray[np.int64]
    hits: NDArray[np.bool_]  # whether the neighbours vote for the word's own label

    def headline(self) -> dict[str, float]:
        """The metrics by name."""
        means = {name: values.mean() for name, values in self.silhouettes.items()}
        found = means | {
            "knn_accuracy": self.hits.mean(),
            "explained_variance_2": self.explained[:2].sum(),
            "explained_variance_3": self.explained.sum(),
        }
        return {name: float(value) for name, value in found.items()}


def measure_galaxy(rows: Float[Tensor, "word S"], labels: NDArray[np.int64], k: int = 5) -> Galaxy:
    """Principal components, silhouettes and nearest neighbours of labelled rows."""
    pca = PCA(COMPONENTS, svd_solver="full")
    components = pca.fit_transform(rows.double().cpu().numpy())
    distances = {
        "silhouette": cosine_distances(rows),
        "silhouette_plane": euclidean_distances(components[:, :2]),
    }
    neighbors = nearest_labelled(rows, k).cpu().numpy()
    return Galaxy(
        components=components,
        explained=pca.explained_variance_ratio_,
        distances=distances,
        silhouettes={name: silhouettes(values, labels) for name, values in distances.items()},
        neighbors=neighbors,
        hits=voted_labels(neighbors, labels) == labels,
    )


@dataclass(frozen=True)
class LabelNull:
    """What permuted labels give: ``means`` of each judged metric [permutation], and silhouettes by category."""

    means: dict[str, NDArray[np.float64]]
    by_category: NDArray[np.float64]


def _permute(galaxy: Galaxy, labels: NDArray[np.int64], permutations: int, seed: int) -> LabelNull:
    sizes, permuted = np.bincount(labels), permuted_labels(labels, permutations, derive_seed(seed, "semantic_galaxy"))
    by_category = {name: permuted_silhouettes(distances, permuted) for name, distances in galaxy.distances.items()}
    means = {name: values @ sizes / len(labels) for name, values in by_category.items()}
    means["knn_accuracy"] = permuted_accuracies(galaxy.neighbors, permuted)
    return LabelNull(means, by_category["silhouette"])


def _spaces(view: SignalView, words: LabelledWords, seed: int) -> Iterator[tuple[str, Float[Tensor, "word S"]]]:
    """The words' recipes, their embeddings, and their recipes in the nulls."""
    recipes = view.recipe[words.ids].float()
    yield "R", recipes
    if view.name != "identity":
        yield "E", view.write(recipes)
    for name, null in recipe_nulls(view, seed, "semantic_galaxy"):
        yield name, null.recipe[words.ids].float()


def clusters_verdict(interval: tuple[float, float], controls: dict[str, float], p: float, words: int) -> Verdict:
    """Claim: words of a category lie together in recipe space.

    Supported if p against permuted labels, Holm-adjusted over the three measures, is below 0.05 and the interval over
    words lies above what every null shows, permuted labels and recipes with nothing in them; underpowered below 30
    words.
    """
    highest = max(value for name, value in controls.items() if name != "E")
    return verdict(interval, highest, p, minimum_units=MINIMUM_WORDS, units=words)


def _with_metrics(result: Result, galaxies: dict[str, Galaxy], null: LabelNull, seed: int) -> Result:
    found = galaxies["R"]
    result.metrics |= found.headline()
    for metric in result.metrics:
        result.controls[metric] = {name: galaxy.headline()[metric] for name, galaxy in galaxies.items() if name != "R"}
    per_word = found.silhouettes | {"knn_accuracy": found.hits.astype(float)}
    raw = [permutation_pvalue(result.metrics[metric], null.means[metric]) for metric in JUDGED]
    for metric, p, adjusted in zip(JUDGED, raw, holm(raw).tolist(), strict=True):
        interval_of = rate_interval if metric == "knn_accuracy" else bootstrap_interval
        result.intervals[metric] = interval_of(per_word[metric], seed=seed)
        result.controls[metric]["label_permutation"] = float(null.means[metric].mean())
        result.verdicts[metric] = clusters_verdict(
            result.intervals[metric], result.controls[metric], adjusted, len(found.hits)
        )
        result.notes.append(f"{metric}: permuted labels p = {p:.2g}, Holm-adjusted {adjusted:.2g}")
    if "E" not in galaxies:
        result.notes.append("no control E: the identity view's recipe is E itself")
    return result


def _word_frame(view: SignalView, words: LabelledWords, galaxy: Galaxy, method: str, seed: int) -> pd.DataFrame:
    recipes = view.recipe[words.ids].float().cpu()
    largest = recipes.abs().topk(min(TOP_SIGNALS, recipes.shape[1]), dim=1).indices
    signs = [["+" if value > 0 else "−" for value in row] for row in recipes.gather(1, largest).tolist()]
    frame = pd.DataFrame(
        {
            "word": words.words,
            "category": words.category_of,
            **{f"pc{i + 1}": galaxy.components[:, i] for i in range(COMPONENTS)},
            **galaxy.silhouettes,
            "nearest": [words.words[i] for i in galaxy.neighbors[:, 0]],
            "own_category": galaxy.hits,
            "signals": [
                " ".join(f"{sign}{signal}" for sign, signal in zip(*pair, strict=True))
                for pair in zip(signs, largest.tolist(), strict=True)
            ],
        }
    )
    if method == "tsne":
        perplexity = min(30.0, (len(frame) - 1) / 3)
        embedded = TSNE(2, metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(
            recipes.numpy()
        )
        frame = frame.assign(tsne1=embedded[:, 0], tsne2=embedded[:, 1])
    return frame


def _category_frame(words: LabelledWords, galaxy: Galaxy, null: LabelNull, seed: int) -> pd.DataFrame:
    """A row a category, the tightest first."""
    rows = []
    for label, category in enumerate(words.categories):
        own = words.labels == label
        values = galaxy.silhouettes["silhouette"][own]
        low, high = bootstrap_band(values, seed=seed)
        rows.append(
            {
                "category": category,
                "words": int(own.sum()),
                "silhouette": values.mean(),
                "low": float(low),
                "high": float(high),
                "permuted_labels": null.by_category[:, label].mean(),
                "knn_accuracy": galaxy.hits[own].mean(),
                "p": permutation_pvalue(values.mean(), null.by_category[:, label]),
            }
        )
    frame = pd.DataFrame(rows).assign(p_holm=lambda frame: holm(frame["p"]))
    return frame.sort_values("silhouette", ascending=False, kind="stable", ignore_index=True)


def _figures(frames: dict[str, pd.DataFrame], found: dict[str, float], method: str) -> dict[str, go.Figure]:
    hover = ["word", "category", "nearest", "signals"]
    x, y = ("tsne1", "tsne2") if method == "tsne" else ("pc1", "pc2")
    categories = frames["categories"].melt(
        id_vars=["category", "words", "knn_accuracy", "p_holm"],
        value_vars=["silhouette", "permuted_labels"],
        var_name="labels",
        value_name="mean",
    )
    spread = frames["categories"].set_index("category")
    measured = categories["labels"] == "silhouette"
    for end in ("low", "high"):
        categories[end] = np.where(measured, categories["category"].map(spread[end]), categories["mean"])
    null = frames["permutations"]["silhouette"]
    both = pd.DataFrame({"silhouette": null, "labels": "permuted labels"})
    figure = histogram_with_control(
        both,
        "silhouette",
        "labels",
        controls=("permuted labels",),
        title="Silhouette of the categories against permuted categories",
        x_title="mean silhouette",
    )
    figure.add_vline(found["silhouette"], line_width=2, annotation_text="measured", annotation_position="top left")
    ends = min(null.min(), found["silhouette"]), max(null.max(), found["silhouette"])
    margin = 0.05 * (ends[1] - ends[0])
    figure.update_xaxes(range=[ends[0] - margin, ends[1] + margin])  # plotly's own range ends at the line
    return {
        "galaxy": scatter(frames["words"], x, y, "category", hover=hover, title="The lexicon's words by their recipes"),
        "galaxy_3d": scatter(
            frames["words"],
            "pc1",
            "pc2",
            "category",
            "pc3",
            hover=hover,
            title="The same along three principal components",
        ),
        "categories": bars(
            categories.replace({"labels": {"silhouette": "categories", "permuted_labels": "permuted labels"}}),
            "category",
            "mean",
            "low",
            "high",
            "labels",
            controls=("permuted labels",),
            horizontal=True,
            hover=["words", "knn_accuracy", "p_holm"],
            title="Silhouette of each category",
            y_title="mean silhouette",
        ),
        "null": figure,
    }
