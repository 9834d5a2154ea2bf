"""What sets the coordinates of a view apart from any other orthogonal ones.

A rotation of a view leaves every logit as it is. Of coordinates that nothing singles out these measures are therefore,
in expectation, those of a random rotation; of the entries of one vector the kurtosis is then 3 S / (S + 2) exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.knockout import leading_share
from analyses.measures.sparsity import hoyer, participation_share
from reflowlens.ablations.closed_form import SingleAblations
from reflowlens.signals import SignalView

LEADING = 10
PRIVILEGED = {
    "recipe_kurtosis": 1,
    "recipe_hoyer": 1,
    "readout_kurtosis": 1,
    "ten_signal_share": 1,
    "remaining_after_one": -1,
}
"""Measure -> the side on which it lies where coordinates are privileged."""


@torch.no_grad()
def axis_measures(view: SignalView, streams: Float[Tensor, "prompt d_model"]) -> dict[str, NDArray[np.float64]]:
    """The measures of `PRIVILEGED` in the coordinates of a view.

    Args:
        view: of real tokens alone (`analyses.measures.knockout.real_tokens`).
        streams: residual streams that the model's predictions are read off.

    Returns, a value a token or a prompt:

    * `recipe_kurtosis` [token]: S Σ r⁴ / (Σ r²)² of a token's recipe r, 3 for Gaussian entries; `recipe_hoyer` [token],
      Hoyer's sparsity of it; both without tokens whose recipe is 0;
    * `readout_kurtosis` [prompt]: that of the readout a = B norm(x);
    * `ten_signal_share` [prompt]: of the positive contributions to the top-1 token's logit, what the ten largest are;
    * `remaining_after_one` [prompt]: the share of its probability that is left without the signal it needs most.
    """
    readout = view.readout(streams).float()
    targets = view.logits(readout).argmax(dim=-1)
    alone = SingleAblations(view, readout, 0.0)
    left = alone.probability(targets) / alone.before().probability(targets)
    recipes = view.recipe[view.recipe.any(dim=1)]
    found = {
        "recipe_kurtosis": 1 / participation_share(recipes),
        "recipe_hoyer": hoyer(recipes),
        "readout_kurtosis": 1 / participation_share(readout),
        "ten_signal_share": leading_share(readout * view.recipe[targets], min(LEADING, view.n_signals)),
        "remaining_after_one": left.amin(dim=-1),
    }
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def kurtosis_unprivileged(n_signals: int) -> float:
    """The kurtosis S Σ x⁴ / (Σ x²)² to be expected of a vector in random coordinates, 3 S / (S + 2).

    >>> kurtosis_unprivileged(1), kurtosis_unprivileged(4)
    (1.0, 2.0)
    """
    return 3 * n_signals / (n_signals + 2)
