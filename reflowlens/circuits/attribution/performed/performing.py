"""Nodes of a graph set to multiples of their activation, and what becomes of the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from reflowlens.arguments import real_number
from reflowlens.circuits.attribution.graph import INPUTS, PROMPT
from reflowlens.circuits.attribution.performed.changed_pass import Change, Level, Place
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Free: TypeAlias = bool | Literal["model"]
Factors: TypeAlias = "Mapping[str | tuple[str, ...], float]"
PERFORMED = ("feature", "neuron", "head", *INPUTS, "error", "readout")


def perform(
    graph: AttributionGraph,
    interventions: Factors | Sequence[Factors],
    *,
    free: Free = True,
    memory: float | None = None,
) -> pd.DataFrame:
    """Set nodes to multiples of their activation, and read what becomes of the others.

    Args:
        interventions: by node, or by tuple of nodes, the factor by which the activation on the prompt is multiplied: 0
            removes a node, 1 changes nothing. All of a mapping is done at once; of a sequence of mappings each is an
            intervention of its own, many of which are run in a batch. Features, neurons, heads, errors, embeddings,
            positions, signals and readouts can be set.
        free: True: the dictionary is spliced into the model, with the errors of the prompt as constants, and everything
            behind is computed anew, attention patterns, norm scales, and features through their activation function.
            False: patterns, scales and gates are held as well, as the graph holds them. ``"model"``: the errors, too,
            are computed anew: a change of features in the model as it is.
        memory: bytes for a batch; default: as for :func:`rl.sweep`.

    Returns:
        A row an intervention and node that has a value and is not set: ``intervention`` (its number), ``node``,
        ``kind``, ``layer``, ``pos``, ``before``, ``after`` (the ``value`` of the node: pre-activation, or logit) and
        ``change``. Features that were not active have no node; they may become active, and then write.

    Raises:
        ReflowlensError: a node does not exist, cannot be set or is silent, a factor is no finite number, nothing is
            asked for, the graph was read from a file, or the model is not what it was.

    Example: ``graph.perform([{"feature:1.17@4": 0}, {("feature:1.17@4", "feature:2.3@4"): 2}])``
    """
    asked: list[Any] = [interventions] if isinstance(interventions, Mapping) else list(interventions)
    if not asked:
        raise ReflowlensError("no intervention: give at least one, such as {node: 0}")
    factors = [factors_of(graph, each) for each in asked]
    values = performed(graph, [change_of(graph, each) for each in factors], level_of(free), memory).values
    nodes = graph.nodes
    has_value = np.flatnonzero(nodes["value"].notna())
    parts = []
    for number, (each, after) in enumerate(zip(factors, values[1:], strict=True)):
        read = has_value[~np.isin(has_value, list(each))]
        part = nodes.loc[read, ["node", "kind", "layer", "pos"]].reset_index(drop=True)
        part.insert(0, "intervention", number)
        parts.append(part.assign(before=values[0, read], after=after[read], change=after[read] - values[0, read]))
    return pd.concat(parts, ignore_index=True)


def level_of(free: Free) -> Level:
    """What ``free=`` holds."""
    if isinstance(free, str) and free == "model":
        return "model"
    if isinstance(free, bool):
        return "free" if free else "constrained"
    raise ReflowlensError(f"free must be True, False or 'model', got {free!r}")


def factors_of(graph: AttributionGraph, intervention: Factors) -> dict[int, float]:
    """The factors of an intervention by the numbers of the nodes."""
    if not isinstance(intervention, Mapping) or not intervention:
        raise ReflowlensError(
            f"an intervention says by node what its activation is multiplied with, got {intervention!r}"
        )
    numbers = {name: number for number, name in enumerate(graph.nodes["node"])}
    kinds, activations = graph.nodes["kind"].tolist(), graph.nodes["activation"].tolist()
    found: dict[int, float] = {}
    for key, factor in intervention.items():
        names = (key,) if isinstance(key, str) else key
        if not isinstance(names, tuple) or not names:
            raise ReflowlensError(f"what is set is the name of a node or a tuple of names, got {key!r}")
        factor = real_number(factor, f"the factor of {key!r}")
        if not np.isfinite(factor):
            raise ReflowlensError(f"the factor of {key!r} must be finite, got {factor}")
        for name in names:
            if name not in numbers:
                near = difflib.get_close_matches(str(name), numbers, n=1)
                raise ReflowlensError(
                    f"no node {name!r} in this graph" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            number = numbers[name]
            if kinds[number] not in PERFORMED:
                raise ReflowlensError(f"{name!r} cannot be set: that can {', '.join(PERFORMED)}")
            if activations[number] == 0:
                raise ReflowlensError(f"{name!r} is not active on this prompt, and every multiple of 0 is 0")
            if number in found:
                raise ReflowlensError(f"{name!r} is set twice in one intervention")
            found[number] = factor
    return found


def change_of(graph: AttributionGraph, factors: Mapping[int, float]) -> Change:
    """Nodes, by their numbers, set to factors of their activation."""
    activation = graph.nodes["activation"].to_numpy()
    return Change({place_of(graph, number): (f - 1) * float(activation[number]) for number, f in factors.items()})


def place_of(graph: AttributionGraph, number: int) -> Place:
    node = graph.nodes.iloc[number]
    unit = 0 if node["kind"] in (*PROMPT, "error") else int(node["feature"])
    return Place(node["kind"], int(node["layer"]), int(node["pos"]), unit)
