"""Whether a graph is to be trusted: a few interventions in the model, as the header of every graph quotes them.

The rule: a graph is trusted if errors have less than half of the influence; if the effects that it predicts correlate
with those seen in the model, the whole interval above zero and above the same correlation with random nodes; and if its
nodes alone keep half of the prediction at least, and more than random ones. By the first, most of what is explained
comes by way of what the graph shows; by the second, its nodes do what it says, and others that write as much do not; by
the third, they are most of what there is to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.performed.changed_pass import Change
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.effects import agreement, predicted_changes
from reflowlens.circuits.attribution.performed.matched import Matched, instead
from reflowlens.circuits.attribution.performed.performing import change_of, place_of
from reflowlens.circuits.attribution.performed.validation import UNITS, strongest
from reflowlens.circuits.attribution.traced import traced_of

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

N_NODES = 24
_FEWEST = 4
_RANDOM = 3  # circuits
_SMALLEST = 1e-6  # difference of the whole and the empty circuit, of the metric, below which shares say nothing


def faithfulness(graph: AttributionGraph) -> dict[str, Any]:
    """Remove the strongest nodes one at a time from the model, and all nodes outside of the pruned graph at once.

    Returns:
        ``correlation``, ``low``, ``high``: Pearson's, of predicted and observed effects of removing each of the 24
            features or neurons of most influence, as many of each block, in the model as it is (``free="model"``), on
            the targets; of several the effects less their mean, for all logits rise and fall together with the scale of
            the final norm, which the graph holds. 95% interval by resampling nodes.
        ``control``: the same with the effects of random nodes that write as much (:class:`~.matched.Matched`).
        ``faithfulness``: of the nodes C of ``graph.prune()``, or of a pruned graph itself,
            (m(C) − m(∅)) / (m(M) − m(∅)) as of circuits: C with all other features (of neurons: all other nodes)
            removed, ∅ without any, M the model, and m minus the Kullback-Leibler divergence of the next token from the
            model's (of a graph of features, their mean value). ``completeness``: the same of what is left without C,
            near 0 where C holds all that matters.
        ``faithfulness_control``: the mean of three random circuits of as many active features of each block.
        ``error_influence``: of ``graph.scores()``.
        ``trustworthy``: whether errors have less than half of the influence, ``low`` is above 0 and above ``control``,
            and ``faithfulness`` is at least one half and above ``faithfulness_control``. ``reason``: what fails first,
            ``"errors"``, ``"few nodes"``, ``"correlation"``, ``"control"`` or ``"faithfulness"``, or ``""``.
            ``verdict``: a sentence.

        What is not defined is NaN.

    Raises:
        ReflowlensError: as :func:`~.performing.perform`.
    """
    traced, chosen = traced_of(graph), strongest(graph, N_NODES)
    removed = [{int(number): 0.0} for number in chosen]
    changes, matched = [change_of(graph, each) for each in removed], Matched(traced, seed=0)
    controls = [
        instead(change, matched.draw(place_of(graph, int(number))))
        for change, number in zip(changes, chosen, strict=True)
    ]
    outcome = performed(graph, [*changes, *controls, *_circuits(graph)], "model")
    values, share = outcome.values, graph.nodes["target"].to_numpy()
    targets = np.flatnonzero(share > 0)
    metric = -_divergence(outcome.logits) if outcome.logits.size else values[:, targets] @ share[targets]
    empty, circuit, without, *random_circuits = metric[-3 - _RANDOM :]
    whole = metric[0] - empty
    far_enough = abs(whole) > _SMALLEST * max(abs(metric[0]), abs(empty))
    shares = (np.array([circuit, np.mean(random_circuits), without]) - empty) / (whole if far_enough else np.nan)
    found = dict.fromkeys(("correlation", "low", "high", "control"), np.nan)
    found |= zip(("faithfulness", "faithfulness_control", "completeness"), shares, strict=True)
    found["error_influence"] = graph.scores()["error_influence"]
    n = len(chosen)
    if n >= 2:
        effects = [
            predicted_changes(graph, removed),
            values[1 : n + 1] - values[0],
            values[n + 1 : 2 * n + 1] - values[0],
        ]
        predicted, observed, random = (_effects_on(each[:, targets]) for each in effects)
        node = np.arange(n).repeat(len(targets))
        agrees = agreement(predicted, observed, node)
        found |= {"correlation": agrees.pearson, "low": agrees.pearson_low, "high": agrees.pearson_high}
        found["control"] = agreement(predicted, random, node).pearson
    found = {name: float(value) for name, value in found.items()}
    return found | _judged(found, n)


def _divergence(logits: Float[np.ndarray, "row d_vocab"]) -> Float[np.ndarray, " row"]:
    """KL(first row ‖ row), in nats."""
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return (np.exp(log_p[0]) * (log_p[0] - log_p)).sum(axis=1)


def _effects_on(changes: np.ndarray) -> np.ndarray:
    """Of each node on each target, of several less their mean."""
    if changes.shape[1] > 1:
        changes = changes - changes.mean(axis=1, keepdims=True)
    return changes.ravel()


def _circuits(graph: AttributionGraph) -> list[Change]:
    """Without all features (nodes that are neurons); with those of the pruned graph alone; with all but those; with
    random ones alone, as many of each block."""
    traced = traced_of(graph)
    is_whole = len(graph.nodes) == traced.engine.layout.n_nodes
    nodes = (graph.prune() if is_whole else graph).nodes
    of_neurons = traced.dictionary is None
    rng = np.random.default_rng(0)
    masks: list[dict[int, Tensor]] = [{} for _ in range(3 + _RANDOM)]
    for block, units in enumerate(traced.engine.replacement.units):
        places = torch.stack([units.position, units.index])
        size = len(traced.tokens), traced.n_units(block)
        if not size[1]:
            continue
        outside = torch.full(size, of_neurons, device=places.device)  # neurons that are no nodes are never removed
        outside[units.position, units.index] = False
        here = nodes[nodes["kind"].isin(UNITS) & (nodes["layer"] == block)]
        kept = torch.tensor(here[["pos", "feature"]].to_numpy(int).T, device=places.device)
        random = [places[:, rng.permutation(len(units))[: len(here)]] for _ in range(_RANDOM)]
        circuit = _with(outside, kept)
        without = ~circuit | outside
        for mask, each in zip(
            masks, [outside, circuit, without, *(_with(outside, some) for some in random)], strict=True
        ):
            mask[block] = each
    return [Change({}, mask) for mask in masks]


def _with(mask: Bool[Tensor, "pos unit"], places: Int[Tensor, "2 place"]) -> Bool[Tensor, "pos unit"]:
    mask, (position, unit) = mask.clone(), places
    mask[position, unit] = True
    return mask


def _judged(found: dict[str, float], n_nodes: int) -> dict[str, Any]:
    errors = f"errors have {found['error_influence']:.0%} of the influence"
    seen = f"predicted and observed effects correlate at {found['correlation']:.2f}"
    interval = f"{found['low']:.2f} to {found['high']:.2f}"
    if not found["error_influence"] < 0.5:
        reason, why = "errors", errors
    elif n_nodes < _FEWEST:
        reason, why = "few nodes", f"it has {n_nodes} features or neurons that can be removed, and {_FEWEST} are needed"
    elif not found["low"] > 0:
        reason, why = "correlation", f"{seen} ({interval})"
    elif not found["low"] > found["control"]:
        reason, why = "control", f"{seen} ({interval}), and with those of random nodes at {found['control']:.2f}"
    elif not found["faithfulness"] >= 0.5 or not found["faithfulness"] > found["faithfulness_control"]:
        reason = "faithfulness"
        random = f"random ones {found['faithfulness_control']:.0%}"
        why = f"its nodes alone keep {found['faithfulness']:.0%} of the prediction, {random}"
        if np.isnan(found["faithfulness"]):
            why = "without its features the prediction is the same"
    else:
        return {"trustworthy": True, "reason": "", "verdict": f"trustworthy: {seen} ({interval}); {errors}"}
    return {"trustworthy": False, "reason": reason, "verdict": f"not trustworthy: {why}"}
