"""The documents that refiners are measured on, each read from its beginning, and what documents tell of a mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.intervals import Interval
from analyses.statistics.resampling import percentile_interval, resampled_means
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

BATCH = 8
IGNORED = -1
RESAMPLES = 2000

Losses = Float[np.ndarray, "text pos"]

K = TypeVar("K", str, int)


class Texts(NamedTuple):
    """Texts of several lengths, padded on the right.

    `tokens` and `targets` [text, pos]; a target is `IGNORED` behind a text's end. `size`: bytes of each target.
    """

    tokens: Int[Tensor, "text pos"]
    targets: Int[Tensor, "text pos"]
    size: Int[np.ndarray, "text pos"]

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """Where there is a token to predict [text, pos]."""
        return (self.targets != IGNORED).cpu().numpy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that are predicted of each text."""
        return np.asarray(self.is_read.sum(axis=1), dtype=np.int64)

    @property
    def bits_per_nat(self) -> float:
        """What turns a loss in nats a token into bits a byte, on these texts."""
        return float(self.lengths.sum() / self.size.sum() / np.log(2))

    def seen(self) -> NDArray[np.bool_]:
        """Whether the target has occurred before in its text [text, pos]."""
        tokens, targets = self.tokens.cpu().numpy(), self.targets.cpu().numpy()
        seen = np.zeros(targets.shape, dtype=bool)
        for row, known in enumerate(set() for _ in tokens):
            for place, (token, target) in enumerate(zip(tokens[row], targets[row], strict=True)):
                known.add(token)
                seen[row, place] = target in known
        return seen & self.is_read

    def batches(self) -> Iterator[tuple[NDArray[np.int64], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
        """Which texts, their tokens and targets, as long as the longest of them; no batch has a single text."""
        for rows in np.array_split(np.arange(len(self.tokens)), -(-len(self.tokens) // BATCH)):
            longest = int(self.lengths[rows].max())
            yield rows, self.tokens[rows, :longest], self.targets[rows, :longest]


def read_texts(model: HookedModel, documents: Sequence[str | Sequence[int]]) -> Texts:
    """Of every document as many tokens from its beginning as the model reads, and one more to predict.

    A document that is text is read behind the tokenizer's end-of-document token where there is one, so that its first
    token is predicted too. One of token ids is read as it is.

    Raises ReflowlensError for fewer than two documents, or one with nothing to predict.
    """
    end = model.tokenizer.eot_token
    start = [] if end is None else [end]
    rows = []
    for number, document in enumerate(documents):
        ids = [*start, *model.tokenizer.encode(document)] if isinstance(document, str) else [int(i) for i in document]
        if len(ids) < 2:
            raise ReflowlensError(f"document {number} has no token to predict: at least two were expected")
        rows.append(ids[: model.cfg.n_ctx + 1])
    if len(rows) < 2:
        raise ReflowlensError(f"an interval over documents needs at least two, got {len(rows)}")
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest - 1), 0 if end is None else end)
    targets = torch.full_like(tokens, IGNORED)
    size = np.zeros(tokens.shape, dtype=np.int64)
    for row, ids in enumerate(rows):
        n = len(ids) - 1
        tokens[row, :n], targets[row, :n] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        size[row, :n] = [0 if i == end else len(model.tokenizer.token_bytes(i)) for i in ids[1:]]
    return Texts(tokens.to(model.cfg.device), targets.to(model.cfg.device), size)


def mean_by_document(
    sums: Mapping[K, NDArray[np.float64]], counts: NDArray[np.int64] | NDArray[np.float64], seed: int
) -> dict[K, tuple[float, Interval]]:
    """Means over tokens, with percentile intervals over documents drawn whole, the same draws for every mean.

    `sums`: name -> sum over the tokens of each document [text]; `counts`: how many tokens those are, or their
    weight [text].
    """
    table = np.column_stack([*sums.values(), counts])
    if np.count_nonzero(counts) < 2:
        return {name: (float(own.sum() / counts.sum()), Interval(np.nan, np.nan)) for name, own in sums.items()}
    scale = np.abs(table).max(axis=0)  # resamples are in float32
    scale[scale == 0] = 1
    drawn = resampled_means(table / scale, resamples=RESAMPLES, seed=seed).astype(np.float64) * scale
    drawn = drawn[drawn[:, -1] > 0]
    return {
        name: (float(own.sum() / counts.sum()), percentile_interval(drawn[:, column] / drawn[:, -1]))
        for column, (name, own) in enumerate(sums.items())
    }


def as_frame(means: Mapping[Any, tuple[float, Interval]], name: str, **constant: str) -> pd.DataFrame:
    """A row a mean: `name`, "value", "low", "high", behind columns that are the same in all rows."""
    return pd.DataFrame(
        [{**constant, name: key, "value": mean, "low": i.low, "high": i.high} for key, (mean, i) in means.items()]
    )
