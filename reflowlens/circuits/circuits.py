"""Circuits: how much of what a model does a part of it does alone, against random parts like it.

A circuit is a set of nodes (heads and MLPs; the embedding belongs to all) or a set of edges. It is judged by running
the clean prompts with everything outside it replaced (:mod:`reflowlens.circuits.runs`).

* Faithfulness of a circuit C in a model M is (m(C) - m(∅)) / (m(M) - m(∅)) for a metric m: 1 when C alone does what
  the model does, 0 when it does no more than nothing (Hanna et al., 2024, arXiv 2403.17806).
* Completeness is the faithfulness of what is left without it, M \\ C: near 0 when C holds all that matters (Marks et
  al., 2024, arXiv 2403.19647).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.arguments import number_of_runs, real_number, whole_number
from reflowlens.circuits.edges import EdgeScores
from reflowlens.circuits.graph import Edge, Graph
from reflowlens.circuits.runs import Ablation, Circuit, CircuitRuns, mask_of
from reflowlens.circuits.task import TaskPerformance, warn_unless_done
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import Metric
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions

Match = Literal["kind", "layer"]
_EVERY_SIZE = 100  # nodes: of so many a circuit of every size is run
_TIE = 1e-6  # the same circuit in another batch


@dataclass(frozen=True)
class CircuitScore:
    """How a circuit compares with the whole model, with nothing, and with random circuits like it.

    Args:
        value: the normalised score, from means over prompts.
        metric: each prompt's value in the run that is scored.
        full, empty: the same of the whole model and of an empty circuit.
        null: scores of the matched random circuits.
        pvalue: (1 + number of random circuits at least as good) / (1 + number of random circuits); NaN without any.
        size: number of nodes (without the embedding) or edges, of ``total`` in the model.
        performance: whether the model does the task, where right and wrong answers are known (from the prompts, or by
            a ``logit_diff``); where it does not, a warning says so, and ``value`` is not to be read.
    """

    value: float
    metric: Float[Tensor, " prompt"]
    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    null: tuple[float, ...]
    pvalue: float
    size: int
    total: int
    performance: TaskPerformance | None = None


@dataclass(frozen=True)
class CircuitGrowth:
    """Circuits of growing size.

    Args:
        frame: one row a circuit: ``size``, ``faithfulness``, ``completeness``.
        circuits: in the same order.
        performance: as of :class:`CircuitScore`.
    """

    frame: pd.DataFrame
    circuits: Sequence[Circuit]
    performance: TaskPerformance | None = None

    def smallest(self, faithfulness: float) -> Circuit:
        """The first circuit that is at least so faithful.

        Raises:
            ReflowlensError: none is.
        """
        faithfulness = real_number(faithfulness, "faithfulness")
        for circuit, value in zip(self.circuits, self.frame.faithfulness, strict=True):
            if value >= faithfulness:
                return circuit
        best = self.frame.faithfulness.max()
        raise ReflowlensError(f"no circuit reaches a faithfulness of {faithfulness:g}; the best has {best:.3g}")


@guarded(changing)
def faithfulness(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    circuit: Circuit = (),
    metric: Metric | None = None,
    *,
    positions: Positions = None,
    ablation: Ablation = "corrupted",
    controls: int = 100,
    match: Match = "kind",
    seed: int = 0,
    memory: float | None = None,
) -> CircuitScore:
    """How much of the model's behaviour is left when everything outside a circuit is replaced.

    Args:
        clean: the prompts that are run; of :class:`reflowlens.Prompts` both columns are used, and ``corrupted`` is left
            out.
        corrupted: the prompts whose activations replace; as many tokens as ``clean``, unless ``positions`` aligns them.
        circuit: names of heads and MLPs (``["a0.h2", "m1"]``), or edges (``[("a0.h2", "a5.h2<v>"), ...]``); see
            :mod:`reflowlens.circuits.graph`. The embedding belongs to every circuit of nodes.
        metric: one of :mod:`reflowlens.metrics`, not normalised.
        positions: where what lies outside is replaced: None, at every position; ``"right"``, at those that both prompts
            of a pair have, counted from their ends; or a list of roles, ``"last"`` and indices, as of
            :func:`reflowlens.sweep`. Elsewhere it stays as in the clean run.
        ablation: replace by each prompt's own ``"corrupted"`` run, or by the ``"mean"`` over all corrupted prompts,
            position by position, of which there may then be any number; with ``positions`` (``"left"`` too) over those
            that have it, counted from their beginning, their end, or by role.
        controls: number of random circuits of the same size.
        match: these have as many nodes (edges) of each ``"kind"``, or of each kind in each ``"layer"``. An edge's kind
            is that of both ends. Random edges seldom connect: they make a weak control, random nodes a fair one.

    Returns:
        ``pvalue`` counts random circuits that are at least as faithful.

    Raises:
        ReflowlensError: a node or edge does not exist, the prompts do not fit together, the metric is the same with
            everything replaced, or what overflows reaches it.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> texts = "The king of France", "The king of China"
        >>> everything = rl.Graph.of(model).edges
        >>> round(rl.faithfulness(model, *texts, everything, rl.metrics.kl(), controls=0).value, 4)
        1.0
    """
    runs = CircuitRuns(model, clean, corrupted, metric, ablation, positions)
    return _score(runs, circuit, controls, match, seed, memory, removed=False)


@guarded(changing)
def completeness(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    circuit: Circuit = (),
    metric: Metric | None = None,
    *,
    positions: Positions = None,
    ablation: Ablation = "corrupted",
    controls: int = 100,
    match: Match = "kind",
    seed: int = 0,
    memory: float | None = None,
) -> CircuitScore:
    """How much of the model's behaviour is left when a circuit is replaced and all else is kept: the less, the better.

    Args:
        model, clean, corrupted, circuit, metric, positions, ablation, controls, match, seed, memory: as in
            :func:`faithfulness`.

    Returns:
        ``value`` is 0 where nothing of the behaviour is left, 1 where all of it is; ``pvalue`` counts random circuits
        whose removal leaves as little.

    Raises:
        ReflowlensError: as :func:`faithfulness`.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> texts = "The king of France", "The king of China"
        >>> everything = rl.Graph.of(model).edges
        >>> round(abs(rl.completeness(model, *texts, everything, rl.metrics.kl(), controls=0).value), 4)
        0.0
    """
    runs = CircuitRuns(model, clean, corrupted, metric, ablation, positions)
    return _score(runs, circuit, controls, match, seed, memory, removed=True)


@guarded(changing)
def grow_circuit(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    scores: EdgeScores | None = None,
    metric: Metric | None = None,
    *,
    of: Literal["edges", "nodes"] = "edges",
    sizes: Sequence[int] | None = None,
    positions: Positions = None,
    ablation: Ablation = "corrupted",
    memory: float | None = None,
    progress: bool | None = None,
) -> CircuitGrowth:
    """Grow a circuit by attribution scores and follow its faithfulness and completeness.

    Edges are taken greedily from the logits backwards: always the one with the largest absolute score that ends at a
    node which is already in the circuit, so that every circuit is connected (Hanna et al., 2024). Nodes are taken by
    the absolute sum of their edges' scores.

    Args:
        clean, corrupted, metric, positions, ablation: as in :func:`faithfulness`.
        scores: of :func:`reflowlens.circuits.edges.edge_attribution` or ``exact_edges``.
        sizes: of the circuits; default: every number of nodes of a model that has up to 100; of larger ones, and of
            edges, about twenty numbers, evenly on a log scale.
        memory: bytes that the runs may take at once; default: a share of what is free.
        progress: show a bar; by default on a terminal.

    Returns:
        ``frame`` has a row per size, with faithfulness and completeness; ``circuits`` the circuits themselves.

    Raises:
        ReflowlensError: as :func:`faithfulness`; or a size is below one.
    """
    if of not in ("edges", "nodes"):
        raise ReflowlensError(f"a circuit is of 'edges' or of 'nodes', not of {of!r}")
    if not isinstance(scores, EdgeScores):
        raise ReflowlensError(f"scores must be those of rl.edge_attribution or rl.exact_edges, got {scores!r}")
    runs = CircuitRuns(model, clean, corrupted, metric, ablation, positions)
    full, empty = _ends(runs.graph, nodes=of == "nodes")
    order: list[Any] = list(strongest_nodes(scores)) if of == "nodes" else greedy_edges(scores)
    if sizes is None:
        some = np.unique(np.geomspace(1, len(order), 20).round().astype(int)).tolist()
        sizes = range(len(order) + 1) if of == "nodes" and len(order) <= _EVERY_SIZE else [0, *some]
    sizes = [whole_number(size, "a circuit's size", 0) for size in (sizes if isinstance(sizes, Iterable) else [sizes])]
    if not sizes:
        raise ReflowlensError("sizes of circuits must be at least one")
    circuits = [order[:size] for size in sizes]
    kept = [mask_of(runs.graph, circuit) | empty for circuit in circuits]
    left = [full & ~mask | empty for mask in kept]
    values = runs.values([full, empty, *kept, *left], memory, progress)
    shares, performance = shares_of(values), runs.performance(values[:2])
    warn_unless_done(performance, "the faithfulness of its circuits")
    n = len(circuits)
    frame = pd.DataFrame({"size": [len(c) for c in circuits], "faithfulness": shares[:n], "completeness": shares[n:]})
    return CircuitGrowth(frame, circuits, performance)


def greedy_edges(scores: EdgeScores) -> list[Edge]:
    """All scored edges in the order in which a circuit takes them, from the logits backwards."""
    graph, strength = scores.graph, scores.values.mean(dim=-1).abs()
    order: list[Edge] = []
    reached: set[str] = set()
    candidates: list[tuple[float, str, str]] = []

    def reach(receivers: Sequence[str]) -> None:
        for receiver in set(receivers) - reached:
            for sender, value in zip(graph.senders, strength[:, graph.receiver(receiver)].tolist(), strict=True):
                if not np.isnan(value):
                    heapq.heappush(candidates, (-value, sender, receiver))
        reached.update(receivers)

    reach(["logits"])
    while candidates:
        _, sender, receiver = heapq.heappop(candidates)
        order.append((sender, receiver))
        reach(graph.reads_of(sender))
    return order


def strongest_nodes(scores: EdgeScores) -> list[str]:
    """Heads and MLPs by the absolute sum of their edges' scores, the strongest first."""
    strength = scores.nodes.drop("embed").abs()
    return list(strength.sort_values(ascending=False, kind="stable").index)


