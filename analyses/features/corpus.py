"""Documents as blocks of tokens: none holds two documents, and none is longer than what a model reads at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

Document: TypeAlias = "str | Sequence[int] | np.ndarray | Int[Tensor, ' token']"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Blocks of text, the longest first, each a row that is padded on the right.

    Args:
        tokens: ids; what stands behind a block's own length is padding.
        lengths: tokens of each block.
        documents: the number of each block's document, counted from 0.
        starts: where in its document each block starts, in tokens.
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    documents: Int[Tensor, " row"]
    starts: Int[Tensor, " row"]

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def n_documents(self) -> int:
        return len(self.documents.unique())

    def batches(self, at_once: int) -> Iterator[Int[Tensor, "row pos"]]:
        """Consecutive blocks, no more than ``at_once`` tokens together (or one block), without common padding."""
        start = 0
        while start < len(self.tokens):
            longest = int(self.lengths[start])
            stop = start + max(1, at_once // longest)
            yield self.tokens[start:stop, :longest]
            start = stop


def corpus_of(
    model: HookedModel, documents: str | Iterable[Document], *, context: int | None = None, n_tokens: int | None = None
) -> Corpus:
    """Cut documents into blocks that begin as the model's texts do.

    Args:
        documents: texts, or their token ids; or one text. Read only as far as needed.
        context: tokens of a block at most; default ``n_ctx``.
        n_tokens: so many at most are taken; None takes all.

    Raises:
        ReflowlensError: there is no block of two tokens, an id is outside the vocabulary, or ``context`` is below 2 or
            above ``n_ctx``.

    >>> from reflowlens.checkpoints import load_model
    >>> model = load_model("reflow-nano")
    >>> corpus_of(model, ["The king of France", "A stone"], context=3).lengths.tolist()
    [3, 2]
    """
    context = model.cfg.n_ctx if context is None else context
    if not 2 <= context <= model.cfg.n_ctx:
        raise ReflowlensError(f"context must be from 2 to n_ctx={model.cfg.n_ctx}, got {context}")
    begin = model.text_start()
    own = context - len(begin)
    left = float("inf") if n_tokens is None else n_tokens
    blocks: list[tuple[list[int], int, int]] = []
    for number, document in enumerate([documents] if isinstance(documents, str) else documents):
        ids = model.tokenizer.encode(document) if isinstance(document, str) else np.asarray(document).tolist()
        for start in range(0, len(ids), own):
            block = begin + ids[start : start + min(own, int(min(left, own)))]
            if len(block) >= 2:
                blocks.append((block, number, start))
                left -= len(block)
            if left < 2:
                break
        if left < 2:
            break
    if not blocks:
        raise ReflowlensError("there is no text to read: no document has two tokens")
    blocks.sort(key=lambda block: -len(block[0]))
    return _padded(model, blocks)


def _padded(model: HookedModel, blocks: Sequence[tuple[list[int], int, int]]) -> Corpus:
    lengths = [len(ids) for ids, *_ in blocks]
    tokens = torch.full((len(blocks), lengths[0]), model.tokenizer.eot_token or 0)
    for row, (ids, *_) in zip(tokens, blocks, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    checked, _ = model.tokens_and_lengths(tokens)
    places: Any = torch.tensor([place for _, *place in blocks])
    return Corpus(checked, torch.tensor(lengths), places[:, 0], places[:, 1])
