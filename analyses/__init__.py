"""analyses: the experiments, each a function from a model to a `Result`, and what they share.

    from analyses import layer_evolution, run_suite
    result = layer_evolution(model, "The capital of France is", target=" Paris")
    result.metrics, result.frames["layers"], result.figures["probability"]

Names are imported when first used. An experiment's function has the name of its module, and `analyses.<name>` is always
the function; what else the module offers is had by `from analyses.<name> import ...`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from analyses.registry import EXPERIMENTS as EXPERIMENTS

if TYPE_CHECKING:
    from analyses.causal_ablation import causal_ablation as causal_ablation
    from analyses.layer_evolution import layer_evolution as layer_evolution
    from analyses.lexicon import load_lexicon as load_lexicon
    from analyses.report import write_report as write_report
    from analyses.result import Result as Result
    from analyses.semantic_algebra import semantic_algebra as semantic_algebra
    from analyses.suite import run_suite as run_suite

_FUNCTIONS = {experiment.name for experiment in EXPERIMENTS.values()}
_HOMES = {name: name for name in _FUNCTIONS} | {
    "Result": "result",
    "load_lexicon": "lexicon",
    "run_suite": "suite",
    "write_report": "report",
}
__all__ = sorted([*_HOMES, "EXPERIMENTS"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analyses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"analyses.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """When a submodule has been imported, Python binds it in the package: here its function takes its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
