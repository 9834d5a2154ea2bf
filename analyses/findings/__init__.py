"""Open questions about signals, each a function from trained runs (or a model) to a `Result`.

    reflowlens study sparsity                       # train what a question compares: hours
    reflowlens findings sparsity --runs out/sparsity --out out/findings

What is measured of each run is kept beside the runs, so that a question is asked again in seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from reflowlens.errors import ReflowlensError, nearest

if TYPE_CHECKING:
    from analyses.result.result import Result

QUESTIONS: dict[str, str] = {
    "axis_privilege": "axis_privilege",
    "claims_over_seeds": "claims_over_seeds",
    "scale": "scale",
    "signal_stability": "signal_stability",
    "sparsity": "sparsity",
    "distillation": "distillation",
    "signals_against_dictionaries": "signals_against_dictionaries",
}
"""Question -> the module of this room that answers it by a function of the same name."""


def question(name: str) -> Callable[..., Result]:
    """The function that answers a question.

    Raises ReflowlensError for one that is not among `QUESTIONS`.
    """
    if name not in QUESTIONS:
        raise ReflowlensError(f"no question {name!r}; there are {', '.join(QUESTIONS)}{nearest(name, list(QUESTIONS))}")
    return getattr(importlib.import_module(f"analyses.findings.{QUESTIONS[name]}"), name)
