"""Statistics of a stream of feature vectors, made batch by batch and merged: the stream is never held.

Moments are float64 and merged by Chan, Golub and LeVeque's update ("Algorithms for computing the sample variance",
1983), so that neither the number of positions nor a large mean costs digits. A merge takes two consecutive parts of a
stream, in order, and gives what both together would have given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

Part = TypeVar("Part")
_PLACES = ("row", "position", "token")


@dataclass(frozen=True, eq=False)
class Moments:
    """Number of vectors, their mean, and sums of products of deviations from it, in float64.

    Args:
        n: number of vectors.
        mean: per feature.
        comoment: ``Σ (x - mean)²`` per feature [feature], or ``Σ (x - mean)(x - mean)ᵀ`` [feature, feature].

    Example:
        >>> first, second = torch.randn(5, 3), torch.randn(7, 3)
        >>> both = Moments.of(first, pairs=True).merge(Moments.of(second, pairs=True))
        >>> torch.allclose(both.comoment / both.n, torch.cat([first, second]).double().T.cov(correction=0))
        True
    """

    n: int
    mean: Float[Tensor, " feature"]
    comoment: Float[Tensor, "feature *feature"]

    @classmethod
    def of(cls, x: Float[Tensor, "n feature"], *, pairs: bool) -> Moments:
        """The moments of vectors x; with ``pairs`` the products of all pairs of features."""
        wide = x.double()
        mean = wide.mean(dim=0)
        centered = wide - mean
        return cls(len(x), mean, centered.T @ centered if pairs else centered.square().sum(dim=0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts, which must hold the same kind of products."""
        n = self.n + other.n
        step = other.mean - self.mean
        between = torch.outer(step, step) if self.comoment.ndim == 2 else step.square()
        return Moments(
            n,
            self.mean + step * (other.n / n),
            self.comoment + other.comoment + between * (self.n * other.n / n),
        )


@dataclass(frozen=True, eq=False)
class TopExamples:
    """The k largest values of each feature, largest first, and where they were; among equal values the earliest.

    Args:
        value: in the units of the activation, float32.
        row: the prompt's number in the stream, from 0.
        position: in the prompt, from 0.
        token: the id at that position.

    Example:
        >>> top = TopExamples.of(torch.tensor([[1.0], [3.0], [3.0]]), *torch.arange(9).reshape(3, 3), k=2)
        >>> top.value.tolist(), top.row.tolist()
        ([[3.0, 3.0]], [[1, 2]])
    """

    value: Float[Tensor, "feature k"]
    row: Int[Tensor, "feature k"]
    position: Int[Tensor, "feature k"]
    token: Int[Tensor, "feature k"]

    @classmethod
    def of(
        cls, x: Float[Tensor, "n feature"], row: Int[Tensor, " n"], position: Tensor, token: Tensor, k: int
    ) -> TopExamples:
        """The largest of some vectors; ``row``, ``position`` and ``token`` say where each vector was."""
        value, index = _largest(x.T, k)
        return cls(value, row[index], position[index], token[index])

    def merge(self, other: TopExamples, k: int) -> TopExamples:
        """The largest of both parts of a stream."""
        value, index = _largest(torch.cat([self.value, other.value], dim=1), k)
        places = (torch.cat([getattr(self, name), getattr(other, name)], dim=1).gather(1, index) for name in _PLACES)
        return TopExamples(value, *places)


