"""Bits per byte of text: what a model's surprise costs, comparable between tokenizers, exact to the byte.

A document is read as the tokenizer cuts it, behind its end-of-document token where it has one, so that every byte is
predicted; otherwise the first token is context alone, and its bytes are not counted. Windows slide over a document
(:mod:`reflowlens.scoring.windows`), so that every token is scored once, with as much context as the window leaves.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from pretraining.loss_comparison import mean_with_interval
from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.scoring.windows import Window, inputs_and_targets, n_scored, predictions, sliding_windows
from reflowlens.tokenizers.base import Tokenizer

_FEW = 8  # documents: with fewer, stretches of them are what is resampled
_STRETCH = 8_192  # bytes


@dataclass(frozen=True, eq=False)
class Document:
    """A text as a tokenizer cuts it.

    Args:
        ids: with the token that it is read behind.
        size: bytes of each token; 0 of what is not part of the text, and of a first token that nothing predicts.
    """

    ids: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> Document:
        """Cut a text.

        Raises:
            ReflowlensError: the text is empty, or its tokens are not made of its bytes.
        """
        ids = tokenizer.encode(text)
        size = [len(tokenizer.token_bytes(token)) for token in ids]
        if not ids:
            raise ReflowlensError("an empty document has no bytes to predict")
        if sum(size) != len(text.encode("utf-8")):
            raise ReflowlensError(
                f"tokens of {tokenizer.name} have {sum(size):,} bytes where the text has {len(text.encode()):,}: bits "
                "per byte would be those of another text"
            )
        if tokenizer.eot_token is not None:
            return cls(np.array([tokenizer.eot_token, *ids]), np.array([0, *size]))
        return cls(np.array(ids), np.array([0, *size[1:]]))


def bits_per_byte(
    models: Mapping[str, HookedModel],
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    learning: ScoreFirst | None = None,
    batch_size: int = 8,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Bits per byte of every model on some texts, and the difference to the first model's.

    Args:
        models: by name; each reads the texts through its own tokenizer.
        texts: the documents.
        window: tokens that are read at once; default: the shortest context among the models.
        stride: tokens by which a window moves on; default: the window, which is fastest and leaves the least context.
        learning: let a copy of each model learn from what it has scored (:class:`ScoreFirst`).
        batch_size: windows read at once.
        resamples: of documents, or of stretches of 8,192 bytes where there are fewer than 8 documents.
        seed: of the resamples.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Returns:
        A row a model: ``model``, ``documents``, ``bytes`` and ``tokens`` that were predicted, ``bits_per_byte`` with
        its 95% percentile bootstrap interval ``low``, ``high``, ``loss`` in nats a token, and ``difference`` in bits
        per byte to the first model with ``difference_low``, ``difference_high``.

    Raises:
        ReflowlensError: there is no model or no text, a window is longer than a model's context, or a stride longer
            than the window.

    Example: ``bits_per_byte({"reflow-nano": rl.load_model("reflow-nano")}, texts, window=256, stride=64)``
    """
    texts = [text for text in texts if text]
    if not models or not texts:
        raise ReflowlensError(f"bits per byte need {'a text' if models else 'a model'}, and there is none")
    shortest = min(model.cfg.n_ctx for model in models.values())
    window = shortest if window is None else whole_number(window, "window", 1)
    stride = window if stride is None else whole_number(stride, "stride", 1)
    for name, model in models.items():
        if window > model.cfg.n_ctx:
            raise ReflowlensError(f"window={window} is longer than the n_ctx={model.cfg.n_ctx} of {name}")
    if stride > window:
        raise ReflowlensError(f"stride={stride} would leave tokens out between windows of {window}")
    rows, baseline = [], None
    for name, model in models.items():
        documents = [Document.of(text, model.tokenizer) for text in texts]
        losses = scored_losses(model, documents, window, stride, learning, batch_size, name, progress)
        bits, sizes = units_of(documents, losses)
        if len(bits) < 2:
            raise ReflowlensError("an interval needs two documents, or one of more than 8,192 bytes")
        mean, low, high = mean_with_interval(bits, sizes, resamples, seed)
        row = {
            "model": name,
            "documents": len(texts),
            "bytes": int(sum(document.size.sum() for document in documents)),
            "tokens": sum(len(document.ids) - 1 for document in documents),
            "bits_per_byte": mean,
            "low": low,
            "high": high,
            "loss": float(np.concatenate(losses).mean()),
        }
        if baseline is None:
            baseline = bits
        elif len(bits) == len(baseline):
            found = mean_with_interval(bits - baseline, sizes, resamples, seed)
            row |= dict(zip(("difference", "difference_low", "difference_high"), found, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def units_of(
    documents: Sequence[Document], losses: Sequence[Float[np.ndarray, " _token"]]
) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
    """Bits and bytes of what is resampled: documents, or stretches of them where they are few."""
    if len(documents) >= _FEW:
        bits = np.array([loss.sum() for loss in losses]) / math.log(2)
        return bits, np.array([document.size.sum() for document in documents], dtype=float)
    bits_of, sizes_of = [], []
    for document, loss in zip(documents, losses, strict=True):
        size = document.size[1:]
        stretch = (np.cumsum(size) - size) // _STRETCH
        n = int(stretch.max(initial=-1)) + 1
        bits_of.append(np.bincount(stretch, weights=loss, minlength=n) / math.log(2))
        sizes_of.append(np.bincount(stretch, weights=size, minlength=n))
    return np.concatenate(bits_of), np.concatenate(sizes_of)


def scored_losses(
    model: HookedModel,
    documents: Sequence[Document],
    window: int,
    stride: int,
    learning: ScoreFirst | None,
    batch_size: int,
    name: str,
    progress: bool | None,
) -> list[Float[np.ndarray, " _token"]]:
    """Cross-entropy in nats of every token but the first of each document."""
    losses = [np.full(len(document.ids) - 1, np.nan) for document in documents]
    windows = [w for i, each in enumerate(documents) for w in sliding_windows(i, len(each.ids), window, stride)]
    chunks = [windows] if learning is None else list(chunks_of(windows, learning.chunk))
    reader, ids = model if learning is None else copy.deepcopy(model), [document.ids for document in documents]
    show = sys.stderr.isatty() if progress is None else progress
    with bar(show=show, total=sum(map(len, losses)), desc=name, unit="token", unit_scale=True) as shown:
        for number, chunk in enumerate(chunks):
            for some in in_batches(chunk, batch_size):
                for each, found in zip(some, predictions(reader, ids, some), strict=True):
                    losses[each.row][each.scored - 1 : each.last] = -found.logprob
                shown.update(sum(map(n_scored, some)))
            if learning is not None and number + 1 < len(chunks):  # nothing comes behind the last
                learning.learn(reader, documents, chunk, window, batch_size, number / (len(chunks) - 1))
    return losses


def chunks_of(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Windows in their order, in chunks that score ``size`` tokens or a few more."""
    chunk: list[Window] = []
    for each in windows:
        chunk.append(each)
        if sum(map(n_scored, chunk)) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class ScoreFirst:
    """A model learns, at test time, from every chunk of tokens after it has scored it, and never before.

    Args:
        chunk: tokens that are scored, then learnt from.
        epochs: passes over a chunk.
        learning_rate: of plain stochastic gradient descent, falling to 0 over the chunks as a half cosine.
        momentum: of it.
        clip: largest norm of the whole gradient.
    """

    chunk: int = 32_768
    epochs: int = 3
    learning_rate: float = 0.002
    momentum: float = 0.9
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("chunk", "epochs", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ReflowlensError(f"{name} must be positive, got {getattr(self, name)!r}")

    def learn(
        self,
        model: HookedModel,
        documents: Sequence[Document],
        scored: Sequence[Window],
        window: int,
        batch_size: int,
        progress: float,
    ) -> None:
        """Change the model by what was scored, and nothing behind it.

        Args:
            window: tokens that are read at once.
            progress: how much of all chunks was scored before this one, 0 to 1.
        """
        rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=self.momentum)
        blocks = list(read_again(scored, window))
        for _ in range(self.epochs):
            for some in in_batches(blocks, batch_size):
                tokens, targets = inputs_and_targets([document.ids for document in documents], some)
                model(tokens.to(model.cfg.device), "loss", targets=targets.to(model.cfg.device)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


def read_again(scored: Sequence[Window], window: int) -> Iterator[Window]:
    """What windows scored, in blocks that do not overlap."""
    spans: dict[int, tuple[int, int]] = {}
    for each in scored:
        first, _ = spans.get(each.row, (each.scored, 0))
        spans[each.row] = (first, each.last)
    for row, (scored_from, end) in spans.items():
        for first in range(scored_from, end + 1, window):
            last = min(first + window - 1, end)
            yield Window(row, first - 1, last, first, last)


def in_batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows of like length together: short ones are padded."""
    ordered = sorted(windows, key=lambda each: each.end - each.first)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
