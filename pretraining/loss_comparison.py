"""Validation losses of several models on the same tokens, and how sure their differences are.

Tokens of one document stand and fall together, so documents are what is resampled, whole; of a single text, such as a
book, the blocks that it is read in. Every model has read the same ones, so the difference is taken token by token
before that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from pretraining.batches import sequential_batches
from pretraining.estimate import parameters_outside_embedding
from pretraining.evaluate import tokens_for
from pretraining.token_files import TokenData, TokenStream
from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

if TYPE_CHECKING:
    from reflowlens.dictionaries.dictionary import Dictionary


def compare_losses(
    models: Mapping[str, HookedModel],
    folder: str | Path,
    *,
    split: str = "val",
    batch_size: int = 8,
    max_tokens: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Loss of every model on a whole split, and its difference to the first model's.

    The stream is read in blocks of the shortest context among the models, as
    :func:`pretraining.evaluate.evaluate_model` reads it.

    Args:
        models: by name; the first is what the others are compared with.
        max_tokens: read no more than the first so many.
        resamples: of the documents, or of a single document's blocks, with replacement.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Returns:
        A row a model: ``model``, ``parameters``, ``outside_embedding`` (those of blocks and norms), ``tokens`` read,
        ``units`` that are resampled and what such a ``unit`` is (document or block), ``loss`` in nats a token with its
        95% percentile bootstrap interval ``low``, ``high``, and ``difference`` (its loss minus the first model's, per
        token; positive: worse) with ``difference_low``, ``difference_high``, missing for the first.

    Raises:
        ReflowlensError: no model is given, one reads another tokenizer than the data's, or the split is one block.

    Example: ``compare_losses({n: rl.load_model(n) for n in ("reflow-nano-short", "gpt2-new-nano")}, "data/mix16k")``
    """
    if not models:
        raise ReflowlensError("no model is given: a loss needs one, a difference two")
    for name, model in models.items():
        data = tokens_for(model, folder, split, name)
    context = min(model.cfg.n_ctx for model in models.values())
    units = _units(data, folder, split, context, max_tokens)
    losses = {
        name: token_losses(model, units.tokens, batch_size, context, name, progress) for name, model in models.items()
    }
    frame = _compared(losses, units, resamples, seed)
    sizes = {name: (model.n_parameters, parameters_outside_embedding(model)) for name, model in models.items()}
    for place, column in ((1, "parameters"), (2, "outside_embedding")):
        frame.insert(place, column, [sizes[name][place - 1] for name in frame["model"]])
    return frame


def compare_replacements(
    model: HookedModel,
    dictionaries: Mapping[str, Dictionary],
    folder: str | Path,
    *,
    split: str = "val",
    batch_size: int = 8,
    max_tokens: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Loss of a model with each of some dictionaries in place of what they stand for, and its difference to the first.

    Args:
        model: which they belong to.
        dictionaries: by name; what each misses is left out (``error=False`` of :meth:`Dictionary.spliced`).

    Returns:
        As :func:`compare_losses`, without the counts of parameters.

    Raises:
        ReflowlensError: a dictionary is none of this model, the model reads another tokenizer than the data's, or the
            split is one block.

    Example: ``compare_replacements(model, {"as it was": dictionary, "packed": packed.dictionary()}, "data/mix16k")``
    """
    context = model.cfg.n_ctx
    data = tokens_for(model, folder, split)
    units = _units(data, folder, split, context, max_tokens)
    losses = {}
    for name, dictionary in dictionaries.items():
        with dictionary.spliced(model, error=False) as spliced:
            losses[name] = token_losses(spliced, units.tokens, batch_size, context, name, progress)
    return _compared(losses, units, resamples, seed)


class _Units(NamedTuple):
    """Tokens, and of each but the first the number of what it is resampled with."""

    tokens: TokenStream
    owner: NDArray[np.int64]
    unit: str


def _units(data: TokenData, folder: str | Path, split: str, context: int, max_tokens: int | None) -> _Units:
    tokens = data.tokens if max_tokens is None else data.tokens[: whole_number(max_tokens, "max_tokens", 2)]
    unit, owner = "document", document_of_targets(tokens, data.manifest.end_id)
    if owner[-1] == owner[0]:
        unit, owner = "block", np.arange(len(owner)) // context
    if owner[-1] < 1:
        raise ReflowlensError(f"{folder} has one block of {context} tokens in {split!r}: an interval needs two")
    return _Units(tokens, owner, unit)


def _compared(losses: Mapping[str, NDArray[Any]], units: _Units, resamples: int, seed: int) -> pd.DataFrame:
    n_units = int(units.owner[-1]) + 1
    counts = np.bincount(units.owner, minlength=n_units).astype(float)
    rows, baseline = [], None
    for name, each in losses.items():
        own = np.bincount(units.owner, weights=each, minlength=n_units)
        loss, low, high = mean_with_interval(own, counts, resamples, seed)
        row: dict[str, Any] = {"model": name, "tokens": len(each), "units": n_units, "unit": units.unit}
        row |= {"loss": loss, "low": low, "high": high}
        if baseline is None:
            baseline = own
        else:
            difference = mean_with_interval(own - baseline, counts, resamples, seed)
            row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def document_of_targets(tokens: TokenStream, end: int) -> NDArray[np.int64]:
    """For every token but the first, the index of its document; the end token is its document's last.

    >>> document_of_targets(np.array([5, 9, 6, 6, 9, 7]), end=9)
    array([0, 1, 1, 1, 2])
    """
    ends = np.asarray(tokens[:-1]) == end
    return np.cumsum(ends, dtype=np.int64)


@torch.no_grad()
def token_losses(
    model: HookedModel, tokens: TokenStream, batch_size: int, context: int, name: str, progress: bool | None
) -> Float[np.ndarray, " target"]:
    """Cross-entropy in nats of every token but the first, in the order of the stream."""
    losses = []
    total = len(tokens) - 1
    show = sys.stderr.isatty() if progress is None else progress
    with bar(show=show, total=total, desc=name, unit="token", unit_scale=True) as shown:
        for x, y in sequential_batches(tokens, batch_size, context):
            logits = model(x.to(model.cfg.device))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten().to(logits.device), reduction="none")
            losses.append(loss.double().cpu().numpy())
            shown.update(y.numel())
    return np.concatenate(losses)


def mean_with_interval(
    sums: NDArray[Any], counts: NDArray[Any], resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean over tokens of documents' sums, with the percentile interval over documents drawn with replacement."""

    def mean(a: NDArray[Any], b: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return np.asarray(a.sum(axis=axis) / b.sum(axis=axis))

    interval = stats.bootstrap(
        (sums, counts),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(mean(sums, counts)), float(interval.low), float(interval.high)
