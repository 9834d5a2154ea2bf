"""What is known of one feature: how often it is active and where, what it writes, its neighbours, what it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

TOP, BOTTOM = "Top activations", "Lowest activations"


@dataclass(frozen=True)
class FeatureContext:
    """Activations of a feature around a place of a text.

    Args:
        block: of the text (:class:`FeatureText`).
        start: position of the first value in its block.
        middle: position of the activation that the context is shown for.
        values: one a token.
    """

    block: int
    start: int
    middle: int
    values: Sequence[float]


@dataclass(frozen=True)
class FeatureEffect:
    """What the loss rises by, in nats a token, if a feature is removed: at the positions where it is not 0.

    Args:
        change: mean over these positions of a sample of blocks.
        error: its standard error over blocks; NaN of a single one.
        positions, blocks: how many.
        control: another feature of the layer, drawn among those active about as often.
        control_change: the same mean, of the control where it is active.
    """

    change: float
    error: float
    positions: int
    blocks: int
    control: int
    control_change: float


@dataclass(frozen=True)
class FeatureRecord:
    """A feature over a text.

    Args:
        layer: key of its layer (:class:`FeatureLayerFacts`).
        index: within the layer.
        fired: positions at which it is above 0.
        smallest, largest: activation.
        histogram: counts of the activations that are not 0, in equal bins from 0 (or ``smallest``, if that is negative)
            to ``largest``.
        quantiles: of the activations that are not 0, at equal steps from 0 to 1.
        contexts: by the name of the group: the top ones, and samples of each interval between two quantiles.
        promoted, suppressed: (token, logit at activation 1), strongest first, on the direct path to the logits.
        near: (layer, index, cosine of directions), nearest first.
        effect: None if it was not measured.
    """

    layer: str
    index: int
    fired: int
    smallest: float
    largest: float
    histogram: Sequence[int]
    quantiles: Sequence[float]
    contexts: Mapping[str, Sequence[FeatureContext]]
    promoted: Sequence[tuple[int, float]]
    suppressed: Sequence[tuple[int, float]]
    near: Sequence[tuple[str, int, float]]
    effect: FeatureEffect | None

    @property
    def low(self) -> float:
        """Where the histogram begins."""
        return min(0.0, self.smallest)

    def words(self, text: FeatureText, n: int = 3) -> list[str]:
        """Automatic label words: the tokens at which it is largest, most frequent first."""
        counts: dict[str, int] = {}
        for context in self.contexts.get(TOP, ()):
            word = text.vocabulary[int(text.block(context.block)[context.middle])].strip()
            if word:
                counts[word] = counts.get(word, 0) + 1
        return sorted(counts, key=lambda word: -counts[word])[:n]

    def promoted_words(self, text: FeatureText, n: int = 3) -> list[str]:
        """Automatic label words too: the tokens that it promotes most."""
        words = (text.vocabulary[token].strip() for token, _ in self.promoted)
        return list(dict.fromkeys(word for word in words if word))[:n]


@dataclass(frozen=True)
class FeatureLayerFacts:
    """Features that are read at one hook point.

    Args:
        key: what addresses the layer in links and names of files.
        name: for people: the hook points.
        n_features: number of features.
        positions: over which the statistics are.
    """

    key: str
    name: str
    n_features: int
    positions: int


@dataclass(frozen=True, eq=False)
class FeatureText:
    """The text that contexts are taken from: blocks of token ids, one after another.

    Args:
        tokens: of all blocks.
        ends: where in ``tokens`` each block ends.
        documents, starts: the document of each block, and where in it the block starts.
        vocabulary: the text of each token that occurs on a page.
    """

    tokens: Int[np.ndarray, " token"]
    ends: Int[np.ndarray, " block"]
    documents: Int[np.ndarray, " block"]
    starts: Int[np.ndarray, " block"]
    vocabulary: Mapping[int, str]

    def block(self, number: int) -> Int[np.ndarray, " pos"]:
        start = int(self.ends[number - 1]) if number else 0
        return self.tokens[start : int(self.ends[number])]

    def of(self, context: FeatureContext) -> list[str]:
        """The tokens of a context as texts."""
        ids = self.block(context.block)[context.start : context.start + len(context.values)]
        return [self.vocabulary[int(token)] for token in ids]


def viewer_json(record: FeatureRecord, facts: FeatureLayerFacts, text: FeatureText) -> dict[str, object]:
    """A feature as the viewers of Neuronpedia and circuit-tracer read it."""
    shown: set[tuple[int, int]] = set()
    groups = []
    for name, contexts in record.contexts.items():
        examples = []
        for context in contexts:
            place = context.block, context.middle
            examples.append(
                {
                    "tokens": text.of(context),
                    "tokens_acts_list": [_rounded(value) for value in context.values],
                    "train_token_ind": context.middle - context.start,
                    "is_repeated_datapoint": place in shown,
                }
            )
            shown.add(place)
        groups.append({"quantile_name": name, "examples": examples})
    return {
        "index": record.index,
        "layer": record.layer,
        "examples_quantiles": groups,
        "top_logits": [text.vocabulary[token] for token, _ in record.promoted],
        "bottom_logits": [text.vocabulary[token] for token, _ in record.suppressed],
        "act_min": _rounded(record.smallest),
        "act_max": _rounded(record.largest),
        "quantile_values": [_rounded(value) for value in record.quantiles],
        "histogram": list(record.histogram),
        "activation_frequency": record.fired / facts.positions,
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def cantor(layer: int, index: int) -> int:
    """The one number that circuit-tracer gives to feature ``index`` of layer ``layer``.

    >>> [cantor(0, 0), cantor(0, 1), cantor(1, 0), cantor(3, 17)]
    [0, 2, 1, 227]
    """
    return (layer + index) * (layer + index + 1) // 2 + index
