"""How well single units predict a concept: AUROC, F1 at a threshold, and the null of labels shifted along the text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from analyses.statistics.draws import derive_generator


def mean_ranks(values: Float[Tensor, "n unit"]) -> Float[Tensor, "n unit"]:
    """Ranks from 1 of each unit's values, ties sharing their mean rank.

    >>> mean_ranks(torch.tensor([[0.0], [3.0], [0.0]])).flatten().tolist()
    [1.5, 3.0, 1.5]
    """
    rows = values.T.contiguous()  # sorting along memory is several times faster
    ordered, order = rows.sort(dim=1)
    place = torch.arange(len(values), dtype=torch.int32, device=values.device).expand_as(rows)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(differs[:, :1])
    first = torch.where(torch.cat([edge, differs], dim=1), place, 0).cummax(dim=1).values
    ends = torch.where(torch.cat([differs, edge], dim=1), place, len(values))
    last = ends.flip(1).cummin(dim=1).values.flip(1)
    ranks = (first + last).to(values.dtype) / 2 + 1
    return torch.empty_like(ranks).scatter_(1, order, ranks).T


def auroc(ranks: Float[Tensor, "n unit"], labels: Bool[Tensor, "n concept"]) -> Float[Tensor, "unit concept"]:
    """The probability that a unit is larger at a position with the concept than at one without it; ties count half.

    This is Mann and Whitney's U over the number of pairs; NaN if all positions have the concept, or none.

    Args:
        ranks: of each unit's values, from `mean_ranks`.
    """
    positives = labels.sum(dim=0).to(ranks.dtype)
    centred = ranks - (len(ranks) + 1) / 2  # large sums of ranks would cost the digits that matter
    above = centred.T @ labels.to(ranks.dtype)
    return 0.5 + above / (positives * (len(ranks) - positives))


class Shifted(NamedTuple):
    """AUROC against labels shifted along the text: mean and standard deviation over shifts, and their number."""

    mean: Float[Tensor, "unit concept"]
    std: Float[Tensor, "unit concept"]
    shifts: int

    def pvalues(self, observed: Float[Tensor, "unit concept"]) -> NDArray[np.float64]:
        """One-sided p of each observation as one more draw: `analyses.statistics.pvalues.predictive_pvalue`."""
        spread = (self.std * (1 + 1 / self.shifts) ** 0.5).clamp(min=1e-12)
        p = stats.t(self.shifts - 1).sf(((observed - self.mean) / spread).double().numpy())
        return np.asarray(p, dtype=np.float64)


def shifted_auroc(ranks: Float[Tensor, "n unit"], labels: Bool[Tensor, "n concept"], shifts: int, seed: int) -> Shifted:
    """The circular-shift null: units and concepts keep their runs and rates, but not their alignment.

    Shifts are drawn uniformly from 5% to 95% of the number of positions.
    """
    n = len(ranks)
    generator = derive_generator(seed, "shifts")
    by = torch.randint(max(1, n // 20), max(2, n - n // 20), (shifts,), generator=generator).tolist()
    found = torch.stack([auroc(ranks, labels.roll(shift, dims=0)) for shift in by])
    return Shifted(found.mean(dim=0), found.std(dim=0), shifts)


def best_thresholds(
    values: Float[Tensor, "n unit"], labels: Bool[Tensor, "n unit"]
) -> tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]:
    """The threshold above 0 at which "value ≥ threshold" has the largest F1 for each unit's own labels, and that F1.

    >>> best_thresholds(torch.tensor([[5.0], [1.0], [4.0]]), torch.tensor([[True], [False], [True]]))
    (tensor([4.]), tensor([1.]))
    """
    ordered, order = values.T.contiguous().sort(dim=1, descending=True)
    hits = labels.T.gather(1, order).cumsum(dim=1, dtype=torch.int32)
    taken = torch.arange(1, len(values) + 1, device=values.device)
    f1 = 2 * hits / (taken + labels.sum(dim=0)[:, None])
    differs = ordered[:, 1:] != ordered[:, :-1]
    complete = torch.cat([differs, torch.ones_like(differs[:, :1])], dim=1)  # of equal values all are taken, or none
    f1 = f1.masked_fill(~complete | (ordered <= 0), -1.0)
    best, index = f1.max(dim=1)
    threshold = ordered.gather(1, index[:, None])[:, 0].masked_fill(best < 0, torch.inf)
    return threshold, best.clamp(min=0)


def f1_at(
    values: Float[Tensor, "n unit"], labels: Bool[Tensor, "n unit"], threshold: Float[Tensor, " unit"]
) -> Float[Tensor, " unit"]:
    """F1 of "value ≥ threshold" for each unit's own labels; 0 if neither is ever true."""
    said = values >= threshold
    hits = (said & labels).sum(dim=0)
    return 2 * hits / (said.sum(dim=0) + labels.sum(dim=0)).clamp(min=1)


def token_entropy(
    fires: Bool[Tensor, "n unit"], tokens: Int[Tensor, " n"], events: int, seed: int = 0
) -> Float[Tensor, " unit"]:
    """Entropy in bits of the tokens at ``events`` random positions where a unit fires; NaN for units with fewer.

    The number of events is the same for every unit, because the entropy of n events is at most log2(n): over all of its
    events a unit would seem more selective the more rarely it fires.
    """
    order = torch.randperm(len(fires), generator=derive_generator(seed, "token_entropy"))
    fires = fires[order]
    fires = fires & (fires.cumsum(dim=0, dtype=torch.int32) <= events)
    _, which = tokens[order].unique(return_inverse=True)
    counts = fires.float().T @ torch.nn.functional.one_hot(which).float()
    share = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log2()).sum(dim=1)
    return entropy.masked_fill(fires.sum(dim=0) < events, torch.nan)


def benjamini_hochberg(pvalues: NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p-values (1995): rejecting those below q has a false discovery rate below q.

    >>> benjamini_hochberg(np.array([0.01, 0.02, 0.9])).round(3).tolist()
    [0.03, 0.03, 0.9]
    """
    return np.asarray(stats.false_discovery_control(pvalues.ravel()).reshape(pvalues.shape))