def matched_circuits(graph: Graph, circuit: Circuit, n: int, match: Match = "kind", seed: int = 0) -> list[Circuit]:
    """Random circuits with as many nodes (edges) of each kind, or of each kind in each layer, as a circuit has.

    >>> graph = Graph(n_layers=2, n_heads=4, n_key_value_heads=4)
    >>> matched_circuits(graph, ["a0.h1", "m1"], 2)
    [['a0.h2', 'm0'], ['a1.h3', 'm1']]
    >>> matched_circuits(graph, ["a0.h1", "m1"], 2, match="layer")
    [['a0.h2', 'm1'], ['a0.h3', 'm1']]
    """

    if match not in ("kind", "layer"):
        raise ReflowlensError(f"controls match by 'kind' or by 'layer', not by {match!r}")

    def group(part: str | Edge) -> Hashable:
        ends = (graph.sender_places[part],) if isinstance(part, str) else graph.places(part)
        return tuple((end.kind, end.layer if match == "layer" else None) for end in ends)

    everything: Circuit = graph.senders[1:] if _of_nodes(circuit) else graph.edges
    members: dict[Hashable, list[Any]] = {}
    for part in everything:
        members.setdefault(group(part), []).append(part)
    counts = Counter(group(part) for part in dict.fromkeys(circuit) if part != "embed")
    rng = np.random.default_rng(seed)

    def draw() -> list[Any]:
        return [members[key][i] for key, count in counts.items() for i in rng.permutation(len(members[key]))[:count]]

    return [draw() for _ in range(n)]


