"""What clusters the words of the lexicon form in one space, and under permuted categories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from analyses.controls.nulls import over_nulls, permuted_labels
from analyses.experiments.semantic_galaxy.clusters import (
    cosine_distances,
    euclidean_distances,
    nearest_labelled,
    permuted_accuracies,
    permuted_silhouettes,
    silhouettes,
    voted_labels,
)
from analyses.statistics.draws import derive_seed
from analyses.words.tokens import LabelledWords
from reflowlens.signals import SignalView

COMPONENTS = 3


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


def permuted_galaxy(galaxy: Galaxy, labels: NDArray[np.int64], permutations: int, seed: int) -> LabelNull:
    """The judged metrics of a galaxy under permuted labels."""
    sizes, permuted = np.bincount(labels), permuted_labels(labels, permutations, derive_seed(seed, "semantic_galaxy"))
    by_category = {name: permuted_silhouettes(distances, permuted) for name, distances in galaxy.distances.items()}
    means = {name: values @ sizes / len(labels) for name, values in by_category.items()}
    means["knn_accuracy"] = permuted_accuracies(galaxy.neighbors, permuted)
    return LabelNull(means, by_category["silhouette"])


def word_spaces(
    view: SignalView, words: LabelledWords, seed: int, *, quick: bool
) -> dict[str, Float[Tensor, "word S"]]:
    """The words' recipes, their embeddings, and their recipes in the nulls."""

    def recipes(each: SignalView) -> Float[Tensor, "word S"]:
        return each.recipe[words.ids].float()

    spaces = {"R": recipes(view)} | ({} if view.name == "identity" else {"E": view.embedding[words.ids].float()})
    return spaces | over_nulls(recipes, view, seed, "semantic_galaxy", quick=quick)
