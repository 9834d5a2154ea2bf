"""The sparsity of one basis, measured once for every metric, frame and control of the Sparsity Profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.sparsity import (
    Rule,
    active_signals,
    block_length,
    column_kurtosis,
    density_curve,
    gini,
    hoyer,
    participation_share,
    support_size,
)
from analyses.statistics.draws import derive_generator
from reflowlens.signals import SignalView

SUPPORT_TOKENS = 128
FACTORS = tuple(np.geomspace(0.25, 4, 17).round(3).tolist())


@dataclass(frozen=True)
class Profile:
    """What one basis shows.

    Args:
        active: how many signals are active for each token, [token].
        hoyer, participation: of each token's recipe, [token]; NaN for a recipe of zeros.
        usage: for how many tokens each signal is active, [signal].
        usage_text: the same over the tokens of the texts, each as often as it occurs, [signal].
        text_shares: share of active signals, mean over the tokens of each text, [text].
        kurtosis: of each signal over tokens, [signal]; NaN for a constant one.
        support: how many signals each of a few drawn tokens needs, [drawn token].
        density: share of entries with |x| > c rms(row) for each c of `FACTORS`.
    """

    active: NDArray[np.int64]
    hoyer: NDArray[np.float64]
    participation: NDArray[np.float64]
    usage: NDArray[np.int64]
    usage_text: NDArray[np.int64]
    text_shares: NDArray[np.float64]
    kurtosis: NDArray[np.float64]
    support: NDArray[np.int64]
    density: NDArray[np.float64]

    def headline(self) -> dict[str, float]:
        """The metrics by name; those of running text where there is any."""
        S = len(self.usage)
        over_vocabulary = {
            "active_signals": self.active.mean(),
            "active_share": self.active.mean() / S,
            "usage_gini": gini(self.usage),
            "hoyer": np.nanmean(self.hoyer),
            "participation": np.nanmean(self.participation),
            "signal_kurtosis": np.nanmedian(self.kurtosis),
            "support_share": self.support.mean() / S,
            "dead_signals": (self.usage == 0).sum(),
        }
        over_text = {}
        if len(self.text_shares):
            over_text = {"active_share_text": self.text_shares.mean(), "usage_gini_text": gini(self.usage_text)}
        return {name: float(value) for name, value in (over_vocabulary | over_text).items()}


def support_tokens(n_tokens: int, seed: int) -> Int[Tensor, " drawn"]:
    """The tokens that ``support`` is measured on, the same ones in every basis."""
    return torch.randperm(n_tokens, generator=derive_generator(seed, "support"))[:SUPPORT_TOKENS]


def measure_profile(
    view: SignalView,
    rule: Rule,
    threshold: float | None = None,
    texts: Sequence[Sequence[int]] = (),
    *,
    drawn: Int[Tensor, " drawn"],
) -> Profile:
    """The profile of a view whose recipe has rows of real tokens alone (`analyses.measures.knockout.real_tokens`).

    Args:
        rule, threshold: as in `analyses.measures.sparsity.active_signals`.
        texts: running text, as token ids.
        drawn: the tokens of ``support`` (`support_tokens`).
    """
    rows = view.recipe.float()
    n_tokens, n_signals = rows.shape
    std = float(rows.std())
    occurrences = np.bincount([token for ids in texts for token in ids], minlength=n_tokens)
    weights = torch.as_tensor(occurrences, dtype=torch.float32, device=rows.device)
    usage, usage_text = rows.new_zeros(n_signals), rows.new_zeros(n_signals)
    density = np.zeros(len(FACTORS))
    parts = []
    length = block_length(n_signals)
    for block, block_weights in zip(rows.split(length), weights.split(length), strict=True):
        mask = active_signals(block, rule, threshold, std).float()
        usage += mask.sum(dim=0)
        usage_text += block_weights @ mask
        density += density_curve(block, FACTORS) * len(block) / n_tokens
        parts.append(torch.stack([mask.sum(dim=1), hoyer(block), participation_share(block)]))
    active, sparsity, participation = torch.cat(parts, dim=1).double().cpu().numpy()
    return Profile(
        active=active.astype(np.int64),
        hoyer=sparsity,
        participation=participation,
        usage=usage.long().cpu().numpy(),
        usage_text=usage_text.round().long().cpu().numpy(),
        text_shares=np.array([active[list(ids)].mean() / n_signals for ids in texts]),
        kurtosis=column_kurtosis(rows),
        support=support_size(rows[drawn.to(rows.device)], view.basis.float()).cpu().numpy(),
        density=density,
    )
