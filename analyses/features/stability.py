"""How much of a dictionary another seed finds again: feature by feature, and as subspaces.

Of every pair of dictionaries and every layer, features are matched one to one so that the sum of similarities is
largest (Hungarian algorithm), and the frame has

``decoder_cosine``  mean absolute cosine of the decoders of matched features: the pairwise mean correlation coefficient
    (PW-MCC) of Song et al. (2025, arXiv 2505.20254);
``shared``  share of the features whose partner is the same by encoders and by decoders, with both cosines above 0.7,
    after Paulo and Belrose (2025, arXiv 2501.16615);
``activation_correlation``  mean Pearson correlation of the activations of features matched by it, on held-out
    documents, 0 for a feature that is never active: whether both are active at the same positions, wherever they read;
``overlap``  of the spans of the decoders: with U_a and U_b the r leading right singular vectors of the decoders scaled
    to norm 1, ‖U_a U_bᵀ‖² / r, the mean squared cosine of the principal angles;
``unmatched_overlap``  the same of those features alone whose matched absolute cosine is below 0.7 in this pair (NaN if
    they are fewer than 2): unstable features may lie in a reproducible subspace (arXiv 2606.12138, 2026).

Beside each stands its level by chance: of the decoders and encoders, the second dictionary turned by a random rotation,
which keeps everything but its relation to the first; of activations, a fresh dictionary that keeps the k largest (32
where there is no k); of an overlap, r / d, which subspaces reach that have nothing to do with each other. Decoders of
one model lie along the same leading directions of what it writes, so an overlap above r / d says little by itself:
compare it with that of dictionaries which were trained with frozen decoders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from analyses.features.documents import Documents, document_batches, token_rows
from analyses.features.replacement import activations
from analyses.statistics.draws import derive_seed
from analyses.units.points import level_of
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.signals import random_rotation

Weights: TypeAlias = tuple[Float[Tensor, "feature d_in"], Float[Tensor, "feature reach d_out"]]  # W_enc, W_dec
SHARED = 0.7  # the cosine above which a feature is said to be found again


@torch.no_grad()
def seed_stability(
    model: HookedModel,
    dictionaries: Mapping[str, Dictionary],
    documents: Documents,
    *,
    rank: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Every pair of dictionaries, layer by layer. Memory grows with the square of the number of features.

    Args:
        model: the one that they were trained on.
        dictionaries: two or more by name, which read and write the same points.
        documents: held-out texts or arrays of tokens, of any lengths, for the correlation of activations.
        rank: r, of the subspaces; by default a quarter of the width that is written.
        seed: of the rotation and of the fresh dictionary.

    Returns:
        A row a pair and layer, and one with layer "all", the mean over layers: ``first``, ``second``, ``layer``, the
        metrics that the module defines, and each one's ``_chance``.

    Raises:
        ReflowlensError: there are fewer than two dictionaries, they differ in points or size, or one is of another
            model.

    Example: ``seed_stability(model, {"seed 0": a, "seed 1": b, "seed 2": c}, texts)``
    """
    if len(dictionaries) < 2:
        raise ReflowlensError(f"stability is of two dictionaries or more, got {len(dictionaries)}")
    first = next(iter(dictionaries.values())).cfg
    for name, other in dictionaries.items():
        check_belongs(other, model)
        if (other.cfg.reads, other.cfg.writes, other.cfg.cross_layer) != (first.reads, first.writes, first.cross_layer):
            raise ReflowlensError(f"{name} reads or writes other points than {next(iter(dictionaries))}")
        if other.cfg.n_features != first.n_features:
            raise ReflowlensError(
                f"{name} has {other.cfg.n_features} features a layer, {next(iter(dictionaries))} {first.n_features}: "
                "stability is of dictionaries of one size"
            )
    rows = token_rows(model, documents)
    found = []
    for layer in bar(range(first.n_layers), show=progress, unit="layer", desc="stability"):
        layers = {name: one.each_layer()[layer] for name, one in dictionaries.items()}
        random = {name: _fresh(one, layer, derive_seed(seed, "fresh", name)) for name, one in dictionaries.items()}
        pairs = list(combinations(layers, 2))
        compared = [(layers[a], layers[b]) for a, b in pairs] + [(layers[a], random[b]) for a, b in pairs]
        correlated = _matched_correlations(model, first.reads[layer], compared, rows, batch_size)
        for number, (a, b) in enumerate(pairs):
            metrics = _of_weights(layers[a], layers[b], rank or max(1, first.d_out // 4), seed)
            metrics["activation_correlation"] = correlated[number]
            metrics["activation_correlation_chance"] = correlated[number + len(pairs)]
            found.append({"first": a, "second": b, "layer": str(level_of(first.writes[layer])), **metrics})
    frame = pd.DataFrame(found)
    together = frame.drop(columns="layer").groupby(["first", "second"], sort=False, as_index=False).mean()
    return pd.concat([frame, together.assign(layer="all")[frame.columns]], ignore_index=True)


def best_matching(similarity: Float[np.ndarray, "a b"]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the one-to-one matching whose similarities have the largest sum.

    >>> best_matching(np.array([[0.9, 0.8], [0.7, 0.1]]))[1].tolist()
    [1, 0]
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return rows, columns


def subspace_overlap(a: Float[Tensor, "feature d"], b: Float[Tensor, "other d"], rank: int) -> float:
    """Mean squared cosine of the principal angles between the leading ``rank`` right singular directions of each.

    >>> subspace_overlap(torch.eye(4)[:2], torch.eye(4)[1:3], 2)
    0.5
    """
    leading = [torch.linalg.svd(F.normalize(x.double(), dim=1), full_matrices=False).Vh[:rank] for x in (a, b)]
    return float((leading[0] @ leading[1].T).square().sum() / rank)


def correlations(
    n: int, products: Float[Tensor, "a b"], sums: tuple[Tensor, Tensor], squares: tuple[Tensor, Tensor]
) -> Float[Tensor, "a b"]:
    """Pearson correlations from sums over n positions; 0 where one of the two does not vary."""
    covariance = products / n - torch.outer(sums[0] / n, sums[1] / n)
    moments = zip(sums, squares, strict=True)
    spreads = [(square / n - (total / n).square()).clamp(min=0).sqrt() for total, square in moments]
    scale = torch.outer(*spreads)
    return torch.where(scale > 1e-12, covariance / scale, 0.0)


def _of_weights(a: DictionaryLayer, b: DictionaryLayer, rank: int, seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    own = (a.W_enc, a.W_dec)
    turned = (_turned(b.W_enc, derive_seed(seed, "encoder")), _turned(b.W_dec, derive_seed(seed, "decoder")))
    rows, columns, cosine, shared = _matched(own, (b.W_enc, b.W_dec))
    _, _, by_chance, shared_by_chance = _matched(own, turned)
    found |= {"decoder_cosine": float(cosine.mean()), "decoder_cosine_chance": float(by_chance.mean())}
    found |= {"shared": float(shared.mean()), "shared_chance": float(shared_by_chance.mean())}
    unmatched = cosine < SHARED
    wide = (a.W_dec.flatten(1), b.W_dec.flatten(1))
    alone = (wide[0][rows[unmatched]], wide[1][columns[unmatched]])
    for name, decoders in (("overlap", wide), ("unmatched_overlap", alone)):
        r = min(rank, len(decoders[0]))
        found[name] = subspace_overlap(*decoders, r) if r > 1 else float("nan")
        found[f"{name}_chance"] = r / wide[0].shape[1] if r > 1 else float("nan")
    return found


def _matched(
    a: Weights, b: Weights
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """Partners by decoder, their |cosine|, and whether the encoders agree that they are one feature."""
    encoders, decoders = (_cosines(*pair) for pair in zip(a, b, strict=True))
    rows, columns = best_matching(np.abs(decoders))
    partner = dict(zip(*best_matching(encoders), strict=True))
    same = np.array([partner.get(row) == column for row, column in zip(rows, columns, strict=True)])
    cosine = np.abs(decoders)[rows, columns]
    return rows, columns, cosine, same & (cosine > SHARED) & (encoders[rows, columns] > SHARED)


def _turned(w: Float[Tensor, "feature *reach d"], seed: int) -> Float[Tensor, "feature *reach d"]:
    return w @ random_rotation(w.shape[-1], seed).to(w)


def _cosines(a: Tensor, b: Tensor) -> NDArray[np.float32]:
    """Of rows, all further axes taken together."""
    return (F.normalize(a.flatten(1), dim=1) @ F.normalize(b.flatten(1), dim=1).T).cpu().numpy()


def _fresh(dictionary: Dictionary, layer: int, seed: int) -> DictionaryLayer:
    """The layer of a dictionary that has learnt nothing, with so many features active as k says, or 32."""
    cfg = dictionary.cfg
    k = min(cfg.k or 32, cfg.n_features)
    return Dictionary.fresh(dataclasses.replace(cfg, activation="topk", k=k), seed).each_layer()[layer]


def _matched_correlations(
    model: HookedModel,
    point: str,
    pairs: Sequence[tuple[DictionaryLayer, DictionaryLayer]],
    rows: Sequence[Int[Tensor, " _token"]],
    batch_size: int,
) -> list[float]:
    """Mean correlation of the activations of features matched by it, of each pair of layers."""
    sums = [[torch.zeros(1, dtype=torch.float64)] * 5 for _ in pairs]
    n = 0
    for batch in document_batches(rows, batch_size):
        x = batch.within(activations(model, batch, [point])[point])
        n += len(x)
        for number, (first, second) in enumerate(pairs):
            a, b = first.encode(x), second.encode(x)
            parts = (a.T @ b, a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0))
            sums[number] = [total + part.double().cpu() for total, part in zip(sums[number], parts, strict=True)]
    found = []
    for products, sum_a, sum_b, square_a, square_b in sums:
        similarity = correlations(n, products, (sum_a, sum_b), (square_a, square_b)).numpy()
        found.append(float(similarity[best_matching(similarity)].mean()))
    return found
