"""Sums a document of everything that the metrics are made of; memory is that of one batch, and of the sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.features.documents import DocumentBatch, by_document, document_batches, n_batches
from analyses.features.predictions import Predictions, PredictionSums
from analyses.features.reconstructors import Reconstructor
from analyses.features.replacement import CleanPass, clean_pass, with_all_constant, with_all_replaced, with_one_replaced
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

ALL = -1  # the place of all layers together, among numbers of layers
BLOCKS = 64  # runs of documents in which firing is counted

Sums: TypeAlias = NDArray[np.float64]
Numbers = TypeVar("Numbers", NDArray[np.int64], Tensor)


@dataclass(eq=False)
class LayerSums:
    """Of one reconstruction of one layer: [document] sums over positions of L0, ‖y - ŷ‖² and the cosine of y and ŷ, and
    in how many positions each feature is active [block, feature]."""

    l0: Sums
    error: Sums
    cosine: Sums
    fired: NDArray[np.int64]


@dataclass(eq=False)
class DocumentSums:
    """Sums a document, [document] each.

    Args:
        positions, predictions: how many counted, and how many of them predict a token.
        loss: the model's own cross-entropy in nats.
        square: ``Σ ‖y - c‖²`` a layer, and ``total`` [document, d] ``Σ (y - c)``, of the targets less a constant c.
        zero, mean: replacement by constants, of each layer and (under ``ALL``) of all.
        layers: by reconstructor, a layer each.
        replaced: by reconstructor, of each layer (of those that are to) and (under ``ALL``) of all.
    """

    positions: Sums
    predictions: Sums
    loss: Sums
    square: list[Sums]
    total: list[Sums]
    zero: dict[int, PredictionSums]
    mean: dict[int, PredictionSums]
    layers: dict[str, list[LayerSums]] = field(default_factory=dict)
    replaced: dict[str, dict[int, PredictionSums]] = field(default_factory=dict)


@torch.no_grad()
def document_sums(
    model: HookedModel,
    reconstructors: Mapping[str, Reconstructor],
    rows: Sequence[Int[Tensor, " _token"]],
    means: Sequence[Float[Tensor, " d"]],
    *,
    batch_size: int,
    layerwise: Collection[str] | None = None,
    progress: bool = False,
) -> DocumentSums:
    """Run a model over documents with and without replacements.

    Args:
        reconstructors: by name; all of them write to the same points.
        means: of what is written at each of these points, on other documents.
        layerwise: the names of those that replace each layer by itself too; None: all.
    """
    total: DocumentSums | None = None
    layerwise = reconstructors if layerwise is None else layerwise
    batches = document_batches(rows, batch_size)
    for batch in bar(batches, show=progress, total=n_batches(rows, batch_size), unit="batch", desc="evaluating"):
        part = _of_batch(model, reconstructors, batch, means, len(rows), layerwise)
        total = part if total is None else _added(total, part)
    assert total is not None  # two documents at least
    return total


def _of_batch(
    model: HookedModel,
    reconstructors: Mapping[str, Reconstructor],
    batch: DocumentBatch,
    means: Sequence[Tensor],
    n_documents: int,
    layerwise: Collection[str],
) -> DocumentSums:
    writes = next(iter(reconstructors.values())).writes
    summed = partial(by_document, document=batch.document, n_documents=n_documents)
    clean = clean_pass(model, batch, [point for one in reconstructors.values() for point in one.reads], writes)
    predictions = Predictions(model, batch, clean.stream, n_documents)
    compared = predictions.compared
    one = partial(with_one_replaced, model, batch, clean)
    targets = [batch.within(clean.activations[point]) for point in writes]
    centred = [y - mean for y, mean in zip(targets, means, strict=True)]
    zeros = [torch.zeros_like(mean) for mean in means]
    constants = {
        name: {
            **{i: compared(one(writes[i], value.expand_as(targets[i]))) for i, value in enumerate(values)},
            ALL: compared(with_all_constant(model, batch, dict(zip(writes, values, strict=True)))),
        }
        for name, values in (("zero", zeros), ("mean", means))
    }
    found = DocumentSums(
        positions=summed(torch.ones(len(batch.document))),
        predictions=predictions.summed(torch.ones(len(batch.targets))),
        loss=predictions.loss,
        square=[summed(y.double().square().sum(1)) for y in centred],
        total=[summed(y) for y in centred],
        zero=constants["zero"],
        mean=constants["mean"],
    )
    block = F.one_hot(block_of(batch.document, n_documents), min(BLOCKS, n_documents)).float()
    for name, reconstructor in reconstructors.items():
        found.layers[name], found.replaced[name] = [], {}
        for i, (active, said) in enumerate(_reconstructed(reconstructor, batch, clean)):
            layer = LayerSums(
                l0=summed(active.sum(1)),
                error=summed((targets[i] - said).double().square().sum(1)),
                cosine=summed(F.cosine_similarity(targets[i], said, dim=1)),
                fired=(block.T @ active).long().cpu().numpy(),
            )
            found.layers[name].append(layer)
            if name in layerwise:
                found.replaced[name][i] = compared(one(writes[i], said))
        found.replaced[name][ALL] = compared(with_all_replaced(model, batch, reconstructor))
    return found


def block_of(document: Numbers, n_documents: int) -> Numbers:
    """The run of documents that a document is in, of at most ``BLOCKS`` of them."""
    return document * min(BLOCKS, n_documents) // n_documents


def _reconstructed(
    reconstructor: Reconstructor, batch: DocumentBatch, clean: CleanPass
) -> Iterator[tuple[Float[Tensor, "n feature"], Float[Tensor, "n d"]]]:
    """Of each layer which features are active, as 1 and 0, and what they say, ŷ."""
    features: dict[int, Tensor] = {}
    for layer, point in enumerate(reconstructor.reads):
        x = batch.within(clean.activations[point])
        features[layer] = reconstructor.encode(layer, x)
        yield (features[layer] != 0).float(), reconstructor.reconstruct(layer, features, x)


Part = TypeVar("Part")


def _added(a: Part, b: Part) -> Part:
    """Two equal structures of dataclasses, lists and dictionaries, added array by array."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: _added(a[key], b[key]) for key in a}  # type: ignore[return-value]
    if isinstance(a, list) and isinstance(b, list):
        return [_added(*pair) for pair in zip(a, b, strict=True)]  # type: ignore[return-value]
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [part.name for part in dataclasses.fields(a)]
        return type(a)(**{name: _added(getattr(a, name), getattr(b, name)) for name in names})
    return a + b  # type: ignore[operator]
