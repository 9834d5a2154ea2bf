"""Experiment 1, Recipe Atlas: which words have alike recipes, and what does each signal stand for?

Neighbours are read in the recipe space R and in the embedding E = R B (of a dictionary's view the vectors that its
recipes are of, its error with them). Alike words are no finding where any words of
their frequency are alike: ``random_words`` are frequency-matched, with the lexicon's categories carried over.
``shuffled_recipe``, ``gaussian`` and ``untrained`` are recipes with nothing in them, ``label_permutation`` the same
pairs or signals under permuted categories. Cosines do not change when the signals are rotated. Codebooks do: how pure
they are stands beside ``rotated_basis``, the floor, and ``varimax``, the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.controls.bases import (
    INVARIANT,
    QUICK_ROTATIONS,
    ROTATIONS,
    Bases,
    basis_verdicts,
    in_bases,
)
from analyses.controls.carried import recipe_error
from analyses.controls.nulls import over_nulls, permuted_labels
from analyses.experiments.recipe_atlas.figures import (
    atlas_figures,
    codebook_frame,
    neighbor_frame,
    pair_frame,
    purity_frame,
    random_band,
    similarity_frame,
)
from analyses.experiments.recipe_atlas.pairs import (
    Pairs,
    overlap_with_embedding,
    random_pair_cosines,
    row_cosines,
    share_label,
    top_pairs,
)
from analyses.experiments.recipe_atlas.purity import Codebooks, codebooks_of
from analyses.measures.knockout import real_tokens
from analyses.measures.neighbors import word_tokens
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng, derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import holm, permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import LabelledWords, frequency_matched, labelled_words
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import AnyView, SignalView, view_of

OVERLAP_PROBES = 200
PERMUTATIONS = 999
POLE_PERMUTATIONS = 20
RANDOM_PAIRS = 499
MINIMUM_UNITS = 20
NAMED_PAIRS = {("three", "four"): 0.7551, ("king", "queen"): 0.54, ("France", "Germany"): 0.53}
"""Pairs with a published cosine."""


def definitions(k: int, pairs: int, pole_words: int) -> dict[str, str]:
    """What each metric means, with the numbers of neighbours, pairs and words that were used."""
    named = {
        f"cosine_{a}_{b}": f"cosine of the recipes of “{a}” and “{b}”; random_words: mean over frequency-matched pairs"
        for a, b in NAMED_PAIRS
    }
    return {
        "valid_top_pairs": f"share of the {pairs} pairs of lexicon words with the largest cosine of their recipes that "
        "share a category",
        **named,
        f"jaccard_at_{k}": f"|A ∩ B| / |A ∪ B| of a word's {k} nearest words by cosine in R and in E, mean over words; "
        "of a control both spaces are made from its recipe",
        "codebook_purity": f"1 - entropy of the categories of the {pole_words} lexicon words at either end of a signal "
        "/ the largest entropy possible; mean over the ends that a signal has, then over signals",
    }


@torch.no_grad()
def recipe_atlas(
    model: HookedModel,
    probes: Sequence[str] | None = None,
    *,
    view: AnyView = None,
    lexicon: Lexicon | None = None,
    k: int = 10,
    pairs: int = 20,
    pole_words: int = 12,
    rotations: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Nearest words of probes, the most similar pairs of the lexicon, and the codebook of every signal.

    Args:
        probes: words whose neighbours are shown, without the space in front; default the first of each category.
        view: whose recipe is R; default the model's native one. With ``identity`` R is E and only R is reported.
        lexicon: its categories say which pairs are valid; words of several tokens are skipped.
        k: neighbours, among the vocabulary's tokens that begin with a space and a letter.
        pairs: how many of the most similar pairs are judged.
        pole_words: how many lexicon words at either end of a signal are its codebook.
        rotations: random rotations beside the purity, at least 2; default 10, of a quick run 4.
        seed: of draws, nulls, permutations and bootstrap.

    Returns:
        A Result with frames ``neighbors`` (a row a probe, space and neighbour), ``pairs`` (a row a space and pair),
        ``similarity`` (mean cosine between categories), ``codebooks`` (a row a signal and end) and ``purity`` (a row a
        basis and signal), and figures ``neighbors``, ``pairs``, ``similarity``, ``purity``.

    Raises:
        ReflowlensError: the lexicon has fewer than 20 single-token words or 2 categories, a probe is several tokens, or
            a number is out of range.

    Example: ``recipe_atlas(model, ["king", "three"]).frames["neighbors"]``
    """
    chosen = real_tokens(view_of(model, view, seed=seed))
    lexicon = lexicon or load_lexicon()
    words, notes = labelled_words(lexicon, model.tokenizer, "recipe_atlas")
    for name, number in {"k": k, "pairs": pairs, "pole_words": pole_words}.items():
        if not 2 <= number < len(words.ids):
            raise ReflowlensError(f"{name} must be between 2 and {len(words.ids) - 1}, got {number}")
    rotations = (QUICK_ROTATIONS if quick else ROTATIONS) if rotations is None else rotations
    candidates = word_tokens(model.tokenizer)
    shown = _shown(model, words, probes)
    named = _named_tokens(model)
    own = derive_seed(seed, "recipe_atlas")
    probed = derive_rng(own, "probes").permutation(words.ids)[:OVERLAP_PROBES]
    has_embedding = chosen.name != "identity"

    def codebooks_in(each: SignalView) -> Codebooks:
        return codebooks_of(each.recipe[words.ids].float(), words.labels, pole_words)

    def space_of(each: SignalView) -> Space:
        overlap = overlap_with_embedding(each, probed, candidates, k) if has_embedding else None
        return Space.of(each.recipe, words.ids, named, pairs, overlap)

    nulls = over_nulls(lambda each: (space_of(each), codebooks_in(each)), chosen, seed, "recipe_atlas", quick=quick)
    spaces = {"R": space_of(chosen), **{name: space for name, (space, _) in nulls.items()}}
    codebooks = in_bases(
        codebooks_in,
        chosen,
        {name: found for name, (_, found) in nulls.items()},
        rotations=rotations,
        seed=seed,
        experiment="recipe_atlas",
        progress=progress,
    )
    matched = frequency_matched(words.ids, candidates, seed=own)
    spaces["random_words"] = Space.of(chosen.recipe, matched, {}, pairs)
    if has_embedding:
        spaces["E"] = Space.of(chosen.embedding, words.ids, named, pairs)
    else:
        notes.append(f"E and jaccard_at_{k} are absent: the identity view's recipe is E itself")
    frames = {
        "neighbors": neighbor_frame(chosen, words, shown, candidates, k, with_embedding=has_embedding),
        "pairs": pair_frame(
            words,
            {name: space.pairs for name, space in spaces.items()},
            {"random_words": [text.strip(" ") for text in model.tokenizer.to_str_tokens(matched)]},
        ),
        "similarity": similarity_frame(spaces["R"].rows, words),
        "codebooks": codebook_frame(words, codebooks.own),
        "purity": purity_frame(codebooks),
    }
    random_cosines = {
        metric: random_pair_cosines(chosen.recipe, tokens, candidates, RANDOM_PAIRS, derive_seed(own, metric))
        for metric, tokens in named.items()
    }
    valid, note = _valid_pairs(spaces, words, seed)
    cosines, cosine_notes = _named_cosines(spaces, random_cosines)
    purity, purity_notes = _purity(codebooks, spaces["R"].rows, words, pole_words, seed)
    return Result(
        name="recipe_atlas",
        title="Recipe Atlas",
        params={
            "probes": list(shown),
            "k": k,
            "pairs": pairs,
            "pole_words": pole_words,
            "words": len(words.ids),
            "rotations": rotations,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings={
            "valid_top_pairs": valid,
            **cosines,
            **({f"jaccard_at_{k}": _overlap(spaces, seed)} if has_embedding else {}),
            **purity,
            **recipe_error(chosen),
        },
        frames=frames,
        figures=atlas_figures(frames, random_band(spaces["random_words"].rows)),
        definitions=definitions(k, pairs, pole_words),
        published={"valid_top_pairs": 1.0} | {_metric(pair): cosine for pair, cosine in NAMED_PAIRS.items()},
        notes=[*notes, f"{INVARIANT}: all but codebook_purity.", note, *cosine_notes, *purity_notes],
    )


@dataclass(frozen=True)
class Space:
    """What the lexicon's words are in one space.

    Args:
        rows: of each word.
        pairs: the most similar ones.
        named: cosine of each named pair, by metric.
        overlap: share of each probe's neighbours that R and E have in common.
    """

    rows: Float[Tensor, "word S"]
    pairs: Pairs
    named: dict[str, float]
    overlap: NDArray[np.float64] | None = None

    @classmethod
    def of(
        cls,
        recipe: Float[Tensor, "token S"],
        ids: NDArray[np.int64],
        named: Mapping[str, tuple[int, int]],
        pairs: int,
        overlap: NDArray[np.float64] | None = None,
    ) -> Space:
        """The rows of tokens ``ids`` of a recipe, and the pairs among them and by name."""
        rows = recipe[ids].float()
        cosines = {metric: float(row_cosines(recipe[a], recipe[b])) for metric, (a, b) in named.items()}
        return cls(rows, top_pairs(rows, pairs), cosines, overlap)


def valid_pairs_verdict(interval: tuple[float, float], controls: dict[str, float], p: float, pairs: int) -> Verdict:
    """Claim: the words with the most similar recipes are related, that is, they share a category.

    Supported if the share exceeds that under permuted categories with p < 0.05 and its interval over pairs lies above
    what every null shows, by 0.1: permuted categories, frequency-matched words and recipes with nothing in them;
    underpowered below 20 pairs.
    """
    bound = bound_of("recipe_atlas", "valid_top_pairs", controls)
    return verdict(interval, bound, p, minimum_units=MINIMUM_UNITS, units=pairs)


def _metric(pair: tuple[str, str]) -> str:
    return "cosine_{}_{}".format(*pair)


def _shown(model: HookedModel, words: LabelledWords, probes: Sequence[str] | None) -> dict[str, int]:
    """Tokens of the words whose neighbours are shown."""
    if probes is None:
        _, first = np.unique(words.labels, return_index=True)
        probes = [words.words[i] for i in first]
    return {word: model.to_single_token(f" {word}") for word in probes}


def _named_tokens(model: HookedModel) -> dict[str, tuple[int, int]]:
    """Tokens of the named pairs that are single tokens, by metric."""
    single = model.tokenizer.is_single_token
    return {
        _metric((a, b)): (model.to_single_token(f" {a}"), model.to_single_token(f" {b}"))
        for a, b in NAMED_PAIRS
        if single(f" {a}") and single(f" {b}")
    }


def _valid_pairs(spaces: Mapping[str, Space], words: LabelledWords, seed: int) -> tuple[Finding, str]:
    shared = {name: share_label(space.pairs, words.labels) for name, space in spaces.items()}
    valid = shared.pop("R").astype(float)
    permuted = permuted_labels(words.labels, PERMUTATIONS, derive_seed(seed, "recipe_atlas", "valid_top_pairs"))
    null = share_label(spaces["R"].pairs, permuted).mean(axis=1)
    p, interval = permutation_pvalue(valid.mean(), null), rate_interval(valid, seed=seed)
    controls = {name: float(values.mean()) for name, values in shared.items()}
    controls["label_permutation"] = float(null.mean())
    finding = Finding(valid.mean(), interval, controls, valid_pairs_verdict(interval, controls, p, len(valid)))
    return finding, f"valid_top_pairs: permuted categories p = {p:.2g}"


def _named_cosines(
    spaces: Mapping[str, Space], random_cosines: Mapping[str, NDArray[np.float64]]
) -> tuple[dict[str, Finding], list[str]]:
    """No verdict: a pair is one unit, and its cosine has no interval."""
    own = spaces["R"].named
    others = {name: space.named for name, space in spaces.items() if name != "R" and space.named}
    raw = [permutation_pvalue(own[metric], null) for metric, null in random_cosines.items()]
    findings, notes = {}, []
    for (metric, null), p, adjusted in zip(random_cosines.items(), raw, holm(raw).tolist(), strict=True):
        controls = {name: named[metric] for name, named in others.items()} | {"random_words": float(null.mean())}
        findings[metric] = Finding(own[metric], controls=controls)
        notes.append(f"{metric}: frequency-matched pairs p = {p:.2g}, Holm-adjusted {adjusted:.2g}")
    absent = [metric for metric in map(_metric, NAMED_PAIRS) if metric not in findings]
    return findings, [*notes, *(f"{metric} is absent: a word of it is several tokens" for metric in absent)]


def _overlap(spaces: Mapping[str, Space], seed: int) -> Finding:
    overlaps = {name: space.overlap for name, space in spaces.items() if space.overlap is not None}
    own = overlaps.pop("R")
    controls = {name: float(values.mean()) for name, values in overlaps.items()}
    return Finding(own.mean(), bootstrap_interval(own, seed=seed), controls)


def _purity(
    codebooks: Bases[Codebooks], rows: Float[Tensor, "word S"], words: LabelledWords, pole_words: int, seed: int
) -> tuple[dict[str, Finding], list[str]]:
    metric, means = "codebook_purity", codebooks.map(Codebooks.mean_purity)
    if not np.isfinite([means.own, *means.rotated.values(), means.varimax]).all():
        return {}, [f"{metric} is absent: no signal has {pole_words} lexicon words of one sign"]
    orders = permuted_labels(words.labels, POLE_PERMUTATIONS, derive_seed(seed, "recipe_atlas", metric))
    permuted = [np.nanmean(codebooks_of(rows, labels, pole_words).signal_purity()) for labels in orders]
    own = codebooks.own.signal_purity()
    own = own[np.isfinite(own)]
    controls = {"label_permutation": float(np.mean(permuted)), **means.controls()}
    beside = {name: value for name, value in controls.items() if np.isfinite(value)}
    finding = Finding(means.own, bootstrap_interval(own, seed=seed), beside)
    return basis_verdicts(
        {metric: finding},
        {metric: means},
        {metric: len(own)},
        minimum_units=MINIMUM_UNITS,
        experiment="recipe_atlas",
    )
