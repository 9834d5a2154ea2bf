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
    from analyses.experiments.basis_geometry.experiment import basis_geometry as basis_geometry
    from analyses.experiments.causal_ablation.experiment import causal_ablation as causal_ablation
    from analyses.experiments.concept_inception.experiment import concept_inception as concept_inception
    from analyses.experiments.crystallisation_boundary import crystallisation_boundary as crystallisation_boundary
    from analyses.experiments.emotion_surgery.experiment import emotion_surgery as emotion_surgery
    from analyses.experiments.genetic_hijack.experiment import genetic_hijack as genetic_hijack
    from analyses.experiments.layer_evolution.experiment import layer_evolution as layer_evolution
    from analyses.experiments.recipe_atlas.experiment import recipe_atlas as recipe_atlas
    from analyses.experiments.semantic_algebra.experiment import semantic_algebra as semantic_algebra
    from analyses.experiments.semantic_galaxy.experiment import semantic_galaxy as semantic_galaxy
    from analyses.experiments.signal_flow.experiment import signal_flow as signal_flow
    from analyses.experiments.sparsity_profile.experiment import sparsity_profile as sparsity_profile
    from analyses.experiments.typo_resilience.experiment import typo_resilience as typo_resilience
    from analyses.report.page import write_report as write_report
    from analyses.result.result import Result as Result
    from analyses.runner.comparison import compare_models as compare_models
    from analyses.runner.suite import run_suite as run_suite
    from analyses.units.firing import unit_statistics as unit_statistics
    from analyses.units.monosemanticity import monosemanticity as monosemanticity
    from analyses.words.lexicon import load_lexicon as load_lexicon

_FUNCTIONS = {experiment.name for experiment in EXPERIMENTS.values()} | {"monosemanticity", "unit_statistics"}
_HOMES = {name: name for name in _FUNCTIONS} | {
    "Result": "result",
    "compare_models": "comparison",
    "crystallisation_boundary": "crystallisation",
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
