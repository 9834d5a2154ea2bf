"""What is read of a row of tokens at once, and which of its tokens are scored there.

A row that a model reads whole is one window. Of longer ones windows slide: the first one scores all that it predicts,
every later one its last ``stride`` tokens, and the last one stops at the end, so that every token is scored once, with
as much context as the window leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide
from reflowlens.models.residual import Readout

_POSITIONS = 128  # whose logits are formed at once: they stay in caches, and more rows sum far slower in float64
Rows = Sequence[NDArray[np.int64]]


class Window(NamedTuple):
    """Of a row of tokens those from ``first`` to before ``end`` are read, and ``scored`` to ``last`` are predicted."""

    row: int
    first: int
    end: int
    scored: int
    last: int


class Predicted(NamedTuple):
    """The tokens that a window scores: log-probability in nats, and whether no other token is likelier."""

    logprob: Float[np.ndarray, " token"]
    likeliest: Bool[np.ndarray, " token"]


def whole_window(row: int, n: int, scored: int = 1) -> Window:
    """A row of n tokens, all of which are read; those from ``scored`` on are scored."""
    return Window(row, 0, n, scored, n - 1)


def sliding_windows(row: int, n: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a row of n tokens: every token but the first is scored in one of them.

    >>> [(each.first, each.end, each.scored, each.last) for each in sliding_windows(0, 8, window=4, stride=2)]
    [(0, 4, 1, 4), (2, 6, 5, 6), (3, 7, 7, 7)]
    """
    last = min(window, n - 1)
    if last:
        yield Window(row, 0, last, 1, last)
    while last < n - 1:
        scored, last = last + 1, min(last + stride, n - 1)
        yield Window(row, last - window, last, scored, last)


def n_scored(window: Window) -> int:
    return window.last - window.scored + 1


@torch.no_grad()
def predictions(model: HookedModel, rows: Rows, windows: Sequence[Window]) -> list[Predicted]:
    """What a model predicts of the tokens that each window scores, all windows in one pass.

    Logits are formed of the scored positions alone, some hundreds at a time.
    """
    tokens, targets = (part.to(model.cfg.device) for part in inputs_and_targets(rows, windows))
    # A function of the readout: the pass is the model's own to the end, for what is attached at the readout.
    found = model(tokens, lambda readout: _predicted(readout, targets))
    logprob, likeliest = (part.cpu().numpy() for part in found)
    ends = np.cumsum([n_scored(each) for each in windows])[:-1]
    return list(map(Predicted, np.split(logprob, ends), np.split(likeliest, ends)))


def inputs_and_targets(
    rows: Rows, windows: Sequence[Window]
) -> tuple[Int[Tensor, "window pos"], Int[Tensor, "window pos"]]:
    """Windows padded on the right; targets are -1 where nothing is scored."""
    length = max(each.end - each.first for each in windows)
    tokens, targets = np.zeros((len(windows), length), np.int64), np.full((len(windows), length), -1)
    for i, (row, first, end, scored, last) in enumerate(windows):
        tokens[i, : end - first] = rows[row][first:end]
        targets[i, scored - first - 1 : last - first] = rows[row][scored : last + 1]
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def _predicted(
    readout: Readout, targets: Int[Tensor, "window pos"]
) -> tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]:
    asked = targets >= 0
    parts = zip(readout.features[asked].split(_POSITIONS), targets[asked].split(_POSITIONS), strict=True)
    logprobs, likeliest = [], []
    for features, ids in parts:
        logits = wide(readout._replace(features=features[:, None]).logits()[:, 0])
        own, highest = logits.gather(1, ids[:, None])[:, 0], logits.amax(dim=1)
        # The normaliser in float64: a sum over the vocabulary, of which log-probabilities near 0 are a difference.
        spread = logits.sub_(highest[:, None]).exp_().sum(dim=1, dtype=torch.float64).log()
        logprobs.append((own - highest).double() - spread)
        likeliest.append(own >= highest)
    return torch.cat(logprobs), torch.cat(likeliest)
