"""What says an activation as a sum over features: a dictionary, and the bases that it is held against.

The nulls have no training beyond a mean or a covariance, and as many features active at a position as the dictionary:

``pca``      the L0 leading principal components of what is written. All of them are active everywhere, so this is the
             least error that any L0-dimensional affine subspace leaves; a dictionary chooses its L0 anew each time.
``neurons``  the MLP's own neurons: at each position the L0 that write the longest vectors, |activation|·‖W_out row‖,
             and the MLP's bias.
``native``, ``varimax``, ``rotated``  of a reFlow, its signals: the rows of the basis B [S, d_model] in the residual
             stream's space, and the two rotations of `reflowlens.signals`. What is written, less its mean, is said by
             the L0 rows most aligned with it, |⟨y, B_s⟩| / ‖B_s‖, with the coefficients of either sign that fit it best
             (least squares). Measured is how sparsely the signals say what a layer writes, not what they tell of the
             prediction; a rotation of them says how much of it is owed to a basis of the space as such.
``mean``     nothing but the mean, on the training documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from analyses.units.points import written_by
from reflowlens.activations.moments import Moments
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel
from reflowlens.signals import ViewName, signal_view

Encoder = Callable[[Tensor], Tensor]
SIGNALS: tuple[ViewName, ...] = ("native", "varimax", "rotated")


class Reconstructor(Protocol):
    """Reads a hook point a layer, makes features of what it reads, and says with them what is at another."""

    @property
    def reads(self) -> Sequence[str]: ...

    @property
    def writes(self) -> Sequence[str]: ...

    def encode(self, layer: int, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n feature"]:
        """The features, 0 where they are not active."""
        ...

    def reconstruct(
        self, layer: int, features: Mapping[int, Float[Tensor, "n feature"]], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """ŷ of a layer, from its features and those of the layers before."""
        ...


@dataclass(frozen=True, eq=False)
class OfDictionary:
    """A dictionary as a reconstructor."""

    dictionary: Dictionary

    @property
    def reads(self) -> Sequence[str]:
        return self.dictionary.cfg.reads

    @property
    def writes(self) -> Sequence[str]:
        return self.dictionary.cfg.writes

    def encode(self, layer: int, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n feature"]:
        return self.dictionary.each_layer()[layer].encode(x)

    def reconstruct(
        self, layer: int, features: Mapping[int, Float[Tensor, "n feature"]], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        return self.dictionary.reconstruct(layer, features, x)


@dataclass(frozen=True, eq=False)
class OfBasis:
    """Features of a basis a layer: ŷ = features @ decoder + offset."""

    reads: Sequence[str]
    writes: Sequence[str]
    encoders: Sequence[Encoder]
    decoders: Sequence[Float[Tensor, "feature d_out"]]
    offsets: Sequence[Float[Tensor, " d_out"]]

    def encode(self, layer: int, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n feature"]:
        return self.encoders[layer](x)

    def reconstruct(
        self, layer: int, features: Mapping[int, Float[Tensor, "n feature"]], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        return features[layer] @ self.decoders[layer] + self.offsets[layer]


def nulls(
    model: HookedModel, writes: Sequence[str], moments: Mapping[str, Moments], l0: Sequence[float], seed: int = 0
) -> Iterator[tuple[str, Reconstructor]]:
    """Those of the nulls above that there are for these points of the model, by name.

    Args:
        moments: of every point of ``writes`` on training documents, with the products of all pairs.
        l0: active features of a position, of each layer of the dictionary.
        seed: of the rotation.
    """
    k = [max(1, round(value)) for value in l0]
    means = [moments[point].mean.float() for point in writes]
    yield "mean", OfBasis(writes, writes, [_nothing] * len(k), [mean.new_zeros(0, len(mean)) for mean in means], means)
    axes = [principal_axes(moments[point])[:rank] for point, rank in zip(writes, k, strict=True)]
    project = [partial(_coordinates, mean, axis) for mean, axis in zip(means, axes, strict=True)]
    yield "pca", OfBasis(writes, writes, project, axes, means)
    if neurons := _neurons(model, writes, k):
        yield "neurons", neurons
    if "native" in model_views(model) and all(len(mean) == model.cfg.d_model for mean in means):
        for name in SIGNALS:
            basis = signal_view(model, name, seed=seed).basis.float()
            choose = [partial(sparse_fit, mean, basis, size) for mean, size in zip(means, k, strict=True)]
            yield name, OfBasis(writes, writes, choose, [basis] * len(k), means)


def model_views(model: HookedModel) -> tuple[ViewName, ...]:
    """The bases of the signals of a model that was trained with some; otherwise none."""
    return SIGNALS if model.cfg.n_signals else ()


def principal_axes(moments: Moments) -> Float[Tensor, "d d"]:
    """Principal axes as rows, the one of the largest variance first."""
    return torch.linalg.eigh(moments.comoment).eigenvectors.flip(1).T.float()


def sparse_fit(
    mean: Float[Tensor, " d"], basis: Float[Tensor, "S d"], k: int, y: Float[Tensor, "n d"]
) -> Float[Tensor, "n S"]:
    """Coefficients, k of them not 0, of the rows that are most aligned with y - mean, fitted to it by least squares."""
    k = min(k, len(basis))
    products = (y - mean) @ basis.T
    rows = (products.abs() / basis.norm(dim=1)).topk(k, dim=1).indices
    gram = (basis @ basis.T)[rows[:, :, None], rows[:, None, :]]
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(k, device=y.device)
    fitted = torch.linalg.solve(gram + ridge, products.gather(1, rows)[..., None])[..., 0]
    return torch.zeros_like(products).scatter(1, rows, fitted)


def _neurons(model: HookedModel, writes: Sequence[str], k: Sequence[int]) -> OfBasis | None:
    """The neurons whose sum is what is written at these points; None if some is not what an MLP writes."""
    reads = [point.replace("hook_mlp_out", "mlp.hook_post") for point in writes]
    weights = [written_by(model, point) for point in reads]
    parameters = dict(model.named_parameters())
    if not all(point.endswith(".hook_mlp_out") for point in writes) or not all(name in parameters for name in weights):
        return None
    decoders = [parameters[str(name)].detach().float() for name in weights]
    biases = [parameters.get(str(name).replace("W_out", "b_out")) for name in weights]
    offsets = [
        decoder.new_zeros(decoder.shape[1]) if bias is None else bias.detach().float()
        for decoder, bias in zip(decoders, biases, strict=True)
    ]
    encoders = [partial(_longest, decoder.norm(dim=1), size) for decoder, size in zip(decoders, k, strict=True)]
    return OfBasis(reads, writes, encoders, decoders, offsets)


def _nothing(y: Float[Tensor, "n d"]) -> Float[Tensor, "n 0"]:
    return y[:, :0]


def _coordinates(
    mean: Float[Tensor, " d"], axes: Float[Tensor, "feature d"], y: Float[Tensor, "n d"]
) -> Float[Tensor, "n feature"]:
    return einsum(y - mean, axes, "n d, feature d -> n feature")


def _longest(norms: Float[Tensor, " neuron"], k: int, a: Float[Tensor, "n neuron"]) -> Float[Tensor, "n neuron"]:
    kept = (a.abs() * norms).topk(min(k, len(norms)), dim=1).indices
    return torch.zeros_like(a).scatter(1, kept, a.gather(1, kept))
