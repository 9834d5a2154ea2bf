"""What a recipe edit changes: the next word after carriers, the text that follows them, and texts it is not about."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.damage import NeutralTexts, continuation_losses
from analyses.measures.sentiment import Poles, distinct_ngrams, valences
from reflowlens.interventions.edit import WeightEdit, edit
from reflowlens.models.base import HookedModel

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Written:
    """Continuations of carriers.

    Args:
        texts: one a carrier.
        valence: mean valence of each text's words, those that were edited counting as neutral.
        loss: mean loss of each text's tokens under the unedited model, in nats.
        distinct: distinct-2 of all of them together.
    """

    texts: list[str]
    valence: NDArray[np.float64]
    loss: NDArray[np.float64]
    distinct: float

    @property
    def perplexity(self) -> float:
        """Under the unedited model, texts counting alike."""
        return float(np.exp(self.loss.mean()))


@dataclass(frozen=True)
class Outcome:
    """A model under an edit.

    Args:
        log_odds: of the held-out positive against the negative words after each carrier, in nats.
        kl: KL(before ‖ under the edit) of each neutral text's tokens, in nats.
        written: None where nothing was generated.
    """

    log_odds: NDArray[np.float64]
    kl: NDArray[np.float64]
    written: Written | None = None


class Probe:
    """Carriers and neutral texts by which edits of a model are judged, from the same seeds each.

    Args:
        heldout: the words looked for after a carrier.
        edited: words whose valence does not count in a text.
        new_tokens: length of a continuation, if the context has room.
    """

    def __init__(
        self,
        model: HookedModel,
        carriers: Sequence[str],
        heldout: Poles,
        neutral_texts: Sequence[str],
        *,
        edited: Collection[str] = (),
        new_tokens: int = 12,
        seed: int = 0,
    ) -> None:
        self.model, self.carriers, self.heldout = model, list(carriers), heldout
        self.edited, self.seed = edited, seed
        self.tokens, self.lengths = model.tokens_and_lengths(self.carriers)
        self.new_tokens = min(new_tokens, model.cfg.n_ctx - max(self.lengths))
        self.neutral = NeutralTexts(model, neutral_texts)

    def outcome(self, edits: Sequence[WeightEdit] = (), *, write: bool = False) -> Outcome:
        """What the model does under edits, which are undone; ``write`` also has it continue the carriers."""
        with edit(self.model, edits):
            outcome = Outcome(self._log_odds(), self.neutral.damage().kl.double().cpu().numpy())
            tokens = self._generate() if write else None
        return outcome if tokens is None else dataclasses.replace(outcome, written=self._written(tokens))

    def log_odds(self, edits: Sequence[WeightEdit] = ()) -> NDArray[np.float64]:
        """Of the held-out words after each carrier under edits, and nothing else."""
        with edit(self.model, edits):
            return self._log_odds()

    @torch.no_grad()
    def _log_odds(self) -> NDArray[np.float64]:
        resid = self.model.final_stream(self.tokens)
        last = resid[range(len(self.lengths)), [length - 1 for length in self.lengths]]
        logits = self.model.read_final(last[None]).logits()[0][:, self.heldout.ids]
        return self.heldout.log_odds(logits.float()).double().cpu().numpy()

    def _generate(self) -> Int[Tensor, "carrier pos"]:
        return self.model.generate(
            self.carriers,
            self.new_tokens,
            temperature=TEMPERATURE,
            seed=self.seed,
            return_type="tokens",
            progress=False,
        )

    def _written(self, tokens: Int[Tensor, "carrier pos"]) -> Written:
        continued = torch.zeros_like(tokens, dtype=torch.bool)
        stop, rows = self.model.tokenizer.eot_token, []
        for row, length in enumerate(self.lengths):
            new = tokens[row, length : length + self.new_tokens].tolist()
            end = new.index(stop) if stop in new else len(new)
            continued[row, length : length + min(end + 1, len(new))] = True  # a document's end is written as well
            rows.append(new[:end])
        texts = [self.model.tokenizer.decode(row) for row in rows]
        loss = continuation_losses(self.model, tokens, continued).double().cpu().numpy()
        return Written(texts, valences(texts, self.edited), loss, distinct_ngrams(rows, 2))