@dataclass(frozen=True, eq=False)
class PointStatistics:
    """Statistics of one hook point over ``n`` positions, per feature.

    Args:
        n: number of positions.
        feature_shape: the axes that were flattened to features: ``mean.reshape(feature_shape)`` restores them.
        moments: for mean, variance and covariance; None if they were not collected.
        top: the largest values; None if they were not collected.
        fired: number of positions at which each feature is above the threshold; None if there was no threshold.

    Raises:
        ReflowlensError: a statistic that is read was not collected; the message says what to give ``collect``.

    Example: ``rl.collect(model, texts, "hook_embed", threshold=0.0)["hook_embed"].firing_rate``
    """

    n: int
    feature_shape: tuple[int, ...]
    moments: Moments | None
    top: TopExamples | None
    fired: Int[Tensor, " feature"] | None

    @property
    def mean(self) -> Float[Tensor, " feature"]:
        """Mean of each feature."""
        return _collected(self.moments, "'mean' among the statistics").mean

    @property
    def variance(self) -> Float[Tensor, " feature"]:
        """Variance of each feature, Σ (x - mean)² / n."""
        comoment = _collected(self.moments, "'mean' among the statistics").comoment
        return (comoment.diagonal() if comoment.ndim == 2 else comoment) / self.n

    @property
    def std(self) -> Float[Tensor, " feature"]:
        """Standard deviation of each feature."""
        return self.variance.sqrt()

    @property
    def covariance(self) -> Float[Tensor, "feature feature"]:
        """Covariance of all pairs of features, Σ (x - mean)(x - mean)ᵀ / n."""
        pairs = self.moments is not None and self.moments.comoment.ndim == 2
        return _collected(self.moments if pairs else None, "'covariance' among the statistics").comoment / self.n

    @property
    def firing_rate(self) -> Float[Tensor, " feature"]:
        """Share of the positions at which a feature is above the threshold."""
        return _collected(self.fired, "a threshold").double() / self.n

    def examples(self, feature: int, model: HookedModel | None = None) -> pd.DataFrame:
        """Where a feature was largest, largest value first.

        Args:
            feature: index among the flattened features.
            model: whose tokenizer shows each token in a column ``text``.

        Returns:
            A row per example: ``value``, ``row`` of the stream, ``position``, ``token``, and ``text`` with a model.

        Raises:
            ReflowlensError: examples were not collected, or there is no such feature.

        Example: ``collected["unembed.hook_signal"].examples(17, model)``
        """
        top = _collected(self.top, "'top' among the statistics")
        if integer(feature) is None or not 0 <= feature < len(top.value):
            raise ReflowlensError(f"no feature {feature}: this point has features 0 to {len(top.value) - 1}")
        frame = pd.DataFrame({name: getattr(top, name)[feature].tolist() for name in ("value", *_PLACES)})
        if model is None:
            return frame
        from reflowlens.models.unwrapping import hooked_model

        return frame.assign(text=hooked_model(model).tokenizer.to_str_tokens(frame["token"].tolist()))

    def merge(self, other: PointStatistics, k: int) -> PointStatistics:
        """The statistics of both parts of a stream, of which the same was collected; k examples are kept."""
        moments, top, fired = self.moments, self.top, self.fired
        if moments is not None and other.moments is not None:
            moments = moments.merge(other.moments)
        if top is not None and other.top is not None:
            top = top.merge(other.top, k)
        if fired is not None and other.fired is not None:
            fired = fired + other.fired
        return PointStatistics(self.n + other.n, self.feature_shape, moments, top, fired)

    def later(self, rows: int) -> PointStatistics:
        """The same, as part of a stream that has so many rows before it."""
        return self if self.top is None else replace(self, top=replace(self.top, row=self.top.row + rows))

    def cpu(self) -> PointStatistics:
        """The same, in main memory."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        return PointStatistics.of_tensors(self.n, self.feature_shape, tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but ``n`` and ``feature_shape``; :meth:`of_tensors` undoes it."""
        found: dict[str, Tensor] = {}
        if self.moments is not None:
            found |= {"mean": self.moments.mean, "comoment": self.moments.comoment}
        if self.top is not None:
            found |= {name: getattr(self.top, name) for name in ("value", *_PLACES)}
        if self.fired is not None:
            found["fired"] = self.fired
        return found

    @classmethod
    def of_tensors(cls, n: int, feature_shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> PointStatistics:
        """From what :meth:`tensors` gives."""
        moments = Moments(n, tensors["mean"], tensors["comoment"]) if "mean" in tensors else None
        top = TopExamples(*(tensors[name] for name in ("value", *_PLACES))) if "value" in tensors else None
        return cls(n, feature_shape, moments, top, tensors.get("fired"))


def _collected(part: Part | None, asked: str) -> Part:
    if part is None:
        raise ReflowlensError(f"this was not collected: give collect {asked}")
    return part


def _largest(x: Float[Tensor, "feature n"], k: int) -> tuple[Float[Tensor, "feature k"], Int[Tensor, "feature k"]]:
    """The k largest values and their indices; of equal ones the first, which ``topk`` does not promise."""
    x = x.float() + 0.0  # -0.0 equals 0.0
    bits = x.contiguous().view(torch.int32)
    in_order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers that are ordered as the numbers are
    n = x.shape[1]
    keys = (in_order << 32) | torch.arange(n - 1, -1, -1, device=x.device)
    index = n - 1 - (keys.topk(min(k, n), dim=1).values & 0xFFFFFFFF)
    return x.gather(1, index), index
