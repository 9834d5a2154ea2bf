"""Does the residual stream vary along the directions that a basis writes most strongly?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.experiments.basis_geometry.spectra import random_subspace
from analyses.measures.lens import residual_points, residual_stack
from analyses.statistics.draws import derive_seed
from analyses.statistics.pvalues import predictive_pvalue
from reflowlens.models.base import HookedModel

_TEXTS = 8  # a time: the residuals of every point and position are held


def strongest_directions(basis: Float[Tensor, "S d_model"], k: int) -> Float[Tensor, "d_model k"]:
    """The first k right singular vectors of a basis: where a recipe of given size writes most."""
    return torch.linalg.svd(basis.float(), full_matrices=False).Vh[:k].T


@dataclass(frozen=True)
class Residuals:
    """Residual streams of running text at the input of every block and at the end.

    Args:
        rows: unit vectors less their mean over all positions, [layer, position, d_model].
        text: which text each position belongs to.
    """

    rows: Float[Tensor, "layer position d_model"]
    text: Int[Tensor, " position"]

    @property
    def n_texts(self) -> int:
        """How many texts were read."""
        return int(self.text.max()) + 1


@torch.no_grad()
def read_residuals(model: HookedModel, texts: Sequence[str]) -> Residuals:
    """Read texts, each cut to the model's context, at every position.

    Each position is scaled to length 1 first, so that none counts for more because its stream is long: a first token,
    or a late layer.
    """
    begin = model.text_start()
    ids = [torch.tensor((begin + model.tokenizer.encode(text))[: model.cfg.n_ctx]) for text in texts]
    layers = [i for i, point in enumerate(residual_points(model.cfg.n_layers)) if point.depth.is_integer()]
    parts = []
    for start in range(0, len(ids), _TEXTS):
        batch = torch.nn.utils.rnn.pad_sequence(ids[start : start + _TEXTS], batch_first=True)
        stack = residual_stack(model, batch, last_only=False)[layers].float()
        parts += [stack[:, i, : len(own)] for i, own in enumerate(ids[start : start + _TEXTS])]
    rows = F.normalize(torch.cat(parts, dim=1), dim=-1)
    text = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(own) for own in ids]))
    return Residuals(rows - rows.mean(dim=1, keepdim=True), text.to(rows.device))


def captured_variance(residuals: Residuals, directions: Float[Tensor, "d_model k"]) -> NDArray[np.float64]:
    """Share of each text's variance that lies within orthonormal directions, [layer, text]."""
    inside = (residuals.rows @ directions.to(residuals.rows)).square().sum(dim=-1)
    total = residuals.rows.square().sum(dim=-1)
    sums = [
        values.new_zeros(len(values), residuals.n_texts).index_add_(1, residuals.text, values)
        for values in (inside, total)
    ]
    return (sums[0] / sums[1]).double().cpu().numpy()


def most_capturable(residuals: Residuals, k: int) -> NDArray[np.float64]:
    """Share of the variance within the best k directions, the principal ones, [layer]."""
    energy = torch.linalg.eigvalsh(residuals.rows.mT @ residuals.rows).flip(-1).clamp_min(0)
    return (energy[:, :k].sum(dim=1) / energy.sum(dim=1)).double().cpu().numpy()


@dataclass(frozen=True)
class Alignment:
    """How much of the residual variance lies within the k strongest directions of a basis; arrays are [layer, ...].

    Args:
        captured: share of each text's variance, [layer, text].
        random: mean share within k random directions, [layer, draw].
        best: share within the best k directions.
        untrained: ``captured`` in models at initialisation, by the name of the draw.
    """

    captured: NDArray[np.float64]
    random: NDArray[np.float64]
    best: NDArray[np.float64]
    untrained: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def pvalues(self) -> list[float]:
        """For each layer, of the mean share as that of one more random subspace."""
        return [predictive_pvalue(own.mean(), draws) for own, draws in zip(self.captured, self.random, strict=True)]


def measure_alignment(
    residuals: Residuals, basis: Float[Tensor, "S d_model"], k: int, draws: int = 20, seed: int = 0
) -> Alignment:
    """The residuals against the k strongest directions of a basis, and against ``draws`` random subspaces."""
    d_model = basis.shape[1]
    subspaces = (random_subspace(d_model, k, derive_seed(seed, i)) for i in range(draws))
    random = [captured_variance(residuals, subspace).mean(axis=1) for subspace in subspaces]
    return Alignment(
        captured=captured_variance(residuals, strongest_directions(basis, k)),
        random=np.stack(random, axis=1),
        best=most_capturable(residuals, k),
    )