def _score(
    runs: CircuitRuns, circuit: Circuit, controls: int, match: Match, seed: int, memory: float | None, removed: bool
) -> CircuitScore:
    controls, seed = number_of_runs(controls, "controls", 0), whole_number(seed, "seed", 0)
    circuit = _checked(circuit)
    full, empty = _ends(runs.graph, nodes=_of_nodes(circuit))
    masks = [mask_of(runs.graph, circuit)]
    masks += [mask_of(runs.graph, other) for other in matched_circuits(runs.graph, circuit, controls, match, seed)]
    masks = [(full & ~mask if removed else mask) | empty for mask in masks]
    values = runs.values([full, empty, *masks], memory)
    observed, *null = shares_of(values)
    performance = runs.performance(values[:2])
    warn_unless_done(performance, f"{'completeness' if removed else 'faithfulness'} of a circuit")
    ahead = sum(share <= observed + _TIE if removed else share >= observed - _TIE for share in null)
    return CircuitScore(
        value=observed,
        metric=values[2],
        full=values[0],
        empty=values[1],
        null=tuple(null),
        pvalue=(1 + ahead) / (1 + controls) if controls else float("nan"),
        size=len(set(circuit) - {"embed"}),
        total=len(runs.graph.senders) - 1 if _of_nodes(circuit) else len(runs.graph.edges),
        performance=performance,
    )


def _checked(circuit: Any) -> Circuit:
    """A circuit whose edges, if it has any, are tuples."""
    parts = [] if isinstance(circuit, str) or not isinstance(circuit, Iterable) else list(circuit)
    if parts and all(isinstance(part, str) for part in parts):
        return parts
    if not parts or any(isinstance(part, str) or not isinstance(part, Sequence) or len(part) != 2 for part in parts):
        raise ReflowlensError(
            "a circuit is a list of nodes, or of edges (sender, receiver): at least one, and not of both"
        )
    return [(sender, receiver) for sender, receiver in parts]


def _of_nodes(circuit: Circuit) -> bool:
    return isinstance(circuit[0], str)


def _ends(graph: Graph, nodes: bool) -> tuple[Bool[Tensor, "sender receiver"], Bool[Tensor, "sender receiver"]]:
    """The whole model, and a circuit without anything; the embedding belongs to every circuit of nodes."""
    return graph.possible, mask_of(graph, ["embed"] if nodes else [])


def shares_of(values: Float[Tensor, "circuit prompt"]) -> list[float]:
    """Scores of all but the first two, which are the whole model and the empty circuit."""
    for circuit, prompt in (~values.isfinite()).nonzero().tolist():
        raise ReflowlensError(
            f"prompt {prompt}: the metric of a circuit's run is {values[circuit, prompt]:g}: activations overflow in "
            "this prompt, clean or replaced; run the model in float32, or leave it out"
        )
    full, empty, *rest = values.mean(dim=1).double()
    if torch.isclose(full, empty, rtol=1e-5, atol=1e-6):  # up to rounding
        raise ReflowlensError("nothing to explain: the metric is the same when everything is replaced")
    return [float((value - empty) / (full - empty)) for value in rest]
