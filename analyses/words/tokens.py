"""The lexicon's words as a model's tokens with their categories, and random words to hold them against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyses.statistics.draws import derive_rng
from analyses.words.lexicon import Lexicon, single_token_categories
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import Tokenizer

MINIMUM_WORDS = 20


@dataclass(frozen=True)
class LabelledWords:
    """Words that are one token each.

    Args:
        ids: token of each word.
        labels: number of its category.
        words: without the space in front.
        categories: by number.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    words: list[str]
    categories: list[str]

    @property
    def category_of(self) -> list[str]:
        """The category of each word."""
        return [self.categories[label] for label in self.labels]


def listed(given: Sequence[str], name: str) -> list[str]:
    """The texts of an argument; a single text, which Python would take for a list of letters, is refused."""
    if isinstance(given, str):
        raise ReflowlensError(f"{name}: a list was expected, got the text {given!r}; write [{given!r}]")
    return list(given)


def labelled_words(lexicon: Lexicon, tokenizer: Tokenizer, experiment: str) -> tuple[LabelledWords, list[str]]:
    """The words of the lexicon's categories that are single tokens, and notes on the others.

    A category of which one word is left has nothing to be compared with and is skipped. Raises ReflowlensError, in the
    name of ``experiment``, for fewer than 20 words or 2 categories.
    """
    found, split = single_token_categories(lexicon.categories, tokenizer)
    kept = {category: tokens for category, tokens in found.items() if len(tokens) > 1}
    lonely = [category for category in lexicon.categories if category not in kept]
    notes = [
        f"{len(skipped)} {what} skipped, {why}: {', '.join(skipped[:5])}"
        for what, why, skipped in (
            ("words", "not single tokens", split),
            ("categories", "fewer than two single-token words", lonely),
        )
        if skipped
    ]
    n_words = sum(map(len, kept.values()))
    if n_words < MINIMUM_WORDS or len(kept) < 2:
        raise ReflowlensError(
            f"{experiment} needs at least {MINIMUM_WORDS} words in 2 categories that are single tokens of "
            f"{tokenizer.name!r}, got {n_words} in {len(kept)}" + "".join(f" ({note})" for note in notes)
        )
    ids = np.concatenate([np.array(tokens) for tokens in kept.values()])
    labels = np.repeat(np.arange(len(kept)), [len(tokens) for tokens in kept.values()])
    words = [text[1:] for text in tokenizer.to_str_tokens(ids)]
    return LabelledWords(ids, labels, words, list(kept)), notes


def frequency_matched(
    ids: Sequence[int] | NDArray[np.int64], candidates: Sequence[int], *, window: int = 100, seed: int = 0
) -> NDArray[np.int64]:
    """For each token a random other one of about its frequency: the control ``random_words``.

    Ranks of a byte-pair encoding are the order in which its tokens were found frequent enough to be worth merging, so
    that a word among the ``window`` candidates nearest in rank is about as frequent. None is drawn twice, and none of
    ``ids``. Raises ReflowlensError if there are too few candidates.
    """
    given = {int(i) for i in ids}
    free = np.array(sorted(set(map(int, candidates)) - given))
    if len(free) < len(ids):
        raise ReflowlensError(f"{len(ids)} random words were expected, and there are {len(free)} to draw from")
    rng = derive_rng(seed, "frequency_matched")
    drawn = np.empty(len(ids), dtype=np.int64)
    for place in rng.permutation(len(ids)):
        centre = int(np.searchsorted(free, ids[place]))
        low = int(np.clip(centre - window // 2, 0, max(0, len(free) - window)))
        choice = int(rng.integers(low, min(low + window, len(free))))
        drawn[place] = free[choice]
        free = np.delete(free, choice)
    return drawn
