"""What features do over a text, in two passes of bounded memory.

The first counts, and keeps of every feature the places where it is largest (and, if it can be negative, smallest), and
a uniform sample of the places where it is not 0. The second, which knows the ranges and the places by then, fills
histograms and reads the activations around each place that is shown.

Position 0 of a block, which sees nothing before it, and padding count in no statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.corpus import Corpus
from analyses.features.layers import FeatureLayer
from reflowlens.activations.stream import Occurrences, measured
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

BINS = 40
_AT_ONCE = 2**23  # entries of the activations of a layer: 32 MB of float32
_MOST_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Active:
    """The activations of a layer's features in some blocks that are not 0, in order of their places.

    A place is a block times the width of the corpus, plus the position.
    """

    feature: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]


class Best:
    """The k places of each feature with the highest scores, highest first, and the activations there.

    Scores are offered batch by batch, in order; of equal ones the first are kept. -1 stands where a feature had fewer
    than k places of a score above ``least``.
    """

    def __init__(self, n_features: int, k: int, device: torch.device, least: float = 0.0) -> None:
        self.score = torch.full((n_features, k), least, device=device)
        self.place = torch.full((n_features, k), -1, device=device)
        self.activation = torch.zeros(n_features, k, device=device)

    def offer(self, score: Float[Tensor, " n"], active: Active) -> None:
        n_features, k = self.score.shape
        some = (score > self.score[active.feature, -1]).nonzero(as_tuple=True)[0]  # few, once there are k
        if not len(some):
            return
        some = some[score[some].argsort(descending=True, stable=True)]
        some = some[active.feature[some].argsort(stable=True)]
        feature = active.feature[some]
        first = torch.searchsorted(feature, torch.arange(n_features, device=feature.device))
        rank = torch.arange(len(feature), device=feature.device) - first[feature]
        some, feature, rank = some[rank < k], feature[rank < k], rank[rank < k]
        new = Best(n_features, k, score.device, -torch.inf)
        new.score[feature, rank] = score[some]
        new.place[feature, rank] = active.place[some]
        new.activation[feature, rank] = active.activation[some]
        joined, order = torch.cat([self.score, new.score], dim=1).sort(dim=1, descending=True, stable=True)
        self.score = joined[:, :k]
        self.place = torch.cat([self.place, new.place], dim=1).gather(1, order[:, :k])
        self.activation = torch.cat([self.activation, new.activation], dim=1).gather(1, order[:, :k])


@dataclass(eq=False)
class Survey:
    """What the first pass found of a layer over ``n`` positions, per feature.

    Args:
        fired, not_zero: positions at which the feature is above 0, and at which it is not 0.
        smallest, largest: activation.
        top, bottom: where it is largest and, of layers that can be negative, smallest.
        sample: a uniform sample of the places where it is not 0.
    """

    n: int
    fired: Int[Tensor, " feature"]
    not_zero: Int[Tensor, " feature"]
    smallest: Float[Tensor, " feature"]
    largest: Float[Tensor, " feature"]
    top: Best
    bottom: Best | None
    sample: Best

    @property
    def density(self) -> Float[Tensor, " feature"]:
        """Share of the positions at which a feature is above 0."""
        return self.fired.double() / self.n


def survey(
    model: HookedModel,
    corpus: Corpus,
    layers: Sequence[FeatureLayer],
    *,
    n_top: int,
    n_sample: int,
    seed: int,
    progress: bool,
) -> list[Survey]:
    """The first pass.

    Raises:
        ReflowlensError: an activation is not finite, or there are no positions.
    """
    device = torch.device(model.cfg.device)
    found = [_nothing(layer, n_top, n_sample, device) for layer in layers]
    counted = (corpus.lengths - 1).sum()

    def add(number: int, x: Float[Tensor, "row pos feature"], active: Active, rows: slice) -> None:
        part, values = found[number], active.activation
        if not values.isfinite().all():
            raise ReflowlensError(f"the features at {layers[number].point!r} hold NaN or infinite values")
        part.fired += active.feature[values > 0].bincount(minlength=x.shape[-1])
        part.smallest.scatter_reduce_(0, active.feature, values, "amin")
        part.largest.scatter_reduce_(0, active.feature, values, "amax")
        part.not_zero += active.feature.bincount(minlength=x.shape[-1])
        part.top.offer(values, active)
        if part.bottom is not None:
            part.bottom.offer(-values, active)
        part.sample.offer(random_keys(seed, active.place, active.feature), active)

    over_blocks(model, corpus, layers, add, "reading features" if progress else "")
    for part in found:
        part.n = int(counted)
        sometimes_zero = part.not_zero < part.n
        for extreme, clamped in (
            (part.smallest, part.smallest.clamp(max=0)),
            (part.largest, part.largest.clamp(min=0)),
        ):
            extreme.copy_(torch.where(sometimes_zero, clamped, extreme))
    return found


def _nothing(layer: FeatureLayer, n_top: int, n_sample: int, device: torch.device) -> Survey:
    zero = torch.zeros(layer.n_features, device=device)
    return Survey(
        n=0,
        fired=zero.long(),
        not_zero=zero.long(),
        smallest=zero + torch.inf,
        largest=zero - torch.inf,
        top=Best(layer.n_features, n_top, device),
        bottom=Best(layer.n_features, n_top, device) if layer.signed else None,
        sample=Best(layer.n_features, n_sample, device, -1.0),
    )


def random_keys(seed: int, place: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Numbers in [0, 1) that look independent and depend on these alone, whatever the batch: SplitMix64's last steps
    (Steele, Lea and Flood, 2014), on integers that wrap around."""
    z = place * -7046029254386353131 + feature * -4417276706812531889 + seed * 1181783497276652981
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    return ((z ^ (z >> 31)) & (2**24 - 1)).float() / 2**24


