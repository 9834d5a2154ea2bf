"""Which places of a feature are shown, and all that was found of a feature as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.directions import Near, TokenEffects
from analyses.features.layers import FeatureLayer
from analyses.features.survey import Best, Survey, Windows
from reflowlens.notebook.feature import BOTTOM, TOP, FeatureContext, FeatureEffect, FeatureRecord

INTERVALS = 5
_GROUPS = (
    TOP,
    BOTTOM,
    *(f"Quantiles {100 * i // INTERVALS}–{100 * (i + 1) // INTERVALS}%" for i in reversed(range(INTERVALS))),
)


@dataclass(frozen=True, eq=False)
class ShownPlaces:
    """The places (:class:`~analyses.features.survey.Best`) of a layer's features that are shown, feature by feature.

    Args:
        feature, group, place: of each; ``group`` is an index into the names of groups.
        quantiles: of each feature's sample; NaN of one that is never active.
    """

    feature: Int[np.ndarray, " shown"]
    group: Int[np.ndarray, " shown"]
    place: Int[np.ndarray, " shown"]
    quantiles: Float[np.ndarray, "feature quantile"]

    def windows(self, around: tuple[int, int]) -> Windows:
        """Windows around the places, to be filled."""
        before, after = around
        values = torch.full((len(self.place), before + 1 + after), torch.nan)
        return Windows(torch.from_numpy(self.feature), torch.from_numpy(self.place), before, values)


def shown_places(part: Survey, n_interval: int) -> ShownPlaces:
    """The largest and smallest places of each feature, and ``n_interval`` of its sample between each two quantiles."""
    top, bottom = _places(part.top), None if part.bottom is None else _places(part.bottom)
    sample, activation = _places(part.sample), part.sample.activation.cpu().numpy()
    found: list[tuple[int, int, int]] = []
    quantiles = np.full((len(sample), INTERVALS + 1), np.nan)
    for feature, places in enumerate(sample):
        found += [(feature, 0, place) for place in top[feature]]
        if bottom is not None:
            found += [(feature, 1, place) for place in bottom[feature]]
        values = activation[feature, : len(places)]
        if not len(values):
            continue
        quantiles[feature] = np.quantile(values, np.linspace(0, 1, INTERVALS + 1))
        interval = np.searchsorted(quantiles[feature, 1:-1], values, side="right")
        for number in reversed(range(INTERVALS)):
            drawn = np.flatnonzero(interval == number)[:n_interval]  # the sample is in a random order
            group = 1 + INTERVALS - number
            found += [(feature, group, places[i]) for i in drawn[np.argsort(-values[drawn], kind="stable")]]
    feature_of, group_of, place_of = np.array(found, dtype=np.int64).reshape(-1, 3).T.copy()
    return ShownPlaces(feature_of, group_of, place_of, quantiles)


def _places(best: Best) -> list[list[int]]:
    """By feature, without what stands for none."""
    return [[place for place in places if place >= 0] for places in best.place.tolist()]


class LayerRecords:
    """All that was found of a layer, feature by feature on demand."""

    def __init__(
        self,
        width: int,
        keys: Sequence[str],
        layer: FeatureLayer,
        part: Survey,
        shown: ShownPlaces,
        windows: Windows,
        histogram: Int[Tensor, "feature bin"],
        effects: Mapping[int, FeatureEffect],
        near: Near | None,
        tokens: TokenEffects | None,
    ) -> None:
        self._width, self._keys, self._layer, self._shown, self._windows = width, keys, layer, shown, windows
        self._histogram, self._effects, self._near, self._tokens = histogram, effects, near, tokens
        self._fired, self._smallest, self._largest = (x.tolist() for x in (part.fired, part.smallest, part.largest))
        self._values = windows.values.numpy()
        self._first = np.searchsorted(shown.feature, np.arange(layer.n_features + 1))

    def record(self, index: int) -> FeatureRecord:
        """Everything of one feature."""
        tokens, near = self._tokens, self._near
        return FeatureRecord(
            layer=self._layer.key,
            index=index,
            fired=self._fired[index],
            smallest=self._smallest[index],
            largest=self._largest[index],
            histogram=self._histogram[index].tolist(),
            quantiles=self._shown.quantiles[index].tolist(),
            contexts=self._contexts(index),
            promoted=[] if tokens is None else _pairs(tokens.promoted[index], tokens.rise[index]),
            suppressed=[] if tokens is None else _pairs(tokens.suppressed[index], tokens.fall[index]),
            near=[]
            if near is None
            else [
                (self._keys[layer], other, cosine)
                for layer, other, cosine in zip(
                    near.layer[index].tolist(), near.index[index].tolist(), near.cosine[index].tolist(), strict=True
                )
            ],
            effect=self._effects.get(index),
        )

    def _contexts(self, index: int) -> dict[str, list[FeatureContext]]:
        found: dict[str, list[FeatureContext]] = {}
        for i in range(self._first[index], self._first[index + 1]):
            block, middle = divmod(int(self._shown.place[i]), self._width)
            values = self._values[i]
            inside = np.flatnonzero(~np.isnan(values))
            start = middle - self._windows.before + int(inside[0])
            context = FeatureContext(block, start, middle, values[inside[0] : inside[-1] + 1].tolist())
            found.setdefault(_GROUPS[self._shown.group[i]], []).append(context)
        return found


def _pairs(tokens: Int[Tensor, " k"], values: Float[Tensor, " k"]) -> list[tuple[int, float]]:
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
