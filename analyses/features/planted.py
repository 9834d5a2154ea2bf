"""A planted dictionary: vectors made of known features, and how many of them a dictionary finds again.

Features are directions [feature, d], more of them than dimensions. A vector is Σ a_i f_i + noise, each a_i 0 where the
feature does not fire and otherwise uniform from 0.5 to 1.5. They fire

``alone``   independently of all others, with frequencies from 20% down to 2% of the vectors;
``pair``    two by two, each in 70% of the cases in which its partner does, and as often;
``parent``  independently of each other, in a fifth of the vectors;
``child``   only where its parent does, one child at a time or none: the second level of a hierarchy, in which a
            dictionary is free to say a parent and a child as one (absorption: Chanin et al., 2024, arXiv 2409.14507).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.features.stability import best_matching, correlations
from analyses.statistics.draws import derive_generator
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError

KINDS = ("alone", "pair", "parent", "child")
MOST, LEAST = 0.2, 0.02  # frequencies
TOGETHER = 0.7  # how often the partner of a pair fires where a feature does
CHILDREN = 3  # of each parent


@dataclass(frozen=True, eq=False)
class Planted:
    """Known features; :func:`planted_data` draws them, and the module says how they fire.

    Args:
        directions: of length 1.
        frequency: the share of vectors in which each fires.
        kind: of each, one of ``KINDS``; pairs stand side by side, and children behind their parent.
        noise: standard deviation of each coordinate.
        seed: of everything.
    """

    directions: Float[Tensor, "feature d"]
    frequency: Float[Tensor, " feature"]
    kind: tuple[str, ...]
    noise: float
    seed: int

    @property
    def l0(self) -> float:
        """Features that fire in a vector, on average."""
        return float(self.frequency.sum())

    def sample(self, n: int, part: int = 0) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n feature"]]:
        """Vectors, and what each feature adds to them; a part of the stream is the same each time."""
        generator = derive_generator(self.seed, "planted", part)
        uniform = torch.rand(n, len(self.kind), generator=generator)
        fires = uniform < self.frequency
        pair = torch.tensor([kind == "pair" for kind in self.kind]).nonzero()[:, 0]
        first, second = pair[::2], pair[1::2]
        without = self.frequency[first] * (1 - TOGETHER) / (1 - self.frequency[first])
        fires[:, second] = uniform[:, second] < torch.where(fires[:, first], TOGETHER, without)
        for parent in (i for i, kind in enumerate(self.kind) if kind == "parent"):
            chosen = (uniform[:, parent + 1] * (CHILDREN + 1)).long()
            for child in range(CHILDREN):
                fires[:, parent + 1 + child] = fires[:, parent] & (chosen == child)
        activations = fires * (0.5 + torch.rand(fires.shape, generator=generator))
        noise = self.noise * torch.randn(n, self.directions.shape[1], generator=generator)
        return activations @ self.directions + noise, activations


def planted_data(
    *, alone: int = 24, pairs: int = 6, parents: int = 3, d: int = 32, noise: float = 0.02, seed: int = 0
) -> Planted:
    """Draw features in random directions.

    Args:
        alone, pairs, parents: how many; a pair is two features, and a parent has three children.
        d: dimensions.
        noise: standard deviation of each coordinate.
        seed: of the directions and of what is sampled.

    Raises:
        ReflowlensError: a number is negative, or there is no feature at all.

    >>> planted = planted_data()
    >>> len(planted.kind), planted.sample(5)[0].shape
    (48, torch.Size([5, 32]))
    """
    if min(alone, pairs, parents) < 0 or alone + pairs + parents == 0 or d < 1:
        raise ReflowlensError(f"planted features must be 0 or more, and one at least, got {(alone, pairs, parents)}")
    kind = ("alone",) * alone + ("pair",) * (2 * pairs) + ("parent", *["child"] * CHILDREN) * parents
    frequency = [
        torch.logspace(np.log10(MOST), np.log10(LEAST), alone),
        torch.logspace(np.log10(MOST / 2), np.log10(LEAST), pairs).repeat_interleave(2),
        torch.tensor([MOST, *[MOST / (CHILDREN + 1)] * CHILDREN]).repeat(parents),
    ]
    generator = derive_generator(seed, "planted_directions")
    directions = F.normalize(torch.randn(len(kind), d, generator=generator), dim=1)
    return Planted(directions, torch.cat(frequency), kind, noise, seed)


@torch.no_grad()
def recover(dictionary: Dictionary, planted: Planted, *, n: int = 20_000, part: int = -1) -> pd.DataFrame:
    """What a dictionary has found of the planted features: each is held against the feature of the dictionary that is
    its partner in the one-to-one matching with the largest sum of correlations of activations.

    Args:
        dictionary: of one layer, which reads the vectors.
        n: vectors to measure on.
        part: of the stream; it should be one that was not trained on.

    Returns:
        A row a planted feature: ``feature``, ``kind``, ``frequency``, ``partner`` (index in the dictionary), the
        ``correlation`` of their activations, ``cosine`` of direction and decoder, ``precision`` and ``recall`` of the
        partner's firing as a statement that the feature fires, and their harmonic mean ``f1``.

    Raises:
        ReflowlensError: the dictionary reads vectors of another width, has several layers, or fewer features than are
            planted.
    """
    if dictionary.cfg.n_layers != 1 or dictionary.cfg.d_in != planted.directions.shape[1]:
        raise ReflowlensError(
            f"a dictionary of one layer that reads vectors of width {planted.directions.shape[1]} was expected, got "
            f"{dictionary.cfg.n_layers} layers of width {dictionary.cfg.d_in}"
        )
    if dictionary.cfg.n_features < len(planted.kind):
        raise ReflowlensError(
            f"the dictionary has {dictionary.cfg.n_features} features, fewer than the {len(planted.kind)} planted ones"
        )
    x, truth = planted.sample(n, part)
    (layer,) = dictionary.each_layer()
    found = layer.encode(x)
    wide = truth.double(), found.double()
    sums, squares = (tuple(moment.sum(0) for moment in of) for of in (wide, [one.square() for one in wide]))
    correlation = correlations(n, wide[0].T @ wide[1], (sums[0], sums[1]), (squares[0], squares[1]))
    rows, columns = best_matching(correlation.numpy())
    decoders = F.normalize(layer.W_dec[columns, 0], dim=1)
    precision, recall = agreement(truth[:, rows] > 0, found[:, columns] > 0)
    return pd.DataFrame(
        {
            "feature": rows,
            "kind": [planted.kind[row] for row in rows],
            "frequency": planted.frequency[rows].numpy(),
            "partner": columns,
            "correlation": correlation[rows, columns].numpy(),
            "cosine": (planted.directions[rows] * decoders).sum(1).numpy(),
            "precision": precision.numpy(),
            "recall": recall.numpy(),
            "f1": (2 * precision * recall / (precision + recall).clamp(min=1e-12)).numpy(),
        }
    )


def agreement(
    truth: Bool[Tensor, "n feature"], said: Bool[Tensor, "n feature"]
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Precision and recall of each column; 0 where nothing is said, or nothing is true.

    >>> agreement(torch.tensor([[True], [True], [False]]), torch.tensor([[True], [False], [False]]))
    (tensor([1.]), tensor([0.5000]))
    """
    both = (truth & said).sum(0)
    return both / said.sum(0).clamp(min=1), both / truth.sum(0).clamp(min=1)


def summary(recovered: pd.DataFrame) -> pd.DataFrame:
    """Means of `recover` over the features of each kind, and of ``all``: ``kind``, ``features``, ``f1``,
    ``correlation``, ``cosine``, ``precision`` and ``recall``."""
    columns = ["f1", "correlation", "cosine", "precision", "recall"]
    everything = pd.concat([recovered, recovered.assign(kind="all")])
    groups = everything.groupby("kind", sort=False)
    return groups[columns].mean().assign(features=groups.size()).reset_index()[["kind", "features", *columns]]
