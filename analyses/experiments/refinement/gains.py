"""Where refiners gain: by position in the text, by whether the token to predict was seen before, by its frequency.

Bins hold different tokens, and a difference between bins may be one between tokens: those seen before are mostly the
common ones. Beside each bin of positions, or of what was seen, stands what *the same tokens* gain outside of it; beside
each bin of frequencies what bins of tokens at random would show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from analyses.controls.nulls import permuted_labels
from analyses.experiments.refinement.texts import Losses, Texts, as_frame, mean_by_document
from analyses.statistics.intervals import Interval
from analyses.statistics.resampling import percentile_interval

QUARTERS = ("commonest", "common", "rare", "rarest")
_PERMUTATIONS = 500
_UNKNOWN = (np.nan, Interval(np.nan, np.nan))


class Bin(NamedTuple):
    """Of all tokens to predict those that `chosen` [text, pos] holds."""

    by: str
    name: str
    first: int
    chosen: Bool[np.ndarray, "text pos"]


def gain_frame(gains: Mapping[str, Losses], loss: Losses, texts: Texts, chunk: int, seed: int) -> pd.DataFrame:
    """A row a refiner and bin: `value`, `low`, `high` in nats a token.

    `by`: "position", in bins that begin at 0, at `chunk` and at its doublings; "seen", whether the token to predict
    occurred before in its text; "frequency", quarters of the tokens to predict by how often the texts have them.
    `first`: the first position, or the bin's number. `tokens`: how many; `loss`: the model's there.
    `control`, `control_low`, `control_high`: what the same tokens gain outside of the bin, each as often as within it;
    `matched`: the bin's gain without tokens that are not outside, which is what `control` compares with. Of
    frequencies `control` is the mean and middle 95% of bins of tokens drawn at random, and `matched` is `value`.
    """
    targets = texts.targets.cpu().numpy()
    quarter = _quarters(targets[texts.is_read])
    random_quarters = {name: _random_quarters(gain, targets, quarter, seed) for name, gain in gains.items()}
    rows = []
    for own in _bins(texts, chunk, quarter):
        here = _means(gains, own.chosen, seed)
        matched = here
        if own.by == "frequency":
            control = {name: random_quarters[name].get(own.first, _UNKNOWN) for name in gains}
        else:
            outside = _outside(own.chosen, targets)
            control = _means(gains, outside, seed)
            matched = _means(gains, own.chosen & np.isin(targets, targets[outside > 0]), seed)
        controls = [(mean, *interval) for mean, interval in control.values()]
        frame = as_frame(here, "refiner", by=own.by, bin=own.name)
        frame["matched"] = [mean for mean, _ in matched.values()]
        frame[["control", "control_low", "control_high"]] = np.array(controls)
        counted = {"first": own.first, "tokens": int(own.chosen.sum()), "loss": float(loss[own.chosen].mean())}
        rows.append(frame.assign(**counted))
    return pd.concat(rows, ignore_index=True)


def _bins(texts: Texts, chunk: int, quarter: Int[np.ndarray, " d_vocab"]) -> Iterator[Bin]:
    """Those that hold any token."""
    is_read, seen, places = texts.is_read, texts.seen(), np.arange(texts.tokens.shape[1])
    edges = [0, chunk]
    while edges[-1] < len(places):
        edges.append(2 * edges[-1])
    of_target = quarter[texts.targets.cpu().numpy().clip(min=0)]
    bins = [
        *(
            Bin("position", f"{start} to {stop - 1}", start, is_read & (start <= places) & (places < stop))
            for start, stop in itertools.pairwise(edges)
        ),
        Bin("seen", "seen before", 1, seen),
        Bin("seen", "not seen", 0, is_read & ~seen),
        *(Bin("frequency", name, number, is_read & (of_target == number)) for number, name in enumerate(QUARTERS)),
    ]
    return (own for own in bins if own.chosen.any())


def _means(
    gains: Mapping[str, Losses], weights: NDArray[np.float64] | NDArray[np.bool_], seed: int
) -> dict[str, tuple[float, Interval]]:
    """Means over tokens by weight, with intervals over documents."""
    if not weights.any():
        return dict.fromkeys(gains, _UNKNOWN)
    sums = {name: (gain * weights).sum(axis=1) for name, gain in gains.items()}
    return mean_by_document(sums, weights.sum(axis=1), seed)


def _outside(chosen: Bool[np.ndarray, "text pos"], targets: Int[np.ndarray, "text pos"]) -> NDArray[np.float64]:
    """Weights [text, pos] that give each token outside of a bin the weight that it has within it."""
    outside = (targets >= 0) & ~chosen
    size = int(targets.max()) + 1
    within, without = (np.bincount(targets[mask], minlength=size) for mask in (chosen, outside))
    weight = np.divide(within, without, out=np.zeros(size), where=without > 0)
    return np.where(outside, weight[targets.clip(min=0)], 0.0)


def _quarters(targets: Int[np.ndarray, " n"]) -> Int[np.ndarray, " d_vocab"]:
    """The quarter that each token is in, commonest first; a token is in one quarter whole.

    >>> _quarters(np.array([0, 0, 0, 0, 1, 1, 2, 3])).tolist()
    [0, 2, 3, 3]
    """
    counts = np.bincount(targets)
    order = np.argsort(-counts, kind="stable")
    before = counts[order].cumsum() - counts[order]
    quarter = np.empty(len(counts), dtype=np.int64)
    quarter[order] = np.minimum(before * len(QUARTERS) // len(targets), len(QUARTERS) - 1)
    return quarter


def _random_quarters(
    gain: Losses, targets: Int[np.ndarray, "text pos"], quarter: Int[np.ndarray, " d_vocab"], seed: int
) -> dict[int, tuple[float, Interval]]:
    """Mean gain of each quarter where tokens are put into quarters at random, as many as there are."""
    is_read = targets >= 0
    counts = np.bincount(targets[is_read])
    sums = np.bincount(targets[is_read], gain[is_read])
    occurs = counts > 0
    labels = permuted_labels(quarter[occurs], _PERMUTATIONS, seed)
    found = {}
    for number in range(len(QUARTERS)):
        drawn = (labels == number) @ np.stack([sums[occurs], counts[occurs]], axis=1)
        known = drawn[drawn[:, 1] > 0]
        if len(known):
            means = known[:, 0] / known[:, 1]
            found[number] = (float(means.mean()), percentile_interval(means))
    return found
