"""A dashboard a feature: what it responds to, what it writes, and what the model loses without it.

    pages = feature_dashboards(rl.load_model("reflow-nano"), texts, rl.load_dictionary("reflow-nano-plt"))
    pages.save("out/features")          # index.html, which opens without a network
    pages.card("3", 17)                 # one of them, in a notebook

Without a dictionary the model's own units are shown: signals of a reFlow, neurons, the neurons of BDH. A context shown
proves nothing by itself: an untrained model has its top activations too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from analyses.features.corpus import Corpus, Document, corpus_of
from analyses.features.directions import TokenEffects, nearest_features, token_effects
from analyses.features.layers import chosen_layers, dictionary_layers, unit_layers
from analyses.features.records import INTERVALS, LayerRecords, shown_places
from analyses.features.removal import BLOCKS, removal_effects
from analyses.features.survey import second_pass, survey
from reflowlens.arguments import whole_number
from reflowlens.checkpoints import model_hash
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.notebook.feature import FeatureLayerFacts, FeatureText
from reflowlens.notebook.feature_pages import FeaturePages

SAMPLE = 100  # positions of a feature, of which quantiles are taken and contexts are drawn
_TOKENS = 10  # promoted, and suppressed
_WITHIN, _ACROSS = 6, 4  # nearest features


def feature_dashboards(
    model: Any,
    documents: str | Iterable[Document],
    dictionary: Dictionary | None = None,
    *,
    points: str | Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    n_features: int | None = None,
    n_tokens: int | None = 100_000,
    context: int | None = None,
    n_top: int = 12,
    n_interval: int = 3,
    around: tuple[int, int] = (20, 8),
    n_removed: int = 24,
    seed: int = 0,
    data_name: str = "",
    progress: bool = False,
) -> FeaturePages:
    """Read a text twice, and gather what is known of every feature.

    Args:
        documents: texts or token ids, each a document: no block holds two. Position 0 of a block counts in nothing.
        dictionary: whose features are shown, computed from what it reads; nothing is spliced into the model.
        points: without a dictionary: hook points or kinds of units (`analyses.units.points.points_named`); default the
            units that the architecture is made of, and the signals of a reFlow.
        layers: keys of layers to show, e.g. ``["2", "3"]``; None shows all.
        n_features: the first so many of each layer; None shows all.
        n_tokens: of the text at most; None reads all of it.
        context: tokens of a block at most; default ``n_ctx``.
        n_top: contexts where a feature is largest.
        n_interval: contexts of each of five intervals between quantiles of its activations that are not 0. Quantiles
            are those of a uniform sample of ``SAMPLE`` positions, and exact for a feature that has no more.
        around: tokens before and after that are shown with the token in the middle.
        n_removed: features a layer whose removal is measured, each beside one that is active as often.
        seed: of every random choice.
        data_name: what the pages call the text.
        progress: show how far the reading is.

    Returns:
        The pages, which save themselves.

    Raises:
        ReflowlensError: the dictionary is another model's, a layer or point does not exist, an activation is not
            finite, a number is out of range, or there is no text.

    Example: ``feature_dashboards(model, open("val.txt").read()).save("out/features")``
    """
    hooked = hooked_model(model)
    _check(n_features=n_features, n_tokens=n_tokens, n_top=n_top, n_interval=n_interval)
    if min(*around, n_removed) < 0:
        raise ReflowlensError(f"around and n_removed count from 0, got {around} and {n_removed}")
    if dictionary is not None and points is not None:
        raise ReflowlensError("points choose units of the model, and a dictionary has its own: leave one of them out")
    every = unit_layers(hooked, points) if dictionary is None else dictionary_layers(hooked, dictionary)
    chosen = [layer.first(n_features) for layer in chosen_layers(every, layers)]
    corpus = corpus_of(hooked, documents, context=context, n_tokens=n_tokens)
    surveys = survey(hooked, corpus, chosen, n_top=n_top, n_sample=SAMPLE, seed=seed, progress=progress)
    shown = [shown_places(part, n_interval) for part in surveys]
    windows = [places.windows(around) for places in shown]
    histograms = second_pass(hooked, corpus, chosen, surveys, windows, progress=progress)
    effects = removal_effects(hooked, corpus, chosen, surveys, n_removed, seed, progress=progress)
    near = nearest_features(chosen, _WITHIN, _ACROSS)
    tokens = [token_effects(layer, _TOKENS, hooked.tokenizer.n_vocab) for layer in chosen]
    parts = zip(chosen, surveys, shown, windows, histograms, effects, near, tokens, strict=True)
    keys = [layer.key for layer in chosen]
    records = [LayerRecords(corpus.tokens.shape[1], keys, *part) for part in parts]
    facts = [
        FeatureLayerFacts(layer.key, layer.name, layer.n_features, part.n)
        for layer, part in zip(chosen, surveys, strict=True)
    ]
    return FeaturePages(
        title=_title(hooked, dictionary),
        facts=_facts(hooked, dictionary, corpus, data_name),
        notes=_notes(dictionary is not None, n_removed),
        layers=facts,
        text=_text(hooked, corpus, tokens),
        record=lambda number, index: records[number].record(index),
    )


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None:
            whole_number(value, name, 1)


def _title(model: HookedModel, dictionary: Dictionary | None) -> str:
    name = model.cfg.model_name or model.cfg.architecture
    return f"Units of {name}" if dictionary is None else f"{dictionary.cfg.name or 'Dictionary'} of {name}"


def _facts(model: HookedModel, dictionary: Dictionary | None, corpus: Corpus, data_name: str) -> dict[str, str]:
    facts = {"model": model.cfg.model_name or model.cfg.architecture, "model hash": model_hash(model)[:16]}
    if dictionary is not None:
        facts["dictionary"] = repr(dictionary)
    if data_name:
        facts["text"] = data_name
    facts["tokens read"] = f"{corpus.n_tokens:,}"
    facts["documents"] = f"{corpus.n_documents:,}"
    facts["blocks"] = f"{len(corpus.tokens):,} of at most {corpus.tokens.shape[1]} tokens"
    return facts


def _notes(of_dictionary: bool, n_removed: int) -> dict[str, str]:
    """How the numbers on the pages are defined."""
    what = "what it writes is taken away; the dictionary's error stays" if of_dictionary else "it is set to 0"
    notes = {
        "Active": "share of the positions at which a feature is above 0. Position 0 of a block, which sees nothing "
        "before it, and padding count in nothing.",
        "Contexts": f"where it is largest; and from each of {INTERVALS} intervals between quantiles of its activations "
        f"that are not 0 a random few, so that what is usual is seen beside what is extreme. Quantiles are those of a "
        f"uniform sample of {SAMPLE} positions; of a feature that has no more they are exact.",
        "Colour": "activation as a share of the feature's largest absolute one; point at a token for the number.",
        "Promoted and suppressed": "logits added at activation 1 on the direct path alone: the feature's direction, "
        "the final norm's weight and the unembedding, before the norm divides by its scale. What later layers make of "
        "the feature is not in it.",
        "Nearest": "cosine of the directions that features write (of readout signals: read).",
        "Label words": "automatic: the tokens at which a feature is largest, most frequent first, and after → those "
        "that it promotes most. They are a way to search, not an explanation.",
    }
    if n_removed:
        notes["Without it"] = (
            f"what the loss of the next token rises by, in nats, if the feature is removed ({what}) from at most "
            f"{BLOCKS} blocks, which are those of a random sample of the positions where it is not 0: mean over the "
            "positions there where it is not 0, ± standard error over blocks. Beside it the same of another feature of "
            "the layer that is active about as often, on its own positions. Measured for a random choice of at most "
            f"{n_removed} features a layer."
        )
    return notes


def _text(model: HookedModel, corpus: Corpus, effects: Sequence[TokenEffects | None]) -> FeatureText:
    """The blocks without padding, and the texts of all tokens that are shown."""
    own = torch.arange(corpus.tokens.shape[1]) < corpus.lengths[:, None]
    tokens = corpus.tokens.cpu()[own]
    seen = [tokens, *(part for effect in effects if effect for part in (effect.promoted, effect.suppressed))]
    ids = torch.cat([part.flatten() for part in seen]).unique().tolist()
    vocabulary = dict(zip(ids, model.tokenizer.to_str_tokens(ids), strict=True))
    ends = corpus.lengths.cumsum(0)
    return FeatureText(tokens.numpy(), ends.numpy(), corpus.documents.numpy(), corpus.starts.numpy(), vocabulary)
