"""What signals stand for: the labelled words at both ends of each signal, and how much these have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

POLES = (1, -1)


@dataclass(frozen=True)
class Codebooks:
    """The words with the largest and the smallest entries of each signal; arrays are [pole, signal, ...].

    Args:
        words: numbers of the words, strongest first.
        entropy: of their categories, in nats; NaN where a pole has too few words with an entry of its sign.
        purity: 1 - entropy / the largest entropy possible.
    """

    words: NDArray[np.int64]
    entropy: NDArray[np.float64]
    purity: NDArray[np.float64]

    def signal_purity(self) -> NDArray[np.float64]:
        """Mean purity of the poles that a signal has; NaN for a signal without any, [signal]."""
        counted = np.isfinite(self.purity)
        sums = np.where(counted, self.purity, 0.0).sum(axis=0)
        return np.divide(sums, counted.sum(axis=0), out=np.full(len(sums), np.nan), where=counted.any(axis=0))

    def mean_purity(self) -> float:
        """Mean over the signals that have a pole; NaN where none has."""
        purity = self.signal_purity()
        return float(np.nanmean(purity)) if np.isfinite(purity).any() else np.nan


def codebooks_of(rows: Float[Tensor, "word S"], labels: NDArray[np.int64], n: int = 12) -> Codebooks:
    """The ``n`` labelled words at either end of each signal, and the purity of their labels.

    A pole of words that all share a label has purity 1; of words of as many labels as can be, 0. Random words lie
    above 0, for a few of them share a label by chance.

    Example: ``codebooks_of(view.rows([" king", " queen", ...]), labels).signal_purity()``
    """
    n = min(n, len(rows))
    words, entropy = [], []
    for sign in POLES:
        values, order = (sign * rows).topk(n, dim=0)
        chosen = order.T.cpu().numpy()
        entropy.append(np.where((values[-1] > 0).cpu().numpy(), label_entropy(labels[chosen]), np.nan))
        words.append(chosen)
    most = np.log(min(n, labels.max() + 1))
    return Codebooks(np.stack(words), np.stack(entropy), 1 - np.stack(entropy) / most)


def label_entropy(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Entropy in nats of the labels along the last axis.

    >>> label_entropy(np.array([[0, 0, 0, 0], [0, 0, 1, 1]])).round(3).tolist()
    [0.0, 0.693]
    """
    counts = (labels[..., None] == np.arange(labels.max() + 1)).sum(axis=-2)
    return np.asarray(stats.entropy(counts, axis=-1))
