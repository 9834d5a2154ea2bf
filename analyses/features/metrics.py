"""From sums a document to metrics with intervals: the same resamples of documents for everything, so that differences
are paired."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from analyses.features.predictions import PredictionSums
from analyses.features.sums import ALL, BLOCKS, DocumentSums, LayerSums, Sums, block_of
from analyses.statistics.resampling import percentile_interval

RECONSTRUCTION = ("l0", "fvu", "cosine", "dead", "dense")
PREDICTION = ("loss", "kl", "agreement", "recovered_zero", "recovered_mean")
METRICS = (*RECONSTRUCTION, *PREDICTION)
DENSE = 0.1  # the share of positions above which a feature is dense
_MISSING = np.full(2, np.nan)  # draws of what was not measured
Draws: TypeAlias = Float[np.ndarray, " draw"]  # the value itself, then that of every resample
Metrics: TypeAlias = dict[tuple[int, str], Draws]


class Resampling:
    """Weights of the documents, and of the runs of them in which firing is counted: all 1, then those of resamples."""

    def __init__(self, n_documents: int, resamples: int, seed: int) -> None:
        self.documents = _weights(n_documents, resamples, seed)
        self.blocks = _weights(min(BLOCKS, n_documents), resamples, seed)

    def of(self, sums: DocumentSums, name: str) -> Metrics:
        """Metrics of a reconstructor, under (layer, metric)."""
        n = self.documents @ sums.positions
        blocks = np.bincount(
            block_of(np.arange(len(sums.positions)), len(sums.positions)), weights=sums.positions
        ).astype(float)
        found: Metrics = {}
        for layer, own in enumerate(sums.layers[name]):
            spread = self.documents @ sums.square[layer]
            spread = spread - np.square(self.documents @ sums.total[layer]).sum(1) / n
            found |= {(layer, metric): draws for metric, draws in self._reconstruction(own, n, spread, blocks).items()}
        for metric in RECONSTRUCTION:
            found[ALL, metric] = np.mean([found[layer, metric] for layer in range(len(sums.layers[name]))], axis=0)
        for layer, replaced in sums.replaced[name].items():
            found |= {(layer, metric): draws for metric, draws in self._prediction(sums, layer, replaced).items()}
        return found

    def model_loss(self, sums: DocumentSums) -> tuple[float, float, float]:
        """The model's own cross-entropy and the ends of its interval."""
        return _with_interval((self.documents @ sums.loss) / (self.documents @ sums.predictions))

    def _reconstruction(self, own: LayerSums, n: Draws, spread: Draws, positions: Sums) -> dict[str, Draws]:
        often = self.blocks @ own.fired / (self.blocks @ positions)[:, None]
        n_features = own.fired.shape[1]
        dead = np.mean(own.fired.sum(0) == 0) if n_features else 0.0
        return {
            "l0": (self.documents @ own.l0) / n,
            "fvu": (self.documents @ own.error) / spread,
            "cosine": (self.documents @ own.cosine) / n,
            "dead": np.concatenate([[dead], np.full(len(n) - 1, np.nan)]),
            "dense": (often > DENSE).mean(axis=1) if n_features else np.zeros(len(n)),
        }

    def _prediction(self, sums: DocumentSums, layer: int, replaced: PredictionSums) -> dict[str, Draws]:
        def mean(values: Sums) -> Draws:
            return (self.documents @ values) / (self.documents @ sums.predictions)

        loss, own = mean(replaced.loss), mean(sums.loss)
        zero, constant = (mean(by_layer[layer].loss) for by_layer in (sums.zero, sums.mean))
        return {
            "loss": loss,
            "kl": mean(replaced.kl),
            "agreement": mean(replaced.agreement),
            "recovered_zero": (zero - loss) / (zero - own),
            "recovered_mean": (constant - loss) / (constant - own),
        }


def layer_rows(name: str, blocks: Sequence[int], metrics: Metrics) -> Iterator[dict[str, Any]]:
    """A row a layer, named by its block, "all" the last: every metric, under ``_low`` and ``_high`` its interval."""
    for layer, shown in _layers(blocks):
        row: dict[str, Any] = {"dictionary": name, "layer": shown}
        for metric in METRICS:
            row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = _with_interval(
                metrics.get((layer, metric), _MISSING)
            )
        yield row


def difference_rows(name: str, blocks: Sequence[int], metrics: Metrics, other: Metrics) -> Iterator[dict[str, Any]]:
    """A row a layer and metric: ``difference``, that of ``metrics`` minus that of ``other``, and its interval."""
    for layer, shown in _layers(blocks):
        for metric in (metric for metric in METRICS if (layer, metric) in metrics):
            row: dict[str, Any] = {"dictionary": name, "layer": shown, "metric": metric}
            row["difference"], row["low"], row["high"] = _with_interval(metrics[layer, metric] - other[layer, metric])
            yield row


def _layers(blocks: Sequence[int]) -> list[tuple[int, str]]:
    return [*((layer, str(block)) for layer, block in enumerate(blocks)), (ALL, "all")]


def _with_interval(draws: Draws) -> tuple[float, float, float]:
    return float(draws[0]), *percentile_interval(draws[1:])


def _weights(n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), drawn])
