"""Which words are alike, and whether they are alike in another space and for their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.neighbors import Neighbors, cosine_neighbors, unit_rows
from analyses.statistics.draws import derive_seed
from analyses.words.tokens import frequency_matched
from reflowlens.signals import SignalView


class Pairs(NamedTuple):
    """Pairs of rows, the most similar first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosines: NDArray[np.float64]


def top_pairs(rows: Float[Tensor, "word S"], n: int = 20) -> Pairs:
    """The ``n`` pairs of rows with the largest cosine, each once.

    >>> top_pairs(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), 1).second.tolist()
    [2]
    """
    unit = unit_rows(rows)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    cosines = (unit @ unit.T)[first, second]
    best = cosines.topk(min(n, len(cosines)))
    chosen = best.indices.cpu()
    return Pairs(first[chosen].numpy(), second[chosen].numpy(), best.values.double().cpu().numpy())


def share_label(pairs: Pairs, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the rows of each pair have the same label; ``labels`` [..., row] may be many labellings."""
    return np.asarray(labels[..., pairs.first] == labels[..., pairs.second])


def label_cosines(rows: Float[Tensor, "word S"], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean cosine between the rows of two labels, of one label between different rows, [label, label].

    Each label has two rows at least.
    """
    unit = unit_rows(rows).double().cpu().numpy()
    member = np.eye(labels.max() + 1)[labels]
    sums = member.T @ unit
    sizes = member.sum(axis=0)
    own = np.square(np.linalg.norm(unit, axis=1)) @ member  # each row with itself, which is left out
    return (sums @ sums.T - np.diag(own)) / (np.outer(sizes, sizes) - np.diag(sizes))


def row_cosines(first: Float[Tensor, "*pair S"], second: Float[Tensor, "*pair S"]) -> Float[Tensor, "*pair"]:
    """Cosine of each row with the one opposite."""
    return (unit_rows(first) * unit_rows(second)).sum(dim=-1)


def random_pair_cosines(
    recipe: Float[Tensor, "token S"], pair: Sequence[int], candidates: Sequence[int], draws: int, seed: int
) -> NDArray[np.float64]:
    """Cosines of ``draws`` random pairs of candidates, each about as frequent as the token in its place."""
    sides = [
        frequency_matched(np.full(draws, token), candidates, seed=derive_seed(seed, i), window=draws)
        for i, token in enumerate(pair)
    ]
    return row_cosines(recipe[sides[0]], recipe[sides[1]]).double().cpu().numpy()


def jaccard(first: Neighbors, second: Neighbors) -> NDArray[np.float64]:
    """|A ∩ B| / |A ∪ B| of the neighbours of each query in two spaces.

    >>> one, other = (Neighbors(torch.tensor([ids]), torch.zeros(1, 3)) for ids in ([1, 2, 3], [2, 3, 4]))
    >>> jaccard(one, other).tolist()
    [0.5]
    """
    shared = (first.ids[:, :, None] == second.ids[:, None, :]).sum(dim=(1, 2)).double()
    return (shared / (first.ids.shape[1] + second.ids.shape[1] - shared)).cpu().numpy()


def overlap_with_embedding(
    view: SignalView, probes: NDArray[np.int64], candidates: Sequence[int], k: int
) -> NDArray[np.float64]:
    """`jaccard` of each probe's k nearest candidates in the recipe space R and in the view's embedding."""
    tokens = torch.as_tensor(probes, device=view.recipe.device)
    allowed = torch.as_tensor(candidates, device=view.recipe.device)
    found = [
        cosine_neighbors(rows[tokens], rows, k, candidates=allowed, exclude=tokens[:, None])
        for rows in (view.recipe, view.embedding)
    ]
    return jaccard(*found)
