"""Nearest neighbours by cosine, ranks, and the null that destroys them: measures shared by the experiments on words.

The whole vocabulary is searched in blocks of queries; a d_vocab x d_vocab matrix is never held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.statistics.draws import derive_rng
from reflowlens.errors import ReflowlensError
from reflowlens.models.products import product
from reflowlens.tokenizers.base import Tokenizer

BLOCK = 32  # queries at a time: scores over GPT-2's 50,257 tokens are 6 MB, which a cache can hold


class Neighbors(NamedTuple):
    """Row numbers and cosines of each query's nearest rows, nearest first."""

    ids: Int[Tensor, "query k"]
    cosines: Float[Tensor, "query k"]


def unit_rows(rows: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch S"]:
    """Rows of length 1, in float32 at least; a row of zeros stays one, so that its cosine with any row is 0."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def cosine_neighbors(
    queries: Float[Tensor, "query S"],
    rows: Float[Tensor, "row S"],
    k: int = 10,
    *,
    candidates: Int[Tensor, " candidate"] | None = None,
    exclude: Int[Tensor, "query excluded"] | None = None,
) -> Neighbors:
    """The k rows with the largest cosine to each query.

    Args:
        candidates: numbers of the rows that may be neighbours; default all.
        exclude: for each query the numbers of rows that may not, for example its own.

    Raises:
        ReflowlensError: fewer than k rows remain for a query.

    Example: ``cosine_neighbors(recipe[probes], recipe, k=10, exclude=probes[:, None])``
    """
    allowed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    allowed[slice(None) if candidates is None else candidates] = True
    remaining = int(allowed.sum()) - (0 if exclude is None else exclude.shape[1])
    if not 1 <= k <= remaining:
        raise ReflowlensError(f"k must be between 1 and {remaining}, the rows that can be neighbours, got {k}")
    unit = unit_rows(rows)
    found = []
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        cosines = product(unit_rows(queries[block]).to(unit), unit.T).masked_fill(~allowed, -torch.inf)
        if exclude is not None:
            cosines.scatter_(1, exclude[block], -torch.inf)
        found.append(cosines.topk(k, dim=1))
    if not found:
        return Neighbors(torch.empty(0, k, dtype=torch.long, device=rows.device), unit.new_empty(0, k))
    return Neighbors(torch.cat([block.indices for block in found]), torch.cat([block.values for block in found]))


def rank_among(
    scores: Float[Tensor, "query row"],
    target: Int[Tensor, " query"],
    candidates: Bool[Tensor, "set row"],
    exclude: Int[Tensor, "query excluded"] | None = None,
) -> Int[Tensor, "query set"]:
    """Rank of each query's target in several sets of candidates: 1 + the number of others that score at least as high.

    Ties count against the target, so that a space in which everything is alike ranks nothing first. A target outside a
    set is ranked as if it were in it.

    >>> rank_among(torch.tensor([[0.9, 0.5, 0.7]]), torch.tensor([1]), torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[3]]
    """
    # Written as 0.0 and 1.0 at once: a boolean matrix and its conversion cost ten times as much.
    rivals = torch.ge(scores, scores.gather(1, target[:, None]), out=torch.empty_like(scores))
    rivals.scatter_(1, target[:, None], 0.0)
    if exclude is not None:
        rivals.scatter_(1, exclude, 0.0)
    # A matrix product counts several sets at once; whole numbers below 2^24 are exact in float32.
    return 1 + (rivals @ candidates.to(rivals).T).round().long()


def word_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of the real tokens that begin a word: a space followed by a letter."""
    texts = enumerate(tokenizer.to_str_tokens(range(tokenizer.n_vocab)))
    return [token for token, text in texts if len(text) > 1 and text[0] == " " and text[1].isalpha()]


def shuffle_columns(matrix: Float[Tensor, "row S"], seed: int) -> Float[Tensor, "row S"]:
    """The control `shuffled_recipe`: entries permuted within each column, each column by its own permutation.

    Every signal keeps its distribution over tokens; what tokens share across signals is destroyed.
    """
    values = matrix.detach().cpu().to(torch.promote_types(matrix.dtype, torch.float32)).numpy()  # numpy has no bfloat16
    shuffled = derive_rng(seed, "shuffled_recipe").permuted(values, axis=0)
    return torch.from_numpy(shuffled).to(matrix)
