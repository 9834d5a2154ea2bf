"""What a prediction owes to single signals: orders to remove them in, their controls, and curves.

The removals themselves are :mod:`reflowlens.ablations.readout` and ``upstream_ablation``; a probability
here is that of a token among the real ones (:func:`real_tokens`).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_generator
from reflowlens.signals import SignalView


def real_tokens(view: SignalView) -> SignalView:
    """The view without padding rows of the recipe, which no tokenizer id reaches."""
    return view.of_tokens(view.n_tokens)


def leading_share(
    contributions: Float[Tensor, "*batch S"], k: int, carried: Float[Tensor, "*batch part"] | None = None
) -> Float[Tensor, "*batch"]:
    """What the k leading signals contribute, as a share of all positive contributions; 0 where there is none.

    ``carried``: contributions that are no signal's and belong to all.
    """
    positive = contributions.clamp(min=0)
    whole = positive.sum(dim=-1) if carried is None else positive.sum(dim=-1) + carried.clamp(min=0).sum(dim=-1)
    return positive.topk(k, dim=-1).values.sum(dim=-1) / whole.clamp(min=torch.finfo(positive.dtype).tiny)


def write_norms(view: SignalView, signals: Float[Tensor, "prompt S"]) -> Float[Tensor, "prompt S"]:
    """How much a signal moves all logits together, |a_s| ‖R_:s‖₂: what a matched control signal is matched on."""
    return signals[:, : view.n_signals].abs() * view.logit_rows[: view.n_tokens, : view.n_signals].norm(dim=0)


def random_order(shape: tuple[int, ...], seed: int) -> Int[Tensor, "prompt S"]:
    """A random order of the signals for each prompt."""
    return torch.rand(shape, generator=derive_generator(seed, "random_order")).argsort(dim=-1)


def matched_order(order: Int[Tensor, "prompt k"], norms: Float[Tensor, "prompt S"]) -> Int[Tensor, "prompt k"]:
    """For each signal in turn the unused *other* signal whose write norm is nearest: an order that removes as much.

    >>> matched_order(torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 1.0, 2.9]]))
    tensor([[2, 0, 1]])
    """
    matched = np.empty(order.shape, dtype=np.int64)
    for row, (wanted, size) in enumerate(zip(order.cpu().numpy(), norms.cpu().numpy(), strict=True)):
        free = np.ones(len(size), dtype=bool)
        for k, signal in enumerate(wanted):
            distance = np.where(free, np.abs(size - size[signal]), np.inf)
            if free.sum() > 1:
                distance[signal] = np.inf
            matched[row, k] = distance.argmin()
            free[matched[row, k]] = False
    return torch.from_numpy(matched)


def curve_counts(n_signals: int, points: int = 14) -> list[int]:
    """Numbers of signals to remove: every one up to 8, then geometrically to all.

    >>> curve_counts(16, points=4)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16]
    """
    tail = np.geomspace(8, max(8, n_signals), points).round().astype(int).tolist() if n_signals > 8 else []
    return sorted({*range(min(8, n_signals) + 1), *tail})


def curve_area(curve: NDArray[np.float64], counts: list[int]) -> NDArray[np.float64]:
    """Area under [prompt, count] curves over the share of signals removed, by the trapezoidal rule."""
    shares = np.asarray(counts) / counts[-1]
    return ((curve[:, 1:] + curve[:, :-1]) / 2 * np.diff(shares)).sum(axis=1)


def codebook_texts(view: SignalView, k: int = 6) -> list[str]:
    """For each signal its k largest positive tokens, as one readable line."""
    top = view.recipe[: view.n_tokens].topk(k, dim=0).indices.T.tolist()
    return [" ".join(repr(text) for text in view.model.tokenizer.to_str_tokens(tokens)) for tokens in top]
