"""How far graphs can be trusted: their scores beside those of nulls, and what they predict of interventions."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.experiments.circuit_tracing.writers import Writers
from analyses.features.graph_scores import graph_scores
from reflowlens.circuits.attribution.graph import AttributionGraph

SCORES = ("replacement", "completeness")
NODES, FACTORS = 16, (0.0, 2.0)  # that are set in a validation, one at a time
_NULLS = {"neurons": "neurons", "random": "random_features", "none": "no_features"}


def scores_beside_nulls(writers: Writers, prompts: Sequence[str], seed: int) -> pd.DataFrame:
    """A row a prompt: ``replacement_model`` and ``completeness_model``, and the same of every null.

    Of a dictionary alone; what is explained are the likeliest tokens of each prompt.
    """
    assert writers.dictionary is not None
    scores = graph_scores(writers.model, writers.dictionary, prompts, seed=seed)
    series = scores["dictionary"].map(_NULLS).fillna("model")
    wide = scores.assign(series=series).pivot(index="prompt", columns="series", values=list(SCORES))
    wide.columns = pd.Index(["_".join(map(str, names)) for names in wide.columns.to_flat_index()])
    return wide.loc[list(prompts)].reset_index()


def validated(graph: AttributionGraph, seed: int) -> dict[str, float]:
    """Correlations of what a graph predicts of interventions on its units with what the model does, and with what it
    does under random units: of the target, and of the units of most influence.

    Empty of a graph of fewer than two units; what does not vary is NaN.
    """
    if graph.nodes["kind"].isin(("feature", "neuron")).sum() < 2:
        return {}
    summary = graph.validate(NODES, FACTORS, free="model", seed=seed).summary.set_index("kind")
    found: dict[str, float] = {}
    for kind, row in summary.iterrows():
        name = "validation_target" if kind == "logit" else "validation_units"
        found |= {f"{name}_model": float(row["pearson"]), f"{name}_matched_unit": float(row["control"])}
    return found
