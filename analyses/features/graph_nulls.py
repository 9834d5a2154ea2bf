"""What a dictionary's features are held against in attribution graphs: others, as many of them, on the same frozen
prompt.

``none``     no feature: all that MLPs write, less a dictionary's bias and skip, is error. What a graph scores by way of
             embeddings, heads and skips alone.
``random``   random features matched in norm and activation. A feature's decoder is a random direction of the norm that
             its own has (of a cross-layer one, a direction in each block that it writes to), the same at all positions.
             Its encoder is random too, of the same norm, but for its component along what it reads at a position,
             which it keeps: so pre-activation, activation, and which features are active, are the dictionary's own.
             What these features write is no longer what the MLP does, and the error is computed anew.
``neurons``  the MLP's own neurons, at each position and block as many as the dictionary has active features there:
             those that write the most. The gate of a gated MLP is held in a graph, so that what goes into its neurons
             is less than all that makes them active, and their scores are flattered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from analyses.statistics.draws import derive_generator
from reflowlens.circuits.attribution.linear.replacement import Replacement, Units, Written


def without_features(replacement: Replacement) -> Replacement:
    """The null ``none``."""
    chosen = [torch.zeros(len(units), dtype=torch.bool, device=units.index.device) for units in replacement.units]
    return kept_units(replacement, chosen)


def strongest_units(replacement: Replacement, counts: Sequence[Int[Tensor, " pos"]]) -> Replacement:
    """Of each block and position the ``counts`` units that write the longest vectors, of units that write to their own
    block; the others become error."""
    chosen = []
    for block, (units, count) in enumerate(zip(replacement.units, counts, strict=True)):
        size = replacement.written[block].by_units[block].norm(dim=1)
        by_size = size.argsort(descending=True, stable=True)
        order = by_size[units.position[by_size].argsort(stable=True)]  # by position, then by size
        firsts = units.position.bincount(minlength=len(count)).cumsum(0) - units.position.bincount(minlength=len(count))
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - firsts[units.position[order]]
        chosen.append(rank < count[units.position])
    return kept_units(replacement, chosen)


def kept_units(replacement: Replacement, chosen: Sequence[Tensor]) -> Replacement:
    """Some of the units; what the others write is error.

    Args:
        chosen: of each block, whether each of its units is kept, [unit].
    """
    written = []
    for block in replacement.written:
        error, by_units = _error_of(block), {}
        for source, vectors in block.by_units.items():
            lost, units = ~chosen[source], replacement.units[source]
            error.index_add_(0, units.position[lost], vectors[lost])
            by_units[source] = vectors[chosen[source]]
        written.append(dataclasses.replace(block, by_units=by_units, error=error))
    kept = [each[own] for each, own in zip(replacement.units, chosen, strict=True)]
    return dataclasses.replace(replacement, units=kept, written=written)


def _error_of(written: Written) -> Float[Tensor, "pos d_model"]:
    """A copy of what an MLP's units miss."""
    assert written.error is not None  # of attention alone there is none
    return written.error.clone()


class RandomFeatures:
    """The null ``random``: the directions of a feature are the same for all prompts.

    Args:
        n_features: of a block.
        seed: of the directions.
    """

    def __init__(self, n_features: int, d_model: int, seed: int) -> None:
        self.shape, self.seed = (n_features, d_model), seed
        self.drawn: dict[tuple[object, ...], Float[Tensor, "feature d_model"]] = {}

    def __call__(self, replacement: Replacement, read: Sequence[Float[Tensor, "pos d_model"]]) -> Replacement:
        """In place of the features of a prompt.

        Args:
            read: what the MLP of each block reads, ``ln2.hook_normalized``.
        """
        units = [
            dataclasses.replace(each, rows=_turned(each.rows, x[each.position], self._of(each, "encoder", block)))
            for block, (each, x) in enumerate(zip(replacement.units, read, strict=True))
        ]
        written = [self._written(block, here, replacement.units) for block, here in enumerate(replacement.written)]
        return dataclasses.replace(replacement, units=units, written=written)

    def _written(self, block: int, here: Written, units: Sequence[Units]) -> Written:
        error, by_units = _error_of(here), {}
        for source, vectors in here.by_units.items():
            random = self._of(units[source], "decoder", source, block) * vectors.norm(dim=1, keepdim=True)
            error.index_add_(0, units[source].position, vectors - random)
            by_units[source] = random
        return dataclasses.replace(here, by_units=by_units, error=error)

    def _of(self, units: Units, *labels: object) -> Float[Tensor, "unit d_model"]:
        """A random direction for each unit."""
        if labels not in self.drawn:
            generator = derive_generator(self.seed, "random_features", *labels)
            self.drawn[labels] = F.normalize(torch.randn(self.shape, generator=generator), dim=1)
        return self.drawn[labels].to(units.rows)[units.index]


def _turned(
    rows: Float[Tensor, "unit d_model"], x: Float[Tensor, "unit d_model"], directions: Float[Tensor, "unit d_model"]
) -> Float[Tensor, "unit d_model"]:
    """Rows of the same norm and the same product with x, that are random otherwise."""
    x = F.normalize(x, dim=1)
    along = (rows * x).sum(1, keepdim=True) * x
    across = directions - (directions * x).sum(1, keepdim=True) * x
    return along + F.normalize(across, dim=1) * (rows - along).norm(dim=1, keepdim=True)
