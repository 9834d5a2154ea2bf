"""reflowlens: language models whose predictions are sums over readable signals, and the tools to test that.

    import reflowlens as rl
    model = rl.load_model("reflow-nano")
    logits, cache = model.run_with_cache("The capital of France is")

Names are imported when first used, so that ``import reflowlens`` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from reflowlens.former_names import keep_former_names

if TYPE_CHECKING:
    from reflowlens import metrics as metrics
    from reflowlens.ablations.readout import ablate_progressively as ablate_progressively
    from reflowlens.ablations.readout import ablate_readout as ablate_readout
    from reflowlens.ablations.upstream import ablate_upstream as ablate_upstream
    from reflowlens.activations.cache import ActivationCache as ActivationCache
    from reflowlens.activations.collect import Collected as Collected
    from reflowlens.activations.collect import collect as collect
    from reflowlens.checkpoints import list_models as list_models
    from reflowlens.checkpoints import load_model as load_model
    from reflowlens.checkpoints import save_model as save_model
    from reflowlens.circuits.attribution.attribute import attribute as attribute
    from reflowlens.circuits.attribution.cost import graph_cost as graph_cost
    from reflowlens.circuits.attribution.directions import DirectionAt as DirectionAt
    from reflowlens.circuits.attribution.graph import AttributionGraph as AttributionGraph
    from reflowlens.circuits.attribution.linear.replacement import FeatureAt as FeatureAt
    from reflowlens.circuits.attribution.many import AttributionGraphs as AttributionGraphs
    from reflowlens.circuits.attribution.many import attribute_each as attribute_each
    from reflowlens.circuits.attribution.performed.dose import dose_response as dose_response
    from reflowlens.circuits.circuits import completeness as completeness
    from reflowlens.circuits.circuits import faithfulness as faithfulness
    from reflowlens.circuits.circuits import grow_circuit as grow_circuit
    from reflowlens.circuits.edges import edge_attribution as edge_attribution
    from reflowlens.circuits.graph import Graph as Graph
    from reflowlens.circuits.path_patching import exact_edges as exact_edges
    from reflowlens.circuits.path_patching import path_patch as path_patch
    from reflowlens.circuits.screening import agreement as agreement
    from reflowlens.circuits.screening import screen as screen
    from reflowlens.config import PRESETS as PRESETS
    from reflowlens.config import ModelConfig as ModelConfig
    from reflowlens.dictionaries.dictionary import Dictionary as Dictionary
    from reflowlens.dictionaries.files import list_dictionaries as list_dictionaries
    from reflowlens.dictionaries.files import load_dictionary as load_dictionary
    from reflowlens.dictionaries.files import save_dictionary as save_dictionary
    from reflowlens.errors import ReflowlensError as ReflowlensError
    from reflowlens.generation import generate as generate
    from reflowlens.interventions.apply import intervene as intervene
    from reflowlens.interventions.apply import run as run
    from reflowlens.interventions.edit import AddWeights as AddWeights
    from reflowlens.interventions.edit import ScaleWeights as ScaleWeights
    from reflowlens.interventions.edit import SetWeights as SetWeights
    from reflowlens.interventions.edit import SwapWeights as SwapWeights
    from reflowlens.interventions.edit import edit as edit
    from reflowlens.interventions.values import Ablate as Ablate
    from reflowlens.interventions.values import Patch as Patch
    from reflowlens.interventions.values import Replace as Replace
    from reflowlens.interventions.values import Scale as Scale
    from reflowlens.interventions.values import Steer as Steer
    from reflowlens.models import build_model as build_model
    from reflowlens.notebook.attention import show_attention as show_attention
    from reflowlens.notebook.feature_card import show_feature as show_feature
    from reflowlens.notebook.tokens import show_tokens as show_tokens
    from reflowlens.prompts import Prompts as Prompts
    from reflowlens.scoring.score import Scores as Scores
    from reflowlens.scoring.score import score as score
    from reflowlens.signals import SignalView as SignalView
    from reflowlens.signals import signal_view as signal_view
    from reflowlens.storage.model_hash import model_hash as model_hash
    from reflowlens.sweeps.sweep import sweep as sweep
    from reflowlens.tokenizers.by_name import get_tokenizer as get_tokenizer

_HOMES = {
    "Ablate": "interventions.values",
    "ActivationCache": "activations.cache",
    "AddWeights": "interventions.edit",
    "AttributionGraph": "circuits.attribution.graph",
    "AttributionGraphs": "circuits.attribution.many",
    "Dictionary": "dictionaries.dictionary",
    "DirectionAt": "circuits.attribution.directions",
    "FeatureAt": "circuits.attribution.linear.replacement",
    "Graph": "circuits.graph",
    "Collected": "activations.collect",
    "ModelConfig": "config",
    "PRESETS": "config",
    "Patch": "interventions.values",
    "Prompts": "prompts",
    "ReflowlensError": "errors",
    "Replace": "interventions.values",
    "Scale": "interventions.values",
    "ScaleWeights": "interventions.edit",
    "Scores": "scoring.score",
    "SetWeights": "interventions.edit",
    "SignalView": "signals",
    "Steer": "interventions.values",
    "SwapWeights": "interventions.edit",
    "ablate_progressively": "ablations.readout",
    "ablate_readout": "ablations.readout",
    "ablate_upstream": "ablations.upstream",
    "agreement": "circuits.screening",
    "attribute": "circuits.attribution.attribute",
    "attribute_each": "circuits.attribution.many",
    "build_model": "models",
    "collect": "activations.collect",
    "completeness": "circuits.circuits",
    "dose_response": "circuits.attribution.performed.dose",
    "edge_attribution": "circuits.edges",
    "edit": "interventions.edit",
    "exact_edges": "circuits.path_patching",
    "faithfulness": "circuits.circuits",
    "generate": "generation",
    "get_tokenizer": "tokenizers",
    "graph_cost": "circuits.attribution.cost",
    "grow_circuit": "circuits.circuits",
    "intervene": "interventions.apply",
    "list_dictionaries": "dictionaries.files",
    "list_models": "checkpoints",
    "load_dictionary": "dictionaries.files",
    "load_model": "checkpoints",
    "model_hash": "storage.model_hash",
    "path_patch": "circuits.path_patching",
    "run": "interventions.apply",
    "save_dictionary": "dictionaries.files",
    "save_model": "checkpoints",
    "score": "scoring.score",
    "screen": "circuits.screening",
    "show_attention": "notebook.attention",
    "show_feature": "notebook.feature_card",
    "show_tokens": "notebook.tokens",
    "signal_view": "signals",
    "sweep": "sweeps.sweep",
}
_MODULES = ("metrics",)
__all__ = sorted([*_HOMES, *_MODULES])

keep_former_names("reflowlens", {"figure_export": "figures.export"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"reflowlens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'reflowlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"reflowlens.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
