"""How sparse a recipe is: which signals of a token are active, how evenly signals are used, and what needs no rule.

A dense Gaussian vector has 11% "active" entries by several natural rules, so no count says anything without what a
Gaussian of the same size, and a rotation of the same recipe, would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from reflowlens.errors import ReflowlensError

Rule = Literal["abs_gt_2mean", "std", "absolute", "relative", "mass"]
RULES: dict[Rule, str] = {
    "abs_gt_2mean": "|R_vs| > 2 mean_s |R_vs|",
    "std": "|R_vs| > {} standard deviations of R",
    "absolute": "|R_vs| > {}",
    "relative": "|R_vs| > {} max_s |R_vs|",
    "mass": "among the largest |R_vs| that together hold {} of Σ_s R_vs²",
}
DEFAULT_THRESHOLDS: dict[Rule, float] = {"std": 1.5, "absolute": 0.1, "relative": 0.5, "mass": 0.9}
_BLOCK = 1 << 22  # entries at a time


def check_rule(rule: str, threshold: float | None) -> tuple[Rule, float | None, str]:
    """The rule, its threshold (a default where there is none) and its definition in words.

    Raises ReflowlensError for an unknown rule and a threshold that it does not take.

    >>> check_rule("relative", 0.25)[2]
    '|R_vs| > 0.25 max_s |R_vs|'
    """
    known: Rule | None = next((name for name in get_args(Rule) if name == rule), None)
    if known is None:
        raise ReflowlensError(f"rule must be one of {', '.join(map(repr, get_args(Rule)))}, got {rule!r}")
    if known == "abs_gt_2mean":
        if threshold is not None:
            raise ReflowlensError("rule 'abs_gt_2mean' takes no threshold; 'relative' and 'std' do")
        return known, None, RULES[known]
    threshold = DEFAULT_THRESHOLDS[known] if threshold is None else threshold
    if not 0 < threshold < (1 if known in ("relative", "mass") else np.inf):
        limits = "between 0 and 1" if known in ("relative", "mass") else "above 0"
        raise ReflowlensError(f"threshold of rule {rule!r} must be {limits}, got {threshold}")
    return known, threshold, RULES[known].format(f"{threshold:g}")


def active_signals(
    rows: Float[Tensor, "token S"],
    rule: Rule = "abs_gt_2mean",
    threshold: float | None = None,
    std: float | None = None,
) -> Bool[Tensor, "token S"]:
    """Which signals are active in each row by one of `RULES`.

    Args:
        threshold: what stands for {} in the rule; default `DEFAULT_THRESHOLDS`.
        std: the standard deviation that the rule ``std`` counts in; default that of all entries of ``rows``.

    >>> active_signals(torch.tensor([[0.1, -4.0, 0.2, 0.3]])).tolist()
    [[False, True, False, False]]
    """
    rule, threshold, _ = check_rule(rule, threshold)
    size = rows.abs()
    if rule == "abs_gt_2mean":
        return size > 2 * size.mean(dim=1, keepdim=True)
    assert threshold is not None
    if rule == "std":
        return size > threshold * (rows.std().item() if std is None else std)
    if rule == "absolute":
        return size > threshold
    if rule == "relative":
        return size > threshold * size.amax(dim=1, keepdim=True)
    squares, order = rows.square().sort(dim=1, descending=True)
    held_before = squares.cumsum(dim=1) - squares
    needed = (held_before < threshold * squares.sum(dim=1, keepdim=True)) & (squares > 0)
    return torch.zeros_like(needed).scatter_(1, order, needed)


def hoyer(rows: Float[Tensor, "token S"]) -> Float[Tensor, " token"]:
    """Hoyer's sparsity (2004), (√S - ‖x‖₁ / ‖x‖₂) / (√S - 1): 0 where all entries are as large, 1 for a single one.

    NaN for a row of zeros. A Gaussian row has about 0.2: 1 - √(2/π) for large S.
    """
    root = rows.shape[1] ** 0.5
    return (root - rows.abs().sum(dim=1) / rows.norm(dim=1)) / (root - 1)


def participation_share(rows: Float[Tensor, "token S"]) -> Float[Tensor, " token"]:
    """(Σx²)² / Σx⁴ / S: the share of signals that a row would have if all of its signals were alike in size.

    NaN for a row of zeros. A Gaussian row has about 1/3.
    """
    squares = rows.square()
    return squares.sum(dim=1).square() / squares.square().sum(dim=1) / rows.shape[1]


def column_kurtosis(rows: Float[Tensor, "token S"]) -> NDArray[np.float64]:
    """Pearson's kurtosis of each column (3 for a Gaussian); NaN for a constant one."""
    columns = max(1, _BLOCK // len(rows))
    parts = [
        stats.kurtosis(rows[:, start : start + columns].double().cpu().numpy(), axis=0, fisher=False)
        for start in range(0, rows.shape[1], columns)
    ]
    return np.concatenate(parts)


def gini(values: ArrayLike) -> NDArray[np.float64]:
    """Gini coefficient of non-negative numbers along the last axis: 0 where all are alike, 1 - 1/n if one has all.

    Of nothing but zeros it is 0. Raises ReflowlensError for a negative number.

    >>> float(gini([1, 1, 1, 1])), float(gini([0, 0, 0, 1]))
    (0.0, 0.75)
    """
    ordered = np.sort(np.asarray(values, dtype=float), axis=-1)
    if ordered.size and ordered.min() < 0:
        raise ReflowlensError(f"a Gini coefficient is of non-negative numbers, got {ordered.min():g}")
    n = ordered.shape[-1]
    total = ordered.sum(axis=-1)
    weighted = (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1)
    return np.divide(weighted, n * total, out=np.zeros_like(total), where=total > 0)


def lorenz_curve(values: ArrayLike) -> NDArray[np.float64]:
    """Share of the total that the smallest 0, 1, ..., n of n numbers hold.

    >>> lorenz_curve([3, 1]).tolist()
    [0.0, 0.25, 1.0]
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    return np.concatenate([[0.0], ordered.cumsum() / max(ordered.sum(), np.finfo(float).tiny)])


def density_curve(rows: Float[Tensor, "token S"], factors: Sequence[float]) -> NDArray[np.float64]:
    """Share of entries with |x| > c · rms(row) for each factor c, mean over rows; rows of zeros have none."""
    size = rows.abs() / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
    return np.array([int((size > factor).count_nonzero()) / size.numel() for factor in factors])


def gaussian_density(factors: ArrayLike) -> NDArray[np.float64]:
    """What `density_curve` is of a long Gaussian row: P(|x| > c)."""
    return 2 * stats.norm.sf(np.asarray(factors, dtype=float))


def support_size(
    rows: Float[Tensor, "token S"], basis: Float[Tensor, "S d_model"], share: float = 0.9
) -> Int[Tensor, " token"]:
    """How many signals a token needs: the smallest k whose mixture keeps ``share`` of its embedding from there on.

    Signals are kept in order of |R_vs| ‖B_s‖, and a mixture keeps 1 - ‖(r - r_k) B‖² / ‖r B‖². The one count of active
    signals that is tied to what the recipe is for: the vector that it mixes.

    >>> support_size(torch.tensor([[3.0, 0.1, 0.0]]), torch.eye(3)).tolist()
    [1]
    """
    lengths = basis.norm(dim=1)
    counts = []
    tokens = max(1, _BLOCK // basis.numel())
    for block in rows.split(tokens):
        order = (block.abs() * lengths).argsort(dim=1, descending=True)
        mixed = (block.gather(1, order)[:, :, None] * basis[order]).cumsum(dim=1)
        error = (mixed - mixed[:, -1:]).square().sum(dim=2)
        short = error > (1 - share) * mixed[:, -1].square().sum(dim=1, keepdim=True)
        places = torch.arange(1, short.shape[1] + 1, device=short.device)
        counts.append((short * places).amax(dim=1) + 1)
    return torch.cat(counts)


def block_length(n_signals: int) -> int:
    """How many rows make a few million entries: what is held at a time."""
    return max(1, _BLOCK // n_signals)
