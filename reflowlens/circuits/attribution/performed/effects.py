"""What a graph predicts of interventions, over all of its paths, and how well that agrees with what is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.ttt_flow import TTTFlow

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Array = np.ndarray
_RESAMPLES = 2000


def predicted_changes(graph: AttributionGraph, factors: Sequence[Mapping[int, float]]) -> Float[Array, "row node"]:
    """By how much the values of all nodes change when nodes are set to multiples of their activation.

    The linear effect over all paths of the graph: an edge adds its weight times the relative change of its source's
    activation, (factor − 1) of a node that is set. Of any other node the activation changes with its value, as much as
    the value where it is active, and times the slope of the activation function of a neuron. Weights keep their signs,
    and no row is normalised. Paths end at nodes that are set. Edges that the graph has not kept, of ``rest`` or pruned,
    carry nothing.

    Args:
        factors: of each intervention, by the numbers of the nodes that are set.

    Returns:
        Zero of nodes that nothing reaches, those that are set among them where nothing else reaches them.
    """
    n_nodes = len(graph.nodes)
    relative, values = np.zeros((n_nodes, len(factors))), np.zeros((n_nodes, len(factors)))
    held = np.zeros_like(relative, dtype=bool)
    for row, each in enumerate(factors):
        for number, factor in each.items():
            relative[number, row], held[number, row] = factor - 1, True
    answer = _answers(graph)
    for first, last in _stages(graph):
        values[first:last] = graph.matrix[first:last] @ relative
        free = ~held[first:last]
        relative[first:last][free] = (answer[first:last, None] * values[first:last])[free]
    return values.T


def _answers(graph: AttributionGraph) -> Float[Array, " node"]:
    """The relative change of each node's activation for a change of its value by 1."""
    kind, activation = graph.nodes["kind"].to_numpy(), graph.nodes["activation"].to_numpy(dtype=np.float64)
    value = graph.nodes["value"].to_numpy(dtype=np.float64)
    slope = np.ones(len(kind))
    model = None if graph.traced is None else graph.traced.model
    if isinstance(model, Decoder | TTTFlow) and not model.cfg.gated_mlp:
        behind = graph.nodes["layer"].to_numpy() >= model.cfg.n_layers  # of the flow step
        for act, here in ((cast(Block, model.blocks[0]).mlp.act, ~behind), (torch.nn.functional.gelu, behind)):
            neurons = (kind == "neuron") & here
            slope[neurons] = _slopes(act, value[neurons])
    writes = np.isfinite(value) & (activation != 0)
    return np.where(writes, slope / np.where(writes, activation, 1.0), 0.0)


def _slopes(act: Callable[[Tensor], Tensor], before: Float[Array, " neuron"]) -> Float[Array, " neuron"]:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor(before, requires_grad=True)
        return torch.autograd.grad(act(x).sum(), x)[0].numpy()


def _stages(graph: AttributionGraph) -> list[tuple[int, int]]:
    """Runs of nodes among which there are no edges, in the order of the pass."""
    nodes = graph.nodes
    begins = (nodes[["kind", "layer"]] != nodes[["kind", "layer"]].shift()).any(axis=1)
    starts = [*np.flatnonzero(begins), len(nodes)]
    return list(pairwise(starts))


@dataclass(frozen=True)
class Correlations:
    """How predictions and observations agree, with 95% intervals by resampling the nodes that were intervened on.

    Args:
        pearson, spearman: correlations, with the ends of their intervals; NaN where one side does not vary.
        slope: least squares of the observed on the predicted, through zero: 1 where sizes agree too.
    """

    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    slope: float


def agreement(
    predicted: Float[Array, " effect"], observed: Float[Array, " effect"], node: Int[Array, " effect"], seed: int = 0
) -> Correlations:
    """Of effects of several nodes, those of a node drawn together; ranks in resamples are those among all effects.

    Args:
        node: the number of the node that each is the effect of.

    >>> x = np.arange(12.0)
    >>> agreement(x, 2 * x, np.arange(12) // 3).slope
    2.0
    """
    numbers, node = np.unique(node, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), _RESAMPLES)
    weights = np.concatenate([np.ones((1, len(numbers))), draws])
    found = []
    for x, y in ((predicted, observed), (_ranks(predicted), _ranks(observed))):
        sample = _correlations(x, y, node, weights)
        spread = sample[1:][np.isfinite(sample[1:])]
        ends = np.quantile(spread, [0.025, 0.975]) if len(numbers) > 1 and len(spread) else [np.nan, np.nan]
        found += [float(sample[0]), *map(float, ends)]
    square = float(predicted @ predicted)
    found.append(float(predicted @ observed) / square if square else float("nan"))
    return Correlations(**dict(zip(Correlations.__dataclass_fields__, found, strict=True)))


def _ranks(x: Float[Array, " effect"]) -> Float[Array, " effect"]:
    return pd.Series(x).rank().to_numpy()


def _correlations(
    x: Float[Array, " effect"],
    y: Float[Array, " effect"],
    node: Int[Array, " effect"],
    weights: Float[Array, "row node"],
) -> Float[Array, " row"]:
    """Correlations with every node's effects counted so many times."""
    x, y = (each - each.mean() for each in (x, y))
    x, y = (each / (np.abs(each).max() or 1.0) for each in (x, y))
    parts = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    by_node = np.stack([np.bincount(node, weights=part, minlength=weights.shape[1]) for part in parts])
    n, x, y, xx, yy, xy = by_node @ weights.T
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return (n * xy - x * y) / np.where(spread > 0, np.sqrt(spread), np.nan)


def relative_size(
    observed: Float[Array, " effect"], control: Float[Array, " effect"], node: Int[Array, " effect"], seed: int = 0
) -> tuple[float, float, float]:
    """The mean size of effects over that of the control's, and a 95% interval by resampling nodes."""
    numbers, node = np.unique(node, return_inverse=True)
    sizes = np.stack([np.bincount(node, weights=np.abs(each)) for each in (observed, control)])
    draws = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), _RESAMPLES)
    above, below = sizes @ np.concatenate([np.ones((1, len(numbers))), draws]).T
    ratio = above / np.where(below > 0, below, np.nan)
    low, high = np.nanquantile(ratio[1:], [0.025, 0.975]) if np.isfinite(ratio).any() else (np.nan, np.nan)
    return float(ratio[0]), float(low), float(high)
