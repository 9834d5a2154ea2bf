"""How far graphs of a dictionary can be trusted, over many prompts and beside what any features would score.

    scores = graph_scores(model, dictionary, prompts, against={"untrained": (untrained, its_dictionary)})
    print(summary(scores))

Scores are those of whole graphs (`reflowlens.circuits.attribution.graph.AttributionGraph.scores`). Beside the
dictionary stand the nulls of `analyses.features.graph_nulls` on the same frozen prompts, and other dictionaries: of
the same model, such as one with a frozen decoder, or of another with its own model, such as the untrained one. Prompts
are the unit of replication, and differences from the dictionary are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.features.graph_nulls import RandomFeatures, strongest_units, without_features
from analyses.statistics.intervals import Interval, bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from reflowlens.circuits.attribution.attribute import attribute, trace, unrounded
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.many import USABLE, with_prompt
from reflowlens.circuits.attribution.scores.redrawn import redrawn
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

SUMMARISED = ("replacement", "completeness", "error_influence", "usable")


@torch.no_grad()
def graph_scores(
    model: HookedModel,
    dictionary: Dictionary,
    prompts: Sequence[str],
    *,
    against: Mapping[str, Dictionary | tuple[HookedModel, Dictionary]] | None = None,
    with_nulls: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Scores of the graphs of every prompt, of a dictionary, its nulls and other dictionaries.

    Args:
        model: the one that the dictionary was trained on.
        prompts: texts of two tokens at least; what is explained are the likeliest tokens of each.
        against: other dictionaries by name; of one of another model, such as the untrained one, that model too.
        with_nulls: also ``neurons``, ``random`` and ``none``.
        seed: of the random features.
        progress: show a bar.

    Returns:
        A row a prompt and dictionary or null: ``dictionary``, ``prompt``, ``l0``: features that are active at a block
        and position; the four scores, and ``usable``, whether the replacement score is at least 0.5.

    Raises:
        ReflowlensError: there is no prompt, a name stands for two rows, or as :func:`reflowlens.attribute`.

    Example: ``summary(graph_scores(model, dictionary, [one.prompt for one in load_lexicon().factual]))``
    """
    name = dictionary.cfg.name or "dictionary"
    others = dict(against or {})
    for other in others:
        if other in (name, *(("neurons", "random", "none") if with_nulls else ())):
            raise ReflowlensError(f"{other!r} is already a row of the table: give the other dictionary another name")
    if not prompts:
        raise ReflowlensError("scores of graphs need a prompt at least")
    random = RandomFeatures(dictionary.cfg.n_features, model.cfg.d_model, seed)
    rows = []
    for number, prompt in enumerate(bar(prompts, show=progress, unit="prompt", desc="graphs")):
        graph = with_prompt(number, prompt, attribute, model, prompt, dictionary, progress=False)
        graphs = {name: graph}
        if with_nulls:
            graphs |= _nulls(graph, random)
        for other, its in others.items():
            its_model, it = its if isinstance(its, tuple) else (model, its)
            graphs[other] = with_prompt(number, prompt, attribute, its_model, prompt, it, progress=False)
        rows += [{"dictionary": key, "prompt": prompt, **_scores(its)} for key, its in graphs.items()]
    return pd.DataFrame(rows)


def summary(scores: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means over prompts with intervals, and what is between each row and the first.

    Returns:
        A row a dictionary or null and score, ``usable`` among them: ``dictionary``, ``l0``, ``score``, ``mean``,
        ``low`` and ``high`` (bootstrap over prompts; of ``usable`` the exact interval of a rate), ``difference`` from
        the first, which is the dictionary, ``difference_low`` and ``difference_high``, and its ``pvalue`` by random
        signs, two-sided.

    Raises:
        ReflowlensError: there are fewer than 2 prompts.
    """
    groups = list(scores.groupby("dictionary", sort=False))
    rows = []
    for name, own in groups:
        for score in SUMMARISED:
            values, first = (part[score].to_numpy(dtype=float) for part in (own, groups[0][1]))
            differences = values - first
            interval = rate_interval(values, seed=seed) if score == "usable" else _interval(values, resamples, seed)
            row = {"dictionary": name, "l0": own["l0"].mean(), "score": score, "mean": values.mean()}
            row |= interval._asdict()
            if own is not groups[0][1]:
                low, high = _interval(differences, resamples, seed)
                row |= {"difference": differences.mean(), "difference_low": low, "difference_high": high}
                row["pvalue"] = paired_permutation_pvalue(differences, "two-sided", seed=seed)
            rows.append(row)
    return pd.DataFrame(rows)


def _interval(values: NDArray[np.float64], resamples: int, seed: int) -> Interval:
    return bootstrap_interval(values, resamples=resamples, seed=seed)


def _nulls(graph: AttributionGraph, random: RandomFeatures) -> dict[str, AttributionGraph]:
    traced = graph.traced
    assert traced is not None  # of a graph that was just made
    model, tokens, own = traced.model, traced.tokens, traced.engine.replacement
    reads = [f"blocks.{block}.ln2.hook_normalized" for block in range(len(own.units))]
    read = [x[0] for x in model.run_with_cache(tokens, names_filter=reads, return_cache_object=False)[1].values()]
    counts = [units.position[units.activation > 0].bincount(minlength=len(tokens)) for units in own.units]
    most = max(int(count.max()) for count in counts)
    of_neurons = unrounded(trace)(model, tokens, None, None, None, most, False, False, False)[0]
    neurons = strongest_units(of_neurons.engine.replacement, counts)
    return {
        "neurons": redrawn(of_neurons, neurons),
        "random": redrawn(traced, random(own, read)),
        "none": redrawn(traced, without_features(own)),
    }


def _scores(graph: AttributionGraph) -> dict[str, Any]:
    nodes, scores = graph.nodes, graph.scores()
    active = nodes["kind"].isin(["feature", "neuron"]) & (nodes["activation"] != 0)
    places = (nodes["kind"] == "error").sum()
    return {"l0": active.sum() / places, **scores, "usable": scores["replacement"] >= USABLE}
