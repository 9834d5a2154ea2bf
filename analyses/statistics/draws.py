"""Random draws by name: a seed and labels make a generator, so that no two controls of a run are one draw by accident.

Generators made of the seed alone give the same numbers to everything that is drawn from it; those of ``seed + i`` share
all draws but one with the seed's neighbours. So a function that draws adds its own name to the seed that it is given,
an experiment adds its name first, and who calls such a function twice adds what tells the calls apart:

    own = derive_seed(seed, "genetic_hijack")
    random_swap(view, pairs, derive_seed(own, "swap"))

Two kinds of draws are shared on purpose. The untrained model is one for all experiments (`analyses.controls`), and
bootstraps and sign flips (`intervals`, `pvalues` and `resampling` beside) resample units by the seed itself, the same
ones for every metric over the same units: they are no controls, and no generator of this module gives their numbers.
"""

from __future__ import annotations

import numpy as np
from transformer_lens.utilities.statistics import derive_generator

__all__ = ["derive_generator", "derive_rng", "derive_seed"]


def derive_seed(seed: int, *labels: object) -> int:
    """The seed of `derive_generator(seed, *labels)`, to hand on: the same for the same labels, on every machine.

    >>> derive_seed(0, "swap") == derive_seed(0, "swap"), derive_seed(0, "swap") == derive_seed(1, "swap")
    (True, False)
    """
    return int(derive_generator(seed, *labels).initial_seed())


def derive_rng(seed: int, *labels: object) -> np.random.Generator:
    """A generator of NumPy keyed on a seed and labels."""
    return np.random.default_rng(derive_seed(seed, *labels))