@dataclass(eq=False)
class Windows:
    """The activations of features around places that are shown, one row a place.

    Args:
        feature: whose activations they are.
        place: in the middle (:class:`Best`).
        before: positions ahead of the middle.
        values: NaN outside of the block.
    """

    feature: Int[Tensor, " window"]
    place: Int[Tensor, " window"]
    before: int
    values: Float[Tensor, "window around"]


def second_pass(
    model: HookedModel,
    corpus: Corpus,
    layers: Sequence[FeatureLayer],
    surveys: Sequence[Survey],
    windows: Sequence[Windows],
    *,
    progress: bool,
) -> list[Int[Tensor, "feature bin"]]:
    """Fill the windows, and count the activations that are not 0 in equal bins from ``low_of`` to the largest."""
    device = torch.device(model.cfg.device)
    width = corpus.tokens.shape[1]
    counts = [torch.zeros(layer.n_features * BINS, dtype=torch.long, device=device) for layer in layers]
    rows_of = [window.place // width for window in windows]
    order = [rows.argsort(stable=True) for rows in rows_of]
    ordered = [rows[by_row] for rows, by_row in zip(rows_of, order, strict=True)]

    def add(number: int, x: Float[Tensor, "row pos feature"], active: Active, rows: slice) -> None:
        part, shown, feature = surveys[number], windows[number], active.feature
        low = low_of(part)
        share = (active.activation - low[feature]) / (part.largest - low)[feature].clamp(min=1e-30)
        bins = feature * BINS + (share * BINS).long().clamp(0, BINS - 1)
        counts[number] += bins.bincount(minlength=len(counts[number]))
        first, last = torch.searchsorted(ordered[number], torch.tensor([rows.start, rows.stop]))
        chosen = order[number][first:last]
        row, middle = rows_of[number][chosen], shown.place[chosen] % width
        position = middle[:, None] + torch.arange(shown.values.shape[1]) - shown.before
        outside = (position < 0) | (position >= corpus.lengths[row, None])
        index = ((row - rows.start)[:, None], position.clamp(0, x.shape[1] - 1), shown.feature[chosen, None])
        around = x[tuple(part.to(device) for part in index)].float().cpu()
        shown.values[chosen] = around.masked_fill(outside, torch.nan)

    over_blocks(model, corpus, layers, add, "reading contexts" if progress else "")
    return [count.reshape(-1, BINS).cpu() for count in counts]


def low_of(part: Survey) -> Float[Tensor, " feature"]:
    """Where histograms begin: at 0, or at the smallest activation if that is negative."""
    return part.smallest.clamp(max=0)


Add: TypeAlias = Callable[[int, Float[Tensor, "row pos feature"], Active, slice], None]


@torch.no_grad()
def over_blocks(model: HookedModel, corpus: Corpus, layers: Sequence[FeatureLayer], add: Add, doing: str) -> None:
    """Run over the corpus; ``add`` gets the number of a layer, its features' activations in some blocks, those of them
    that are not 0 at positions that count, and which blocks these are."""
    first = 0
    numbers: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        numbers.setdefault(layer.point, []).append(number)

    def measure(name: str, x: Float[Tensor, "n *unit"], occurrences: Occurrences) -> None:
        rows = slice(first, first + int(occurrences.row[-1]) + 1)
        position = torch.arange(int(corpus.lengths[rows].max()))
        places = torch.arange(rows.start, rows.stop)[:, None] * corpus.tokens.shape[1] + position
        counts = (position > 0) & (position < corpus.lengths[rows, None])
        place, counts = places.flatten().to(x.device), counts.flatten().to(x.device)
        for number in numbers[name]:
            features = layers[number].encode(x)
            at, feature = features.nonzero(as_tuple=True)
            at, feature = at[counts[at]], feature[counts[at]]
            active = Active(feature, place[at], features[at, feature].float())
            add(number, features.unflatten(0, (rows.stop - rows.start, len(position))), active, rows)

    widest = max(layer.n_features for layer in layers)
    batches = list(corpus.batches(min(_MOST_TOKENS, max(1, _AT_ONCE // widest))))
    steps = bar(batches, show=bool(doing), desc=doing, unit="batch", leave=False)
    for _, n_rows, _ in measured(model, steps, list(numbers), measure):
        first += n_rows
