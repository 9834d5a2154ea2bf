"""Sentiment: words of two poles, the direction from one to the other, and how positive a text is.

Texts are scored by VADER's lexicon (Hutto and Gilbert 2014): 7,208 of its words, those of Latin letters only, each with
the mean of ten people's ratings from -4 to 4. Its rules for negation and emphasis are not applied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_rng
from analyses.words.lexicon import Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import capped
from reflowlens.signals import SignalView

TRAINING = ("positive_adjectives", "negative_adjectives")
MINIMUM_WORDS = 4  # of each pole


@dataclass(frozen=True)
class Poles:
    """Token ids of positive and of negative words."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """Both, the positive ones first: the order that logits of the poles come in."""
        return [*self.positive, *self.negative]

    def direction(self, view: SignalView) -> Float[Tensor, " S"]:
        """Mean recipe of the positive words minus that of the negative ones; ``view.write`` makes it a direction of the
        residual stream."""
        return view.recipe[list(self.positive)].mean(dim=0) - view.recipe[list(self.negative)].mean(dim=0)

    def shuffled(self, seed: int) -> Poles:
        """The control `shuffled_labels`: the same words dealt to poles of the same sizes at random."""
        words = derive_rng(seed, "shuffled_labels").permutation(self.ids).tolist()
        return Poles(tuple(words[: len(self.positive)]), tuple(words[len(self.positive) :]))

    def logits(self, view: SignalView, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row word"]:
        """Logits of the words when the residual stream ends so."""
        ids = torch.tensor(self.ids, device=view.recipe.device)
        return capped(view.readout(resid) @ view.recipe[ids].T + view.bias_of(ids), view.cap)

    def log_odds(self, logits: Float[Tensor, "*row word"]) -> Float[Tensor, "*row"]:
        """log(probability of all positive words / probability of all negative ones), in nats."""
        n = len(self.positive)
        return logits[..., :n].logsumexp(dim=-1) - logits[..., n:].logsumexp(dim=-1)

    def leaning(self, logits: Float[Tensor, "*row word"]) -> Int[Tensor, "*row"]:
        """The pole of the most probable of the words: 1 or -1."""
        return torch.where(logits.argmax(dim=-1) < len(self.positive), 1, -1)


def sentiment_poles(model: HookedModel, lexicon: Lexicon, experiment: str) -> tuple[Poles, Poles]:
    """The words that a direction is made of, and the held-out continuations that it is judged by.

    The former are the lexicon's categories ``positive_adjectives`` and ``negative_adjectives``, the latter its
    ``sentiment.positive`` and ``sentiment.negative``; of each, the single tokens of the model's tokenizer. Raises
    ReflowlensError where fewer than 4 are left of one.
    """
    words = [lexicon.categories.get(name, ()) for name in TRAINING]
    words += [lexicon.sentiment.positive, lexicon.sentiment.negative]
    ids = [_single_tokens(model, some) for some in words]
    for name, found in zip((*TRAINING, "sentiment.positive", "sentiment.negative"), ids, strict=True):
        if len(found) < MINIMUM_WORDS:
            raise ReflowlensError(
                f"{experiment} needs {MINIMUM_WORDS} single-token words in the lexicon's {name}, got {len(found)}"
            )
    return Poles(ids[0], ids[1]), Poles(ids[2], ids[3])


def _single_tokens(model: HookedModel, words: Sequence[str]) -> tuple[int, ...]:
    spaced = [f" {word}" for word in words]
    return tuple(model.to_single_token(word) for word in spaced if model.tokenizer.is_single_token(word))


@functools.cache
def word_valences() -> dict[str, float]:
    """How positive a word is, from -4 to 4.

    >>> word_valences()["great"], word_valences()["terrible"]
    (3.1, -2.1)
    """
    text = (resources.files("reflowlens") / "assets/vader/valence.tsv").read_text(encoding="utf-8")
    pairs = (line.split("\t") for line in text.splitlines())
    return {word: float(valence) for word, valence in pairs}


def text_valence(text: str, without: Collection[str] = ()) -> float:
    """Mean valence of a text's words: 0 for a word that has none, for one of `without`, and for a text without words.

    >>> text_valence("A great film."), text_valence("A great film.", without=["great"])
    (1.0333333333333334, 0.0)
    """
    words = re.findall(r"[a-z]+", text.lower())
    left_out = set(without)
    values = [0.0 if word in left_out else word_valences().get(word, 0.0) for word in words]
    return sum(values) / len(values) if values else 0.0


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n (Li et al. 2016): different n-grams over all n-grams of some token sequences; 1 where there are none.

    >>> distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def valences(texts: Sequence[str], without: Collection[str] = ()) -> NDArray[np.float64]:
    """`text_valence` of each text."""
    return np.array([text_valence(text, without) for text in texts])
