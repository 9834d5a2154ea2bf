"""Analogies asked of a space: how many candidate words complete a - b + c better than the expected one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from analyses.claims import UNTRAINED, untrained_names
from analyses.controls.bases import random_rotations
from analyses.controls.nulls import untrained_view
from analyses.measures.neighbors import BLOCK, rank_among, shuffle_columns, unit_rows, word_tokens
from analyses.statistics.draws import derive_seed
from analyses.words.lexicon import Analogy, Lexicon, single_token_analogies
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.products import product
from reflowlens.signals import SignalView, rotate
from reflowlens.tokenizers.base import Tokenizer

MINIMUM_ANALOGIES = 10
EPSILON = 1e-3  # of 3CosMul, as Levy and Goldberg (2014) set it
Ranks: TypeAlias = "NDArray[np.int64]"  # of the expected word, [question]
Hits: TypeAlias = "NDArray[np.bool_]"  # whether it is first, [question]

OTHER_WEIGHTS = ("shuffled_recipe", *UNTRAINED)
NULLS = ("c_alone", "a_plus_c", *OTHER_WEIGHTS)
RANKINGS = {
    "add": "3CosAdd on raw rows: candidates x by cos(x, r_a - r_b + r_c); candidates are the tokens that begin with a "
    "space and a letter; a, b and c excluded; ties count against the expected word",
    "add_unit": "as add, with rows scaled to length 1 before they are added (Levy and Goldberg 2014)",
    "mul": "as add, by 3CosMul (Levy and Goldberg 2014): s(x, a) s(x, c) / (s(x, b) + 0.001) with s = (1 + cos) / 2",
    "c_alone": "as add, by cos(x, r_c)",
    "a_plus_c": "as add, by cos(x, r_a + r_c)",
    "with_inputs": "as add, with a, b and c among the candidates",
    "all_tokens": "as add, over all real tokens; the vocabulary's padding rows are never candidates",
    "lexicon": "as add, over the words of the lexicon's categories and of the analogies asked",
}


def usable_analogies(analogies: Sequence[Analogy], tokenizer: Tokenizer) -> tuple[list[Analogy], list[str]]:
    """The analogies that can be asked, and notes on the others.

    Four single tokens are needed, and an expected word other than a, b and c, which are excluded as answers.
    Raises ReflowlensError if fewer than 10 are left.
    """
    single, split = single_token_analogies(analogies, tokenizer)
    kept = [item for item in single if item.expected not in (item.a, item.b, item.c)]
    trivial = [str(item) for item in single if item.expected in (item.a, item.b, item.c)]
    notes = [
        f"{len(skipped)} of {len(analogies)} analogies skipped, {why}: {'; '.join(skipped[:5])}"
        for why, skipped in (("not single tokens", split), ("the answer is one of the inputs", trivial))
        if skipped
    ]
    if len(kept) < MINIMUM_ANALOGIES:
        raise ReflowlensError(
            f"semantic algebra needs at least {MINIMUM_ANALOGIES} analogies of single tokens of {tokenizer.name!r}, "
            f"got {len(kept)}" + "".join(f" ({note})" for note in notes)
        )
    return kept, notes


def spaces_of(view: SignalView, seed: int, *, quick: bool) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    """Kind of weights, space, and its rows without padding."""
    own = derive_seed(seed, "semantic_algebra")
    yield from _both("trained", view)
    shuffled = shuffle_columns(view.recipe[: view.n_tokens], own)
    yield from _both("shuffled_recipe", dataclasses.replace(view, recipe=shuffled))
    for number, name in enumerate(untrained_names("semantic_algebra", quick), start=1):
        yield from _both(name, untrained_view(view, seed, number))  # unnamed, so that one at a time is in memory
    ((_, rotation),) = random_rotations(view.n_signals, 1, seed, "semantic_algebra")
    rotated = rotate(view, rotation)
    yield "rotated_basis", "R", rotated.recipe[: view.n_tokens]


def _both(weights: str, view: SignalView) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    recipe = view.recipe[: view.n_tokens]
    yield weights, "R", recipe
    if view.name != "identity":
        yield weights, "E", product(recipe, view.basis)


def rank_all(
    model: HookedModel,
    spaces: Iterator[tuple[str, str, Float[Tensor, "token S"]]],
    questions: list[Analogy],
    lexicon: Lexicon,
    progress: bool,
) -> pd.DataFrame:
    """A row a space, kind of weights and question, in this order."""
    tokenizer = model.tokenizer
    ids = torch.tensor([[tokenizer.single_token(f" {word}") for word in item.words] for item in questions])
    candidates = candidate_sets(tokenizer, lexicon, ids)
    words = pd.DataFrame([item.words for item in questions], columns=["a", "b", "c", "expected"])
    parts = []
    for weights, space, rows in tqdm(spaces, desc="spaces", disable=not progress):
        ranks: dict[str, Any] = analogy_ranks(rows, ids.to(rows.device), candidates.to(rows.device))
        ranks["predicted"] = [text[1:] for text in tokenizer.to_str_tokens(ranks["predicted"])]
        parts.append(
            words.assign(relation=[item.relation for item in questions], space=space, weights=weights, **ranks)
        )
    return pd.concat(parts, ignore_index=True)


def paired_hits_pvalue(hits: Hits, other: Hits) -> float:
    """One-sided exact sign-flip p of more hits than the other's on the same questions (McNemar's exact test).

    Only questions that one of the two answers have a sign to flip, and their differences are all of size 1, which makes
    the sign-flip distribution binomial.
    """
    wins, losses = int((hits & ~other).sum()), int((other & ~hits).sum())
    return float(stats.binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0


def candidate_sets(tokenizer: Tokenizer, lexicon: Lexicon, ids: Int[Tensor, "quadruple 4"]) -> Bool[Tensor, "3 token"]:
    """Which real tokens are words (a space, then a letter), which are tokens (all), which the lexicon or `ids` hold."""
    listed = {f" {word}" for words in lexicon.categories.values() for word in words}
    candidates = torch.zeros(3, tokenizer.n_vocab, dtype=torch.bool)
    candidates[0, word_tokens(tokenizer)] = True
    candidates[1] = True
    candidates[2, [tokenizer.single_token(word) for word in listed if tokenizer.is_single_token(word)]] = True
    candidates[2, ids.flatten()] = True
    return candidates


def analogy_ranks(
    rows: Float[Tensor, "token S"], ids: Int[Tensor, "quadruple 4"], candidates: Bool[Tensor, "3 token"]
) -> dict[str, NDArray[np.int64]]:
    """Rank of the expected word of each quadruple (a, b, c, expected) by every rule of `RANKINGS`.

    Args:
        rows: the space, a row a token.
        candidates: words, all tokens and the lexicon's, as `candidate_sets` makes them.

    Returns:
        ``rank_<ranking>`` and ``predicted`` (id of the nearest word by ``add``), each [quadruple].

    Example: ``analogy_ranks(view.recipe[: view.n_tokens], ids, candidates)["rank_add"]``
    """
    words, places = ids[:, :3].unique(return_inverse=True)
    unit = unit_rows(rows)
    # Every rule combines the cosines of a, b and c, so that one matrix product over the distinct words serves them all.
    cosines = product(unit[words], unit.T)
    lengths = rows[words].to(unit).norm(dim=1)
    blocks = [
        _block_ranks(cosines, lengths, places[start : start + BLOCK], ids[start : start + BLOCK], candidates)
        for start in range(0, len(ids), BLOCK)
    ]
    return {name: torch.cat([block[name] for block in blocks]).cpu().numpy() for name in blocks[0]}


def _block_ranks(
    cosines: Float[Tensor, "word token"],
    lengths: Float[Tensor, " word"],
    places: Int[Tensor, "quadruple 3"],
    ids: Int[Tensor, "quadruple 4"],
    candidates: Bool[Tensor, "3 token"],
) -> dict[str, Tensor]:
    inputs, expected, words = ids[:, :3], ids[:, 3], candidates[:1]
    cos_a, cos_b, cos_c = (cosines.index_select(0, place) for place in places.unbind(1))
    length_a, length_b, length_c = lengths[places][:, :, None].unbind(1)
    # Scores are those of `RANKINGS` but for a positive factor that is the same for all x, which moves no rank.
    a_plus_c = length_a * cos_a + length_c * cos_c
    add = a_plus_c - length_b * cos_b
    scores = {
        "add_unit": cos_a + cos_c - cos_b,
        "mul": (1 + cos_a).mul_(1 + cos_c).div_(1 + 2 * EPSILON + cos_b),
        "c_alone": cos_c,
        "a_plus_c": a_plus_c,
    }
    ranks = {f"rank_{name}": rank_among(score, expected, words, inputs)[:, 0] for name, score in scores.items()}
    barred = torch.zeros_like(add[:1]).masked_fill_(~words, -torch.inf)
    among_words, among_tokens, among_lexicon = rank_among(add, expected, candidates, inputs).unbind(1)
    return {
        "rank_add": among_words,
        **ranks,
        "rank_with_inputs": rank_among(add, expected, words)[:, 0],
        "rank_all_tokens": among_tokens,
        "rank_lexicon": among_lexicon,
        "predicted": (add + barred).scatter_(1, inputs, -torch.inf).argmax(dim=1),
    }
