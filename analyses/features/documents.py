"""Documents in padded batches, the positions of them that count, and what is predicted from these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.units.held_out import as_stream
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

Documents: TypeAlias = "Sequence[str | Int[Tensor | np.ndarray, ' _token']]"
SHORTEST = 3  # tokens: position 1 is the first that counts, and the last has no next token


@dataclass(frozen=True, eq=False)
class DocumentBatch:
    """Some documents, padded on the right; of each, the positions from 1 on count.

    Args:
        tokens: as the model reads them.
        counted: which positions count; n of them.
        document: number of the document of each of the n.
        predicts: which of the n have a next token.
        targets: these next tokens.
    """

    tokens: Int[Tensor, "row pos"]
    counted: Bool[Tensor, "row pos"]
    document: Int[Tensor, " n"]
    predicts: Bool[Tensor, " n"]
    targets: Int[Tensor, " m"]

    @classmethod
    def of(cls, rows: Sequence[Int[Tensor, " _token"]], numbers: Int[Tensor, " row"]) -> DocumentBatch:
        """Of documents of any lengths, and the number of each."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        position = torch.arange(tokens.shape[1])
        counted = (position >= 1) & (position < lengths[:, None])
        row, place = counted.nonzero(as_tuple=True)
        predicts = place + 1 < lengths[row]
        targets = tokens[row[predicts], place[predicts] + 1]
        device = tokens.device
        return cls(tokens, counted.to(device), numbers[row].to(device), predicts.to(device), targets)

    def within(self, x: Float[Tensor, "row pos feature"]) -> Float[Tensor, "n feature"]:
        """The vectors at the positions that count, in float32."""
        return x[self.counted].float()

    def filled(self, x: Float[Tensor, "row pos feature"], y: Float[Tensor, "n feature"]) -> Tensor:
        """x with other vectors at the positions that count."""
        return x.masked_scatter(self.counted[..., None], y.to(x.dtype))


def token_rows(model: HookedModel, documents: Documents) -> list[Int[Tensor, " _token"]]:
    """The first ``n_ctx`` tokens of every document, on the model's device; documents of under 3 tokens are left out.

    Raises:
        ReflowlensError: it is no list of documents, a document is neither a text nor token ids [token], an id is
            outside the vocabulary, or fewer than two documents have 3 tokens.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise ReflowlensError(f"documents must be a list of texts or arrays of tokens, got {type(documents).__name__}")
    rows = []
    for document in documents:
        row = as_stream(model, document)[: model.cfg.n_ctx]
        if len(row) >= SHORTEST:
            rows.append(model.to_tokens(row)[0])
    if len(rows) < 2:
        raise ReflowlensError(
            f"at least 2 documents of {SHORTEST} tokens are needed, got {len(rows)} of {len(documents)}: give more text"
        )
    return rows


def document_batches(rows: Sequence[Int[Tensor, " _token"]], batch_size: int) -> Iterator[DocumentBatch]:
    """``batch_size`` documents at a time, those of similar length together."""
    order = torch.tensor([len(row) for row in rows]).argsort(stable=True)
    for numbers in order.split(batch_size):
        yield DocumentBatch.of([rows[i] for i in numbers.tolist()], numbers)


def n_batches(rows: Sequence[Int[Tensor, " _token"]], batch_size: int) -> int:
    """How many batches :func:`document_batches` gives."""
    return math.ceil(len(rows) / batch_size)


def by_document(values: Float[Tensor, "n *stat"], document: Int[Tensor, " n"], n_documents: int) -> NDArray[np.float64]:
    """Sums over the positions of each document, in float64 [document, *stat]."""
    sums = torch.zeros(n_documents, *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, document, values.double()).cpu().numpy()
