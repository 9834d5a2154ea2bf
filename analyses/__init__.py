"""analyses: the experiments, each a function from a model to a `Result`, and what they share.

    from analyses import layer_evolution, run_suite
    result = layer_evolution(model, "The capital of France is", target=" Paris")
    result.metrics, result.frames["layers"], result.figures["probability"]

Names are imported when first used. Rooms, from what everybody uses to what uses everything: `words`, `statistics`,
`measures`, `result`, `controls`; `units`, `features`, `tasks`; `experiments`, a folder each; `report`, `runner` and
`findings`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from analyses.registry import EXPERIMENTS as EXPERIMENTS
from reflowlens.former_names import keep_former_names

if TYPE_CHECKING:
    from analyses.experiments.basis_geometry import basis_geometry as basis_geometry
    from analyses.experiments.causal_ablation import causal_ablation as causal_ablation
    from analyses.experiments.circuit_tracing import circuit_tracing as circuit_tracing
    from analyses.experiments.concept_inception import concept_inception as concept_inception
    from analyses.experiments.crystallisation_boundary import crystallisation_boundary as crystallisation_boundary
    from analyses.experiments.emotion_surgery import emotion_surgery as emotion_surgery
    from analyses.experiments.genetic_hijack import genetic_hijack as genetic_hijack
    from analyses.experiments.layer_evolution import layer_evolution as layer_evolution
    from analyses.experiments.recipe_atlas import recipe_atlas as recipe_atlas
    from analyses.experiments.semantic_algebra import semantic_algebra as semantic_algebra
    from analyses.experiments.semantic_galaxy import semantic_galaxy as semantic_galaxy
    from analyses.experiments.signal_flow import signal_flow as signal_flow
    from analyses.experiments.sparsity_profile import sparsity_profile as sparsity_profile
    from analyses.experiments.typo_resilience import typo_resilience as typo_resilience
    from analyses.features.dashboards import feature_dashboards as feature_dashboards
    from analyses.features.evaluation import evaluate_dictionary as evaluate_dictionary
    from analyses.features.probing import sparse_probing as sparse_probing
    from analyses.features.stability import seed_stability as seed_stability
    from analyses.report import write_report as write_report
    from analyses.result import Result as Result
    from analyses.runner.comparison import compare_models as compare_models
    from analyses.runner.suite import run_suite as run_suite
    from analyses.tasks.activation_addition import activation_addition as activation_addition
    from analyses.tasks.causal_tracing import causal_tracing as causal_tracing
    from analyses.tasks.comparisons import last_words as last_words
    from analyses.tasks.comparisons import minimal_pairs as minimal_pairs
    from analyses.tasks.comparisons import multiple_choice as multiple_choice
    from analyses.tasks.composition import composition_scores as composition_scores
    from analyses.tasks.function_vectors import function_vectors as function_vectors
    from analyses.tasks.head_ablation import head_ablation as head_ablation
    from analyses.tasks.head_patterns import head_patterns as head_patterns
    from analyses.tasks.logit_attribution import direct_logit_attribution as direct_logit_attribution
    from analyses.tasks.performance import task_performance as task_performance
    from analyses.tasks.probes import Probes as Probes
    from analyses.tasks.probes import linear_probes as linear_probes
    from analyses.tasks.summary import summarise as summarise
    from analyses.units.firing import unit_statistics as unit_statistics
    from analyses.units.monosemanticity import monosemanticity as monosemanticity
    from analyses.words import load_lexicon as load_lexicon

_HOMES = {experiment.name: f"experiments.{experiment.name}" for experiment in EXPERIMENTS.values()} | {
    "Probes": "tasks.probes",
    "Result": "result",
    "activation_addition": "tasks.activation_addition",
    "causal_tracing": "tasks.causal_tracing",
    "compare_models": "runner.comparison",
    "composition_scores": "tasks.composition",
    "crystallisation_boundary": "experiments.crystallisation_boundary",
    "direct_logit_attribution": "tasks.logit_attribution",
    "evaluate_dictionary": "features.evaluation",
    "feature_dashboards": "features.dashboards",
    "function_vectors": "tasks.function_vectors",
    "head_ablation": "tasks.head_ablation",
    "head_patterns": "tasks.head_patterns",
    "last_words": "tasks.comparisons",
    "linear_probes": "tasks.probes",
    "load_lexicon": "words",
    "minimal_pairs": "tasks.comparisons",
    "monosemanticity": "units.monosemanticity",
    "multiple_choice": "tasks.comparisons",
    "run_suite": "runner.suite",
    "seed_stability": "features.stability",
    "sparse_probing": "features.probing",
    "summarise": "tasks.summary",
    "task_performance": "tasks.performance",
    "unit_statistics": "units.firing",
    "write_report": "report",
}
__all__ = sorted([*_HOMES, "EXPERIMENTS"])

keep_former_names(
    "analyses",
    {
        "comparison": "runner.comparison",
        "draws": "statistics.draws",
        "lens": "measures.lens",
        "lexicon": "words.lexicon",
        "sentiment": "measures.sentiment",
        "unit_comparison": "units.comparison",
        "unit_report": "units.terminal",
    },
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analyses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"analyses.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
