"""What a graph was made of, kept for what is asked of it later: attention explained, interventions performed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from reflowlens.circuits.attribution.engine import Engine
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.residual import ResidualModel


@dataclass(frozen=True)
class Traced:
    """The model on the prompt of a graph.

    Args:
        tokens: of the prompt; of a graph of features those up to the last target.
        engine: the frozen model with its MLPs replaced, by which edges are computed.
    """

    model: ResidualModel
    dictionary: Dictionary | None
    tokens: Int[Tensor, " pos"]
    engine: Engine

    @property
    def texts(self) -> list[str]:
        """Of the tokens; ids beyond the tokenizer's have none."""
        model, n_vocab = self.model, self.model.tokenizer.n_vocab
        return [model.to_single_str_token(token) if token < n_vocab else "" for token in self.tokens.tolist()]
