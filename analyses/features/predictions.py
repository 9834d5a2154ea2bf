"""What replacements do to the predictions of a model: logits are formed for a few positions at a time, and let go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.features.documents import DocumentBatch, by_document
from reflowlens.models.base import HookedModel

_AT_ONCE = 2**21  # logits, 8 MB: a processor's cache holds them through the handful of passes over them


@dataclass(eq=False)
class PredictionSums:
    """Of one replacement: [document] sums over predictions of the cross-entropy in nats, of KL(model‖replaced) in nats
    and of the agreement of both in the likeliest token."""

    loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]


class Predictions:
    """The predictions of a model in a batch, which those of passes with replacements are compared with.

    Args:
        stream: the residual stream behind the last block.
    """

    def __init__(
        self, model: HookedModel, batch: DocumentBatch, stream: Float[Tensor, "row pos d_model"], n_documents: int
    ) -> None:
        self.model, self.batch = model, batch
        self.summed = partial(by_document, document=batch.document[batch.predicts], n_documents=n_documents)
        self.rows = max(1, _AT_ONCE // model.cfg.d_vocab)
        self.own = [self._logits(part).log_softmax(-1) for part in self._streams(stream)]
        losses = [-of.gather(1, to)[:, 0] for of, to in zip(self.own, self._targets(), strict=True)]
        self.loss = self.summed(torch.cat(losses))

    def compared(self, stream: Float[Tensor, "row pos d_model"]) -> PredictionSums:
        """Of a pass with replacements that ends in this stream."""
        parts = []
        for part, own, targets in zip(self._streams(stream), self.own, self._targets(), strict=True):
            logits = self._logits(part)
            total = logits.logsumexp(-1)
            loss = total - logits.gather(1, targets)[:, 0]
            agreement = logits.argmax(-1) == own.argmax(-1)
            kl = torch.linalg.vecdot(own.exp(), own - logits) + total
            parts.append(torch.stack([loss, kl, agreement.float()], dim=1))
        return PredictionSums(*self.summed(torch.cat(parts)).T)

    def _streams(self, stream: Float[Tensor, "row pos d_model"]) -> tuple[Tensor, ...]:
        return stream[self.batch.counted][self.batch.predicts].split(self.rows)

    def _targets(self) -> tuple[Tensor, ...]:
        return self.batch.targets[:, None].split(self.rows)

    def _logits(self, stream: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_vocab"]:
        return self.model.read_final(stream[None]).logits()[0].float()
