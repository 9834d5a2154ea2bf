"""Graphs validated: what they predict of interventions, beside what the model does and what random nodes do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from reflowlens.arguments import random_seed, real_number, whole_number
from reflowlens.circuits.attribution.performed.changed_pass import Level
from reflowlens.circuits.attribution.performed.changed_runs import performed
from reflowlens.circuits.attribution.performed.effects import agreement, predicted_changes, relative_size
from reflowlens.circuits.attribution.performed.matched import Matched, instead
from reflowlens.circuits.attribution.performed.performing import Free, change_of, level_of, place_of
from reflowlens.circuits.attribution.traced import traced_of
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

UNITS = ("feature", "neuron")
FACTORS = (-1.0, 0.0, 2.0, 3.0, 4.0, 5.0)
DIFFERENCE = "logit difference"
_EFFECTS = ("predicted", "observed", "control")
_MOST_TARGETS = 512  # features or neurons whose changes are read, those of most influence


@dataclass(frozen=True, eq=False)
class Validation:
    """Predicted and observed effects of a graph's nodes; ``graph.validate`` makes it.

    Attributes:
        rows: an effect a row: ``level`` (``constrained``, ``free``, ``model``), ``node`` (which is set), ``factor``,
            ``target``, ``kind`` (of the target), ``predicted`` (over all paths of the graph), ``observed``, and
            ``control``: what a random matched node does to the target.
        summary: a row a level and kind of target, and one for ``logit difference``: effects on logits less their mean
            over the logits that are targets, which leaves the differences between any two of them. Numbers of ``nodes``
            and ``effects``; ``pearson`` and ``spearman`` of
            predicted and observed effects and the ends of their 95% intervals, nodes resampled; ``slope`` of the
            observed on the predicted; ``control`` and its interval, the Pearson correlation of the prediction with the
            effects of random nodes; ``size``, the mean size of effects over that of random nodes', and its interval.
        of: of which graph.
    """

    rows: pd.DataFrame = field(repr=False)
    summary: pd.DataFrame
    of: str

    def figure(self, kind: str = DIFFERENCE, most: int = 2000) -> Any:
        """Observed against predicted effects on targets of a kind, and against them the effects of random nodes.

        Raises:
            ReflowlensError: no target is of this kind.
        """
        from reflowlens.figures import scatter

        rows = self.rows[self.rows["kind"] == ("logit" if kind == DIFFERENCE else kind)]
        rows = differences(rows) if kind == DIFFERENCE else rows
        if rows.empty:
            there = ", ".join(map(repr, self.summary["kind"].unique()))
            raise ReflowlensError(f"no target is a {kind!r}: there are {there}")
        parts = []
        for level, part in rows.groupby("level", observed=True):
            part = part.sample(min(most, len(part)), random_state=0)
            parts.append(part.assign(effect=part["observed"], of=str(level)))
            parts.append(part.assign(effect=part["control"], of=f"{level}, random nodes"))
        return scatter(
            pd.concat(parts), "predicted", "effect", "of", hover=["of", "node", "factor", "target"],
            title=f"Effects on {kind}s of {self.of}", x_title="predicted effect", y_title="observed effect",
        )  # fmt: skip

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        rows = self.summary.astype(object).itertuples(index=False)
        return titled("Validation", f"of {self.of}", table(list(self.summary.columns), rows))


def validate(
    graph: AttributionGraph,
    n_nodes: int = 32,
    factors: Sequence[float] = FACTORS,
    *,
    free: Free | Sequence[Free] = (False, True, "model"),
    seed: int = 0,
    memory: float | None = None,
) -> Validation:
    """Set nodes to multiples of their activation, one at a time, and compare what changes with what the graph predicts.

    Args:
        n_nodes: features or neurons that are set, of each block as many, those of most influence.
        factors: by which their activations are multiplied; 1 changes nothing and is left out.
        free: what is held meanwhile, one or several as in :func:`~.performing.perform`.
        seed: of the random nodes: for each node another of its block that is not active at its position and writes a
            vector of the same size there (:class:`~.matched.Matched`), and of the resampling.
        memory: bytes for a batch; default: as for :func:`rl.sweep`.

    Returns:
        Effects on all targets that are logits or readouts, and on the 512 features or neurons of most influence that
        lie behind what is set: in a later block, at its position or after it.

    Raises:
        ReflowlensError: fewer than two nodes can be set, factors are no finite numbers or all 1, or as
            :func:`~.performing.perform`.

    Example: ``graph.validate().summary``
    """
    traced = traced_of(graph)
    n_nodes, seed = whole_number(n_nodes, "n_nodes", 2), random_seed(seed)
    levels = [level_of(each) for each in ([free] if isinstance(free, bool | str) else free)]
    if not levels:
        raise ReflowlensError("free must be True, False or 'model', or several of them, got none")
    chosen = strongest(graph, n_nodes)
    if len(chosen) < 2:
        raise ReflowlensError(
            f"a validation needs two nodes at least that can be set, and this graph has {len(chosen)}"
        )
    asked = [{int(number): factor} for number in chosen for factor in _checked_factors(factors)]
    changes = [change_of(graph, each) for each in asked]
    matched = Matched(traced, seed)
    others = {number: matched.draw(place_of(graph, int(number))) for number in chosen}
    controls = [instead(change, others[next(iter(each))]) for each, change in zip(asked, changes, strict=True)]
    predicted = predicted_changes(graph, asked)
    rows = pd.concat(
        [
            _effects(graph, asked, predicted, _changed(graph, [*changes, *controls], level, memory), level)
            for level in levels
        ],
        ignore_index=True,
    )
    return Validation(rows, summarised(rows, seed), graph.of)


def strongest(graph: AttributionGraph, n: int) -> Int[np.ndarray, " chosen"]:
    """Numbers of the active features or neurons of most influence, as many of each block."""
    nodes = graph.nodes
    able = nodes[nodes["kind"].isin(UNITS) & (nodes["activation"] != 0) & (nodes["influence"] > 0)]
    able = able.sort_values("influence", ascending=False, kind="stable")
    place = able.groupby("layer").cumcount()
    return np.sort(able.assign(place=place).sort_values("place", kind="stable").index.to_numpy()[:n])


def _checked_factors(factors: Sequence[float]) -> list[float]:
    given = list(factors) if isinstance(factors, Iterable) and not isinstance(factors, str) else [factors]
    found = [real_number(factor, "a factor") for factor in given]
    if not np.isfinite(found).all():
        raise ReflowlensError(f"a factor must be finite, got {found}")
    found = [factor for factor in found if factor != 1]
    if not found:
        raise ReflowlensError(f"factors names none but 1, which changes nothing: got {factors!r}")
    return found


def _changed(graph: AttributionGraph, changes: Sequence[Any], level: Level, memory: float | None) -> np.ndarray:
    """What changes, of the nodes that are set and of the controls, [2, intervention, node]."""
    values = performed(graph, changes, level, memory).values
    return (values[1:] - values[0]).reshape(2, len(changes) // 2, -1)


def _effects(
    graph: AttributionGraph,
    asked: Sequence[dict[int, float]],
    predicted: np.ndarray,
    changed: np.ndarray,
    level: Level,
) -> pd.DataFrame:
    """A row an intervention and target that lies behind it."""
    read = targets_of(graph)
    source = np.array([next(iter(each)) for each in asked])
    factor = np.array([next(iter(each.values())) for each in asked])
    layer, position = (graph.nodes[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in ("layer", "pos"))
    behind = (layer[read] > layer[source][:, None]) & (position[read] >= position[source][:, None])
    row, column = behind.nonzero()
    target = read[column]
    names = pd.CategoricalDtype(graph.nodes["node"])
    return pd.DataFrame(
        {
            "level": level,
            "node": pd.Categorical.from_codes(source[row], dtype=names),
            "factor": factor[row],
            "target": pd.Categorical.from_codes(target, dtype=names),
            "kind": graph.nodes["kind"].to_numpy()[target],
            "predicted": predicted[row, target],
            "observed": changed[0, row, target],
            "control": changed[1, row, target],
        }
    )


def targets_of(graph: AttributionGraph) -> Int[np.ndarray, " target"]:
    """Numbers of the nodes whose changes are read."""
    nodes = graph.nodes
    units = nodes[nodes["kind"].isin(UNITS)].sort_values("influence", ascending=False, kind="stable")
    at_end = nodes["kind"].isin(("readout", "logit")) | (nodes["target"] > 0)
    return np.union1d(units.index[:_MOST_TARGETS], np.flatnonzero(at_end))


def summarised(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a level and kind of target."""
    found = []
    for level, of_level in rows.groupby("level", sort=False):
        kinds = dict(list(of_level.groupby("kind", sort=False)))
        if "logit" in kinds and kinds["logit"]["target"].nunique() > 1:
            kinds[DIFFERENCE] = differences(kinds["logit"])
        for kind, part in kinds.items():
            node = part["node"].cat.codes.to_numpy()
            predicted, observed, control = (part[name].to_numpy() for name in _EFFECTS)
            agrees, random = agreement(predicted, observed, node, seed), agreement(predicted, control, node, seed)
            size, low, high = relative_size(observed, control, node, seed)
            counts = {"level": level, "kind": kind, "nodes": len(np.unique(node)), "effects": len(part)}
            beside = {"control": random.pearson, "control_low": random.pearson_low, "control_high": random.pearson_high}
            found.append(counts | asdict(agrees) | beside | {"size": size, "size_low": low, "size_high": high})
    return pd.DataFrame(found)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Effects on several targets less their mean over them."""
    effects = rows[list(_EFFECTS)]
    return rows.assign(**(effects - effects.groupby([rows["node"], rows["factor"]], observed=True).transform("mean")))
