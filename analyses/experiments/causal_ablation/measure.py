"""What is left of a prediction when signals are knocked out at the readout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.knockout import (
    curve_area,
    curve_counts,
    matched_order,
    random_order,
    write_norms,
)
from analyses.measures.lens import first_settled
from reflowlens.ablations.closed_form import ProgressiveAblations, SingleAblations
from reflowlens.signals import SignalView

RECOVERED = 0.9  # of a probability, when signals are said to suffice for it


class Measured(NamedTuple):
    """What one view says of every prompt; arrays are [prompt], curves [prompt, count]."""

    counts: list[int]
    worst: NDArray[np.int64]
    single: dict[str, NDArray[np.float64]]  # share of the probability left, by which signal was zeroed
    curves: dict[str, NDArray[np.float64]]  # share of the probability left, by order

    def area(self, order: str = "contribution") -> NDArray[np.float64]:
        """Area between the random-order curve and another."""
        return curve_area(self.curves["random"] - self.curves[order], self.counts)

    def sufficient_share(self) -> NDArray[np.float64]:
        """Smallest share of signals whose keeping restores the probability, from there on."""
        enough = self.curves["keep"] >= RECOVERED
        return np.asarray(self.counts)[first_settled(enough.T)] / self.counts[-1]

    def headline(self) -> dict[str, NDArray[np.float64]]:
        """The metrics with a rotation null, one value a prompt."""
        return {
            "remaining_after_one": self.single["worst"],
            "knockout_area": self.area(),
            "sufficient_share": self.sufficient_share(),
        }


def measure_knockout(
    view: SignalView, final: Float[Tensor, "prompt d_model"], seed: int, *, matched: bool = False
) -> Measured:
    """Knock out signals at the readout of the streams that prompts end in, one alone and many in order.

    ``matched``: also in the order of the signals that move all logits as much.
    """
    a = view.readout(final).float()
    targets = view.logits(a).argmax(dim=-1)
    alone = SingleAblations(view, a, 0.0)
    before = alone.before().probability(targets)
    left = (alone.probability(targets) / before).cpu()
    worst = left.argmin(dim=-1)
    contribution = (a * view.logit_rows[targets])[:, : view.n_signals].cpu()
    by_contribution = contribution.argsort(dim=-1, descending=True)
    norms = write_norms(view, a).cpu()
    partner = matched_order(worst[:, None], norms)[:, 0]
    rows = torch.arange(len(left))
    counts = curve_counts(view.n_signals)
    orders = {
        "contribution": by_contribution,
        **({"matched": matched_order(by_contribution, norms)} if matched else {}),
        "random": random_order(tuple(left.shape), seed),
    }
    removed = {name: ProgressiveAblations(view, a, 0.0, order, counts) for name, order in orders.items()}
    contributing, kept = removed.pop("contribution").probability_and_kept(targets)
    others = {name: each.probability(targets) for name, each in removed.items()}
    curves = {"contribution": contributing, **others, "keep": kept}
    return Measured(
        counts,
        worst.numpy(),
        {
            "worst": left[rows, worst].double().numpy(),
            "random_signal": left.mean(dim=-1).double().numpy(),
            "matched_signal": left[rows, partner].double().numpy(),
        },
        {name: (curve / before).double().cpu().numpy() for name, curve in curves.items()},
    )
