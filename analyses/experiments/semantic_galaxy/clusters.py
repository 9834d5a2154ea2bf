"""Do labelled points form clusters? Silhouettes, nearest-neighbour labels, and both under permuted labels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from analyses.measures.neighbors import cosine_neighbors, unit_rows
from reflowlens.errors import ReflowlensError


def cosine_distances(rows: Float[Tensor, "point S"]) -> NDArray[np.float32]:
    """1 - cos between all pairs, exactly 0 from a point to itself."""
    unit = unit_rows(rows)
    distances = (1 - unit @ unit.T).clamp_min(0).float().fill_diagonal_(0.0)
    return distances.cpu().numpy()


def euclidean_distances(points: NDArray[np.floating]) -> NDArray[np.float32]:
    """Distances between all pairs of points [point, dimension]."""
    return squareform(pdist(points)).astype(np.float32)


def silhouettes(distances: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rousseeuw's silhouette (1987) of every point: (b - a) / max(a, b), 0 for the only point of its label.

    a: mean distance to the others of its label; b: to the points of the nearest other label. scikit-learn's
    ``silhouette_samples(metric="precomputed")``, as one matrix product so that labels can be permuted often.

    Args:
        labels: whole numbers from 0 on, each used.

    Raises:
        ReflowlensError: there are fewer than 2 labels, or a label for every point.
    """
    one_hot = _one_hot(distances, labels)
    sizes = one_hot.sum(axis=0)
    sums = (distances @ one_hot).astype(float)
    points = np.arange(len(labels))
    own_size = sizes[labels]
    inner = sums[points, labels] / np.maximum(own_size - 1, 1)
    outer = sums / sizes
    outer[points, labels] = np.inf
    nearest = outer.min(axis=1)
    widest = np.maximum(inner, nearest)
    values = np.divide(nearest - inner, widest, out=np.zeros(len(labels)), where=widest > 0)
    return np.where(own_size > 1, values, 0.0)


def permuted_silhouettes(distances: NDArray[np.floating], permuted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean silhouette of the points of each label, [permutation, label], under `permuted_labels` of the points."""
    return np.array([label_means(silhouettes(distances, labels), labels) for labels in permuted])


def label_means(values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of the values of each label's points, [label]."""
    return np.bincount(labels, weights=values) / np.bincount(labels)


def nearest_labelled(rows: Float[Tensor, "point S"], k: int) -> Int[Tensor, "point k"]:
    """For each point the k others with the largest cosine, nearest first."""
    points = torch.arange(len(rows), device=rows.device)
    return cosine_neighbors(rows, rows, k, exclude=points[:, None]).ids


def voted_labels(neighbors: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The label that most of a point's neighbours have; of equally many that of the nearest: k-NN, leaving one out.

    >>> voted_labels(np.array([[1, 2], [0, 2], [1, 0]]), np.array([0, 0, 1])).tolist()
    [0, 0, 0]
    """
    votes = labels[neighbors]
    k = votes.shape[1]
    weights = 1 + 0.5 ** np.arange(
        1, k + 1
    )  # a bonus larger than those of all later ranks together, all below one vote
    tally = np.zeros((len(votes), labels.max() + 1))
    np.add.at(tally, (np.arange(len(votes))[:, None], votes), weights)
    return tally.argmax(axis=1)


def permuted_accuracies(neighbors: NDArray[np.int64], permuted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of points whose voted label is their own, [permutation], under `permuted_labels` of the points."""
    return np.array([(voted_labels(neighbors, labels) == labels).mean() for labels in permuted])


def _one_hot(distances: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.floating]:
    n_labels = int(labels.max()) + 1 if len(labels) else 0
    if not 2 <= n_labels < len(labels):
        raise ReflowlensError(f"silhouettes need at least 2 labels and fewer than points, got {n_labels} labels")
    return np.eye(n_labels, dtype=distances.dtype)[labels]
